"""Turns: when each of many lost executions of a tenant may start again, agreed on by any number of reapers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from cloacina_celery.core import pacing
from cloacina_celery.store.bounded import LOOK_TIMEOUT_MS, bounded_transaction
from cloacina_celery.store.database import Database
from cloacina_celery.store.driver_errors import LockNotAvailable


def take(
    database: Database, tenant: str, *, rate: float, burst: int, draws: Sequence[float]
) -> list[datetime | None]:
    """Take one turn for each draw, and return when each comes, on the database's clock; ``None`` is at once.

    It is a transaction of its own, so that the tenant's row in the catalog is locked for a moment only: whoever
    recovers a tenant never waits for another reaper's work, nor, with rows of the tenant in its hands, for a
    `drop` that waits for these rows. A recovery that is rolled back after it has wasted its turns.

    Somebody may hold the row for longer (a drop, a person's open transaction), or it may be gone. Then nobody else
    is reckoned with: work goes on, as fast as if these were the only ones.

    Args:
        rate: executions a second and tenant.
        burst: how many come at once after a quiet time.
        draws: numbers from [0, 1), for the jitter.
    """
    try:
        with bounded_transaction(database, lock_timeout_ms=LOOK_TIMEOUT_MS) as cursor:
            cursor.execute(
                """
                UPDATE cloacina.tenants SET recovery_paced_until = greatest(
                    least(coalesce(recovery_paced_until, '-infinity'),
                          clock_timestamp() + make_interval(secs => %(longest)s)),
                    clock_timestamp() - make_interval(secs => %(burst)s)) + make_interval(secs => %(taken)s)
                WHERE name = %(tenant)s
                RETURNING clock_timestamp(),
                    extract(epoch FROM recovery_paced_until - clock_timestamp())::float8 - %(taken)s
                """,
                {
                    "tenant": tenant,
                    "longest": pacing.LONGEST_LEAD,
                    "burst": burst / rate,
                    "taken": len(draws) / rate,
                },
            )
            row = cursor.fetchone()
    except LockNotAvailable:
        row = None
    if row is None:
        with database.statement() as cursor:
            cursor.execute("SELECT clock_timestamp(), %s::float8", (-burst / rate,))
            row = cursor.fetchone()
    assert row is not None
    now, lead = row
    waits = pacing.delays(lead=lead, rate=rate, draws=draws)
    return [now + timedelta(seconds=wait) if wait else None for wait in waits]
