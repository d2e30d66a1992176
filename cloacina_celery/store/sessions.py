"""SQLAlchemy sessions that see one tenant's schema and nothing else."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, SessionTransaction

from cloacina_celery.core.tenant import quote
from cloacina_celery.errors import DatabaseUnavailable, InvalidPayload, IsolationRefused
from cloacina_celery.store.database import Cursor, Database
from cloacina_celery.store.driver_errors import RoleRefused, is_disconnect, one_line

DRIVERS = ("psycopg2", "psycopg")
"""Drivers of a user's own session that take our statements as they are."""

# One statement takes the tenant's role, if it has one, and its path; both die with the transaction. The role is
# read at each transaction's begin: another process may have given the tenant one since.
_SCOPE = text(
    "SELECT set_config('search_path', :path, true), set_config('role', coalesce("
    "(SELECT t.role FROM cloacina.tenants t WHERE t.name = :tenant), 'none'), true)"
)
# At a savepoint the session may have any role that its code has taken, and must need none of that one's rights.
_SCOPE_AGAIN = text("SELECT set_config('search_path', :path, true), set_config('role', :role, true)")


class TenantSession(Session):
    """A session whose every transaction, savepoints included, runs in its tenant's schema and as its role.

    Both are set at each transaction's begin and die with the transaction, so a commit in the middle begins
    anew in the tenant, and the connection goes back to the pool with no tenant on it.
    """

    def __init__(self, database: Database, tenant: str, **kwargs: Any) -> None:
        self.tenant = tenant
        self._path = quote(tenant)
        self._entered: Connection | None = None
        self._role = "none"
        super().__init__(bind=database.engine, **kwargs)

    def close(self) -> None:
        """Roll back and give the connection back; one that is gone cannot, and has taken its transaction along."""
        try:
            super().close()
        except DBAPIError as error:
            if not is_disconnect(error):
                raise
            self.invalidate()

    @property
    def is_cut(self) -> bool:
        """Whether the open transaction has lost its connection, and with it all that it wrote."""
        return self.in_transaction() and self._entered is not None and self._entered.invalidated


@event.listens_for(TenantSession, "after_begin")
def _enter_schema(session: TenantSession, transaction: SessionTransaction, connection: Connection) -> None:
    session._entered = connection
    driver: Any = connection.connection.dbapi_connection
    driver.is_tenants = True
    driver.met.add(session.tenant)
    if transaction.nested:
        connection.execute(_SCOPE_AGAIN, {"path": session._path, "role": session._role})
        return
    try:
        _, session._role = connection.execute(_SCOPE, {"path": session._path, "tenant": session.tenant}).one()
    except DBAPIError as error:
        if isinstance(error.orig, RoleRefused):
            raise IsolationRefused(
                session.tenant,
                f"its role cannot be taken ({' '.join(str(error.orig).split())}): run `celery -A <app> cloacina "
                f"tenant isolate {session.tenant}` with a login that may create roles, or GRANT the role to this login",
            ) from error
        raise


def begin(session: Session) -> None:
    """Begin the session's transaction on a connection that answers; a pooled one may have broken meanwhile.

    Raises:
        DatabaseUnavailable: there was none; nothing has been done yet, and it may be tried again.
    """
    try:
        session.connection()
    except DBAPIError as error:
        session.rollback()
        if not is_disconnect(error):
            raise
        raise DatabaseUnavailable(f"no connection to the database: {one_line(error)}") from error


def driver_cursor(session: Session) -> Cursor:
    """Open a driver's cursor inside the session's current transaction, after what the session has pending.

    Raises:
        InvalidPayload: the session's database is not Postgres, or its driver speaks otherwise.
    """
    session.flush()
    connection = session.connection()
    dialect = connection.dialect
    if dialect.driver not in DRIVERS:
        raise InvalidPayload(
            f"session= takes a Session on Postgres through {' or '.join(DRIVERS)}, not on "
            f"{dialect.name} through {dialect.driver}: give it one on the database of the tenants"
        )
    cursor: Cursor = connection.connection.cursor()
    return cursor
