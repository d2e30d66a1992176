"""One run of an execution: what the task may ask about it, and the session whose effects settle with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from cloacina_celery.errors import DatabaseUnavailable, LeaseLost
from cloacina_celery.runtime.context import bind_unit
from cloacina_celery.runtime.patience import until_available
from cloacina_celery.runtime.trust import LeaseBoard, steady_clock
from cloacina_celery.runtime.units import SessionUnit
from cloacina_celery.store import executions
from cloacina_celery.store.database import Database, on_lent_connection
from cloacina_celery.store.sessions import TenantSession, begin
from cloacina_celery.telemetry import log

T = TypeVar("T")

PATIENCE_WITH_SESSION = 10.0
"""Seconds for which a task that has a connection waits for a second one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedRetry:
    """What the task's own ``self.retry()`` asked for."""

    message: str
    delay: float | None
    eta: datetime | None


@dataclass(slots=True, kw_only=True, eq=False)
class Attempt:
    """The attempt that is running: its identity ``(id, attempt)`` is the fence of all it writes."""

    database: Database = field(repr=False)
    tenant: str
    id: str
    task: str
    attempt: int
    failures: int
    recoveries: int
    trusted_until: float
    board: LeaseBoard | None = field(repr=False)
    session: TenantSession | None = field(default=None, repr=False)
    requested_retry: RequestedRetry | None = field(default=None, repr=False)
    replacement: Any = field(default=None, repr=False)
    is_over: bool = field(default=False, repr=False)

    @property
    def is_recovery(self) -> bool:
        """Whether an earlier attempt was lost with its worker."""
        return self.recoveries > 0

    @property
    def is_trusted(self) -> bool:
        """Whether the lease was extended lately enough; asks nobody, so it answers when the database does not.

        ``False`` means that the execution may be running elsewhere by now: do nothing more for it.
        """
        now = steady_clock()
        if now >= self.trusted_until and self.board is not None:
            self.trusted_until = max(
                self.trusted_until, self.board.read((self.tenant, self.id, self.attempt))
            )
        return now < self.trusted_until

    @property
    def is_cancelled(self) -> bool:
        """Tell whether this attempt has been cancelled or otherwise lost its execution, by asking the database.

        Where that does not answer, it is asked again until it does, or until the attempt is trusted no more.
        """

        def look() -> bool:
            if not self.is_trusted:
                return True
            with self.database.statement() as cursor:
                return not executions.is_held(cursor, self.tenant, self.id, self.attempt)

        return self.wait_for_database(look)

    @contextmanager
    def open_session(self) -> Iterator[Session]:
        """Lend the attempt's one session; its transaction commits with the settlement.

        A block that raises takes its own work back and leaves that of earlier blocks.

        Raises:
            LeaseLost: nobody would commit what is written. The attempt is over and something outlived it, it was
                cancelled or lost its execution, or its lease was not extended for too long to be trusted.
        """
        if self.is_over or not self.is_trusted:
            raise LeaseLost(self.tenant, self.id, self.attempt)
        if self.session is None:
            self.session = TenantSession(self.database, self.tenant)
        session = self.session
        # The first block of a transaction needs no savepoint: rolling back all of it is the same and free.
        savepoint = session.begin_nested() if session.in_transaction() else None
        if savepoint is None:
            self.wait_for_database(partial(begin, session))
        try:
            unit = SessionUnit(session, self.tenant)
            with on_lent_connection():
                is_held = executions.is_held(unit.cursor(), self.tenant, self.id, self.attempt)
            if not is_held:
                raise LeaseLost(self.tenant, self.id, self.attempt)
            with bind_unit(unit):
                yield session
            session.flush()
        except BaseException:
            if savepoint is None:
                session.rollback()
            elif savepoint.is_active:
                savepoint.rollback()
            raise
        else:
            if savepoint is not None and savepoint.is_active:
                savepoint.commit()

    def wait_for_database(self, work: Callable[[], T]) -> T:
        """Do what may be done again until the database answers: one that is away must not cost a run its budget.

        Raises:
            DatabaseUnavailable: it did not for `PATIENCE_WITH_SESSION`, and the attempt has a session open. Each of a
                server's last connections may be held by a task that waits for one more.
        """
        began_at = steady_clock()

        def wait(error: DatabaseUnavailable) -> None:
            log("attempt.waiting", tenant=self.tenant, execution_id=self.id, error=error)
            is_holding = self.session is not None and self.session.in_transaction()
            if is_holding and steady_clock() - began_at > PATIENCE_WITH_SESSION:
                raise error

        return until_available(work, wait)

    def discard_session(self) -> None:
        """End the attempt: what it did and has not committed is rolled back, its connection given back."""
        self.is_over = True
        if self.session is not None:
            session, self.session = self.session, None
            session.close()
