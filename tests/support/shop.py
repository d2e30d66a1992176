"""The Celery app of the acceptance tests: durable tasks that fail, hang, die and write on demand.

Configured by its environment's CLOACINA_* variables alone, so that a worker process and a test process import
the same thing; in a test process take it from the `shop` fixture, which imports it under the test's
own environment.
"""

from __future__ import annotations

import os
import signal

from celery import Celery
from sqlalchemy import text

from cloacina_celery import Cloacina, RetryPolicy
from tests.support import shop_tables
from tests.support.brokers import configure_queues
from tests.support.databases import connect
from tests.support.waiting import eventually

GATE_PATIENCE = 300.0
"""Seconds a task waits at its gate: longer than any test, so that none ends by itself meanwhile."""

QUICK = RetryPolicy(max_attempts=3, initial_delay=0.1, backoff="fixed", jitter=False)
"""Three runs, a tenth of a second apart: exact enough to count on."""

DATABASE_URL = os.environ["CLOACINA_DATABASE_URL"]
"""Read once: in a test process the variable is there only while this module is imported."""

app = Celery("shop", broker=os.environ["CLOACINA_BROKER_URL"])
configure_queues(app)
cloacina = Cloacina(app, database_url=DATABASE_URL)


@cloacina.task(name="shop.add", retry=QUICK, max_recoveries=3)
def add(x: int, y: int) -> int:
    """Return the sum."""
    return x + y


@cloacina.task(name="shop.boom", retry=QUICK, max_recoveries=3)
def boom(message: str) -> None:
    """Raise ValueError with this message, each time."""
    raise ValueError(message)


@cloacina.task(name="shop.flaky", retry=QUICK, max_recoveries=3)
def flaky(failures: int, key: str = "flaky") -> int:
    """Raise OSError on the first `failures` attempts, then return the attempt; each one is in `runs`."""
    attempt = _record(key)
    if attempt <= failures:
        raise OSError(f"attempt {attempt} of {failures} to fail")
    return attempt


@cloacina.task(name="shop.block", retry=QUICK, max_recoveries=3)
def block(key: str) -> int:
    """Record the start in `runs`, wait until the test opens the gate, then return the attempt."""
    attempt = _record(key)
    _wait_at_gate(key)
    return attempt


@cloacina.task(name="shop.poison", retry=QUICK, max_recoveries=3)
def poison(key: str = "poison") -> None:
    """Record the start in `runs`, then kill the process it runs in."""
    _record(key)
    os.kill(os.getpid(), signal.SIGKILL)


@cloacina.task(name="shop.note", retry=QUICK, max_recoveries=3)
def note(words: str) -> None:
    """Write one row to `notes` through the tenant's session."""
    _note(words)


@cloacina.task(name="shop.note_and_block", retry=QUICK, max_recoveries=3)
def note_and_block(words: str, key: str) -> None:
    """Write one row to `notes`, then wait at the gate: kill it there, and the row must not stay."""
    _note(words)
    _record(key)
    _wait_at_gate(key)


@cloacina.task(name="shop.where", retry=QUICK, max_recoveries=3)
def where() -> dict[str, str | None]:
    """Return the search_path and the current schema that the task's session sees."""
    with cloacina.session() as session:
        return {
            "search_path": session.execute(text("SHOW search_path")).scalar_one(),
            "current_schema": session.execute(text("SELECT current_schema()")).scalar_one(),
        }


@app.task(name="shop.plain_add")
def plain_add(x: int, y: int) -> int:
    """Return the sum; a task that the plugin has nothing to do with."""
    return x + y


def _record(key: str) -> int:
    """Write this start to `runs` on a connection of its own, so that it stays whatever happens next."""
    execution = cloacina.current_execution()
    conn = connect(DATABASE_URL)
    try:
        shop_tables.record_run(
            conn,
            cloacina.current_tenant(),
            key,
            execution_id=str(execution.id),
            attempt=execution.attempt,
            is_recovery=execution.is_recovery,
            pid=os.getpid(),
        )
    finally:
        conn.close()
    return int(execution.attempt)


def _wait_at_gate(key: str) -> None:
    tenant = cloacina.current_tenant()
    conn = connect(DATABASE_URL)
    try:
        eventually(
            lambda: shop_tables.gate_is_open(conn, tenant, key),
            GATE_PATIENCE,
            f"the gate {key!r} of {tenant}",
        )
    finally:
        conn.close()


def _note(words: str) -> None:
    with cloacina.session() as session:
        session.execute(
            text("INSERT INTO notes (text, attempt) VALUES (:words, :attempt)"),
            {"words": words, "attempt": cloacina.current_execution().attempt},
        )
