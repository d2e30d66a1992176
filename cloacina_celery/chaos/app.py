"""The app of a chaos run: one durable task that does, fails, waits or dies as its order says.

Configured by the environment alone, so that the driver and its workers import the same thing: the two URLs,
CHAOS_SETTINGS (JSON, the plugin's settings), CHAOS_OUTSIDE (the file that every start appends a line to) and
CHAOS_DRIVER (the process id whose end is the end of all).
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
from typing import Any

from celery import Celery
from sqlalchemy import text

from cloacina_celery import Cloacina, RetryPolicy

SETTINGS: dict[str, Any] = json.loads(os.environ.get("CHAOS_SETTINGS", "{}"))
MAIN_PID = os.getpid()
"""The worker's main process: its children are forked after this module was imported."""

PATIENT = RetryPolicy(max_attempts=1000, initial_delay=0.2, backoff="fixed", jitter=True)
"""No fault of ours may use up a budget: whatever is submitted has to succeed."""

MAX_RECOVERIES = 1000
POISON_RECOVERIES = 2

PR_SET_PDEATHSIG = 1

app = Celery("chaos", broker=os.environ["CLOACINA_BROKER_URL"])
app.conf.update(broker_connection_retry_on_startup=True, broker_connection_max_retries=None)
cloacina = Cloacina(app, database_url=os.environ["CLOACINA_DATABASE_URL"], **SETTINGS)

faulthandler.register(signal.SIGUSR2, all_threads=True)
"""A process that does not end shall say why."""

if sys.platform == "linux" and str(os.getppid()) == os.environ.get("CHAOS_DRIVER"):
    # A driver that is killed ends no processes; the kernel does it then.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@cloacina.task(name="chaos.work", retry=PATIENT, max_recoveries=MAX_RECOVERIES)
def work(order: dict[str, Any]) -> int:
    """Carry out an order: leave a line outside, write one effect inside, and what else it says."""
    return _work(order)


@cloacina.task(name="chaos.poison", retry=PATIENT, max_recoveries=POISON_RECOVERIES)
def poison(order: dict[str, Any]) -> int:
    """Carry out an order that kills its process each time, and must end as abandoned."""
    return _work(order)


def _work(order: dict[str, Any]) -> int:
    execution = cloacina.current_execution()
    assert execution is not None
    _leave_line(execution.id, execution.attempt, order["tenant"])
    dies = order["dies"] if execution.attempt == 1 or order["is_poison"] else None
    if dies == "claimed":
        os.kill(os.getpid(), signal.SIGKILL)
    if dies == "main" and os.getppid() == MAIN_PID:
        os.kill(MAIN_PID, signal.SIGKILL)
    time.sleep(order["before"])
    with cloacina.session() as session:
        session.execute(
            text("INSERT INTO chaos_effects (execution_id, attempt, tenant) VALUES (:id, :attempt, :tenant)"),
            {"id": execution.id, "attempt": execution.attempt, "tenant": order["tenant"]},
        )
    time.sleep(order["after"])
    if dies == "written":
        os.kill(os.getpid(), signal.SIGKILL)
    if execution.failures < order["failures"]:
        raise OSError(f"failure {execution.failures + 1} of {order['failures']} that were ordered")
    return execution.attempt


def _leave_line(execution_id: str, attempt: int, tenant: str) -> None:
    # One small append is atomic, and it stays whatever becomes of the transaction.
    line = f"{execution_id} {attempt} {tenant} {os.getpid()} {time.time()}\n"
    file = os.open(os.environ["CHAOS_OUTSIDE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)
