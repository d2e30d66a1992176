"""Connections: one pool per process, none with a tenant of its own."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias
from weakref import WeakMethod

import psycopg2
import psycopg2.extensions
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry

from cloacina_celery.errors import DatabaseUnavailable, SettingsError
from cloacina_celery.store.address import Address, AddressInFile
from cloacina_celery.store.driver_errors import ConnectionTrouble, DriverError, mark_lost, one_line
from cloacina_celery.store.watchdog import cut_after

APPLICATION_NAME = "cloacina_celery"
CONNECT_TIMEOUT = 5
"""Seconds."""

UNANSWERED_TIMEOUT_MS = 10_000
"""For how long what was sent may stay unacknowledged by the other machine; TCP tries for a quarter of an hour."""

_AWAY = ("53", "57P0", "25006")
"""A server that is full (of connections, disk or memory), one that starts or shuts down, and one that only reads,
as the standby does until a failover has promoted it: it will take the same statement later."""


Cursor: TypeAlias = psycopg2.extensions.cursor


def after_fork_in_child(method: Callable[[], None]) -> None:
    """Call a bound method in each child that this process forks, for as long as its object lives."""
    weak = WeakMethod(method)

    def call() -> None:
        alive = weak()
        if alive is not None:
            alive()

    os.register_at_fork(after_in_child=call)


_CLEAN_UP = """
    CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; SELECT pg_advisory_unlock_all();
    DISCARD SEQUENCES; DISCARD TEMP
"""
"""``DISCARD ALL`` without the prepared statements, which are ours and name their schema."""


MAX_MET = 500
"""Tenants whose tables one connection may meet: its backend remembers each, with 0.1 to 0.2 MB, until it ends.

Who serves fewer never opens a connection anew for it; who serves more pays some milliseconds in five hundred tenants.
"""


class StoreConnection(psycopg2.extensions.connection):  # type: ignore[misc]  # the driver is untyped
    """A connection that knows what it has prepared, whom it has met, and whether a tenant's code has used it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prepared: dict[tuple[str, str], str] = {}
        self.met: set[str] = set()
        self.is_tenants = False


def note_met(cursor: Cursor, *tenants: str) -> None:
    """Note that a statement reads or writes these tenants' tables; a connection that is not ours is left alone."""
    if isinstance(cursor.connection, StoreConnection):
        cursor.connection.met.update(tenants)


