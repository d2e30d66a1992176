"""The workers' register, and how a worker's death is seen: its advisory lock goes with its connection."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from cloacina_celery.store.database import Cursor

LOCK_CLASS = 0x636C6F63  # "cloc": the first half of the advisory lock's key, the second is the worker's id

RESTART_GRACE = 10.0
"""Seconds after the server's start in which no worker is called dead that has not shown itself since: every one lost
its lock with the server, and takes it back before it writes its next heartbeat."""

BELIEVED_FOR = 5.0
"""Seconds after its last sign for which a worker's word counts about the messages that it has reserved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadWorker:
    """A worker that is gone without having said so."""

    worker_id: int
    name: str
    tenants: tuple[str, ...]
    had_lock: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Register:
    """What one look into the register shows.

    ``database_at`` is the database's clock in seconds, ``known`` counts the workers that have not signed off,
    ``silent`` those of them that are dead or have given no sign for as long as a lease.
    """

    database_at: float
    known: int
    silent: int
    dead: tuple[DeadWorker, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """Messages of one tenant that were delivered to a worker and have not started.

    ``count`` is all of them; ``ids`` names the executions of those that have been there for some seconds.
    """

    count: int
    ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AliveWorker:
    """A worker that has not ended, as far as the register knows."""

    worker_id: int
    name: str
    tenants: tuple[str, ...]
    started_at: datetime
    heartbeat_at: datetime
    silent_for: float
    """Seconds since its last sign, on the database's clock."""
    swept_for: float | None
    """Seconds since it last ended a sweep of its tenants; ``None`` where it never did."""


def alive(cursor: Cursor) -> list[AliveWorker]:
    """List the workers that have neither signed off nor been found dead."""
    return _select(cursor, "stopped_at IS NULL", {})


def last_sweeps(cursor: Cursor) -> dict[str, float]:
    """Tell for how many seconds each tenant has not been swept by a worker of its own; others are left out."""
    cursor.execute(
        "SELECT tenant, extract(epoch FROM now() - max(swept_at))::float8"
        " FROM cloacina.workers, unnest(tenants) AS tenant WHERE swept_at IS NOT NULL GROUP BY tenant"
    )
    return dict(cursor.fetchall())


def newest_on(cursor: Cursor, *, host: str, node: str | None = None) -> AliveWorker | None:
    """Return the worker that was registered last on a host, or under a node name there, be it ended or not."""
    found = _select(
        cursor,
        # A name is "node on host pid n": see `keeper.worker_name`.
        "split_part(split_part(name, ' on ', 2), ' pid ', 1) = %(host)s"
        " AND (%(node)s::text IS NULL OR split_part(name, ' on ', 1) = %(node)s)",
        {"host": host, "node": node},
    )
    return found[-1] if found else None


def _select(cursor: Cursor, condition: str, values: dict[str, object]) -> list[AliveWorker]:
    cursor.execute(
        "SELECT id, name, tenants, started_at, heartbeat_at, extract(epoch FROM now() - heartbeat_at)::float8,"
        " extract(epoch FROM now() - swept_at)::float8"
        f" FROM cloacina.workers WHERE {condition} ORDER BY id",
        values,
    )
    return [
        AliveWorker(
            worker_id=i, name=name, tenants=tuple(tenants), started_at=started, heartbeat_at=beat,
            silent_for=silent, swept_for=swept,
        )
        for i, name, tenants, started, beat, silent, swept in cursor.fetchall()
    ]  # fmt: skip


def register(cursor: Cursor, *, name: str, tenants: Sequence[str]) -> int:
    """Enter a worker and return its id; until it holds its lock only its leases speak for it."""
    cursor.execute(
        "INSERT INTO cloacina.workers (name, tenants, has_lock) VALUES (%s, %s, false) RETURNING id",
        (name, list(tenants)),
    )
    row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def hold_lock(cursor: Cursor, worker_id: int) -> None:
    """Take the worker's liveness lock on this connection, for as long as the connection lives."""
    # lock_timeout is this connection's own: a predecessor connection of ours may not be gone yet.
    cursor.execute("SET lock_timeout = '1s'")
    cursor.execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, _lock_key(worker_id)))
    # One that was buried while it was frozen and its connection cut is back: its next death must be seen too.
    cursor.execute(
        "UPDATE cloacina.workers SET has_lock = true, heartbeat_at = now(), stopped_at = NULL, end_reason = NULL"
        " WHERE id = %s",
        (worker_id,),
    )


def set_tenants(cursor: Cursor, worker_id: int, tenants: Sequence[str]) -> None:
    """Enter which tenants a worker may hold executions of."""
    cursor.execute("UPDATE cloacina.workers SET tenants = %s WHERE id = %s", (list(tenants), worker_id))


