"""Recovery: finding one tenant's orphaned rows, and moving them on by their budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from cloacina_celery.core.lifecycle import Abandon, Recover, after_loss
from cloacina_celery.core.protocol import EXPIRED, FENCE, OF_WORKER
from cloacina_celery.core.tenant import quote
from cloacina_celery.store.database import Cursor, note_met
from cloacina_celery.store.guards import may, where
from cloacina_celery.store.ringing import Ring, fetch_rings
from cloacina_celery.store.statements import Statement


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """A locked running row whose holder is gone."""

    execution_id: str
    attempt: int
    failures: int
    recoveries: int
    max_recoveries: int
    message: str

    @property
    def decision(self) -> Recover | Abandon:
        """What its recovery budget says."""
        return after_loss(recoveries=self.recoveries, max_recoveries=self.max_recoveries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What became of an orphan; ``ring`` is set where its message is to be published now."""

    execution_id: str
    attempt: int
    decision: Recover | Abandon
    not_before: datetime | None
    ring: Ring | None
    message: str
    error: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Glance:
    """Which kinds of work one tenant has for the reaper."""

    tenant: str
    is_due: bool
    is_expired: bool
    is_stranded: bool
    has_letters: bool


_ORPHAN_COLUMNS = "id, attempt, failures, recoveries, max_recoveries, message"

_LOCK_EXPIRED = Statement(
    "lock_expired",
    f"""
    SELECT {_ORPHAN_COLUMNS} FROM {{s}}.cloacina_executions AS e
    WHERE {where(EXPIRED)}
      AND ($2::boolean OR NOT EXISTS (
          SELECT FROM cloacina.workers AS w WHERE w.id = e.worker_id AND w.stopped_at IS NULL))
    ORDER BY lease_expires_at LIMIT $1::int FOR UPDATE SKIP LOCKED
    """,
)
_LOCK_OF_WORKER = Statement(
    "lock_of_worker",
    f"""
    SELECT {_ORPHAN_COLUMNS} FROM {{s}}.cloacina_executions
    WHERE {where(OF_WORKER, worker="$2::bigint")}
    ORDER BY lease_expires_at LIMIT $1::int FOR UPDATE SKIP LOCKED
    """,
)
# Not SKIP LOCKED: a child that died in the middle of its settlement holds the row until its backend notices.
_LOCK_ONE = Statement(
    "lock_one",
    f"""
    SELECT {_ORPHAN_COLUMNS} FROM {{s}}.cloacina_executions
    WHERE {where(FENCE)} FOR UPDATE
    """,
)
_RECOVER = Statement(
    "recover",
    f"""
    WITH recovered AS (
        UPDATE {{s}}.cloacina_executions
        SET state = 'pending', recoveries = recoveries + 1, lease_expires_at = NULL,
            run_at = greatest(now() + make_interval(secs => $3::float8), $5::timestamptz),
            rung_at = CASE WHEN $3::float8 = 0 AND $5::timestamptz IS NULL THEN now() END
        WHERE {may("recover")}
        RETURNING id, attempt, worker_id
    )
    INSERT INTO {{s}}.cloacina_events (execution_id, kind, attempt, worker_id, reason)
    SELECT id, 'recovered', attempt, worker_id, $4::text FROM recovered
    """,
)
_ABANDON = Statement(
    "abandon",
    f"""
    WITH abandoned AS (
        UPDATE {{s}}.cloacina_executions
        SET state = 'abandoned', lease_expires_at = NULL, settled_at = now(), error = $3::text
        WHERE {may("abandon")}
        RETURNING id, attempt, worker_id
    )
    INSERT INTO {{s}}.cloacina_events (execution_id, kind, attempt, worker_id, reason, error)
    SELECT id, 'abandoned', attempt, worker_id, $4::text, $3::text FROM abandoned
    """,
)
_RELEASE = Statement(
    "release",
    f"""
    WITH released AS (
        UPDATE {{s}}.cloacina_executions
        SET state = 'pending', releases = releases + 1, lease_expires_at = NULL, run_at = now(), rung_at = now()
        WHERE {may("release all")}
        RETURNING id, attempt, failures, recoveries, message, worker_id
    ), recorded AS (
        INSERT INTO {{s}}.cloacina_events (execution_id, kind, attempt, worker_id, reason)
        SELECT id, 'released', attempt, worker_id, $2::text FROM released
    )
    SELECT id, attempt, failures, recoveries, message FROM released
    """,
)


