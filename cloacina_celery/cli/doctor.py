"""``cloacina doctor`` and ``probe``: what is wrong with the system, and whether this host's worker is stuck."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict

import click

from cloacina_celery.cli.output import command, fail, print_rows
from cloacina_celery.core.health import Grade
from cloacina_celery.core.words import counted
from cloacina_celery.errors import DatabaseUnavailable
from cloacina_celery.plugin.app import Cloacina
from cloacina_celery.plugin.doctor import examine
from cloacina_celery.store import workers


@click.command("doctor")
@command
def doctor(cloacina: Cloacina, as_json: bool) -> None:
    """Look at settings, database, privileges, clocks, broker, workers, tenants and queues; say what to do.

    Exit 1 if something is wrong; what is only to be minded is shown and does not count.
    """
    findings = [asdict(finding) for finding in examine(cloacina.parts.kernel)]
    print_rows(as_json, findings, ("grade", "what", "found", "do"), empty="nothing was looked at")
    wrong = sum(finding["grade"] is Grade.WRONG for finding in findings)
    if wrong:
        fail(f"{counted(wrong, 'thing is', 'things are')} wrong")


@click.command("probe")
@click.option("--node", help="The worker's node name, as celery@host, where several run on this host.")
@click.option(
    "--silent-for",
    "patience",
    type=click.FloatRange(min=1),
    help="Seconds without a sign. By default the lease's.",
)
@command
def probe(cloacina: Cloacina, node: str | None, patience: float | None, as_json: bool) -> None:
    """Exit 1 if this host's worker has not started, or has given no sign for too long; for an orchestrator's probes.

    While the database does not answer nothing is known, and it exits with 0: restarting workers would not mend that.
    """
    patience = cloacina.settings.lease_ttl if patience is None else patience
    try:
        with cloacina.database.statement() as cursor:
            found = workers.newest_on(cursor, host=socket.gethostname(), node=node)
    except DatabaseUnavailable as error:
        click.echo(
            json.dumps({"alive": None, "error": str(error)}) if as_json else f"nothing is known: {error}"
        )
        return
    is_alive = found is not None and found.silent_for <= patience
    if as_json:
        silent_for = None if found is None else found.silent_for
        click.echo(json.dumps({"alive": is_alive, "worker": found and found.name, "silent_for": silent_for}))
    elif found is not None and is_alive:
        click.echo(f"{found.name} gave its last sign {found.silent_for:.1f} s ago")
    if found is None:
        fail(f"no worker of this host ({node or socket.gethostname()}) is in the register")
    if not is_alive:
        fail(f"{found.name} has given no sign for {found.silent_for:.0f} s: it is dead or stuck, restart it")
