"""``cloacina sweep`` and ``cloacina status``: all tenants at once."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from cloacina_celery.cli.output import command, plain, print_rows
from cloacina_celery.core.lifecycle import State
from cloacina_celery.core.words import counted
from cloacina_celery.plugin.app import Cloacina
from cloacina_celery.store import workers


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
    """Count each tenant's executions by state, and list the workers."""
    rows: list[dict[str, Any]] = []
    for one in cloacina.tenants.list():
        counts = cloacina.executions(one.name).count()
        is_paused = cloacina.tenants.limits(one.name).is_paused
        standing = f"{one.state}, paused" if is_paused else str(one.state)
        numbers = {str(state): counts.get(state, 0) for state in State}
        rows.append({"tenant": one.name, "is": standing, **numbers})
    with cloacina.database.statement() as cursor:
        alive = [asdict(worker) for worker in workers.alive(cursor)] if rows else []
    if as_json:
        click.echo(json.dumps({"tenants": rows, "workers": alive}, default=plain, indent=2))
        return
    print_rows(False, rows, ("tenant", "is", *map(str, State)), empty="no tenants yet")
    click.echo()
    for worker in alive:
        worker["tenants"] = ", ".join(worker["tenants"])
    print_rows(
        False, alive, ("worker_id", "name", "tenants", "started_at", "heartbeat_at"), empty="no worker runs"
    )
