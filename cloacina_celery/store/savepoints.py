"""Savepoints: a part of a transaction that can be undone alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cloacina_celery.store.database import Cursor


@contextmanager
def savepoint(cursor: Cursor) -> Iterator[None]:
    """Undo in the database what the block has done if it raises, and leave the transaction usable. They may nest.

    Its settings (``SET LOCAL``, a role) are undone with it.
    """
    cursor.execute("SAVEPOINT cloacina_part")
    try:
        yield
    except BaseException:
        # Where the connection is gone, what broke it is the error to see.
        if not cursor.connection.closed:
            cursor.execute("ROLLBACK TO SAVEPOINT cloacina_part; RELEASE SAVEPOINT cloacina_part")
        raise
    cursor.execute("RELEASE SAVEPOINT cloacina_part")
