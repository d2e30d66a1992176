"""What the driver's errors mean: a lock, a mistake, or a connection of ours that broke."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2
import psycopg2.extensions
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError

from cloacina_celery.errors import CloacinaError, DatabaseRefused, DatabaseUnavailable

UndefinedTable = psycopg2.errors.UndefinedTable
InvalidSchemaName = psycopg2.errors.InvalidSchemaName
LockNotAvailable = psycopg2.errors.LockNotAvailable
DeadlockDetected = psycopg2.errors.DeadlockDetected
RoleRefused = (psycopg2.errors.InsufficientPrivilege, psycopg2.errors.InvalidParameterValue)
DriverError = psycopg2.Error
PassingTrouble = (
    LockNotAvailable,
    psycopg2.extensions.QueryCanceledError,
    psycopg2.extensions.TransactionRollbackError,
)
"""A lock or a statement that took too long, a deadlock: what the same transaction may not meet the next time."""
ConnectionTrouble = (psycopg2.OperationalError, psycopg2.InterfaceError)
_LOST = "_cloacina_lost_connection"
"""The attribute by which an exception is known to come from a connection of ours that broke, or could not be made."""


def is_disconnect(error: BaseException) -> bool:
    """Tell whether an error means that the connection broke, so that it is not known what was committed."""
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or hasattr(error, _LOST)
    if isinstance(error, ConnectionTrouble):
        # Without a code it is libpq that speaks; 57P01 to 57P03 are a server that shuts down or starts.
        return error.pgcode is None or error.pgcode.startswith("57P0")
    return isinstance(error, DatabaseUnavailable)


def lost_connection(error: BaseException | None) -> str | None:
    """Say in words how a connection of ours broke, if an error came from that; ``None`` if it did not.

    Errors of other databases that a task's code talks to are none of ours, however they look.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, DatabaseUnavailable) or hasattr(error, _LOST):
            return one_line(error)
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def on_lent_connection() -> Iterator[None]:
    """Have an error that means a broken connection raised as what it is, where a session lent the connection.

    Raises:
        DatabaseUnavailable: the connection broke; whether a write was committed is not known.
    """
    try:
        yield
    except (DriverError, DBAPIError) as error:
        if not is_disconnect(error):
            raise
        raise DatabaseUnavailable(f"the database connection broke: {one_line(error)}") from error


@contextmanager
def refusals_in_words() -> Iterator[None]:
    """Have what the database refuses raised in words that name the thing and the mend, for a person who asked for it.

    Raises:
        DatabaseRefused: it refused the statement.
        DatabaseUnavailable: it did not answer.
    """
    try:
        yield
    except (DriverError, DBAPIError) as error:
        original = getattr(error, "orig", error)
        if is_disconnect(error) or (isinstance(original, ConnectionTrouble) and original.pgcode is None):
            raise DatabaseUnavailable(f"the database does not answer: {one_line(error)}") from error
        said = one_line(original).partition(" LINE ")[0]
        mend = next((words for kind, words in _MENDS if isinstance(original, kind)), "see the database's log")
        raise DatabaseRefused(f"the database refuses: {said}; {mend}") from error


_MENDS = (
    (
        psycopg2.errors.InsufficientPrivilege,
        "run this with the login that owns the catalog, or have that login grant it",
    ),
    (
        (UndefinedTable, psycopg2.errors.UndefinedColumn, InvalidSchemaName),
        "run `celery -A <app> cloacina schema migrate --recheck`",
    ),
    ((LockNotAvailable, psycopg2.errors.QueryCanceled), "somebody holds a lock there: try again"),
)


def mark_lost(context: ExceptionContext) -> None:
    error = context.sqlalchemy_exception
    if error is not None and (context.is_disconnect or context.connection is None):
        setattr(error, _LOST, True)


def one_line(error: BaseException) -> str:
    """Return an error's words, those of the driver where SQLAlchemy has wrapped it, on one line."""
    return " ".join(str(getattr(error, "orig", error)).split())


def in_words(error: BaseException) -> str:
    """Return an error as a log line says it: its words, and its type where they are neither ours nor the driver's.

    Those of others may say nothing alone: a ``KeyError`` has only the key.
    """
    return (
        one_line(error) if isinstance(error, (DriverError, CloacinaError)) else " ".join(repr(error).split())
    )
