"""What submitters and workers do to an execution's row until its attempt ends: submit, claim, heartbeat.

Every write of a worker is fenced by ``(id, attempt, state = 'running')``: zero rows mean that the lease is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cloacina_celery.core.protocol import FENCE, NEVER_RAN, PARKED
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


# The conflict's WHERE lets two kinds of existing rows through: those parked by a replacement (see
# `settlements.park`) and those entered as failed with what they were to follow (see `submit_failed`), when that was
# requeued.
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
