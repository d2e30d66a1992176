"""``cloacina tenant limit``: what a tenant may use at a time."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from cloacina_celery.cli.output import command
from cloacina_celery.cli.tenants import tenant
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
@click.option("--pause/--resume", "paused", default=None, help="Start nothing more; go on.")
@command
def tenant_limit(
    cloacina: Cloacina, name: str, tasks: str | None, rate: str | None, paused: bool | None, as_json: bool
) -> None:
    """Show or change a tenant's limits; workers obey within seconds. What is not given stays as it is."""
    if tasks is None and rate is None and paused is None:
        found = cloacina.tenants.limits(name)
    else:
        found = cloacina.tenants.limit(
            name,
            max_concurrent_tasks=_tasks(tasks),
            max_rate=UNCHANGED if rate is None else None if rate == NONE else parse_rate(rate),
            paused=UNCHANGED if paused is None else paused,
        )
    click.echo(
        json.dumps({"name": name, **asdict(found)}) if as_json else f"tenant {name}: {_in_words(found)}"
    )


def _tasks(given: str | None) -> int | Unchanged | None:
    if given is None:
        return UNCHANGED
    if given == NONE:
        return None
    if not given.isdecimal():
        raise SettingsError(f"--max-concurrent-tasks is a whole number or {NONE!r}, not {given!r}")
    return int(given)


def _in_words(limits: Limits) -> str:
    words = []
    if limits.max_concurrent_tasks is not None:
        words.append(f"at most {limits.max_concurrent_tasks} tasks at once")
    if limits.max_rate is not None:
        words.append(f"at most {limits.max_rate:g} starts per second")
    if limits.is_paused:
        words.append("paused")
    return ", ".join(words) or "no limits"
