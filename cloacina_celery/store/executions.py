"""What submitters and workers do to an execution's row: submit, claim, heartbeat, settle, release.

Every write of a worker is fenced by ``(id, attempt, state = 'running')``: zero rows mean that the lease is lost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cloacina_celery.core.lifecycle import Fail, Retry, after_failure
from cloacina_celery.core.protocol import FENCE, NEVER_RAN, PARKED
from cloacina_celery.core.retry import RetryPolicy
from cloacina_celery.core.tenancy import FIRST_EPOCH
from cloacina_celery.store.database import Cursor
from cloacina_celery.store.guards import may, where
from cloacina_celery.store.statements import Statement


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """Everything a new row is made of.

    ``delay`` is in seconds on the database's clock, ``eta`` an aware instant; neither means now.
    ``is_rung``: whether a message leaves right after the commit, if the row is due.
    """

    execution_id: str
    task: str
    message: str
    max_recoveries: int
    policy: str | None = None
    delay: float | None = None
    eta: datetime | None = None
    group_id: str | None = None
    group_index: int | None = None
    is_rung: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A lease on one attempt."""

    attempt: int
    failures: int
    recoveries: int
    policy: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """What it takes to publish a pending execution's message again.

    One that ``goes_first`` had started before its worker was lost or shut down: it has waited its turn already.
    """

    tenant: str
    execution_id: str
    attempt: int
    failures: int
    recoveries: int
    message: str
    goes_first: bool = False


# The conflict's WHERE lets two kinds of existing rows through: those parked by a replacement (see `park`) and
# those entered as failed with what they were to follow (see `submit_failed`), when that was requeued.
# A row that is due is born rung: its message leaves right after the commit, and if it does not,
# the row says when it should have. A delayed row is born unrung, and so is one whose broker is known to be down;
# the poll rings when it is due.
_SUBMIT = Statement(
    "submit",
    f"""
    WITH timed AS MATERIALIZED (
        SELECT coalesce($6::timestamptz, now() + make_interval(secs => $7::float8), now()) AS run_at
    ), submitted AS (
        INSERT INTO {{s}}.cloacina_executions AS executions
            (id, task, message, max_recoveries, policy, run_at, rung_at, group_id, group_index)
        SELECT $1::text, $2::text, $3::text, $4::int, $5::text, run_at,
               CASE WHEN run_at <= now() AND $10::bool THEN now() END, $8::text, $9::int
        FROM timed
        ON CONFLICT (id) DO UPDATE
        SET task = excluded.task, message = excluded.message, policy = excluded.policy,
            run_at = excluded.run_at, rung_at = excluded.rung_at, max_recoveries = excluded.max_recoveries,
            state = 'pending', error = NULL, settled_at = NULL,
            group_id = excluded.group_id, group_index = excluded.group_index
        WHERE {where(PARKED, row="executions.")}
           OR {where(NEVER_RAN, row="executions.")}
        RETURNING id, attempt, rung_at
    ), recorded AS (
        INSERT INTO {{s}}.cloacina_events (execution_id, kind, attempt) SELECT id, 'submitted', attempt FROM submitted
    )
    SELECT attempt, rung_at IS NOT NULL FROM submitted
    """,
    hot=True,
)

# The claim's commit need not reach the disk: if the server loses it, the row is pending again and the fence
# refuses everything this attempt does. That halves the price of a short task.
_CLAIM = Statement(
    "claim",
    f"""
    WITH claimed AS (
        UPDATE {{s}}.cloacina_executions
        SET state = 'running', attempt = attempt + 1, worker_id = $3::bigint, started_at = now(),
            lease_expires_at = now() + make_interval(secs => $4::float8), policy = coalesce(policy, $5::text)
        WHERE {may("claim")}
          AND EXISTS (SELECT FROM cloacina.tenants
                      WHERE name = {{t}} AND epoch = $7::int AND state IN ('active', 'draining'))
        RETURNING id, attempt, failures, recoveries, policy
    ), recorded AS (
        INSERT INTO {{s}}.cloacina_events (execution_id, kind, attempt, worker_id, reason)
        SELECT id, 'claimed', attempt, $3::bigint, $6::text FROM claimed
    )
    SELECT attempt, failures, recoveries, policy, set_config('synchronous_commit', 'off', true) FROM claimed
    """,
    hot=True,
)

# The event, not the worker, says whose claim it was: a doubled message may be in another child of the same worker.
_FIND_CLAIM = Statement(
    "find_claim",
    f"""
    UPDATE {{s}}.cloacina_executions SET lease_expires_at = now() + make_interval(secs => $4::float8)
    WHERE {may("find claim")} AND EXISTS (
        SELECT FROM {{s}}.cloacina_events
        WHERE execution_id = $1::text AND attempt = $2::int AND kind = 'claimed' AND reason = $3::text)
    RETURNING attempt, failures, recoveries, policy
    """,
)

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

