"""The work of a chaos run: one durable task that does, fails, waits, hangs or dies as its order says.

Registered on the app of `make chaos` and on a user's own alike. Configured by the environment, so that the driver
and its workers agree: CHAOS_OUTSIDE (the file that every start appends a line to), CHAOS_APPLICATION (the name that
this run's connections have in Postgres) and CHAOS_DRIVER (the process id whose end is the end of all).
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
import sys
import time
from typing import Any

from sqlalchemy import text

from cloacina_celery import RetryPolicy
from cloacina_celery.store import database

WORK, POISON, NOTE = "chaos.work", "chaos.poison", "chaos.note"

PATIENT = RetryPolicy(max_attempts=1000, initial_delay=0.2, backoff="fixed", jitter=True)
"""No fault of ours may use up a budget: whatever is submitted has to succeed."""

MAX_RECOVERIES = 1000
POISON_RECOVERIES = 2
UNTIL_CANCELLED = 90.0
"""Seconds for which a task that shall be cancelled waits for it."""

PR_SET_PDEATHSIG = 1
MAIN_PID = os.getpid()
"""The worker's main process: its children are forked after this module was imported."""


def join(app: Any) -> None:
    """Have an app do a chaos run's work in this process."""
    database.APPLICATION_NAME = os.environ.get("CHAOS_APPLICATION", database.APPLICATION_NAME)
    # A process that does not end shall say why, and one that crashes as ordered leaves no core behind.
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    if str(os.getppid()) == os.environ.get("CHAOS_DRIVER"):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":
            # A driver that is killed ends no processes; the kernel does it then.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    cloacina = app.cloacina

    @cloacina.task(name=WORK, retry=PATIENT, max_recoveries=MAX_RECOVERIES, shared=False)
    def work(order: dict[str, Any]) -> int:
        """Carry out an order: leave a line outside, write one effect inside, and what else it says."""
        return _carry_out(cloacina, order)

    @cloacina.task(name=POISON, retry=PATIENT, max_recoveries=POISON_RECOVERIES, shared=False)
    def poison(order: dict[str, Any]) -> int:
        """Carry out an order that kills its process each time, and must end as abandoned."""
        return _carry_out(cloacina, order)

    @app.task(name=NOTE, shared=False)
    def note(execution_id: str) -> None:
        """Follow an execution as a plain task: the driver itself takes its messages, and no worker runs it."""


def _carry_out(cloacina: Any, order: dict[str, Any]) -> int:
    execution = cloacina.current_execution()
    assert execution is not None
    _leave_line(execution.id, execution.attempt, order["tenant"])
    if execution.attempt == 1 or order["is_poison"]:
        _die(order["dies"])
    if order["holds_gil"]:
        # PyDLL, unlike CDLL, does not let go of the lock around the call.
        ctypes.PyDLL(None).usleep(int(order["holds_gil"] * 1_000_000))
    if order["hangs"] and execution.attempt == 1:
        time.sleep(UNTIL_CANCELLED)
    if order["is_cancelled"]:
        _wait_until_cancelled(execution)
    time.sleep(order["before"])
    with cloacina.session() as session:
        session.execute(
            text("INSERT INTO chaos_effects (execution_id, attempt, tenant) VALUES (:id, :attempt, :tenant)"),
            {"id": execution.id, "attempt": execution.attempt, "tenant": order["tenant"]},
        )
    time.sleep(order["after"])
    if order["dies"] == "written" and execution.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if execution.failures < order["failures"]:
        raise OSError(f"failure {execution.failures + 1} of {order['failures']} that were ordered")
    return int(execution.attempt)


def _die(way: str | None) -> None:
    if way == "claimed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif way == "main" and os.getppid() == MAIN_PID:
        os.kill(MAIN_PID, signal.SIGKILL)
    elif way == "exit":
        os._exit(1)
    elif way == "segfault":
        ctypes.string_at(0)


def _wait_until_cancelled(execution: Any) -> None:
    until = time.monotonic() + UNTIL_CANCELLED
    while time.monotonic() < until and not execution.is_cancelled:
        time.sleep(0.2)


def _leave_line(execution_id: str, attempt: int, tenant: str) -> None:
    # One small append is atomic, and it stays whatever becomes of the transaction.
    line = f"{execution_id} {attempt} {tenant} {os.getpid()} {time.time()}\n"
    file = os.open(os.environ["CHAOS_OUTSIDE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)
