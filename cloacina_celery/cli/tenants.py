"""``cloacina tenant ...``: create, look at, suspend, drain and drop tenants."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from cloacina_celery.cli.output import TRY_AGAIN, cell, command, fail, plain, print_rows
from cloacina_celery.cli.overview import FACTS, facts_of
from cloacina_celery.errors import TenantStateRefused
from cloacina_celery.plugin.app import Cloacina
from cloacina_celery.store import workers
from cloacina_celery.store.overview import overview, overviews
from cloacina_celery.store.tenancy import Left

FOR_EVER = float("inf")


@click.group()
def tenant() -> None:
    """Create, look at, suspend, drain, move and drop tenants."""


def by_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a verb ``--by``: who is entered in the audit."""
    return click.option("--by", help="Who does it, for the audit. By default your user and host.")(function)


def say(as_json: bool, name: str, words: str, **facts: Any) -> None:
    """Print what a verb did, in words or as JSON."""
    click.echo(json.dumps({"name": name, **facts}, default=plain) if as_json else f"tenant {name} {words}")


@tenant.command("create")
@click.argument("name")
@click.option("--legacy", is_flag=True, help="Allow 'public', an existing single-tenant deployment's schema.")
@by_option
@command
def tenant_create(cloacina: Cloacina, name: str, legacy: bool, by: str | None, as_json: bool) -> None:
    """Create a tenant: schema, tables and queue. An existing one is left as it is."""
    is_new = cloacina.tenants.create(name, legacy=legacy, by=by)
    say(as_json, name, "created" if is_new else "exists already", created=is_new)


@tenant.command("list")
@click.option("--removed", is_flag=True, help="Also what is left of those that were removed.")
@command
def tenant_list(cloacina: Cloacina, removed: bool, as_json: bool) -> None:
    """List all tenants with what they have: counts by state, ages of the oldest, and the schema's revision."""
    seen = {one.tenant.name: facts_of(one) for one in overviews(cloacina.database)}
    rows = [{**asdict(one), **seen.get(one.name, {})} for one in cloacina.tenants.list(with_removed=removed)]
    columns = ("name", "state", "epoch", "revision", *FACTS, "trouble")
    print_rows(as_json, rows, columns, empty="no tenants yet")


@tenant.command("show")
@click.argument("name")
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(min=1), help="Steps of the audit."
)
@command
def tenant_show(cloacina: Cloacina, name: str, limit: int, as_json: bool) -> None:
    """Show a tenant: its limits, what it has, who serves it, and what was done to it by whom."""
    found = cloacina.tenants.get(name)
    seen = facts_of(overview(cloacina.database, found)) if found.standing.exists else {}
    limits = asdict(cloacina.tenants.limits(name)) if found.standing.exists else {}
    serving = _workers_of(cloacina, name)
    audit = [asdict(entry) for entry in cloacina.tenants.audit(name, limit=limit)]
    facts = {**asdict(found), **limits, **seen}
    if as_json:
        click.echo(json.dumps({**facts, "workers": serving, "audit": audit}, default=plain, indent=2))
        return
    for column, value in {**facts, "workers": ", ".join(serving) or "none"}.items():
        click.echo(f"{column + ':':22}{cell(value)}")
    click.echo()
    columns = ("at", "epoch", "verb", "step", "operator", "database_user", "detail")
    print_rows(False, audit, columns, empty="nothing was done to it since there is an audit")


@tenant.command("suspend")
@click.argument("name")
@click.option("--give-back", is_flag=True, help="What runs is pending again; its effects are rolled back.")
@click.option("--refuse-submits", is_flag=True, help="Submissions raise SubmitRefused; else their rows wait.")
@by_option
@command
def tenant_suspend(
    cloacina: Cloacina, name: str, give_back: bool, refuse_submits: bool, by: str | None, as_json: bool
) -> None:
    """Let nothing new start. What runs goes on to its end, unless it is given back."""
    is_change = cloacina.tenants.suspend(name, give_back=give_back, refuse_submits=refuse_submits, by=by)
    left = cloacina.tenants.left(name)
    words = f"{'suspended' if is_change else 'is suspended already'}; {_words_of(left)}"
    say(as_json, name, words, suspended=is_change, **asdict(left))


@tenant.command("resume")
@click.argument("name")
@by_option
@command
def tenant_resume(cloacina: Cloacina, name: str, by: str | None, as_json: bool) -> None:
    """Let a suspended or draining tenant work again; what waited is sent, oldest first."""
    is_change = cloacina.tenants.resume(name, by=by)
    say(as_json, name, "resumed" if is_change else "is active already", resumed=is_change)


