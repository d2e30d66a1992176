"""``cloacina schema ...``: migrate the schemas and see their revisions."""

from __future__ import annotations

import click

from cloacina_celery.cli.output import command, print_rows
from cloacina_celery.core.tenant import CATALOG_SCHEMA
from cloacina_celery.errors import CloacinaError
from cloacina_celery.plugin.app import Cloacina
from cloacina_celery.store import catalog, migrate


@click.group()
def schema() -> None:
    """Migrate the schemas and see their revisions."""


@schema.command("migrate")
@click.argument("tenants", nargs=-1)
@command
def schema_migrate(cloacina: Cloacina, tenants: tuple[str, ...], as_json: bool) -> None:
    """Bring the catalog and the named tenants (all, if none is named) to this version's revision."""
    migrate.migrate_catalog(cloacina.database)
    failures, rows = 0, []
    for name in tenants or catalog.names(cloacina.database):
        try:
            catalog.migrate_tenant(cloacina.database, name)
            rows.append({"schema": name, "revision": migrate.TENANT_HEAD, "error": None})
        except CloacinaError as error:
            failures += 1
            rows.append({"schema": name, "revision": None, "error": str(error)})
    print_rows(
        as_json,
        rows,
        ("schema", "revision", "error"),
        empty="the catalog is up to date; there are no tenants yet",
    )
    if failures:
        raise CloacinaError(f"{failures} of {len(rows)} schemas were not migrated")


@schema.command("status")
@command
def schema_status(cloacina: Cloacina, as_json: bool) -> None:
    """Show each schema's revision beside the one this version works with; exit 1 if any differs."""
    with cloacina.database.statement() as cursor:
        found = [(CATALOG_SCHEMA, migrate.revision_of(cursor, CATALOG_SCHEMA), migrate.CATALOG_HEAD)]
    found += [(name, at, migrate.TENANT_HEAD) for name, at in catalog.revisions(cloacina.database)]
    rows = [
        {"schema": name, "revision": at, "wanted": wanted, "ok": at == wanted} for name, at, wanted in found
    ]
    print_rows(as_json, rows, ("schema", "revision", "wanted", "ok"), empty="nothing there yet")
    if not all(row["ok"] for row in rows):
        raise CloacinaError(
            "a schema is not at the wanted revision: run `celery -A <app> cloacina schema migrate`"
        )
