"""``cloacina execution ...``: look at executions, cancel and requeue them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from cloacina_celery.cli.output import cell, command, plain, print_rows
from cloacina_celery.core.lifecycle import State
from cloacina_celery.core.tenancy import TenantState
from cloacina_celery.core.words import counted
from cloacina_celery.plugin.app import Cloacina
from cloacina_celery.store.queries import Event, Execution


@click.group()
def execution() -> None:
    """Look at executions, cancel and requeue them."""


@execution.command("list")
@click.argument("tenant")
@click.option("--state", type=click.Choice([str(state) for state in State]), help="Only those in this state.")
@click.option("--task", help="Only those of this task.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(min=1))
@command
def execution_list(
    cloacina: Cloacina, tenant: str, state: str | None, task: str | None, limit: int, as_json: bool
) -> None:
    """List a tenant's executions, newest first."""
    rows = [asdict(one) for one in cloacina.executions(tenant).list(state=state, task=task, limit=limit)]
    columns = (
        "id",
        "task",
        "state",
        "attempt",
        "failures",
        "recoveries",
        "submitted_at",
        "run_at",
        "settled_at",
    )
    print_rows(as_json, rows, columns, empty=f"no such executions in {tenant}")


@execution.command("show")
@click.argument("tenant")
@click.argument("execution_id")
@command
def execution_show(cloacina: Cloacina, tenant: str, execution_id: str, as_json: bool) -> None:
    """Tell an execution's whole life, in order and in words."""
    found = cloacina.executions(tenant).get(execution_id)
    events = cloacina.executions(tenant).history(execution_id)
    if as_json:
        click.echo(
            json.dumps({**asdict(found), "events": [asdict(e) for e in events]}, default=plain, indent=2)
        )
        return
    click.echo(_headline(found))
    for event in events:
        click.echo(f"  {cell(event.at)}  {tell(event)}")
    if found.state is State.PENDING:
        click.echo(f"  {'':19}  {_waiting(cloacina, found)}")
    if found.error and found.error.get("traceback") and found.state is not State.SUCCEEDED:
        click.echo(f"\n{found.error['traceback']}")


def _waiting(cloacina: Cloacina, found: Execution) -> str:
    """Say what a pending execution waits for."""
    of = cloacina.tenants.get(found.tenant)
    if of.state is TenantState.SUSPENDED:
        return f"it waits: tenant {found.tenant} is suspended, and nothing of it starts until it is resumed"
    if cloacina.tenants.limits(found.tenant).is_paused:
        return f"it waits: tenant {found.tenant} is paused (`tenant limit {found.tenant} --resume`)"
    return f"it waits for its time, {cell(found.run_at)}, and then for a worker's free slot"


def _headline(found: Execution) -> str:
    return (
        f"{found.task} [{found.id}] of {found.tenant}: {found.state} after {counted(found.attempt, 'attempt')} "
        f"({found.failures} failed, {found.recoveries} recovered of at most {found.max_recoveries}, "
        f"{found.releases} given back)"
    )


def tell(event: Event) -> str:
    """Say one event in words."""
    worker = f" by {event.worker}" if event.worker else ""
    reason = f": {event.reason}" if event.reason else ""
    error = f" with {_error(event.error)}" if event.error else ""
    match event.kind:
        case "submitted":
            return "submitted"
        case "claimed":
            return f"attempt {event.attempt} started{worker}"
        case "succeeded":
            return f"attempt {event.attempt} succeeded{worker}"
        case "retry_scheduled":
            return f"attempt {event.attempt} failed{error}; it is tried again {event.reason}"
        case "failed":
            return f"attempt {event.attempt} failed{error}; it is not tried again{reason}"
        case "recovered":
            return f"attempt {event.attempt} was lost{worker}{reason}; it is sent out again"
        case "abandoned":
            return f"attempt {event.attempt} was lost{worker}; given up{reason}"
        case "released":
            return f"attempt {event.attempt} was given back{worker}{reason}"
        case "cancelled":
            # The worker that may be in the event is the one that ran it, not the one who cancelled it.
            return f"cancelled{reason}"
        case "requeued":
            return f"made pending again{reason}"
        case "rung_again":
            return f"its message was sent again{reason}"
        case _:
            return f"{event.kind}{worker}{reason}"


def _error(error: dict[str, Any]) -> str:
    message = error.get("exc_message")
    return (
        f"{error.get('exc_type')}({', '.join(map(str, message)) if isinstance(message, list) else message})"
    )


@execution.command("cancel")
@click.argument("tenant")
@click.argument("execution_id")
@click.option("--terminate", is_flag=True, help="End the process that runs it, too.")
@command
def execution_cancel(
    cloacina: Cloacina, tenant: str, execution_id: str, terminate: bool, as_json: bool
) -> None:
    """End an execution that has not ended."""
    found = cloacina.executions(tenant).cancel(execution_id, terminate=terminate)
    click.echo(json.dumps(asdict(found), default=plain) if as_json else _headline(found))


@execution.command("requeue")
@click.argument("tenant")
@click.argument("execution_id")
@command
def execution_requeue(cloacina: Cloacina, tenant: str, execution_id: str, as_json: bool) -> None:
    """Make a failed, abandoned or cancelled execution run again."""
    found = cloacina.executions(tenant).requeue(execution_id)
    click.echo(json.dumps(asdict(found), default=plain) if as_json else _headline(found))
