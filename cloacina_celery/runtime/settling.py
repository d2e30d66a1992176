"""Settling for certain: a settlement whose answer is lost is looked up or done again, never taken for granted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from cloacina_celery.errors import DatabaseUnavailable, LeaseLost
from cloacina_celery.runtime.attempt import Attempt
from cloacina_celery.runtime.patience import until_available
from cloacina_celery.runtime.units import Action, CursorUnit, pending_actions, settlement
from cloacina_celery.store import queries, settlements
from cloacina_celery.store.driver_errors import (
    LockNotAvailable,
    lost_connection,
    on_lent_connection,
    one_line,
)
from cloacina_celery.telemetry import log

T = TypeVar("T")

FREE_RELEASES = 3
"""How often an execution may have been given back before a commit that the database cut off spends its budget."""


class RecoverAttempt(Protocol):
    """Moves a lost attempt on by its recovery budget; false if it has ended otherwise."""

    def __call__(self, tenant: str, execution_id: str, attempt: int, *, reason: str) -> bool: ...


def settle(
    attempt: Attempt, write: Callable[[CursorUnit], None], *kinds: str, is_in_doubt: bool = False
) -> None:
    """Settle an attempt whose effects are not wanted, in a transaction of its own, until that is known to be done.

    Args:
        write: settles on the unit that it is given, or raises `LeaseLost` where the fence refuses; it is called
            again after a transaction of which nothing is known.
        kinds: the events by which an earlier try is recognised, should it have been committed.
        is_in_doubt: whether there was an earlier try.

    Raises:
        LeaseLost: the attempt has come to something else.
    """
    attempt.discard_session()
    owed: list[Action] = []

    def once() -> None:
        nonlocal owed
        with settlement(attempt.database, attempt.tenant) as unit:
            with on_lent_connection():
                write(unit)
            owed = unit.actions

    def wait(error: DatabaseUnavailable) -> None:
        nonlocal is_in_doubt
        is_in_doubt = True
        note_waiting(attempt, error)

    try:
        until_available(once, wait)
    except LeaseLost:
        # Not before the fence has refused: until then the lost try may yet be committing.
        kind = end_of(attempt) if is_in_doubt else None
        if kind not in kinds:
            raise
        log(
            "settle.found", tenant=attempt.tenant, execution_id=attempt.id, attempt=attempt.attempt, kind=kind
        )
        for action in owed:
            action()


def after_lost_commit(attempt: Attempt, error: Exception, recover_attempt: RecoverAttempt) -> bool:
    """Find out whether the commit of an attempt's session was done; move the attempt on if it was not.

    It is given back, which spends no budget: most often a server was restarted. But the server also cuts off whoever
    idles in a transaction for longer than it allows, without a word that reaches us, so an execution that has been
    given back `FREE_RELEASES` times already spends its recovery budget.

    Returns:
        Whether it was done, and the attempt has succeeded with its effects.

    Raises:
        LeaseLost: the attempt has come to something else.
    """
    owed = pending_actions(attempt.session) if attempt.session is not None else []
    attempt.discard_session()
    reason = f"the database went away before it was settled: {one_line(error)}"

    def move_on() -> bool:
        with attempt.database.statement() as cursor:
            row = queries.get(cursor, attempt.tenant, attempt.id)
            if row is None or row.releases < FREE_RELEASES:
                return settlements.release_attempt(
                    cursor, attempt.tenant, attempt.id, attempt.attempt, reason=reason
                )
        return _recover(attempt, recover_attempt, reason)

    # First the move, then the look: the lost commit may still be under way, and holds the row until it is through.
    if _insist(attempt, move_on):
        return False
    match end_of(attempt):
        case "succeeded" as kind:
            log(
                "settle.found",
                tenant=attempt.tenant,
                execution_id=attempt.id,
                attempt=attempt.attempt,
                kind=kind,
            )
            for action in owed:
                action()
            return True
        case "released" | "recovered" | "abandoned":
            return False
        case _:
            raise LeaseLost(attempt.tenant, attempt.id, attempt.attempt)


def recover_if_cut(attempt: Attempt, error: Exception, recover_attempt: RecoverAttempt) -> str | None:
    """Move an attempt on by its recovery budget, if what it raised came from a connection of ours that broke.

    Returns:
        Why, in words; ``None`` if the error came from elsewhere, and nothing was done.

    Raises:
        LeaseLost: it did, and the attempt has come to something else.
    """
    how = lost_connection(error)
    if how is None and attempt.session is not None and attempt.session.is_cut:
        how = one_line(error)
    if how is None:
        return None
    attempt.discard_session()
    reason = f"its connection to the database broke: {how}"
    is_recovered = _insist(attempt, lambda: _recover(attempt, recover_attempt, reason))
    # Where connections are what is short, somebody else may need those that this process keeps open.
    attempt.database.dispose()
    if not is_recovered and end_of(attempt) not in ("recovered", "abandoned"):
        raise LeaseLost(attempt.tenant, attempt.id, attempt.attempt)
    return reason


def end_of(attempt: Attempt) -> str | None:
    """Read by which move the attempt ended, as soon as the database answers."""

    def look() -> str | None:
        with attempt.database.statement() as cursor:
            return queries.end_of_attempt(cursor, attempt.tenant, attempt.id, attempt.attempt)

    return _insist(attempt, look)


def note_waiting(attempt: Attempt, error: Exception) -> None:
    """Log that a settlement waits for the database, and keep no connection open meanwhile.

    A recovery needs two at once, and of those that wait for their second each may hold the first.
    """
    attempt.database.dispose()
    log(
        "settle.waiting", tenant=attempt.tenant, execution_id=attempt.id, attempt=attempt.attempt, error=error
    )


def _recover(attempt: Attempt, recover_attempt: RecoverAttempt, reason: str) -> bool:
    try:
        return recover_attempt(attempt.tenant, attempt.id, attempt.attempt, reason=reason)
    except LockNotAvailable as locked:
        raise DatabaseUnavailable(f"the row is locked: {one_line(locked)}") from locked


def _insist(attempt: Attempt, work: Callable[[], T]) -> T:
    return until_available(work, lambda error: note_waiting(attempt, error))
