"""Rows to test with: put into a state by the store's own verbs, and read past the store."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from psycopg2 import sql

from cloacina_celery.core.lifecycle import State
from cloacina_celery.store import executions, queries, recovery, settlements
from cloacina_celery.store.executions import Submission
from tests.support.waiting import PATIENCE, eventually, wait_until_blocked

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg2 import extensions

    from cloacina_celery.store.database import Cursor, Database

EXECUTION_ID = "e-1"
MESSAGE = '[{"task": "shop.add"}, {}, [[], {}, {}]]'
WORKER = 41
LEASE = 30.0
ERROR = {"exc_type": "OSError", "exc_module": "builtins", "exc_message": ["no"], "traceback": None}


def submission(execution_id: str = EXECUTION_ID, **changes: Any) -> Submission:
    """Describe a plain row, due now, with three recoveries."""
    plain = Submission(execution_id=execution_id, task="shop.add", message=MESSAGE, max_recoveries=3)
    return replace(plain, **changes)


def submit(cursor: Cursor, tenant: str, execution_id: str = EXECUTION_ID, **changes: Any) -> None:
    """Insert a row that must be new."""
    assert executions.submit(cursor, tenant, submission(execution_id, **changes)) is not None


def claim(
    cursor: Cursor,
    tenant: str,
    execution_id: str = EXECUTION_ID,
    *,
    attempt: int = 1,
    worker_id: int = WORKER,
) -> executions.Claim | None:
    """Ask for the lease on an attempt."""
    return executions.claim(
        cursor, tenant, execution_id, attempt=attempt, worker_id=worker_id, lease_ttl=LEASE, policy=None
    )


def run(cursor: Cursor, tenant: str, execution_id: str = EXECUTION_ID, **changes: Any) -> None:
    """Insert a row and open its first lease."""
    worker_id = changes.pop("worker_id", WORKER)
    submit(cursor, tenant, execution_id, **changes)
    assert claim(cursor, tenant, execution_id, worker_id=worker_id) is not None


def bring_to(cursor: Cursor, tenant: str, state: State, execution_id: str = EXECUTION_ID) -> None:
    """Insert a row and move it, attempt 1, to a state by the verbs that lead there."""
    run(cursor, tenant, execution_id, max_recoveries=0)
    match state:
        case State.RUNNING:
            pass
        case State.PENDING:
            assert settlements.release_attempt(cursor, tenant, execution_id, 1, reason="test")
        case State.SUCCEEDED:
            assert settlements.succeed(cursor, tenant, execution_id, 1, "7")
        case State.FAILED:
            assert settlements.end_failed(cursor, tenant, execution_id, 1, error=ERROR, reason="test")
        case State.CANCELLED:
            assert queries.cancel(cursor, tenant, execution_id, reason="test")
        case State.ABANDONED:
            (orphan,) = recovery.lock_attempt(cursor, tenant, execution_id, 1)
            recovery.recover(cursor, tenant, orphan, reason="test")
    assert read(cursor, tenant, execution_id).state is state


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An execution's row as the table has it."""

    state: State
    attempt: int
    failures: int
    recoveries: int
    releases: int
    worker_id: int | None
    message: str
    policy: str | None
    result: str | None
    error: str | None
    run_at: datetime
    rung_at: datetime | None
    started_at: datetime | None
    settled_at: datetime | None
    lease_expires_at: datetime | None


def read(cursor: Cursor, tenant: str, execution_id: str = EXECUTION_ID) -> Row:
    """Read a row past the store."""
    columns = list(Row.__dataclass_fields__)
    # An instant at infinity has no datetime; these tests compare it as the last one there is.
    listed = ", ".join(f"least({name}, '9999-01-01')" if name == "run_at" else name for name in columns)
    cursor.execute(
        sql.SQL(f"SELECT {listed} FROM {{}}.cloacina_executions WHERE id = %s").format(
            sql.Identifier(tenant)
        ),
        (execution_id,),
    )
    found = cursor.fetchone()
    assert found is not None, f"no row {execution_id}"
    values = dict(zip(columns, found, strict=True))
    return Row(**{**values, "state": State(values["state"])})


def events(cursor: Cursor, tenant: str, execution_id: str = EXECUTION_ID) -> list[tuple[str, int]]:
    """Read kind and attempt of a row's events, in order."""
    cursor.execute(
        sql.SQL("SELECT kind, attempt FROM {}.cloacina_events WHERE execution_id = %s ORDER BY id").format(
            sql.Identifier(tenant)
        ),
        (execution_id,),
    )
    return [(kind, attempt) for kind, attempt in cursor.fetchall()]


def expire(cursor: Cursor, tenant: str, execution_id: str = EXECUTION_ID, seconds: float = 1.0) -> None:
    """Let a lease have run out some seconds ago on the database's clock."""
    cursor.execute(
        sql.SQL(
            "UPDATE {}.cloacina_executions SET lease_expires_at = now() - make_interval(secs => %s) WHERE id = %s"
        ).format(sql.Identifier(tenant)),
        (seconds, execution_id),
    )
    assert cursor.rowcount == 1


def shift(cursor: Cursor, tenant: str, column: str, seconds: float, execution_id: str = EXECUTION_ID) -> None:
    """Move one of a row's instants by some seconds."""
    cursor.execute(
        sql.SQL(
            "UPDATE {}.cloacina_executions SET {c} = {c} + make_interval(secs => %s) WHERE id = %s"
        ).format(sql.Identifier(tenant), c=sql.Identifier(column)),
        (seconds, execution_id),
    )
    assert cursor.rowcount == 1


class Rival:
    """A transaction in a thread of its own, that can be watched at the lock where it stands."""

    def __init__(self, database: Database, work: Callable[[Cursor], Any]) -> None:
        self._database = database
        self._work = work
        self._pid = 0
        self._answer: list[Any] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._database.transaction() as cursor:
                self._pid = cursor.connection.info.backend_pid
                answer = self._work(cursor)
            self._answer.append(answer)
        except BaseException as error:  # noqa: BLE001  # handed to the test's own thread
            self._error = error

    def wait_until_blocked(self, observer: extensions.connection) -> None:
        """Return once the transaction stands at somebody's lock."""
        eventually(lambda: self._pid, why="the rival to begin")
        wait_until_blocked(observer, self._pid)

    def is_at_work(self) -> bool:
        """Tell whether the work has not ended."""
        return self._thread.is_alive()

    def answer(self) -> Any:
        """Return what the work returned, once its transaction has committed."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the rival still stands at a lock"
        if self._error is not None:
            raise self._error
        return self._answer[0]


def age_of_server(observer: extensions.connection) -> float:
    """Return the seconds since Postgres has started."""
    with observer.cursor() as cursor:
        cursor.execute("SELECT extract(epoch FROM now() - pg_postmaster_start_time())::float8")
        row = cursor.fetchone()
    assert row is not None
    return float(row[0])
