"""``cloacina schema ...``: migrate the schemas and see their revisions."""

from __future__ import annotations

from typing import Any

import click

from cloacina_celery.cli.output import command, fail, print_rows, progress
from cloacina_celery.core.tenant import CATALOG_SCHEMA
from cloacina_celery.core.words import counted
from cloacina_celery.errors import UnknownTenant
from cloacina_celery.plugin.app import Cloacina
from cloacina_celery.store import catalog, fleet, migrate


@click.group()
def schema() -> None:
    """Migrate the schemas and see their revisions."""


@schema.command("migrate")
@click.argument("tenants", nargs=-1)
@click.option(
    "--jobs", default=1, show_default=True, type=click.IntRange(1, 64), help="So many schemas at a time."
)
@click.option("--canary", help="The tenant that goes first; if it fails, nothing else is touched.")
@click.option("--recheck", is_flag=True, help="Look into each schema, whatever the catalog says of it.")
@command
def schema_migrate(
    cloacina: Cloacina, tenants: tuple[str, ...], jobs: int, canary: str | None, recheck: bool, as_json: bool
) -> None:
    """Bring the catalog and the named tenants (all, if none is named) to this version's revision.

    A tenant that fails does not stop the others, and running this again does the rest.
    """
    database = cloacina.database
    migrate.migrate_catalog(database)
    everybody = catalog.names(database)
    names = list(tenants) or (everybody if recheck else fleet.stale(database))
    if canary is not None and canary not in everybody:
        raise UnknownTenant(canary)
    rows: list[dict[str, Any]] = []
    with progress("migrating", len(names), as_json=as_json) as advance:
        for done in fleet.migrate_all(database, names, jobs=jobs, canary=canary):
            at = migrate.TENANT_HEAD if done.error is None else None
            rows.append({"schema": done.tenant, "revision": at, "error": done.error})
            advance()
    failures = sum(row["error"] is not None for row in rows)
    untouched = len(set(names) - {row["schema"] for row in rows})
    print_rows(
        as_json,
        sorted(rows, key=lambda row: (row["error"] is not None, row["schema"])),
        ("schema", "revision", "error"),
        empty=f"nothing to do: up to date are the catalog and {counted(len(everybody), 'tenant')}",
    )
    if failures:
        others = counted(untouched, "other was", "others were")
        rest = f"; it was the canary, and {others} not touched" if untouched else ""
        fail(f"{failures} of {counted(len(rows), 'schema')} not migrated{rest}")


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
        fail(
            "a schema is not at the wanted revision: run `celery -A <app> cloacina schema migrate --recheck`"
        )
