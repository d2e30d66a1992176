"""What an attempt's end does to its row: succeed, retry, fail, replace, release, cancel.

Each is fenced by ``(id, attempt, state = 'running')``: zero rows mean that the lease is lost.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from cloacina_celery.core.lifecycle import Fail, Retry, after_failure
from cloacina_celery.core.protocol import FENCE
from cloacina_celery.core.retry import RetryPolicy
from cloacina_celery.store.database import Cursor
from cloacina_celery.store.guards import may, where
from cloacina_celery.store.statements import Statement

_SUCCEED = Statement(
    "succeed",
    f"""
    WITH settled AS (
        UPDATE {{s}}.cloacina_executions
        SET state = 'succeeded', result = $3::text, settled_at = now(), lease_expires_at = NULL
        WHERE {may("succeed")}
        RETURNING id, attempt, worker_id
    ), recorded AS (
        INSERT INTO {{s}}.cloacina_events (execution_id, kind, attempt, worker_id)
        SELECT id, 'succeeded', attempt, worker_id FROM settled
    )
    SELECT 1 FROM settled
    """,
    hot=True,
)

_LOCK_ATTEMPT = Statement(
    "lock_attempt",
    f"""
    SELECT failures, policy FROM {{s}}.cloacina_executions
    WHERE {where(FENCE)} FOR UPDATE
    """,
)

_RETRY = Statement(
    "retry",
    f"""
    WITH settled AS (
        UPDATE {{s}}.cloacina_executions
        SET state = 'pending', failures = failures + 1, lease_expires_at = NULL, error = $3::text,
            message = coalesce($6::text, message),
            run_at = coalesce($5::timestamptz, now() + make_interval(secs => $4::float8)), rung_at = NULL
        WHERE {may("retry")}
        RETURNING id, attempt, worker_id, run_at
    )
    INSERT INTO {{s}}.cloacina_events (execution_id, kind, attempt, worker_id, error, reason)
    SELECT id, 'retry_scheduled', attempt, worker_id, $3::text,
           'in ' || round(extract(epoch FROM run_at - now())::numeric, 1) || ' s' FROM settled
    RETURNING 1
    """,
)

_FAIL = Statement(
    "fail",
    f"""
    WITH settled AS (
        UPDATE {{s}}.cloacina_executions
        SET state = 'failed', failures = failures + 1, lease_expires_at = NULL, error = $3::text, settled_at = now()
        WHERE {may("fail")}
        RETURNING id, attempt, worker_id
    )
    INSERT INTO {{s}}.cloacina_events (execution_id, kind, attempt, worker_id, error, reason)
    SELECT id, 'failed', attempt, worker_id, $3::text, $4::text FROM settled
    RETURNING 1
    """,
)

_PARK = Statement(
    "park",
    f"""
    WITH settled AS (
        UPDATE {{s}}.cloacina_executions
        SET state = 'pending', lease_expires_at = NULL, run_at = 'infinity', rung_at = NULL
        WHERE {may("replace")}
        RETURNING id, attempt, worker_id
    )
    INSERT INTO {{s}}.cloacina_events (execution_id, kind, attempt, worker_id)
    SELECT id, 'replaced', attempt, worker_id FROM settled
    RETURNING 1
    """,
)

_RELEASE_ATTEMPT = Statement(
    "release_attempt",
    f"""
    WITH released AS (
        UPDATE {{s}}.cloacina_executions
        SET state = 'pending', releases = releases + 1, lease_expires_at = NULL, run_at = now(), rung_at = NULL
        WHERE {may("release")}
        RETURNING id, attempt, worker_id
    )
    INSERT INTO {{s}}.cloacina_events (execution_id, kind, attempt, worker_id, reason)
    SELECT id, 'released', attempt, worker_id, $3::text FROM released
    RETURNING 1
    """,
)

_END_CANCELLED = Statement(
    "end_cancelled",
    f"""
    WITH settled AS (
        UPDATE {{s}}.cloacina_executions
        SET state = 'cancelled', lease_expires_at = NULL, settled_at = now()
        WHERE {may("end cancelled")}
        RETURNING id, attempt, worker_id
    )
    INSERT INTO {{s}}.cloacina_events (execution_id, kind, attempt, worker_id, reason)
    SELECT id, 'cancelled', attempt, worker_id, $3::text FROM settled
    RETURNING 1
    """,
)


def succeed(
    cursor: Cursor, tenant: str, execution_id: str, attempt: int, result: str | None, *, prepare: bool = False
) -> bool:
    """Settle as succeeded; ``False`` means that the fence refused."""
    _SUCCEED.execute(cursor, tenant, execution_id, attempt, result, prepare=prepare)
    return cursor.fetchone() is not None


def fail(
    cursor: Cursor,
    tenant: str,
    execution_id: str,
    attempt: int,
    *,
    error: dict[str, Any],
    lineage: tuple[str, ...],
    random: float,
    default_policy: RetryPolicy,
    retry_after: float | None = None,
) -> Retry | Fail | None:
    """Settle a raised exception by the policy in the row; ``None`` means that the fence refused.

    Needs a transaction: the row stays locked from the decision to the write.
    """
    _LOCK_ATTEMPT.execute(cursor, tenant, execution_id, attempt)
    row = cursor.fetchone()
    if row is None:
        return None
    failures, stored = row
    policy = RetryPolicy.from_stored(json.loads(stored)) if stored else default_policy
    decision = after_failure(policy, failures=failures, error=lineage, random=random, retry_after=retry_after)
    match decision:
        case Retry(delay=delay):
            settled = retry(cursor, tenant, execution_id, attempt, error=error, delay=delay)
        case Fail(reason=reason):
            settled = end_failed(cursor, tenant, execution_id, attempt, error=error, reason=reason)
    return decision if settled else None


def retry(
    cursor: Cursor,
    tenant: str,
    execution_id: str,
    attempt: int,
    *,
    error: dict[str, Any],
    delay: float | None = None,
    eta: datetime | None = None,
    message: str | None = None,
) -> bool:
    """Settle as to be run again after ``delay`` seconds or at ``eta``; a new ``message`` replaces the stored one."""
    _RETRY.execute(cursor, tenant, execution_id, attempt, json.dumps(error), delay or 0.0, eta, message)
    return cursor.fetchone() is not None


def end_failed(
    cursor: Cursor, tenant: str, execution_id: str, attempt: int, *, error: dict[str, Any], reason: str
) -> bool:
    """Settle as failed; ``False`` means that the fence refused."""
    _FAIL.execute(cursor, tenant, execution_id, attempt, json.dumps(error), reason)
    return cursor.fetchone() is not None


def park(cursor: Cursor, tenant: str, execution_id: str, attempt: int) -> bool:
    """Settle as replaced: the row waits, for ever if need be, for the submission that takes over its id."""
    _PARK.execute(cursor, tenant, execution_id, attempt)
    return cursor.fetchone() is not None


def release_attempt(cursor: Cursor, tenant: str, execution_id: str, attempt: int, *, reason: str) -> bool:
    """Give one attempt back unfinished; no budget is spent, and the next poll rings for the next attempt."""
    _RELEASE_ATTEMPT.execute(cursor, tenant, execution_id, attempt, reason)
    return cursor.fetchone() is not None


def end_cancelled(cursor: Cursor, tenant: str, execution_id: str, attempt: int, *, reason: str) -> bool:
    """Settle as cancelled, by the attempt's own wish."""
    _END_CANCELLED.execute(cursor, tenant, execution_id, attempt, reason)
    return cursor.fetchone() is not None
