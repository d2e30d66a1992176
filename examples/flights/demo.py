"""The demo's story: submit every month, kill a worker in the middle, and see the totals come out right."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cloacina_celery import cloacina
from examples.flights.board import Board
from examples.flights.report import account_of, flights_in, table_of, verdict
from examples.flights.tasks import Base, load_month
from examples.flights.totals import Months, months_in_file, names_of_carriers
from examples.processes import CeleryProcess

TIMEOUT = 300.0
"""Seconds without the awaited thing after which the demo gives up."""

KILL_AT = 0.25
"""The share of the months that are loaded when a worker is killed."""


class DemoFailed(Exception):
    """The demo did not come to what it is to show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """An attempt that a worker was in the middle of when it was killed."""

    tenant: str
    execution_id: str
    attempt: int

    def is_found(self) -> bool:
        """Tell whether the loss has been noticed and the task sent out again."""
        return cloacina.executions(self.tenant).get(self.execution_id).recoveries > 0

    def has_a_successor(self) -> bool:
        """Tell whether another worker has taken the task up."""
        return cloacina.executions(self.tenant).get(self.execution_id).attempt > self.attempt


def run() -> bool:
    """Play the whole story; tell whether every total is right and something was recovered."""
    begun = time.monotonic()
    console = Console()
    expected = {f"tenant_{carrier.lower()}": months for carrier, months in months_in_file().items()}
    first, *_, last = expected
    total = sum(flights_in(months) for months in expected.values())
    console.print(f"To load: {total:,} flights of {len(expected)} carriers, each a tenant.")
    begin_anew(list(expected))

    logs = Path(tempfile.mkdtemp(prefix="cloacina-flights-"))
    with ExitStack() as cleanup:
        board = Board(console, {tenant: len(months) for tenant, months in expected.items()})

        def start(name: str, *arguments: str) -> CeleryProcess:
            process = CeleryProcess.start(name, arguments, log=logs / f"{name}.log")
            cleanup.callback(process.stop)
            command = process.command.replace(",".join(expected), f"{first},...,{last}")
            board.say(f"[bold]{name}[/] has pid {process.pid}: {command}")
            return process

        def start_worker(name: str) -> CeleryProcess:
            options = ("--concurrency=2", f"--hostname={name}@%h", "--loglevel=INFO")
            return start(name, "worker", "-Q", ",".join(expected), *options)

        def wait_for(wish: str, is_so: Callable[[], bool]) -> None:
            deadline = time.monotonic() + TIMEOUT
            board.update()
            while not is_so():
                if not survivor.is_alive() or time.monotonic() > deadline:
                    raise DemoFailed(f"waited in vain for {wish}; see the logs in {logs}")
                time.sleep(0.1)
                board.update()

        board.say(f"The logs are in {logs}.")
        start("beat", "beat", f"--schedule={logs / 'celerybeat-schedule'}", "--pidfile=")
        victim, survivor = start_worker("worker-1"), start_worker("worker-2")
        submit(expected)
        with board:
            wait_for("a quarter of the months", lambda: board.share >= KILL_AT)
            lost = kill_in_mid_task(victim, list(expected))
            killed_at = time.monotonic()
            board.say(f"[red]kill -9 {victim.pid}[/]: {victim.name} was in the middle of {len(lost)} tasks")
            for attempt in lost:
                wait_for(f"the loss in {attempt.tenant} to be found", attempt.is_found)
                seconds = time.monotonic() - killed_at
                board.say(f"[green]sent out again[/] in {attempt.tenant}, {seconds:.1f} s after the kill")
            start_worker("worker-3")
            for attempt in lost:
                wait_for(f"the second start in {attempt.tenant}", attempt.has_a_successor)
                seconds = time.monotonic() - killed_at
                board.say(f"[green]started again[/] in {attempt.tenant}, {seconds:.1f} s after the kill")
            wait_for("all months", lambda: board.share >= 1)

    names = names_of_carriers()
    accounts = [account_of(tenant, names, months) for tenant, months in expected.items()]
    console.print(table_of(accounts))
    is_right, conclusion = verdict(accounts)
    console.print(f"{conclusion} It took {time.monotonic() - begun:.0f} s.")
    return is_right


def begin_anew(tenants: list[str]) -> None:
    """Remove what an earlier run has left, and make the tenants and their tables."""
    left = {tenant.name for tenant in cloacina.tenants.list()}
    for tenant in left & set(tenants):
        cloacina.tenants.drop(tenant, now=True)
    for tenant in tenants:
        cloacina.tenants.create(tenant)
        with cloacina.session(tenant) as session:
            Base.metadata.create_all(session.connection())


def submit(expected: dict[str, Months]) -> None:
    """Submit one durable task for each carrier and month, January of all carriers first."""
    for month in range(1, 13):
        for tenant, months in expected.items():
            if month in months:
                carrier = tenant.removeprefix("tenant_").upper()
                load_month.apply_async((carrier, month), tenant=tenant)


def kill_in_mid_task(worker: CeleryProcess, tenants: list[str]) -> list[Run]:
    """Kill the worker at a moment when it certainly runs tasks, and return these."""
    for _ in range(100):
        # Frozen first: what is seen to run now is what dies, however short the tasks are.
        worker.freeze()
        time.sleep(0.1)  # what had left for Postgres arrives
        lost = runs_of(worker, tenants)
        if lost:
            worker.kill()
            return lost
        worker.thaw()
        time.sleep(0.1)
    raise DemoFailed(f"{worker.name} never ran a task; see its log {worker.log}")


def runs_of(worker: CeleryProcess, tenants: list[str]) -> list[Run]:
    """List the attempts that a worker has begun and not ended."""
    found = []
    for tenant in tenants:
        executions = cloacina.executions(tenant)
        for execution in executions.list(state="running"):
            last = executions.history(execution.id)[-1]
            if last.worker is not None and worker.name in last.worker:
                found.append(Run(tenant=tenant, execution_id=execution.id, attempt=execution.attempt))
    return found