class Database:
    """Lend connections to the database of all tenants; safe to keep across a fork.

    A connection's own ``search_path`` is empty, so a statement that names no schema fails instead of
    reading somebody's. Each process opens its own pool on first use.

    Args:
        url_file: where the URL stands, read anew for each connection, in place of ``url``.
    """

    def __init__(
        self,
        url: str,
        *,
        url_file: str = "",
        pool_size: int = 5,
        prepared_statements: bool = True,
        isolation: str = "auto",
    ) -> None:
        self._address = AddressInFile(url_file) if url_file else Address(url)
        self.isolation = isolation
        self.prepared_statements = prepared_statements
        self._pool_size = pool_size
        self._engine: Engine | None = None
        self._pid = 0
        self._lock = threading.Lock()
        self._limits = threading.local()
        after_fork_in_child(self._forget_after_fork)

    def _forget_after_fork(self) -> None:
        # The parent's sockets must not be spoken to, nor closed politely, from a child: dispose(close=False)
        # only forgets them. The lock may have been held by a thread that does not exist here.
        self._lock = threading.Lock()
        if self._engine is not None:
            self._engine.dispose(close=False)
            self._engine = None

    @property
    def url(self) -> URL:
        """Where the next connection goes, and as whom."""
        return self._address.url()

    @property
    def engine(self) -> Engine:
        """The process's engine; sessions of tenants run on it too."""
        if self._engine is None or self._pid != os.getpid():
            with self._lock:
                if self._engine is None or self._pid != os.getpid():
                    self._engine = create_engine(
                        self.url,
                        pool_size=self._pool_size,
                        max_overflow=-1,
                        pool_use_lifo=True,
                        connect_args=self._connect_args(),
                    )
                    event.listen(self._engine, "do_connect", self._as_whom)
                    event.listen(self._engine, "checkout", self._refuse_stale)
                    event.listen(self._engine, "connect", self._refuse_a_path)
                    event.listen(self._engine, "reset", _clean_up)
                    event.listen(self._engine, "checkin", _retire)
                    event.listen(self._engine, "handle_error", mark_lost)
                    self._pid = os.getpid()
        return self._engine

    def _connect_args(self) -> dict[str, Any]:
        # What the URL's query says wins, except over the empty search_path, which comes last.
        query: dict[str, Any] = dict(self.url.query)
        return {
            "application_name": APPLICATION_NAME,
            "connect_timeout": CONNECT_TIMEOUT,
            # A machine that is gone is noticed within ten seconds, whichever side it was waiting for.
            "keepalives_idle": 4,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": UNANSWERED_TIMEOUT_MS,
            **query,
            "options": f"{query.get('options', '')} -c search_path=".strip(),
            "connection_factory": StoreConnection,
        }

    @contextmanager
    def waits_limited_to(self, seconds: float) -> Iterator[None]:
        """Have this thread, while the block runs, give up any connection that it has lent for longer than this.

        For threads whose worker depends on them; a task's own has nothing better to do than to wait.
        """
        before = getattr(self._limits, "seconds", None)
        self._limits.seconds = seconds
        try:
            yield
        finally:
            self._limits.seconds = before

    def limited(self, connection: StoreConnection) -> AbstractContextManager[None]:
        """Break the connection if the block takes longer than this thread may wait."""
        seconds: float | None = getattr(self._limits, "seconds", None)
        return nullcontext() if seconds is None else cut_after(connection, seconds)

    @contextmanager
    def statement(self) -> Iterator[Cursor]:
        """Lend a cursor on which every statement commits by itself.

        Raises:
            DatabaseUnavailable: the connection broke; whether a write was committed is not known.
        """
        with self._lend(autocommit=True) as connection, connection.cursor() as cursor:
            yield cursor

    @contextmanager
    def transaction(self) -> Iterator[Cursor]:
        """Lend a cursor in a transaction that commits at the end, and rolls back on any exception.

        Raises:
            DatabaseUnavailable: as `statement`.
        """
        with self._lend(autocommit=False) as connection, connection, connection.cursor() as cursor:
            yield cursor

    @contextmanager
    def _lend(self, *, autocommit: bool) -> Iterator[StoreConnection]:
        try:
            fairy = self.engine.raw_connection()
        except Exception as error:
            if isinstance(getattr(error, "orig", error), ConnectionTrouble):
                raise DatabaseUnavailable(f"no connection to the database: {one_line(error)}") from error
            raise
        connection: Any = fairy.dbapi_connection
        try:
            connection.autocommit = autocommit
            with self.limited(connection):
                yield connection
        except DriverError as error:
            is_away = (error.pgcode or "").startswith(_AWAY)
            if not connection.closed and not is_away:
                raise
            # The other pooled connections most likely met the same fate; a new pool costs little.
            self.engine.dispose()
            how = (
                "does not take the statement now" if is_away and not connection.closed else "connection broke"
            )
            raise DatabaseUnavailable(f"the database {how}: {one_line(error)}") from error
        finally:
            if connection.closed:
                fairy.invalidate()
            else:
                connection.autocommit = False
            fairy.close()

    def dedicated_connection(self) -> StoreConnection:
        """Open a connection outside the pool, in autocommit; the caller closes it.

        Raises:
            DatabaseUnavailable: the database did not answer.
        """
        try:
            connection: StoreConnection = psycopg2.connect(
                **self.url.translate_connect_args(username="user", database="dbname"), **self._connect_args()
            )
            connection.autocommit = True
            self._refuse_a_path(connection)
        except psycopg2.OperationalError as error:
            raise DatabaseUnavailable(f"no connection to the database: {one_line(error)}") from error
        return connection

    def _as_whom(self, _dialect: object, _record: object, _args: object, params: dict[str, Any]) -> None:
        params.update(self.url.translate_connect_args(username="user", database="dbname"))

    def _refuse_stale(self, connection: StoreConnection, *_: object) -> None:
        """Have another connection lent if the server has ended this one while nobody used it.

        A server says nothing to an idle connection unless it ends it; that is seen without asking, so that a restart
        costs the next statement nothing.
        """
        wire = select.poll()
        if not connection.closed:
            wire.register(connection.fileno(), select.POLLIN)
        if connection.closed or wire.poll(0):
            raise DisconnectionError("the server has ended the connection")
        if self._address.may_change and self._address.is_stale(connection.info.user):
            raise DisconnectionError("there are other credentials now")

    def _refuse_a_path(self, connection: StoreConnection, *_: object) -> None:
        # A transaction pooler drops the option that empties it, and a statement without a schema would find tables.
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_setting('search_path'), session_user, current_database()")
            path, login, database = cursor.fetchone()
        if not connection.autocommit:
            connection.rollback()
        if path.strip() not in ("", '""'):
            raise SettingsError(
                f"connections begin with search_path {path!r}, so that a statement without a tenant would find "
                "somebody's tables; a pooler has dropped the option that empties it: "
                f'ALTER ROLE "{login}" IN DATABASE "{database}" SET search_path = \'\''
            )

    def dispose(self) -> None:
        """Close the pool of this process; the next use opens a new one."""
        if self._engine is not None and self._pid == os.getpid():
            self._engine.dispose()


def _clean_up(connection: StoreConnection, *_: object) -> None:
    """Leave to the next user of a pooled connection nothing of the tenant's before it.

    A transaction's end takes the ``search_path`` with it, but not a temporary table (which is found before any
    other), a ``SET``, a role, a lock or a sequence's last value.
    """
    if connection.is_tenants and not connection.closed:
        connection.rollback()
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(_CLEAN_UP)
        connection.autocommit = False
        connection.is_tenants = False


def _retire(connection: StoreConnection | None, record: ConnectionPoolEntry) -> None:
    """Close a connection that comes back having met many tenants, so that its backend's memory is given back."""
    if connection is not None and len(connection.met) > MAX_MET:
        record.invalidate()
