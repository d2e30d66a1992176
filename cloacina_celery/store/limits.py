"""Tenants' limits: kept in the catalog, audited, and decided at the claim, under one lock per tenant.

A message that finds no room leaves its row waiting: pending, ``rung_at`` at infinity, so that neither the poll nor
the sweep rings it. Whoever frees a slot rings the row that has waited longest. What runs is counted, not booked:
a crash leaves no count behind that would have to be put right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import NamedTuple

from cloacina_celery.core.limits import Limits
from cloacina_celery.core.protocol import WAITING
from cloacina_celery.core.tenancy import FIRST_EPOCH, Verb
from cloacina_celery.core.tenant import quote
from cloacina_celery.store import audit, catalog, executions
from cloacina_celery.store.bounded import LOCK_TIMEOUT_MS
from cloacina_celery.store.database import Cursor, note_met
from cloacina_celery.store.executions import Claim
from cloacina_celery.store.guards import may, where
from cloacina_celery.store.ringing import Ring
from cloacina_celery.store.statements import Statement

LOCK_CLASS = 0x636C6F6D  # "clom": the first half of the advisory lock's key, the second is the schema's hash

NO_LIMIT = 2**31 - 1

COMING = 1.0
"""Seconds for which a row that was rung is expected to come for its slot, so that no second one is rung for it."""

# Two statements in one message: the second one's snapshot is taken when the lock is held, so it sees the claims of
# all who held it before.
_LOCK = f"SELECT pg_advisory_xact_lock({LOCK_CLASS}, hashtext('{{s}}'));"
_ALONE = Statement("limits_alone", _LOCK)
_ROOM = Statement(
    "room",
    _LOCK
    + """
    SELECT CASE WHEN t.is_paused THEN 0 ELSE least(
               CASE WHEN t.max_concurrent_tasks IS NOT NULL THEN t.max_concurrent_tasks - (
                   SELECT count(*) FROM {s}.cloacina_executions WHERE state = 'running') END,
               CASE WHEN t.max_rate IS NOT NULL THEN floor(
                   greatest(t.max_rate, 1) - coalesce((
                       SELECT greatest(extract(epoch FROM p.full_at - clock_timestamp()), 0)
                       FROM {s}.cloacina_pace p), 0) * t.max_rate + 1e-6) END,
               $2::int) END,
           t.max_rate,
           set_config('synchronous_commit', 'off', true),
           set_config('lock_timeout', coalesce($3::text, current_setting('lock_timeout')), true)
    FROM cloacina.tenants t WHERE t.name = $1::text
    """,
)
_SPEND = Statement(
    "spend",
    """
    INSERT INTO {s}.cloacina_pace AS p (full_at) VALUES (clock_timestamp() + make_interval(secs => 1 / $1::float8))
    ON CONFLICT (is_only) DO UPDATE
    SET full_at = greatest(p.full_at, clock_timestamp()) + make_interval(secs => 1 / $1::float8)
    """,
)
_RESCALE = Statement(
    "rescale",
    """
    UPDATE {s}.cloacina_pace SET full_at = clock_timestamp() + make_interval(secs => least(
        greatest(extract(epoch FROM full_at - clock_timestamp()), 0)::float8 * $1::float8, greatest($2::float8, 1)
    ) / $2::float8)
    """,
)
_FORGET_PACE = Statement("forget_pace", "DELETE FROM {s}.cloacina_pace")
_DEFER = Statement(
    "defer",
    f"""
    WITH deferred AS (
        UPDATE {{s}}.cloacina_executions SET rung_at = 'infinity'
        WHERE {may("defer")}
        RETURNING id, attempt
    )
    INSERT INTO {{s}}.cloacina_events (execution_id, kind, attempt, reason)
    SELECT id, 'deferred', attempt, 'its tenant is at its limit, or paused' FROM deferred
    RETURNING 1
    """,
)
_RING_WAITING = Statement(
    "ring_waiting",
    f"""
    UPDATE {{s}}.cloacina_executions SET rung_at = now()
    WHERE id IN (
        SELECT id FROM {{s}}.cloacina_executions
        WHERE {may("ring waiting")}
        ORDER BY run_at, id LIMIT $1::int FOR UPDATE SKIP LOCKED
    )
    RETURNING id, attempt, failures, recoveries, message, run_at
    """,
)
_COUNT_COMING = Statement(
    "count_coming",
    """
    SELECT count(*) FROM {s}.cloacina_executions
    WHERE state = 'pending' AND rung_at > now() - make_interval(secs => $1::float8) AND rung_at < 'infinity'
    """,
)
_FREE_WAITING = Statement(
    "free_waiting",
    f"UPDATE {{s}}.cloacina_executions SET rung_at = NULL WHERE {may('free waiting')}",
)
_SET = Statement(
    "set_limits",
    """
    UPDATE cloacina.tenants
    SET max_concurrent_tasks = $2::int, max_rate = $3::float8, is_paused = $4::boolean,
        weight = $5::int, limits_changed_at = clock_timestamp()
    WHERE name = $1::text
    """,
)


_COLUMNS = tuple(Limits.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Deferred:
    """The answer to a message that found no room: its row waits, and is rung when there is some."""


class Seat(NamedTuple):
    """What a worker's queues go by: whether a tenant is consumed, and how many turns it gets."""

    is_paused: bool
    weight: int


