"""Retention: what has ended long ago is deleted, a small batch at a time."""

from __future__ import annotations

from cloacina_celery.store.database import Cursor
from cloacina_celery.store.statements import Statement

FOR_EVER = 1e9
"""Seconds that stand for never: thirty years."""

_PRUNE = Statement(
    "prune",
    """
    WITH old AS (
        SELECT id, group_id FROM {s}.cloacina_executions
        WHERE settled_at < now() - make_interval(secs => least($1::float8, $2::float8))
          AND settled_at < now() - make_interval(
              secs => CASE state WHEN 'succeeded' THEN $1::float8 ELSE $2::float8 END)
        ORDER BY settled_at LIMIT $3::int FOR UPDATE SKIP LOCKED
    ), executions AS (
        DELETE FROM {s}.cloacina_executions AS e USING old WHERE e.id = old.id
    ), events AS (
        DELETE FROM {s}.cloacina_events AS v USING old WHERE v.execution_id = old.id
    ), chords AS (
        DELETE FROM {s}.cloacina_chords AS c USING old WHERE c.group_id = old.group_id
    )
    SELECT count(*) FROM old
    """,
)


def forget_workers(cursor: Cursor, *, stopped_after: float) -> None:
    """Delete the register's entries of workers that ended ``stopped_after`` seconds ago; 0 is for ever."""
    cursor.execute(
        "DELETE FROM cloacina.workers WHERE stopped_at < now() - make_interval(secs => %s)",
        (stopped_after or FOR_EVER,),
    )


def prune(cursor: Cursor, tenant: str, *, succeeded_after: float, failed_after: float, limit: int) -> int:
    """Delete ended executions with their events, oldest first; return how many.

    Args:
        succeeded_after: seconds for which succeeded ones are kept; 0 is for ever.
        failed_after: the same for failed, abandoned and cancelled ones.
        limit: how many at the most, so that no lock is held and no replica lags for long.
    """
    _PRUNE.execute(cursor, tenant, succeeded_after or FOR_EVER, failed_after or FOR_EVER, limit)
    row = cursor.fetchone()
    return int(row[0]) if row else 0
