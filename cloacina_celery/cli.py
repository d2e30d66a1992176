"""``celery -A app cloacina ...``: tenants, schemas and executions for people (tables) and programs (--json)."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cloacina_celery.core.lifecycle import State
from cloacina_celery.core.tenant import CATALOG_SCHEMA
from cloacina_celery.errors import CloacinaError, SettingsError, UnknownTenant
from cloacina_celery.plugin.app import Cloacina
from cloacina_celery.store import catalog, migrate, workers
from cloacina_celery.store.queries import Event, Execution

WIDE = 200
"""Columns of a table that goes into a pipe: there is no screen to fit, and an id cut short is of no use."""


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)


def _command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the plugin of the app and ``--json``; errors of ours end it with one line and exit code 1."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
    @click.pass_context
    @functools.wraps(function)
    def wrapper(context: click.Context, *args: Any, **kwargs: Any) -> Any:
        try:
            app = context.obj.app
            cloacina = getattr(app, "cloacina", None)
            if cloacina is None:
                raise SettingsError(f"app {app.main!r} has no plugin: write Cloacina(app, database_url=...)")
            return function(cloacina, *args, **kwargs)
        except CloacinaError as error:
            raise click.ClickException(str(error)) from None

    return wrapper


def _print(as_json: bool, rows: Sequence[dict[str, Any]], columns: Iterable[str], *, empty: str) -> None:
    if as_json:
        click.echo(json.dumps(rows, default=_plain, indent=2))
        return
    if not rows:
        click.echo(empty)
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    _console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return str(value)


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else str(value)


@click.group()
def cloacina() -> None:
    """Durable tasks of many tenants: look at them and act on them."""


@cloacina.group()
def tenant() -> None:
    """Create, list and drop tenants."""


@tenant.command("create")
@click.argument("name")
@click.option("--legacy", is_flag=True, help="Allow 'public', an existing single-tenant deployment's schema.")
@_command
def tenant_create(cloacina: Cloacina, name: str, legacy: bool, as_json: bool) -> None:
    """Create a tenant: schema, tables and queue. An existing one is left as it is."""
    is_new = cloacina.tenants.create(name, legacy=legacy)
    if as_json:
        click.echo(json.dumps({"name": name, "created": is_new}))
    else:
        click.echo(f"tenant {name} {'created' if is_new else 'exists already'}")


@tenant.command("list")
@_command
def tenant_list(cloacina: Cloacina, as_json: bool) -> None:
    """List all tenants."""
    rows = [asdict(one) for one in cloacina.tenants.list()]
    _print(as_json, rows, ("name", "is_legacy", "created_at"), empty="no tenants yet")


@tenant.command("drop")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask: all data in the tenant's schema is lost.")
@_command
def tenant_drop(cloacina: Cloacina, name: str, yes: bool, as_json: bool) -> None:
    """Drop a tenant with everything in its schema."""
    if not catalog.exists(cloacina.database, name):
        raise UnknownTenant(name)
    if not yes:
        click.confirm(f"Drop tenant {name} and all data in its schema?", abort=True, err=True)
    cloacina.tenants.drop(name)
    click.echo(json.dumps({"name": name, "dropped": True}) if as_json else f"tenant {name} dropped")


@cloacina.group()
def schema() -> None:
    """Migrate the schemas and see their revisions."""


@schema.command("migrate")
@click.argument("tenants", nargs=-1)
@_command
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
    _print(
        as_json,
        rows,
        ("schema", "revision", "error"),
        empty="the catalog is up to date; there are no tenants yet",
    )
    if failures:
        raise CloacinaError(f"{failures} of {len(rows)} schemas were not migrated")


@schema.command("status")
@_command
def schema_status(cloacina: Cloacina, as_json: bool) -> None:
    """Show each schema's revision beside the one this version works with; exit 1 if any differs."""
    with cloacina.database.statement() as cursor:
        found = [(CATALOG_SCHEMA, migrate.revision_of(cursor, CATALOG_SCHEMA), migrate.CATALOG_HEAD)]
    found += [(name, at, migrate.TENANT_HEAD) for name, at in catalog.revisions(cloacina.database)]
    rows = [
        {"schema": name, "revision": at, "wanted": wanted, "ok": at == wanted} for name, at, wanted in found
    ]
    _print(as_json, rows, ("schema", "revision", "wanted", "ok"), empty="nothing there yet")
    if not all(row["ok"] for row in rows):
        raise CloacinaError(
            "a schema is not at the wanted revision: run `celery -A <app> cloacina schema migrate`"
        )


