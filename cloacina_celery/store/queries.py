"""What people and results ask of executions, and the two verbs that only people use: cancel and requeue."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cloacina_celery.core.lifecycle import State
from cloacina_celery.store.database import Cursor
from cloacina_celery.store.guards import may
from cloacina_celery.store.ringing import Ring
from cloacina_celery.store.statements import Statement


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One durable call of a task, as its row stands."""

    id: str
    tenant: str
    task: str
    state: State
    attempt: int
    failures: int
    recoveries: int
    releases: int
    max_recoveries: int
    policy: dict[str, Any] | None
    worker_id: int | None
    submitted_at: datetime
    run_at: datetime
    started_at: datetime | None
    settled_at: datetime | None
    result: Any
    error: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One transition of an execution, as it was recorded with the transition itself."""

    at: datetime
    kind: str
    attempt: int
    worker: str | None
    reason: str | None
    error: dict[str, Any] | None


_COLUMNS = (
    "id, task, state, attempt, failures, recoveries, releases, max_recoveries, policy, worker_id, "
    "submitted_at, run_at, started_at, settled_at, result, error"
)
_GET = Statement("get", f"SELECT {_COLUMNS} FROM {{s}}.cloacina_executions WHERE id = $1::text")
_LIST = Statement(
    "list",
    f"""
    SELECT {_COLUMNS} FROM {{s}}.cloacina_executions
    WHERE ($1::text IS NULL OR state = $1::text) AND ($2::text IS NULL OR task = $2::text)
    ORDER BY submitted_at DESC, id LIMIT $3::int
    """,
)
_COUNT = Statement("count", "SELECT state, count(*) FROM {s}.cloacina_executions GROUP BY state")
_OUTCOME = Statement(
    "outcome",
    "SELECT state, failures, result, error, settled_at FROM {s}.cloacina_executions WHERE id = $1::text",
)
_HISTORY = Statement(
    "history",
    """
    SELECT e.at, e.kind, e.attempt, w.name, e.reason, e.error
    FROM {s}.cloacina_events e LEFT JOIN cloacina.workers w ON w.id = e.worker_id
    WHERE e.execution_id = $1::text ORDER BY e.id
    """,
)
# Of the events with the attempt's number the first is its own end; a later one may end what it left pending.
_END_OF_ATTEMPT = Statement(
    "end_of_attempt",
    """
    SELECT kind FROM {s}.cloacina_events
    WHERE execution_id = $1::text AND attempt = $2::int AND kind NOT IN ('claimed', 'submitted', 'rung_again')
    ORDER BY id LIMIT 1
    """,
)
_CANCEL = Statement(
    "cancel",
    f"""
    WITH cancelled AS (
        UPDATE {{s}}.cloacina_executions
        SET state = 'cancelled', lease_expires_at = NULL, settled_at = now()
        WHERE {may("cancel")}
        RETURNING id, attempt, worker_id
    )
    INSERT INTO {{s}}.cloacina_events (execution_id, kind, attempt, worker_id, reason)
    SELECT id, 'cancelled', attempt, worker_id, $2::text FROM cancelled
    RETURNING 1
    """,
)
_REQUEUE = Statement(
    "requeue",
    f"""
    WITH requeued AS (
        UPDATE {{s}}.cloacina_executions
        SET state = 'pending', failures = 0, recoveries = 0, settled_at = NULL, result = NULL,
            run_at = now(), rung_at = now()
        WHERE {may("requeue")}
        RETURNING id, attempt, failures, recoveries, message
    ), recorded AS (
        INSERT INTO {{s}}.cloacina_events (execution_id, kind, attempt, reason)
        SELECT id, 'requeued', attempt, $2::text FROM requeued
    )
    SELECT id, attempt, failures, recoveries, message FROM requeued
    """,
)


def get(cursor: Cursor, tenant: str, execution_id: str) -> Execution | None:
    """Read one execution."""
    _GET.execute(cursor, tenant, execution_id)
    row = cursor.fetchone()
    return _execution(tenant, row) if row else None


def list_(
    cursor: Cursor, tenant: str, *, state: State | None = None, task: str | None = None, limit: int = 100
) -> list[Execution]:
    """List executions, newest first."""
    _LIST.execute(cursor, tenant, state, task, limit)
    return [_execution(tenant, row) for row in cursor.fetchall()]


def count(cursor: Cursor, tenant: str) -> dict[State, int]:
    """Count executions by state."""
    _COUNT.execute(cursor, tenant)
    return {State(state): n for state, n in cursor.fetchall()}


def outcome(
    cursor: Cursor, tenant: str, execution_id: str
) -> tuple[State, int, str | None, dict[str, Any] | None, datetime | None] | None:
    """Read what a result object needs: state, failures, stored result, error and the instant of settling."""
    _OUTCOME.execute(cursor, tenant, execution_id)
    row = cursor.fetchone()
    if row is None:
        return None
    return State(row[0]), row[1], row[2], json.loads(row[3]) if row[3] else None, row[4]


def history(cursor: Cursor, tenant: str, execution_id: str) -> list[Event]:
    """Read an execution's transitions in order."""
    _HISTORY.execute(cursor, tenant, execution_id)
    return [
        Event(at=at, kind=kind, attempt=attempt, worker=worker, reason=reason,
              error=json.loads(error) if error else None)
        for at, kind, attempt, worker, reason, error in cursor.fetchall()
    ]  # fmt: skip


def end_of_attempt(cursor: Cursor, tenant: str, execution_id: str, attempt: int) -> str | None:
    """Read by which move a claimed attempt ended; ``None`` while it runs."""
    _END_OF_ATTEMPT.execute(cursor, tenant, execution_id, attempt)
    row = cursor.fetchone()
    return None if row is None else str(row[0])


def cancel(cursor: Cursor, tenant: str, execution_id: str, *, reason: str) -> bool:
    """End a pending or running execution; a running attempt finds its fence closed when it settles."""
    _CANCEL.execute(cursor, tenant, execution_id, reason)
    return cursor.fetchone() is not None


def requeue(cursor: Cursor, tenant: str, execution_id: str, *, reason: str) -> Ring | None:
    """Make a failed, abandoned or cancelled execution pending again, with fresh budgets."""
    _REQUEUE.execute(cursor, tenant, execution_id, reason)
    row = cursor.fetchone()
    if row is None:
        return None
    return Ring(
        tenant=tenant,
        execution_id=row[0],
        attempt=row[1] + 1,
        failures=row[2],
        recoveries=row[3],
        message=row[4],
    )


def _execution(tenant: str, row: tuple[Any, ...]) -> Execution:
    (id_, task, state, attempt, failures, recoveries, releases, max_recoveries, policy, worker_id,
     submitted_at, run_at, started_at, settled_at, result, error) = row  # fmt: skip
    return Execution(
        id=id_, tenant=tenant, task=task, state=State(state), attempt=attempt, failures=failures,
        recoveries=recoveries, releases=releases, max_recoveries=max_recoveries,
        policy=json.loads(policy) if policy else None, worker_id=worker_id, submitted_at=submitted_at,
        run_at=run_at, started_at=started_at, settled_at=settled_at,
        result=json.loads(result) if result is not None else None, error=json.loads(error) if error else None,
    )  # fmt: skip