def glance(cursor: Cursor, tenants: Sequence[str], *, stranded_after: float) -> list[Glance]:
    """See, in one statement over three small indexes each, which of the tenants have work for the reaper."""
    branches = " UNION ALL ".join(
        f"""SELECT %s,
        EXISTS (SELECT FROM {quote(t)}.cloacina_executions
                WHERE {may("ring")}),
        EXISTS (SELECT FROM {quote(t)}.cloacina_executions WHERE {where(EXPIRED)}),
        EXISTS (SELECT FROM {quote(t)}.cloacina_executions
                WHERE {may("ring again", stranded_after="%s")}),
        EXISTS (SELECT FROM {quote(t)}.cloacina_outbox WHERE created_at < now() - make_interval(secs => %s))"""
        for t in tenants
    )
    note_met(cursor, *tenants)
    cursor.execute(
        branches, [value for tenant in tenants for value in (tenant, stranded_after, stranded_after)]
    )
    return [
        Glance(tenant=tenant, is_due=due, is_expired=expired, is_stranded=stranded, has_letters=letters)
        for tenant, due, expired, stranded, letters in cursor.fetchall()
        if due or expired or stranded or letters
    ]


def lock_expired(cursor: Cursor, tenant: str, *, limit: int, of_known: bool = True) -> list[Orphan]:
    """Lock running rows whose lease ran out on the database's clock.

    Args:
        of_known: ``False`` leaves out those whose holder is a worker that has not signed off or been buried.
    """
    _LOCK_EXPIRED.execute(cursor, tenant, limit, of_known)
    return _orphans(cursor)


def lock_of_worker(cursor: Cursor, tenant: str, worker_id: int, *, limit: int) -> list[Orphan]:
    """Lock the running rows of one dead worker."""
    _LOCK_OF_WORKER.execute(cursor, tenant, limit, worker_id)
    return _orphans(cursor)


def lock_attempt(cursor: Cursor, tenant: str, execution_id: str, attempt: int) -> list[Orphan]:
    """Lock one running row, if it still runs that attempt."""
    _LOCK_ONE.execute(cursor, tenant, execution_id, attempt)
    return _orphans(cursor)


def holders(
    cursor: Cursor, tenants: Sequence[str], worker_ids: Sequence[int]
) -> list[tuple[str, frozenset[int]]]:
    """See, in one statement, in each of the tenants which of the workers have running rows."""
    branches = " UNION ALL ".join(
        f"""SELECT %s, ARRAY(SELECT DISTINCT worker_id FROM {quote(t)}.cloacina_executions
                             WHERE {where(OF_WORKER, worker="ANY(%s)")})"""
        for t in tenants
    )
    note_met(cursor, *tenants)
    cursor.execute(branches, [value for tenant in tenants for value in (tenant, list(worker_ids))])
    return [(tenant, frozenset(holding)) for tenant, holding in cursor.fetchall()]


def recover(
    cursor: Cursor, tenant: str, orphan: Orphan, *, reason: str, not_before: datetime | None = None
) -> Recovered:
    """Move a locked orphan on by its recovery budget: pending again, or abandoned.

    Args:
        not_before: the turn that it was given among many, on the database's clock; ``None`` is now.
    """
    decision = orphan.decision
    ring, error = None, None
    match decision:
        case Recover(delay=delay):
            _RECOVER.execute(cursor, tenant, orphan.execution_id, orphan.attempt, delay, reason, not_before)
            if delay == 0 and not_before is None:
                ring = Ring(
                    tenant=tenant,
                    execution_id=orphan.execution_id,
                    attempt=orphan.attempt + 1,
                    failures=orphan.failures,
                    recoveries=orphan.recoveries + 1,
                    message=orphan.message,
                    goes_first=True,
                )
        case Abandon(reason=why):
            error = {
                "exc_type": "WorkerLostError",
                "exc_module": "billiard.exceptions",
                "exc_message": [f"abandoned: {why}; the last time: {reason}"],
                "traceback": None,
            }
            _ABANDON.execute(
                cursor, tenant, orphan.execution_id, orphan.attempt, json.dumps(error), f"{why}; {reason}"
            )
    return Recovered(
        execution_id=orphan.execution_id,
        attempt=orphan.attempt,
        decision=decision,
        not_before=not_before,
        ring=ring,
        message=orphan.message,
        error=error,
    )


def release(cursor: Cursor, tenant: str, worker_id: int, *, reason: str) -> list[Ring]:
    """Give back everything a worker that is shutting down still holds; no budget is spent."""
    _RELEASE.execute(cursor, tenant, worker_id, reason)
    return [replace(ring, goes_first=True) for ring in fetch_rings(cursor, tenant)]


def _orphans(cursor: Cursor) -> list[Orphan]:
    return [
        Orphan(execution_id=i, attempt=a, failures=f, recoveries=r, max_recoveries=m, message=message)
        for i, a, f, r, m, message in cursor.fetchall()
    ]
