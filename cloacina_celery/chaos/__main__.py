"""Run thousands of executions over ten tenants under faults, and check the history.

Real broker, database, workers and beats. The faults are drawn with the printed seed; the exit code is the
checker's: 0 where nothing was lost, doubled, settled twice, misplaced or stuck.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import psycopg2
from rich.console import Console
from rich.table import Table
from sqlalchemy import make_url

from cloacina_celery import devservers
from cloacina_celery.chaos import queues
from cloacina_celery.chaos.checker import FINDINGS, MESSAGE, RUN, Verdict, check, percentile
from cloacina_celery.chaos.drive import Run
from cloacina_celery.chaos.faults import FAULTS
from cloacina_celery.chaos.fleet import Fleet
from cloacina_celery.chaos.history import History
from cloacina_celery.chaos.plan import SHARES, Plan

QUICK = {"lease_ttl": 3.0, "heartbeat_interval": 1.0, "stranded_after": 3.0, "sweep_interval": 2.0}
"""Settings with which a short run has time for what takes the default ones half a minute."""

DRAIN_PATIENCE = 15.0
SLOWEST = 5
"""Recoveries that are listed below the table."""

LISTED = 50
"""Findings of one kind that are listed."""

SHOWN = 10
"""Executions whose history is printed where something was found."""


def main(arguments: list[str] | None = None) -> int:
    """Run, print and return the exit code."""
    chosen = _parser().parse_args(arguments)
    # A file's lines shall be whole, whoever reads them.
    console = Console(width=None if sys.stdout.isatty() else 120)
    random = Random(chosen.seed)
    folder = Path(tempfile.mkdtemp(prefix="cloacina-chaos-"))
    console.print(f"seed {chosen.seed}; logs in {folder}", highlight=False)
    with (
        _servers(chosen.broker, folder, console) as (server_url, broker_url, servers_folder),
        _database(server_url) as database_url,
    ):
        is_clean = _run(chosen, random, console, folder, database_url, broker_url, servers_folder)
    if is_clean and not chosen.keep:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        console.print(f"logs are in {folder}", highlight=False)
    return 0 if is_clean else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cloacina_celery.chaos", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=120, help="time in which faults strike (%(default)s)"
    )
    parser.add_argument("--executions", type=int, default=1000, help="how many are submitted (%(default)s)")
    parser.add_argument("--tenants", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=3, help="processes of two children each (%(default)s)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="drawn unless given")
    parser.add_argument("--every", type=float, default=6, help="mean seconds between faults (%(default)s)")
    parser.add_argument("--calm", type=float, default=1, help="seconds before the first fault (%(default)s)")
    parser.add_argument(
        "--broker", choices=("redis", "env"), default="redis",
        help="redis: the environment's if it is one, else an embedded one; env: whatever CLOACINA_BROKER_URL names",
    )  # fmt: skip
    parser.add_argument(
        "--fault",
        action="append",
        choices=[fault.kind for fault in FAULTS],
        help="only these kinds; repeatable",
    )
    parser.add_argument(
        "--kind", action="append", choices=list(SHARES), help="only these executions; repeatable"
    )
    parser.add_argument(
        "--quick", action="store_true", help="short leases and sweeps instead of the defaults"
    )
    parser.add_argument(
        "--app", default="cloacina_celery.chaos.app:app", help="another app module (%(default)s)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the logs of a clean run too")
    return parser


@contextmanager
def _servers(broker: str, folder: Path, console: Console) -> Iterator[tuple[str, str, Path | None]]:
    """Yield the URLs of the servers, and the embedded ones' folder where both are embedded."""
    database_url = os.environ.get("CLOACINA_DATABASE_URL", "")
    broker_url = os.environ.get("CLOACINA_BROKER_URL", "")
    if broker == "env" and not broker_url:
        raise SystemExit("--broker env: set CLOACINA_BROKER_URL")
    if broker == "redis" and not broker_url.startswith("redis"):
        broker_url = ""
    if database_url and broker_url:
        console.print("servers are the environment's: they are not restarted", highlight=False)
        yield database_url, broker_url, None
        return
    own = folder / "servers"
    servers = devservers.start(own)
    try:
        both = not database_url and not broker_url
        yield database_url or servers.database_url, broker_url or servers.broker_url, own if both else None
    finally:
        devservers.stop(own)


