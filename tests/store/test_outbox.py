"""The outbox: what was committed is there until it is removed, and two reapers send different letters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloacina_celery.store import outbox

if TYPE_CHECKING:
    from cloacina_celery.store.database import Cursor, Database


def test_letters_are_taken_oldest_first_and_only_once_they_have_waited(cursor: Cursor, tenant: str) -> None:
    ids = [outbox.put(cursor, tenant, "plain", f"[{n}]") for n in range(3)]
    assert outbox.lock(cursor, tenant, limit=9, older_than=60) == []
    found = outbox.lock(cursor, tenant, limit=2, older_than=-1)
    assert [(letter.id, letter.message) for letter in found] == [(ids[0], "[0]"), (ids[1], "[1]")]


def test_a_letter_that_was_removed_is_gone(cursor: Cursor, tenant: str) -> None:
    ids = [outbox.put(cursor, tenant, "plain", "[]") for _ in range(2)]
    outbox.remove(cursor, tenant, ids[:1])
    assert [letter.id for letter in outbox.lock(cursor, tenant, limit=9, older_than=-1)] == ids[1:]


def test_a_letter_goes_with_its_transaction(database: Database, cursor: Cursor, tenant: str) -> None:
    class Undone(Exception):
        pass

    try:
        with database.transaction() as lent:
            outbox.put(lent, tenant, "plain", "[]")
            raise Undone
    except Undone:
        pass
    assert outbox.lock(cursor, tenant, limit=9, older_than=-1) == []


def test_two_reapers_take_different_letters(database: Database, cursor: Cursor, tenant: str) -> None:
    ids = [outbox.put(cursor, tenant, "plain", "[]") for _ in range(2)]
    with database.transaction() as first, database.transaction() as second:
        assert [one.id for one in outbox.lock(first, tenant, limit=1, older_than=-1)] == ids[:1]
        assert [one.id for one in outbox.lock(second, tenant, limit=9, older_than=-1)] == ids[1:]