def seats(cursor: Cursor) -> dict[str, Seat]:
    """List the tenants that exist, and of each whether it is paused, and its weight."""
    cursor.execute("SELECT name, is_paused, weight FROM cloacina.tenants WHERE state <> 'removed'")
    return {name: Seat(is_paused, weight) for name, is_paused, weight in cursor.fetchall()}


def get(cursor: Cursor, tenant: str, *, lock: bool = False) -> Limits:
    """Read a tenant's limits; with ``lock`` they stay as they are until the transaction's end.

    Raises:
        UnknownTenant: the catalog does not know it, or knows that it was removed.
    """
    if lock:
        # In the order of the claims, and of those who remove the tenant: its lock, its table, its row.
        _ALONE.execute(cursor, tenant)
        catalog.open_tables(cursor, tenant)
        catalog.lock(cursor, tenant)
    catalog.require(cursor, tenant)
    cursor.execute(f"SELECT {', '.join(_COLUMNS)} FROM cloacina.tenants WHERE name = %s", (tenant,))
    return Limits(**dict(zip(_COLUMNS, cursor.fetchone() or (), strict=True)))


def put(cursor: Cursor, tenant: str, limits: Limits, *, by: str = catalog.NOBODY) -> None:
    """Change a tenant's limits; where none is left, what waits is free to be rung by the next poll.

    Starts that were spent ahead are counted on by the new rate: one that was raised holds at once.
    Needs a transaction: a claim that is being decided by the old limits waits, or is waited for.

    Raises:
        UnknownTenant: the catalog does not know it, or knows that it was removed.
    """
    before = get(cursor, tenant, lock=True)
    _SET.execute(
        cursor, tenant, tenant, limits.max_concurrent_tasks, limits.max_rate, limits.is_paused, limits.weight
    )
    if limits.max_rate is None:
        _FORGET_PACE.execute(cursor, tenant)
    elif before.max_rate is not None and before.max_rate != limits.max_rate:
        _RESCALE.execute(cursor, tenant, before.max_rate, limits.max_rate)
    if limits != before:
        epoch = catalog.lock(cursor, tenant).epoch
        audit.record(cursor, tenant, Verb.LIMIT, "set", epoch=epoch, by=by, detail=_change(before, limits))
    if not limits.is_limited:
        _FREE_WAITING.execute(cursor, tenant)


def limited(cursor: Cursor) -> list[str]:
    """List the tenants that have any limit."""
    cursor.execute(
        "SELECT name FROM cloacina.tenants "
        "WHERE is_paused OR max_concurrent_tasks IS NOT NULL OR max_rate IS NOT NULL"
    )
    return [name for (name,) in cursor.fetchall()]


def changed(cursor: Cursor, *, within: float) -> list[tuple[str, bool]]:
    """List the tenants whose limits were changed in the last ``within`` seconds, and whether each has any now."""
    cursor.execute(
        "SELECT name, is_paused OR max_concurrent_tasks IS NOT NULL OR max_rate IS NOT NULL FROM cloacina.tenants "
        "WHERE limits_changed_at > now() - make_interval(secs => %s)",
        (within,),
    )
    return [(name, bool(is_limited)) for name, is_limited in cursor.fetchall()]


