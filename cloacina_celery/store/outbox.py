"""The outbox: messages of plain tasks that follow a settlement, committed with it and kept until they are sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cloacina_celery.store.database import Cursor
from cloacina_celery.store.statements import Statement


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """A plain task's message that waits to be sent."""

    id: int
    task: str
    message: str


_PUT = Statement(
    "put_letter", "INSERT INTO {s}.cloacina_outbox (task, message) VALUES ($1::text, $2::text) RETURNING id"
)
_LOCK = Statement(
    "lock_letters",
    """
    SELECT id, task, message FROM {s}.cloacina_outbox
    WHERE created_at < now() - make_interval(secs => $2::float8)
    ORDER BY id LIMIT $1::int FOR UPDATE SKIP LOCKED
    """,
)
_REMOVE = Statement("remove_letters", "DELETE FROM {s}.cloacina_outbox WHERE id = ANY($1::bigint[])")


def put(cursor: Cursor, tenant: str, task: str, message: str) -> int:
    """Keep a message with the transaction, and return its id."""
    _PUT.execute(cursor, tenant, task, message)
    row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def lock(cursor: Cursor, tenant: str, *, limit: int, older_than: float) -> list[Letter]:
    """Lock messages that have waited for so many seconds, oldest first: whoever was to send them has died or failed."""
    _LOCK.execute(cursor, tenant, limit, older_than)
    return [Letter(id=i, task=task, message=message) for i, task, message in cursor.fetchall()]


def remove(cursor: Cursor, tenant: str, ids: Sequence[int]) -> None:
    """Forget messages that were sent."""
    _REMOVE.execute(cursor, tenant, list(ids))