def heartbeat(
    cursor: Cursor,
    worker_id: int,
    reserved: Mapping[str, Reserved] | None = None,
    *,
    swept_for: float | None = None,
) -> None:
    """Say that the worker's background work is going on; one that was buried by mistake is back with it.

    Args:
        reserved: by tenant, the messages that were delivered to the worker and have not started.
        swept_for: seconds since it last ended a sweep of its tenants; ``None`` leaves that as it is.
    """
    stored = {tenant: {"count": one.count, "ids": list(one.ids)} for tenant, one in (reserved or {}).items()}
    cursor.execute(
        "UPDATE cloacina.workers SET heartbeat_at = now(), stopped_at = NULL, end_reason = NULL, reserved = %s, "
        "swept_at = coalesce(now() - make_interval(secs => %s::float8), swept_at) WHERE id = %s",
        (json.dumps(stored), swept_for, worker_id),
    )


def stop(cursor: Cursor, worker_id: int, *, reason: str) -> None:
    """Enter that the worker has ended; its rows are settled, released or recovered."""
    cursor.execute(
        "UPDATE cloacina.workers SET stopped_at = now(), end_reason = %s WHERE id = %s AND stopped_at IS NULL",
        (reason, worker_id),
    )


def look(cursor: Cursor, *, grace: float, lease_ttl: float) -> Register:
    """Look who of the known workers is dead: who has no liveness lock ``grace`` seconds after the last heartbeat.

    A worker that never had a lock (behind a pooler) is called dead when its leases must all have run out.
    """
    cursor.execute(
        """
        WITH known AS MATERIALIZED (
            SELECT w.id, w.name, w.has_lock, ARRAY(
                       -- Of a removed tenant there is nothing left to recover.
                       SELECT unnest(w.tenants) EXCEPT
                       SELECT name FROM cloacina.tenants WHERE state = 'removed' ORDER BY 1) AS tenants,
                   w.heartbeat_at < now() - make_interval(secs => %(ttl)s) AS is_silent,
                   (pg_postmaster_start_time() < now() - make_interval(secs => %(restart)s)
                    OR pg_postmaster_start_time() < w.heartbeat_at)
                   AND CASE WHEN w.has_lock
                       THEN w.heartbeat_at < now() - make_interval(secs => %(grace)s) AND NOT EXISTS (
                           SELECT FROM pg_locks l
                           WHERE l.locktype = 'advisory' AND l.classid = %(class)s AND l.objsubid = 2
                             AND l.objid = (w.id & 2147483647)::oid AND l.granted
                             AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()))
                       ELSE w.heartbeat_at < now() - 2 * make_interval(secs => %(ttl)s) END AS is_dead
            FROM cloacina.workers w WHERE w.stopped_at IS NULL
        )
        SELECT extract(epoch FROM clock_timestamp())::float8, count.known, count.silent, dead.*
        FROM (SELECT count(*) AS known, count(*) FILTER (WHERE is_dead OR is_silent) AS silent FROM known) count
        LEFT JOIN (SELECT id, name, tenants, has_lock FROM known WHERE is_dead) dead ON true
        """,
        {"restart": RESTART_GRACE, "grace": grace, "class": LOCK_CLASS, "ttl": lease_ttl},
    )
    rows = cursor.fetchall()
    database_at, known, silent = rows[0][:3]
    return Register(
        database_at=database_at,
        known=known,
        silent=silent,
        dead=tuple(
            DeadWorker(
                worker_id=worker_id,
                name=name,
                tenants=tuple(tenants),
                had_lock=had_lock,
                reason="its liveness lock is gone" if had_lock else f"no heartbeat for {2 * lease_ttl:g} s",
            )
            for _, _, _, worker_id, name, tenants, had_lock in rows
            if worker_id is not None
        ),
    )


def lock_dead(cursor: Cursor, worker_ids: Sequence[int]) -> frozenset[int]:
    """Lock dead workers' entries for the transaction; return those that no other reaper is at or done with."""
    cursor.execute(
        "SELECT id FROM cloacina.workers WHERE id = ANY(%s) AND stopped_at IS NULL FOR UPDATE SKIP LOCKED",
        (list(worker_ids),),
    )
    return frozenset(worker_id for (worker_id,) in cursor.fetchall())


def forget_all_of(cursor: Cursor, tenants: Sequence[str]) -> None:
    """Delete the entries of the workers that served these tenants and no others."""
    cursor.execute("DELETE FROM cloacina.workers WHERE tenants <@ %s", (list(tenants),))


def _lock_key(worker_id: int) -> int:
    return worker_id & 0x7FFFFFFF