_SUBMIT_FAILED = Statement(
    "submit_failed",
    """
    WITH submitted AS (
        INSERT INTO {s}.cloacina_executions
            (id, task, message, max_recoveries, state, error, settled_at, group_id, group_index)
        VALUES ($1::text, $2::text, $3::text, 0, 'failed', $4::text, now(), $5::text, $6::int)
        ON CONFLICT (id) DO NOTHING
        RETURNING id
    )
    INSERT INTO {s}.cloacina_events (execution_id, kind, attempt, error, reason)
    SELECT id, 'failed', 0, $4::text, $7::text FROM submitted
    """,
)

_HEARTBEAT = Statement(
    "heartbeat",
    f"""
    UPDATE {{s}}.cloacina_executions AS e
    SET lease_expires_at = now() + make_interval(secs => $3::float8)
    FROM unnest($1::text[], $2::int[]) AS held (id, attempt)
    WHERE {may("heartbeat", row="e.", id_="held.id", attempt="held.attempt")}
    RETURNING e.id
    """,
)

_IS_HELD = Statement(
    "is_held",
    f"""
    SELECT 1 FROM {{s}}.cloacina_executions WHERE {where(FENCE)}
    """,
)

_UNRING = Statement(
    "unring",
    f"""
    UPDATE {{s}}.cloacina_executions AS e SET rung_at = NULL
    FROM unnest($1::text[], $2::int[]) AS unsent (id, attempt)
    WHERE {may("unring", row="e.", id_="unsent.id", attempt="unsent.attempt")}
    RETURNING 1
    """,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A new pending row: the attempt its first message rings for, and whether that message leaves now."""

    attempt: int
    is_due: bool


def submit(cursor: Cursor, tenant: str, submission: Submission, *, prepare: bool = False) -> Submitted | None:
    """Insert a pending row; ``None`` if an execution of this id exists already."""
    _SUBMIT.execute(
        cursor, tenant, submission.execution_id, submission.task, submission.message, submission.max_recoveries,
        submission.policy, submission.eta, submission.delay, submission.group_id, submission.group_index,
        submission.is_rung, prepare=prepare,
    )  # fmt: skip
    row = cursor.fetchone()
    return None if row is None else Submitted(attempt=row[0] + 1, is_due=row[1])


def submit_failed(cursor: Cursor, tenant: str, submission: Submission, *, error: str, reason: str) -> None:
    """Insert a row that will never run, as failed: what waits for it must learn of it."""
    _SUBMIT_FAILED.execute(
        cursor, tenant, submission.execution_id, submission.task, submission.message, error,
        submission.group_id, submission.group_index, reason,
    )  # fmt: skip


def claim(
    cursor: Cursor,
    tenant: str,
    execution_id: str,
    *,
    attempt: int,
    worker_id: int,
    lease_ttl: float,
    policy: str | None,
    epoch: int = FIRST_EPOCH,
    claimant: str | None = None,
    prepare: bool = False,
) -> Claim | None:
    """Open the lease for ``attempt``; ``None`` declines a message that is stale, doubled or early.

    So it does while the tenant is suspended, and where the message is of another ``epoch`` of the tenant.

    Args:
        claimant: says in words who claims, and so that no other claim says the same; see `find_claim`.
    """
    _CLAIM.execute(
        cursor, tenant, execution_id, attempt, worker_id, lease_ttl, policy, claimant, epoch, prepare=prepare
    )
    return _claim(cursor)


def find_claim(
    cursor: Cursor, tenant: str, execution_id: str, *, attempt: int, claimant: str, lease_ttl: float
) -> Claim | None:
    """Extend the lease that an earlier `claim` opened without its answer arriving; ``None`` if it did not.

    Only whoever says the same ``claimant`` finds it, so of two who hold a doubled message never both.
    """
    _FIND_CLAIM.execute(cursor, tenant, execution_id, attempt, claimant, lease_ttl)
    return _claim(cursor)


def _claim(cursor: Cursor) -> Claim | None:
    row = cursor.fetchone()
    if row is None:
        return None
    return Claim(attempt=row[0], failures=row[1], recoveries=row[2], policy=row[3])


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


def heartbeat(
    cursor: Cursor, tenant: str, held: Sequence[tuple[str, int]], *, lease_ttl: float
) -> frozenset[str]:
    """Extend the leases of ``(execution_id, attempt)`` pairs; return the ids that are still held."""
    _HEARTBEAT.execute(cursor, tenant, [i for i, _ in held], [attempt for _, attempt in held], lease_ttl)
    return frozenset(row[0] for row in cursor.fetchall())


def is_held(cursor: Cursor, tenant: str, execution_id: str, attempt: int) -> bool:
    """Tell whether the attempt still holds its execution."""
    _IS_HELD.execute(cursor, tenant, execution_id, attempt)
    return cursor.fetchone() is not None


def unring(cursor: Cursor, tenant: str, unsent: Sequence[tuple[str, int]]) -> bool:
    """Note that the messages for ``(execution_id, attempt)`` did not leave or are gone, so that a poll publishes them.

    Returns:
        Whether a row waits for one of them.
    """
    _UNRING.execute(cursor, tenant, [i for i, _ in unsent], [attempt for _, attempt in unsent])
    return cursor.fetchone() is not None
