"""Promises of the waiting helpers."""

from __future__ import annotations

import threading
from itertools import count
from typing import TYPE_CHECKING

import pytest

from tests.support.databases import connect
from tests.support.waiting import database_time, eventually, never, wait_for_row, wait_until_blocked

if TYPE_CHECKING:
    from psycopg2 import extensions


def test_eventually_returns_the_first_truthy_value() -> None:
    numbers = count(-2)
    assert eventually(lambda: max(next(numbers), 0)) == 1


def test_eventually_says_why_and_what_it_saw_last() -> None:
    with pytest.raises(AssertionError, match=r"waited 0\.05 s for the moon; last seen: \[\]"):
        eventually(list, 0.05, "the moon")


def test_eventually_looks_once_even_without_patience() -> None:
    assert eventually(lambda: "there", 0) == "there"


def test_an_exception_passes_through_unless_it_means_not_yet() -> None:
    answers: list[object] = [OSError("not yet"), OSError("not yet"), "now"]

    def answer() -> object:
        value = answers.pop(0)
        if isinstance(value, Exception):
            raise value
        return value

    with pytest.raises(OSError, match="not yet"):
        eventually(answer)
    assert eventually(answer, ignoring=(OSError,)) == "now"


def test_never_fails_as_soon_as_the_fact_is_true() -> None:
    numbers = count(-2)
    with pytest.raises(AssertionError, match="a second run came true after"):
        never(lambda: max(next(numbers), 0), 10, "a second run")
    never(lambda: False, 0.05)


def test_a_row_is_waited_for(observer: extensions.connection, database_url: str) -> None:
    started_at = database_time(observer)
    assert wait_for_row(observer, "SELECT clock_timestamp() >= %s", (started_at,)) == (True,)
    with pytest.raises(AssertionError, match="backend 0 to wait for a lock"):
        wait_until_blocked(observer, 0, 0.05)
    observer.autocommit = False
    with pytest.raises(ValueError, match="autocommit"):
        wait_for_row(observer, "SELECT 1")


def test_a_blocked_backend_is_seen_with_its_blocker(
    observer: extensions.connection, database_url: str
) -> None:
    holder, waiter = connect(database_url), connect(database_url)
    try:
        with holder.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(7)")

        def wait_for_the_lock() -> None:
            with waiter.cursor() as cursor:
                cursor.execute("SELECT pg_advisory_lock(7)")

        thread = threading.Thread(target=wait_for_the_lock)
        thread.start()
        assert wait_until_blocked(observer, waiter.info.backend_pid) == [holder.info.backend_pid]
        with holder.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_unlock(7)")
        thread.join()
    finally:
        holder.close()
        waiter.close()
