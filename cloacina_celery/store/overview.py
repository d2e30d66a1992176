"""What an operator sees of a tenant at a glance: how many executions in which state, and how old the oldest are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cloacina_celery.core.lifecycle import State
from cloacina_celery.store import catalog, workers
from cloacina_celery.store.bounded import bounded_transaction
from cloacina_celery.store.catalog import Tenant
from cloacina_celery.store.database import Database
from cloacina_celery.store.driver_errors import DriverError, one_line
from cloacina_celery.store.statements import Statement

_LOOK = Statement(
    "overview",
    """
    SELECT state, count(*),
           count(*) FILTER (WHERE state = 'pending' AND run_at <= now()),
           extract(epoch FROM now() - min(run_at) FILTER (WHERE state = 'pending' AND run_at <= now()))::float8,
           extract(epoch FROM now() - min(started_at) FILTER (WHERE state = 'running'))::float8,
           count(*) FILTER (WHERE state = 'running' AND lease_expires_at < now())
    FROM {s}.cloacina_executions GROUP BY state
    """,
)
_LETTERS = Statement("count_letters", "SELECT count(*) FROM {s}.cloacina_outbox")
_DUE = Statement(
    "count_due",
    "SELECT count(*) FROM {s}.cloacina_executions WHERE state = 'pending' AND run_at <= now()",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """One tenant at a glance.

    ``due`` counts the pending executions whose time has come, ``oldest_due`` is for how many seconds the first of
    them could have run, ``oldest_running`` for how many the longest attempt has, ``overdue`` counts the running ones
    whose lease ran out, ``letters`` those in its outbox, and ``last_sweep`` tells how many seconds ago a worker of its
    own last ended one. Where the tenant could not be looked at, ``trouble`` says why and the rest is nothing.
    """

    tenant: Tenant
    counts: dict[State, int]
    due: int = 0
    oldest_due: float | None = None
    oldest_running: float | None = None
    overdue: int = 0
    letters: int = 0
    last_sweep: float | None = None
    trouble: str | None = None


def overviews(database: Database) -> Iterator[Overview]:
    """Look at each tenant that exists; a lock or a fault of one costs a second, and does not hide the others."""
    tenants = catalog.tenants(database)
    last_sweeps = _last_sweeps(database) if tenants else {}
    for tenant in tenants:
        yield _overview(database, tenant, last_sweeps)


def overview(database: Database, tenant: Tenant) -> Overview:
    """Look at one tenant."""
    return _overview(database, tenant, _last_sweeps(database))


def _last_sweeps(database: Database) -> dict[str, float]:
    with database.statement() as cursor:
        return workers.last_sweeps(cursor)


def _overview(database: Database, tenant: Tenant, last_sweeps: dict[str, float]) -> Overview:
    try:
        with bounded_transaction(database) as cursor:
            _LOOK.execute(cursor, tenant.name)
            rows = cursor.fetchall()
            _LETTERS.execute(cursor, tenant.name)
            letters = cursor.fetchone()
    except DriverError as error:
        return Overview(tenant=tenant, counts={}, trouble=one_line(error).partition(" LINE ")[0])
    return Overview(
        tenant=tenant,
        counts={State(state): count for state, count, *_ in rows},
        due=sum(row[2] for row in rows),
        oldest_due=next((row[3] for row in rows if row[3] is not None), None),
        oldest_running=next((row[4] for row in rows if row[4] is not None), None),
        overdue=sum(row[5] for row in rows),
        letters=letters[0] if letters else 0,
        last_sweep=last_sweeps.get(tenant.name),
    )


def count_due(database: Database, tenant: str) -> int:
    """Count a tenant's pending executions whose time has come, over a small index."""
    with bounded_transaction(database) as cursor:
        _DUE.execute(cursor, tenant)
        row = cursor.fetchone()
    return int(row[0]) if row else 0
