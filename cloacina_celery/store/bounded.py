"""Time bounds for background statements, so that one tenant's lock delays nobody else's recovery."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cloacina_celery.store.database import Cursor, Database

LOCK_TIMEOUT_MS = 1000
LOOK_TIMEOUT_MS = 200
"""For statements that wait for no row, only for somebody's DDL: due rows of the other tenants start within a second."""

STATEMENT_TIMEOUT_MS = 30_000


@contextmanager
def bounded_transaction(database: Database, *, lock_timeout_ms: int = LOCK_TIMEOUT_MS) -> Iterator[Cursor]:
    """Lend a transaction whose statements give up on a lock, after a second unless told.

    Raises:
        LockNotAvailable: somebody held a lock for longer than that.
    """
    with database.transaction() as cursor:
        bound(cursor, lock_timeout_ms=lock_timeout_ms)
        yield cursor


def bound(cursor: Cursor, *, lock_timeout_ms: int = LOCK_TIMEOUT_MS) -> None:
    """Bound the statements of the transaction that is open on the cursor."""
    cursor.execute(
        f"SET LOCAL lock_timeout = {lock_timeout_ms}; SET LOCAL statement_timeout = {STATEMENT_TIMEOUT_MS}"
    )
