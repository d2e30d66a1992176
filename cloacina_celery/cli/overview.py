"""``cloacina sweep`` and ``cloacina status``: all tenants at once."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from cloacina_celery.cli.output import command, fail, plain, print_rows
from cloacina_celery.core.lifecycle import State
from cloacina_celery.core.words import counted
from cloacina_celery.plugin.app import Cloacina
from cloacina_celery.store import workers
from cloacina_celery.store.overview import Overview, overviews


@click.command("sweep")
@command
def sweep(cloacina: Cloacina, as_json: bool) -> None:
    """Sweep all tenants now: recover what is orphaned, send out what is due or stranded."""
    touched = cloacina.sweep()
    click.echo(
        json.dumps({"touched": touched})
        if as_json
        else f"{counted(touched, 'execution')} sent out again or ended"
    )


@click.command("status")
@command
def status(cloacina: Cloacina, as_json: bool) -> None:
    """Count each tenant's executions by state, tell how old the oldest are, and list the workers.

    Exit 1 if a tenant could not be looked at; the others are shown.
    """
    found = list(overviews(cloacina.database))
    rows = [{"tenant": one.tenant.name, "is": _standing(cloacina, one), **facts_of(one)} for one in found]
    with cloacina.database.statement() as cursor:
        alive = [asdict(worker) for worker in workers.alive(cursor)] if rows else []
    if as_json:
        click.echo(json.dumps({"tenants": rows, "workers": alive}, default=plain, indent=2))
    else:
        everybody = {"tenant": f"all {len(rows)}", **_sums(rows)}
        print_rows(
            False,
            [*rows, *([everybody] if len(rows) > 1 else [])],
            ("tenant", "is", *FACTS),
            empty="no tenants yet",
        )
        click.echo()
        for worker in alive:
            worker["tenants"] = ", ".join(worker["tenants"])
        columns = ("worker_id", "name", "tenants", "started_at", "silent_for", "swept_for")
        print_rows(False, alive, columns, empty="no worker runs")
    untold = [one for one in found if one.trouble]
    for one in untold:
        click.echo(f"tenant {one.tenant.name} could not be looked at: {one.trouble}", err=True)
    if untold:
        fail(f"{counted(len(untold), 'tenant')} of {len(rows)} could not be looked at")


FACTS = (*map(str, State), "oldest_due", "oldest_running", "last_sweep")
"""The columns of `facts_of` that a table has."""


def facts_of(one: Overview) -> dict[str, Any]:
    """Return what a look at a tenant has shown, by column; what is not known is ``None``. Ages are seconds."""
    is_known = one.trouble is None
    counts = {str(state): one.counts.get(state, 0) if is_known else None for state in State}
    return {
        **counts,
        "due": one.due if is_known else None,
        "oldest_due": one.oldest_due,
        "oldest_running": one.oldest_running,
        "overdue": one.overdue if is_known else None,
        "letters": one.letters if is_known else None,
        "last_sweep": one.last_sweep,
        "trouble": one.trouble,
    }


def _standing(cloacina: Cloacina, one: Overview) -> str:
    is_paused = cloacina.tenants.limits(one.tenant.name).is_paused
    return f"{one.tenant.state}, paused" if is_paused else str(one.tenant.state)


def _sums(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up the tenants' counts, and take the greatest of their ages."""
    sums: dict[str, Any] = {str(state): sum(row[str(state)] or 0 for row in rows) for state in State}
    for age in ("oldest_due", "oldest_running", "last_sweep"):
        sums[age] = max((row[age] for row in rows if row[age] is not None), default=None)
    return sums
