"""``cloacina tenant isolate``: bring tenants that exist to the level of roles."""

from __future__ import annotations

import click

from cloacina_celery.cli.output import command, fail, print_rows
from cloacina_celery.core.tenant import LEGACY_TENANT
from cloacina_celery.core.words import counted
from cloacina_celery.errors import CloacinaError
from cloacina_celery.plugin.app import Cloacina


@click.command("isolate")
@click.argument("tenants", nargs=-1)
@command
def tenant_isolate(cloacina: Cloacina, tenants: tuple[str, ...], as_json: bool) -> None:
    """Give the named tenants (all but public, if none is named) a role of their own, which owns their tables."""
    rows: list[dict[str, object]] = []
    for name in tenants or [t.name for t in cloacina.tenants.list() if t.name != LEGACY_TENANT]:
        try:
            cloacina.tenants.isolate(name)
            rows.append({"tenant": name, "isolated": True, "error": None})
        except CloacinaError as error:
            rows.append({"tenant": name, "isolated": False, "error": str(error)})
    print_rows(as_json, rows, ("tenant", "isolated", "error"), empty="there are no tenants yet")
    failures = sum(not row["isolated"] for row in rows)
    if failures:
        fail(f"{failures} of {counted(len(rows), 'tenant')} not isolated")
