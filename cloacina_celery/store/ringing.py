"""Ringing: which pending rows a message leaves for, for the first time or once more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cloacina_celery.store.database import Cursor
from cloacina_celery.store.guards import may
from cloacina_celery.store.statements import Statement
from cloacina_celery.store.workers import BELIEVED_FOR


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


# What a suspended tenant's claims would decline is not rung.
_RING_DUE = Statement(
    "ring_due",
    f"""
    UPDATE {{s}}.cloacina_executions SET rung_at = now()
    WHERE id IN (
        SELECT id FROM {{s}}.cloacina_executions
        WHERE {may("ring")} AND EXISTS (
            SELECT FROM cloacina.tenants WHERE name = {{t}} AND state IN ('active', 'draining'))
        ORDER BY run_at LIMIT $1::int FOR UPDATE SKIP LOCKED
    )
    RETURNING id, attempt, failures, recoveries, message, run_at
    """,
)

# What a living worker has reserved is in no queue and is not lost: it waits for a free slot there. Of what has
# been there for a while the ids are known, so a message there whose row ran elsewhere meanwhile hides no lost one.
_RESERVED = f"""
    SELECT (reserved -> $1::text ->> 'count')::bigint AS number, reserved -> $1::text -> 'ids' AS ids
    FROM cloacina.workers
    WHERE stopped_at IS NULL AND heartbeat_at > now() - interval '{BELIEVED_FOR} s' AND reserved -> $1::text IS NOT NULL
"""

_COUNT_RUNG = Statement(
    "count_rung",
    f"""
    WITH reserved AS ({_RESERVED})
    SELECT (SELECT count(*) FROM {{s}}.cloacina_executions WHERE state = 'pending' AND rung_at < 'infinity')
         - (SELECT coalesce(sum(number - jsonb_array_length(ids)), 0) FROM reserved)
         - (SELECT count(*) FROM {{s}}.cloacina_executions
            WHERE id IN (SELECT jsonb_array_elements_text(ids) FROM reserved)
              AND state = 'pending' AND rung_at < 'infinity')
    """,
)

# Queues are first in, first out. So a row is overtaken, and its message most likely lost, when one has been
# claimed that was rung later and never again. Those that go first, or were rung again, say nothing about it.
_OVERTAKEN = """
    SELECT max(rung_at) FROM (
        (SELECT rung_at, submitted_at FROM {s}.cloacina_executions WHERE state = 'running')
        UNION ALL
        (SELECT rung_at, submitted_at FROM {s}.cloacina_executions
         WHERE settled_at IS NOT NULL AND attempt > 0 ORDER BY settled_at DESC LIMIT 100)
    ) AS claimed WHERE rung_at = submitted_at
"""

_RING_STRANDED = Statement(
    "ring_stranded",
    f"""
    WITH reserved AS ({_RESERVED.replace("$1", "$5")}), rung AS (
        UPDATE {{s}}.cloacina_executions SET rung_at = now()
        WHERE id IN (
            SELECT id FROM {{s}}.cloacina_executions
            WHERE {may("ring again")}
              AND (NOT $3::boolean OR rung_at < greatest(now() - make_interval(secs => $4::float8), ({_OVERTAKEN})))
              AND id NOT IN (SELECT jsonb_array_elements_text(ids) FROM reserved)
              AND EXISTS (SELECT FROM cloacina.tenants WHERE name = {{t}} AND state IN ('active', 'draining'))
            ORDER BY rung_at LIMIT $1::int FOR UPDATE SKIP LOCKED
        )
        RETURNING id, attempt, failures, recoveries, message, submitted_at
    ), recorded AS (
        INSERT INTO {{s}}.cloacina_events (execution_id, kind, attempt, reason)
        SELECT id, 'rung_again', attempt, 'nobody claimed it, and the queue held too few messages' FROM rung
    )
    SELECT id, attempt, failures, recoveries, message FROM rung ORDER BY submitted_at
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


def ring_due(cursor: Cursor, tenant: str, *, limit: int) -> list[Ring]:
    """Take the rows that are due and that nobody has rung for yet, oldest first."""
    _RING_DUE.execute(cursor, tenant, limit)
    rows = sorted(cursor.fetchall(), key=lambda row: row[5])
    rings = [_ring(tenant, *row[:5]) for row in rows]
    # Lost at its first start, and now its turn among many has come. Who was lost more often may kill its worker.
    return [
        replace(ring, goes_first=True) if ring.attempt == 2 and ring.recoveries == 1 else ring
        for ring in rings
    ]


def count_rung(cursor: Cursor, tenant: str) -> int:
    """Count the pending rows whose message should be in the queue."""
    _COUNT_RUNG.execute(cursor, tenant, tenant)
    row = cursor.fetchone()
    return int(row[0]) if row else 0


def ring_stranded(
    cursor: Cursor,
    tenant: str,
    *,
    limit: int,
    stranded_after: float,
    only_overtaken: bool = False,
    lost_for: float | None = None,
) -> list[Ring]:
    """Take the rows rung longest ago and still unclaimed; their attempt number stays as it is.

    Args:
        only_overtaken: leave those alone that may still wait for their turn: no row that was rung after them has
            been claimed.
        lost_for: what was rung longer ago than these seconds counts as overtaken: the queue was seen empty then.
    """
    _RING_STRANDED.execute(cursor, tenant, limit, stranded_after, only_overtaken, lost_for, tenant)
    return fetch_rings(cursor, tenant)


def unring(cursor: Cursor, tenant: str, unsent: Sequence[tuple[str, int]]) -> bool:
    """Note that the messages for ``(execution_id, attempt)`` did not leave or are gone, so that a poll publishes them.

    Returns:
        Whether a row waits for one of them.
    """
    _UNRING.execute(cursor, tenant, [i for i, _ in unsent], [attempt for _, attempt in unsent])
    return cursor.fetchone() is not None


def fetch_rings(cursor: Cursor, tenant: str) -> list[Ring]:
    """Read id, attempt, failures, recoveries and message of rows whose next attempt is to be rung for."""
    return [_ring(tenant, *row) for row in cursor.fetchall()]


def _ring(tenant: str, execution_id: str, attempt: int, failures: int, recoveries: int, message: str) -> Ring:
    return Ring(
        tenant=tenant,
        execution_id=execution_id,
        attempt=attempt + 1,
        failures=failures,
        recoveries=recoveries,
        message=message,
    )