@tenant.command("drain")
@click.argument("name")
@click.option("--wait", is_flag=True, help="Return only when nothing is left.")
@click.option("--timeout", type=click.FloatRange(min=0), help="Seconds to wait at the most.")
@by_option
@command
def tenant_drain(
    cloacina: Cloacina, name: str, wait: bool, timeout: float | None, by: str | None, as_json: bool
) -> None:
    """Refuse submissions, and let what is there run to its end. Exit 75 if --wait ends with something left."""
    if timeout is not None and not wait:
        raise click.UsageError("--timeout says how long to --wait: say that too")
    left = cloacina.tenants.drain(name, wait=wait, timeout=timeout, progress=_tell, by=by)
    say(as_json, name, f"drains; {_words_of(left)}", **asdict(left))
    if wait and left:
        fail(f"tenant {name} is not drained in time: {left}. It goes on; --wait again", exit_code=TRY_AGAIN)


@tenant.command("drop")
@click.argument("name")
@click.option("--now", is_flag=True, help="Also if executions have not ended; else it drains first.")
@click.option("--timeout", type=click.FloatRange(min=0), help="Seconds to drain at the most.")
@click.option("--yes", is_flag=True, help="Do not ask: all data in the tenant's schema is lost.")
@by_option
@command
def tenant_drop(
    cloacina: Cloacina,
    name: str,
    now: bool,
    timeout: float | None,
    yes: bool,
    by: str | None,
    as_json: bool,
) -> None:
    """Drop a tenant with everything in its schema, and its queue. Exit 75 if --timeout ends with something left."""
    found = cloacina.tenants.get(name)
    if not yes and found.standing.exists:
        click.confirm(f"Drop tenant {name} and all data in its schema?", abort=True, err=True)
    limit = FOR_EVER if timeout is None else timeout
    is_told = False

    def tell(left: Left) -> None:
        nonlocal is_told
        if left and not is_told:
            is_told = True
            click.echo(
                "waiting for what is left to end; --now drops it too, --timeout waits no longer", err=True
            )
        _tell(left)

    try:
        is_change = cloacina.tenants.drop(name, now=now, timeout=limit, progress=tell, by=by)
    except TenantStateRefused as refused:
        left = cloacina.tenants.left(name)
        if not left:
            raise
        if as_json:
            say(as_json, name, "", dropped=False, **asdict(left))
        fail(str(refused), exit_code=TRY_AGAIN)
    say(as_json, name, "dropped" if is_change else "is removed already", dropped=is_change)


@tenant.command("set")
@click.argument("name")
@click.option("--retain-succeeded", type=click.FloatRange(min=0), help="Seconds; 0 is for ever.")
@click.option("--retain-failed", type=click.FloatRange(min=0), help="Seconds; 0 is for ever.")
@click.option(
    "--unset",
    multiple=True,
    type=click.Choice(["retain-succeeded", "retain-failed"]),
    help="Take the app's setting again.",
)
@by_option
@command
def tenant_set(
    cloacina: Cloacina,
    name: str,
    retain_succeeded: float | None,
    retain_failed: float | None,
    unset: tuple[str, ...],
    by: str | None,
    as_json: bool,
) -> None:
    """Give a tenant settings of its own."""
    given = {"retain_succeeded": retain_succeeded, "retain_failed": retain_failed}
    changes: dict[str, float | None] = {column: value for column, value in given.items() if value is not None}
    both = [option for option in unset if option.replace("-", "_") in changes]
    if both:
        raise click.UsageError(f"{both[0]} is set and unset at once: say one of the two")
    if not changes and not unset:
        raise click.UsageError("nothing to set: say --retain-succeeded, --retain-failed or --unset")
    changes.update({option.replace("-", "_"): None for option in unset})
    is_change = cloacina.tenants.set(name, by=by, **changes)
    say(as_json, name, "set" if is_change else "was set so already", set=is_change, **changes)


def _workers_of(cloacina: Cloacina, name: str) -> list[str]:
    with cloacina.database.statement() as cursor:
        return [worker.name for worker in workers.alive(cursor) if name in worker.tenants]


def _tell(left: Left) -> None:
    click.echo(_words_of(left), err=True)


def _words_of(left: Left) -> str:
    return str(left) if left else "nothing is left to run"
