"""Chords: the last member to settle finds all the others settled, exactly once."""

from __future__ import annotations

from dataclasses import dataclass

from cloacina_celery.core.lifecycle import State
from cloacina_celery.store.database import Cursor
from cloacina_celery.store.statements import Statement


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A settled member of a chord's header."""

    execution_id: str
    state: State
    result: str | None
    error: str | None


_OPEN = Statement(
    "open_chord",
    "INSERT INTO {s}.cloacina_chords (group_id, size) VALUES ($1::text, $2::int) ON CONFLICT DO NOTHING",
)
_LOCK = Statement("lock_chord", "SELECT pg_advisory_xact_lock(hashtextextended('{s}' || $1::text, 0))")
_COMPLETE = Statement(
    "complete_chord",
    """
    UPDATE {s}.cloacina_chords AS c SET completed_at = now()
    WHERE c.group_id = $1::text AND c.completed_at IS NULL AND c.size <= (
        SELECT count(*) FROM {s}.cloacina_executions
        WHERE group_id = $1::text AND state NOT IN ('pending', 'running'))
    RETURNING c.size
    """,
)
_PARTS = Statement(
    "chord_parts",
    """
    SELECT id, state, result, error FROM {s}.cloacina_executions
    WHERE group_id = $1::text ORDER BY group_index, id
    """,
)


def open_(cursor: Cursor, tenant: str, group_id: str, size: int) -> None:
    """Enter how many members a chord waits for."""
    _OPEN.execute(cursor, tenant, group_id, size)


def complete(cursor: Cursor, tenant: str, group_id: str) -> list[Part] | None:
    """Return all parts to exactly one caller: the one whose settlement was the last.

    Call it after the settling write and in its transaction. The advisory lock makes the members' settlements
    queue up, so that each sees those before it and two last ones cannot both miss the other.
    """
    _LOCK.execute(cursor, tenant, group_id)
    _COMPLETE.execute(cursor, tenant, group_id)
    if cursor.fetchone() is None:
        return None
    _PARTS.execute(cursor, tenant, group_id)
    return [Part(execution_id=i, state=State(s), result=r, error=e) for i, s, r, e in cursor.fetchall()]