def claim(
    cursor: Cursor,
    tenant: str,
    execution_id: str,
    *,
    attempt: int,
    worker_id: int,
    lease_ttl: float,
    policy: str | None,
    claimant: str | None = None,
    epoch: int = FIRST_EPOCH,
    prepare: bool = False,
) -> Claim | Deferred | None:
    """Open the lease for ``attempt`` if the tenant has room, else let its row wait; ``None`` declines the message.

    Needs a transaction: its lock makes the tenant's claims queue up, so that each counts those before it.

    Raises:
        LockNotAvailable: another transaction holds the row for longer than a second. The others' claims are not to
            wait for it: this one must let go of the tenant's lock, and be tried again.
    """
    room, rate = _room(cursor, tenant, row_timeout=str(LOCK_TIMEOUT_MS))
    if room > 0:
        claimed = executions.claim(
            cursor, tenant, execution_id, attempt=attempt, worker_id=worker_id, lease_ttl=lease_ttl, policy=policy,
            claimant=claimant, epoch=epoch, prepare=prepare,
        )  # fmt: skip
        if claimed is not None and rate is not None:
            _SPEND.execute(cursor, tenant, rate)
        return claimed
    _DEFER.execute(cursor, tenant, execution_id, attempt)
    return Deferred() if cursor.fetchone() is not None else None


def ring_next(cursor: Cursor, tenant: str) -> list[Ring]:
    """Take the row that has waited longest, if there is room for one. Needs a transaction."""
    room, _ = _room(cursor, tenant)
    return [replace(ring, goes_first=True) for ring in _ring_waiting(cursor, tenant, min(room, 1))]


def ring_waiting(cursor: Cursor, tenant: str, *, limit: int) -> list[Ring]:
    """Take as many waiting rows as there is room for, less those that are on their way. Needs a transaction."""
    room, _ = _room(cursor, tenant)
    if room <= 0:
        return []
    _COUNT_COMING.execute(cursor, tenant, COMING)
    row = cursor.fetchone()
    return _ring_waiting(cursor, tenant, min(room - (row[0] if row else 0), limit))


def waiting(cursor: Cursor, tenants: Sequence[str]) -> list[str]:
    """See, in one statement, which of the tenants have rows that wait for room."""
    if not tenants:
        return []
    note_met(cursor, *tenants)
    cursor.execute(
        " UNION ALL ".join(
            f"SELECT %s WHERE EXISTS (SELECT FROM {quote(tenant)}.cloacina_executions WHERE {where(WAITING)})"
            for tenant in tenants
        ),
        list(tenants),
    )
    return [name for (name,) in cursor.fetchall()]


def _change(before: Limits, limits: Limits) -> str:
    was, now = asdict(before), asdict(limits)
    return ", ".join(
        f"{column} = {_say(now[column])}, was {_say(was[column])}"
        for column in now
        if now[column] != was[column]
    )


def _say(value: float | None) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _room(cursor: Cursor, tenant: str, row_timeout: str | None = None) -> tuple[int, float | None]:
    _ROOM.execute(cursor, tenant, tenant, NO_LIMIT, row_timeout)
    row = cursor.fetchone()
    # A tenant that was dropped meanwhile has no row; whoever asks will find its tables gone.
    return (int(row[0]), row[1]) if row else (NO_LIMIT, None)


def _ring_waiting(cursor: Cursor, tenant: str, limit: int) -> list[Ring]:
    if limit <= 0:
        return []
    _RING_WAITING.execute(cursor, tenant, limit)
    rows: list[tuple[str, int, int, int, str, datetime]] = sorted(cursor.fetchall(), key=lambda row: row[5])
    return [
        Ring(
            tenant=tenant,
            execution_id=execution_id,
            attempt=attempt + 1,
            failures=failures,
            recoveries=recoveries,
            message=message,
        )
        for execution_id, attempt, failures, recoveries, message, _ in rows
    ]
