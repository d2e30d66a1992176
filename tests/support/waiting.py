"""Ways to wait for a fact: the only place of the test suite that sleeps.

A test that sleeps hopes; a test that waits on a row, a lock or a log line knows. Each function here polls,
and when its patience ends, it says what it waited for and what it saw last.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from psycopg2 import extensions

T = TypeVar("T")

POLL_INTERVAL = 0.02
"""Seconds between two looks: short against every promise we test (1 s or more), long against one look."""

PATIENCE = 15.0
"""Seconds a waiter waits unless told: far more than a fact needs, as two busy cores may run four workers."""


LOCKS = (
    "(SELECT l.* FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
    " WHERE d.datname = current_database()) AS locks"
)
"""The locks of the asking connection's database: pg_locks shows the whole server's, other tests' among them."""


def eventually(
    fact: Callable[[], T | None],
    timeout: float = PATIENCE,
    why: str = "the awaited fact",
    *,
    ignoring: tuple[type[Exception], ...] = (),
) -> T:
    """Return the first truthy value of `fact`, or fail saying `why` and the last value seen.

    `ignoring` names exceptions that only mean "not yet", such as a table which does not exist so far; all
    others pass through at once. The fact is looked at once more after the time is up, so that a test on a
    machine that stood still for a while does not fail without a look.

    Raises:
        AssertionError: `timeout` seconds went by.
    """
    deadline = time.monotonic() + timeout
    while True:
        is_last_look = time.monotonic() >= deadline
        last: object
        try:
            value = fact()
        except ignoring as error:
            last = error
        else:
            if value:
                return value
            last = value
        if is_last_look:
            raise AssertionError(f"waited {timeout:g} s for {why}; last seen: {last!r}")
        time.sleep(POLL_INTERVAL)


def never(fact: Callable[[], object], during: float, why: str = "the unwanted fact") -> None:
    """Fail as soon as `fact` is truthy within `during` seconds.

    For "it is not run again": give it a little more than the time in which the wrong thing would happen.

    Raises:
        AssertionError: the fact came true.
    """
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < during:
        value = fact()
        if value:
            raise AssertionError(f"{why} came true after {elapsed:.2f} s: {value!r}")
        time.sleep(POLL_INTERVAL)


def wait_for_row(
    conn: extensions.connection,
    sql: str,
    params: Sequence[Any] = (),
    timeout: float = PATIENCE,
    why: str | None = None,
) -> tuple[Any, ...]:
    """Return the first row of the query as soon as it has one.

    Raises:
        AssertionError: no row came within `timeout` seconds.
        ValueError: the connection is not in autocommit mode.
    """
    _require_autocommit(conn)

    def first_row() -> tuple[Any, ...] | None:
        with conn.cursor() as cursor:
            cursor.execute(sql, params)
            row: tuple[Any, ...] | None = cursor.fetchone()
            return row

    return eventually(first_row, timeout, why or f"a row of {sql!r} with {tuple(params)!r}")


def wait_until_blocked(conn: extensions.connection, pid: int, timeout: float = PATIENCE) -> list[int]:
    """Return the backend pids that block backend `pid`, as soon as it waits for a lock.

    `pid` is a backend's (`pg_backend_pid()`), not a process of ours. With this a race is tested in the order
    that the test chose: the second transaction is known to stand at the lock before the first goes on.

    Raises:
        AssertionError: the backend did not wait for a lock within `timeout` seconds.
        ValueError: the connection is not in autocommit mode: within one transaction, Postgres shows one
            snapshot of pg_stat_activity for ever.
    """
    row = wait_for_row(
        conn,
        "SELECT pg_blocking_pids(pid) FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
        " AND cardinality(pg_blocking_pids(pid)) > 0",
        (pid,),
        timeout,
        f"backend {pid} to wait for a lock",
    )
    blockers: list[int] = row[0]
    return blockers


def database_time(conn: extensions.connection) -> datetime:
    """Return the database's own clock, to compare with instants that rows carry."""
    with conn.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        row = cursor.fetchone()
    assert row is not None
    instant: datetime = row[0]
    return instant


def _require_autocommit(conn: extensions.connection) -> None:
    if not conn.autocommit:
        raise ValueError(
            "wait on an autocommit connection (the `observer` fixture): this one would hold a transaction"
        )
