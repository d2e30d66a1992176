"""Time bounds for background statements, so that one tenant's lock delays nobody else's recovery."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cloacina_celery.store.database import Cursor, Database

LOCK_TIMEOUT_MS = 1000
STATEMENT_TIMEOUT_MS = 30_000


@contextmanager
def bounded_transaction(database: Database) -> Iterator[Cursor]:
    """Lend a transaction whose statements give up on a lock after a second.

    Raises:
        LockNotAvailable: somebody held a lock for longer than that.
    """
    with database.transaction() as cursor:
        bound(cursor)
        yield cursor


def bound(cursor: Cursor) -> None:
    """Bound the statements of the transaction that is open on the cursor."""
    cursor.execute(
        f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}; SET LOCAL statement_timeout = {STATEMENT_TIMEOUT_MS}"
    )
