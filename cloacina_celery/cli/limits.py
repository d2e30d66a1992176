"""``cloacina tenant limit``: what a tenant may use at a time."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from cloacina_celery.cli.output import command
from cloacina_celery.cli.tenants import by_option, tenant
from cloacina_celery.core.limits import Limits, parse_rate
from cloacina_celery.errors import SettingsError
from cloacina_celery.plugin.app import Cloacina
from cloacina_celery.plugin.tenant_limits import UNCHANGED, Unchanged

NONE = "none"


@tenant.command("limit")
@click.argument("name")
@click.option(
    "--max-concurrent-tasks", "tasks", metavar="N", help="Tasks at once, on all workers; or 'none'."
)
@click.option("--rate", metavar="RATE", help="Starts: 10/s, 600/m, 5/h; or 'none'.")
@click.option("--pause", is_flag=True, help="Start nothing more.")
@click.option("--resume", is_flag=True, help="Go on after --pause.")
@click.option("--weight", metavar="N", help="Turns for each of a tenant of weight 1, from 1 to 100.")
@by_option
@command
def tenant_limit(
    cloacina: Cloacina,
    name: str,
    tasks: str | None,
    rate: str | None,
    pause: bool,
    resume: bool,
    weight: str | None,
    by: str | None,
    as_json: bool,
) -> None:
    """Show or change a tenant's limits and weight; workers obey within seconds. What is not given stays as it is."""
    if pause and resume:
        raise SettingsError("--pause and --resume at once: say one of the two")
    if tasks is None and rate is None and weight is None and not pause and not resume:
        if by is not None:
            raise SettingsError("--by is who changes a limit, and none is given to change")
        found = cloacina.tenants.limits(name)
    else:
        found = cloacina.tenants.limit(
            name,
            max_concurrent_tasks=None
            if tasks == NONE
            else _number("--max-concurrent-tasks", tasks, f" or {NONE!r}"),
            max_rate=UNCHANGED if rate is None else None if rate == NONE else parse_rate(rate),
            paused=pause if pause or resume else UNCHANGED,
            weight=_number("--weight", weight),
            by=by,
        )
    click.echo(
        json.dumps({"name": name, **asdict(found)}) if as_json else f"tenant {name}: {_in_words(found)}"
    )


def _number(option: str, given: str | None, or_else: str = "") -> int | Unchanged:
    if given is None:
        return UNCHANGED
    if not given.isdecimal():
        raise SettingsError(f"{option} is a whole number{or_else}, not {given!r}")
    return int(given)


def _in_words(limits: Limits) -> str:
    words = []
    if limits.max_concurrent_tasks is not None:
        words.append(f"at most {limits.max_concurrent_tasks} tasks at once")
    if limits.max_rate is not None:
        words.append(f"at most {limits.max_rate:g} starts per second")
    if limits.is_paused:
        words.append("paused")
    if limits.weight != 1:
        words.append(f"weight {limits.weight}")
    return ", ".join(words) or "no limits"