@cloacina.group()
def execution() -> None:
    """Look at executions, cancel and requeue them."""


@execution.command("list")
@click.argument("tenant")
@click.option("--state", type=click.Choice([str(state) for state in State]), help="Only those in this state.")
@click.option("--task", help="Only those of this task.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(min=1))
@_command
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
    _print(as_json, rows, columns, empty=f"no such executions in {tenant}")


@execution.command("show")
@click.argument("tenant")
@click.argument("execution_id")
@_command
def execution_show(cloacina: Cloacina, tenant: str, execution_id: str, as_json: bool) -> None:
    """Tell an execution's whole life, in order and in words."""
    found = cloacina.executions(tenant).get(execution_id)
    events = cloacina.executions(tenant).history(execution_id)
    if as_json:
        click.echo(
            json.dumps({**asdict(found), "events": [asdict(e) for e in events]}, default=_plain, indent=2)
        )
        return
    click.echo(_headline(found))
    for event in events:
        click.echo(f"  {_cell(event.at)}  {tell(event)}")
    if found.error and found.error.get("traceback") and found.state is not State.SUCCEEDED:
        click.echo(f"\n{found.error['traceback']}")


def _headline(found: Execution) -> str:
    return (
        f"{found.task} [{found.id}] of {found.tenant}: {found.state} after {found.attempt} attempts "
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
@_command
def execution_cancel(cloacina: Cloacina, tenant: str, execution_id: str, as_json: bool) -> None:
    """End an execution that has not ended."""
    found = cloacina.executions(tenant).cancel(execution_id)
    click.echo(json.dumps(asdict(found), default=_plain) if as_json else _headline(found))


@execution.command("requeue")
@click.argument("tenant")
@click.argument("execution_id")
@_command
def execution_requeue(cloacina: Cloacina, tenant: str, execution_id: str, as_json: bool) -> None:
    """Make a failed, abandoned or cancelled execution run again."""
    found = cloacina.executions(tenant).requeue(execution_id)
    click.echo(json.dumps(asdict(found), default=_plain) if as_json else _headline(found))


@cloacina.command("sweep")
@_command
def sweep(cloacina: Cloacina, as_json: bool) -> None:
    """Sweep all tenants now: recover what is orphaned, send out what is due or stranded."""
    touched = cloacina.sweep()
    click.echo(
        json.dumps({"touched": touched}) if as_json else f"{touched} executions sent out again or ended"
    )


@cloacina.command("status")
@_command
def status(cloacina: Cloacina, as_json: bool) -> None:
    """Count each tenant's executions by state, and list the workers."""
    rows: list[dict[str, Any]] = []
    for one in cloacina.tenants.list():
        counts = cloacina.executions(one.name).count()
        rows.append({"tenant": one.name, **{str(state): counts.get(state, 0) for state in State}})
    with cloacina.database.statement() as cursor:
        alive = [asdict(worker) for worker in workers.alive(cursor)] if rows else []
    if as_json:
        click.echo(json.dumps({"tenants": rows, "workers": alive}, default=_plain, indent=2))
        return
    _print(False, rows, ("tenant", *map(str, State)), empty="no tenants yet")
    click.echo()
    _print(
        False, alive, ("worker_id", "name", "tenants", "started_at", "heartbeat_at"), empty="no worker runs"
    )
