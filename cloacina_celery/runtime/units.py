"""Transactions that submissions join: a SQLAlchemy session's, or a bare cursor's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from weakref import WeakKeyDictionary

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from cloacina_celery.runtime.context import bind_unit
from cloacina_celery.store.database import Cursor, Database
from cloacina_celery.store.savepoints import savepoint
from cloacina_celery.store.sessions import driver_cursor

Action = Callable[[], None]


class CursorUnit:
    """A transaction on a cursor, such as one that settles an attempt together with what follows from it."""

    is_open = True

    def __init__(self, tenant: str, cursor: Cursor, *, is_settlement: bool) -> None:
        self.tenant = tenant
        self.is_settlement = is_settlement
        self._cursor = cursor
        self.actions: list[Action] = []

    def cursor(self) -> Cursor:
        """Return the transaction's cursor."""
        return self._cursor

    def after_commit(self, action: Action) -> None:
        """Keep the action for the commit."""
        self.actions.append(action)

    @contextmanager
    def part(self) -> Iterator[None]:
        """Undo what the block has done, and forget what it kept for the commit, if it raises; the rest stays."""
        kept = len(self.actions)
        try:
            with savepoint(self._cursor):
                yield
        except BaseException:
            del self.actions[kept:]
            raise


def settlement(database: Database, tenant: str) -> AbstractContextManager[CursorUnit]:
    """Open a settling transaction; submissions in the block join it, and their messages leave after its commit."""
    return _transaction(database, tenant, is_settlement=True)


def joint(database: Database, tenant: str) -> AbstractContextManager[CursorUnit]:
    """Open a transaction for submissions that are to be made together or not at all."""
    return _transaction(database, tenant, is_settlement=False)


@contextmanager
def _transaction(database: Database, tenant: str, *, is_settlement: bool) -> Iterator[CursorUnit]:
    with database.transaction() as cursor:
        unit = CursorUnit(tenant, cursor, is_settlement=is_settlement)
        with bind_unit(unit):
            yield unit
    for action in unit.actions:
        action()


class SessionUnit:
    """A session's transaction; what joined a savepoint that was rolled back is forgotten."""

    is_open = True

    def __init__(self, session: Session, tenant: str, *, is_settlement: bool = False) -> None:
        self.session = session
        self.tenant = tenant
        self.is_settlement = is_settlement

    def cursor(self) -> Cursor:
        """Open a cursor after flushing what the session has pending, so that order is kept."""
        return driver_cursor(self.session)

    def after_commit(self, action: Action) -> None:
        """Keep the action under the innermost open transaction of the session."""
        transaction = self.session.get_nested_transaction() or self.session.get_transaction()
        assert transaction is not None, "cursor() began one"
        if self.session not in _pending:
            event.listen(self.session, "after_commit", _publish)
            event.listen(self.session, "after_soft_rollback", _forget)
            event.listen(self.session, "after_transaction_end", _forget_all)
        _pending.setdefault(self.session, []).append((transaction, action))


_pending: WeakKeyDictionary[Session, list[tuple[SessionTransaction, Action]]] = WeakKeyDictionary()


def pending_actions(session: Session) -> list[Action]:
    """List what a session will do after its commit, for whoever learns of the commit by another way."""
    return [action for _, action in _pending.get(session, [])]


def _publish(session: Session) -> None:
    actions = _pending.get(session)
    # SQLAlchemy says "commit" also where a savepoint is released, which the transaction around it may yet undo.
    if actions and not session.in_nested_transaction():
        _pending[session] = []
        for _, action in actions:
            action()


def _forget(session: Session, rolled_back: SessionTransaction) -> None:
    actions = _pending.get(session)
    if actions:
        _pending[session] = [entry for entry in actions if not _is_within(entry[0], rolled_back)]


def _forget_all(session: Session, ended: SessionTransaction) -> None:
    # A session that was closed without a word has rolled back; it may be used again for other work.
    if ended.parent is None and _pending.get(session):
        _pending[session] = []


def _is_within(transaction: SessionTransaction | None, ancestor: SessionTransaction) -> bool:
    while transaction is not None:
        if transaction is ancestor:
            return True
        transaction = transaction.parent
    return False