@contextmanager
def _database(server_url: str) -> Iterator[str]:
    """Yield the URL of a database of this run's own, dropped at the end."""
    name = f"cloacina_chaos_{secrets.token_hex(4)}"
    _execute(server_url, f"CREATE DATABASE {name}")
    try:
        yield (
            make_url(server_url)
            .set(drivername="postgresql+psycopg2", database=name)
            .render_as_string(hide_password=False)
        )
    finally:
        _execute(server_url, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def _execute(server_url: str, statement: str) -> None:
    url = make_url(server_url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = psycopg2.connect(url)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(statement)
    connection.close()


def _run(
    chosen: argparse.Namespace, random: Random, console: Console, folder: Path, database_url: str,
    broker_url: str, servers_folder: Path | None,
) -> bool:  # fmt: skip
    # The names are this run's own: others may use the same broker.
    mark = secrets.token_hex(3)
    tenants = [f"tenant_{mark}_{number}" for number in range(chosen.tenants)]
    control_queue = f"cloacina_control_{mark}"
    settings: dict[str, object] = {**(QUICK if chosen.quick else {}), "control_queue": control_queue}
    outside = folder / "outside.txt"
    os.environ.update(
        CLOACINA_DATABASE_URL=database_url, CLOACINA_BROKER_URL=broker_url, CHAOS_OUTSIDE=str(outside),
        CHAOS_SETTINGS=json.dumps(settings), CHAOS_DRIVER=str(os.getpid()), PYTHONUNBUFFERED="1",
    )  # fmt: skip
    module = importlib.import_module(chosen.app.partition(":")[0])
    fleet = Fleet(chosen.app, tenants, chosen.workers, os.environ, folder)
    run = Run(
        module=module, plan=Plan.draw(random, tenants, chosen.executions, chosen.kind), fleet=fleet, random=random,
        database_url=database_url, lease_ttl=module.cloacina.settings.lease_ttl, console=console,
        servers_folder=servers_folder,
    )  # fmt: skip
    began = time.monotonic()
    try:
        run.prepare()
        fleet.start()
        fleet.wait_ready()
        run.play(
            seconds=chosen.seconds, every=chosen.every, calm=chosen.calm,
            faults=tuple(chosen.fault) if chosen.fault else None,
        )  # fmt: skip
        console.print("faults are over; waiting for the rest", highlight=False)
        run.settle()
        _drain(run)
        fleet.shut_down()
        history = History.read(run, outside)
    finally:
        fleet.kill_all()
        queues.delete(module.app, [*tenants, control_queue])
        module.cloacina.database.dispose()
    verdict = check(history)
    _print(console, verdict, history, run, time.monotonic() - began, chosen.seed)
    return verdict.is_clean


def _drain(run: Run) -> None:
    """Let the workers take what is left in the queues: a late message may do harm as well."""
    deadline = time.monotonic() + DRAIN_PATIENCE
    while any(queues.depth(run.app, tenant) for tenant in run.plan.tenants) and time.monotonic() < deadline:
        run.fleet.mend()
        time.sleep(0.1)


def _print(console: Console, verdict: Verdict, history: History, run: Run, seconds: float, seed: int) -> None:
    table = Table(title=f"chaos, seed {seed}, {seconds:.0f} s", show_header=False, min_width=50)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("executions", f"{verdict.executions:,}")
    for state, number in sorted(verdict.states.items()):
        table.add_row(f"  {state}", f"{number:,}")
    table.add_row("submissions with a lost answer, made again", f"{run.unknown:,}")
    table.add_row("transactions rolled back", f"{len(history.ghosts):,}")
    table.add_row("attempts", f"{verdict.attempts:,}")
    table.add_row("recoveries", f"{verdict.recoveries:,}")
    table.add_row("failures that a fault caused", f"{verdict.failures_by_faults:,}", end_section=True)
    table.add_row("faults", f"{len(history.faults):,}")
    for kind, number in sorted(Counter(fault.kind for fault in history.faults).items()):
        table.add_row(f"  {kind}", f"{number:,}")
    table.add_section()
    for kind in FINDINGS:
        number = verdict.count(kind)
        table.add_row(kind, f"[red]{number}[/]" if number else "0")
    table.add_section()
    for what in (RUN, MESSAGE):
        times = [one.seconds for one in verdict.recovered if one.what == what]
        for title, percent in (("p50", 50), ("p99", 99), ("max", 100)):
            table.add_row(f"recovery time of a lost {what}, {title}", f"{percentile(times, percent):.2f} s")
    console.print(table)
    for one in verdict.recovered[: -SLOWEST - 1 : -1]:
        console.print(f"{one.seconds:6.2f} s after {one.cause}: {one.execution_id}", highlight=False)
    if verdict.is_clean:
        return
    for kind in FINDINGS:
        found = [finding for finding in verdict.findings if finding.kind == kind]
        if found:
            console.print(f"{kind}:", style="red")
        for finding in found[:LISTED]:
            console.print(f"  {finding.execution_id} {finding.what}", highlight=False)
        if len(found) > LISTED:
            console.print(f"  and {len(found) - LISTED} more", highlight=False)
    for id_ in list(dict.fromkeys(finding.execution_id for finding in verdict.findings))[:SHOWN]:
        events = [event for event in history.events if event.execution_id == id_]
        if not events:
            continue
        planned = history.planned.get(id_)
        console.print(f"\n{id_} in {events[0].tenant} ({planned.kind if planned else 'not planned'})")
        told = [(event.at, f"{event.kind} (attempt {event.attempt}, worker {event.worker_id}) {event.reason or ''}")
                for event in events]  # fmt: skip
        told += [(line.at, f"user code of attempt {line.attempt} in process {line.pid}")
                 for line in history.lines if line.execution_id == id_]  # fmt: skip
        for at, what in sorted(told):
            console.print(f"  {at:%H:%M:%S.%f} {what}", highlight=False)
    console.print(f"\nto run the same plan and faults again: --seed {seed}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
