"""The hot and the polling statements go through the small indexes, however many settled rows there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from psycopg2 import sql

from cloacina_celery.core.retry import RetryPolicy
from cloacina_celery.store import catalog, chords, executions, queries, recovery, ringing, settlements
from tests.store.rows import ERROR, LEASE, submission

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from psycopg2 import extensions

    from cloacina_celery.store.database import Cursor, Database

PRIMARY, DUE, RUNG, LEASES = (
    "cloacina_executions_pkey",
    "_executions_due",
    "_executions_rung",
    "_executions_lease",
)
GROUP, EVENTS = "_executions_group", "_events_of"

FILL = """
INSERT INTO {schema}.cloacina_executions (id, task, max_recoveries, message, state, attempt, worker_id,
    lease_expires_at, run_at, rung_at, settled_at, group_id)
SELECT 'e-' || n, 'shop.add', 3, '[]', state, 1, n % 50,
    CASE WHEN state = 'running' THEN now() + make_interval(secs => n) END,
    now() + make_interval(secs => n),
    CASE WHEN n % 2 = 0 THEN now() - make_interval(secs => n) END,
    CASE WHEN state = 'succeeded' THEN now() END,
    CASE WHEN n % 100 = 0 THEN 'g-' || n / 1000 END
FROM (
    SELECT n, CASE WHEN n % 100 = 1 THEN 'running' WHEN n % 50 IN (0, 3) THEN 'pending' ELSE 'succeeded' END AS state
    FROM generate_series(1, 20000) AS n
) AS made;
INSERT INTO {schema}.cloacina_events (execution_id, kind, attempt)
SELECT 'e-' || n, 'submitted', 0 FROM generate_series(1, 20000) AS n;
"""


class Explaining:
    """A cursor that has the server explain each statement instead of doing it."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self.connection = cursor.connection
        self.plan = ""

    def execute(self, statement: str, params: Any = None) -> None:
        self._cursor.execute(f"EXPLAIN {statement}", params)
        self.plan += "\n".join(row[0] for row in self._cursor.fetchall()) + "\n"

    def fetchone(self) -> None:
        return None

    def fetchall(self) -> list[Any]:
        return []


@pytest.fixture(scope="module")
def filled(database: Database, shared_observer: extensions.connection) -> str:
    """A tenant with twenty thousand rows, nearly all of them settled."""
    catalog.create(database, "tenant_filled")
    with shared_observer.cursor() as cursor:
        cursor.execute(sql.SQL(FILL).format(schema=sql.Identifier("tenant_filled")))
        cursor.execute("ANALYZE tenant_filled.cloacina_executions, tenant_filled.cloacina_events")
    return "tenant_filled"


STATEMENTS: dict[str, tuple[Callable[[Any, str], Any], Sequence[str]]] = {
    "submit": (lambda c, t: executions.submit(c, t, submission("new")), [PRIMARY]),
    "claim": (
        lambda c, t: executions.claim(c, t, "e-2", attempt=1, worker_id=1, lease_ttl=LEASE, policy=None),
        [PRIMARY],
    ),
    "succeed": (lambda c, t: settlements.succeed(c, t, "e-1", 1, None), [PRIMARY]),
    "fail": (
        lambda c, t: settlements.fail(
            c, t, "e-1", 1, error=ERROR, lineage=("x",), random=0.5, default_policy=RetryPolicy()
        ),
        [PRIMARY],
    ),
    "retry": (lambda c, t: settlements.retry(c, t, "e-1", 1, error=ERROR), [PRIMARY]),
    "end_failed": (lambda c, t: settlements.end_failed(c, t, "e-1", 1, error=ERROR, reason=""), [PRIMARY]),
    "release_attempt": (lambda c, t: settlements.release_attempt(c, t, "e-1", 1, reason=""), [PRIMARY]),
    "heartbeat": (
        lambda c, t: executions.heartbeat(c, t, [("e-1", 1), ("e-101", 1)], lease_ttl=1),
        [PRIMARY],
    ),
    "outcome": (lambda c, t: queries.outcome(c, t, "e-1"), [PRIMARY]),
    "cancel": (lambda c, t: queries.cancel(c, t, "e-1", reason=""), [PRIMARY]),
    "history": (lambda c, t: queries.history(c, t, "e-1"), [EVENTS]),
    "glance": (lambda c, t: recovery.glance(c, [t], stranded_after=10), [DUE, LEASES, RUNG]),
    "ring_due": (lambda c, t: ringing.ring_due(c, t, limit=10), [DUE, PRIMARY]),
    "ring_stranded": (lambda c, t: ringing.ring_stranded(c, t, limit=10, stranded_after=1), [RUNG, PRIMARY]),
    "count_rung": (lambda c, t: ringing.count_rung(c, t), [RUNG]),
    "lock_expired": (lambda c, t: recovery.lock_expired(c, t, limit=10), [LEASES]),
    "lock_of_worker": (lambda c, t: recovery.lock_of_worker(c, t, 7, limit=10), [LEASES]),
    "lock_attempt": (lambda c, t: recovery.lock_attempt(c, t, "e-1", 1), [PRIMARY]),
    "holders": (lambda c, t: recovery.holders(c, [t], [7, 8]), [LEASES]),
    "release": (lambda c, t: recovery.release(c, t, 7, reason=""), [LEASES]),
    "complete_chord": (lambda c, t: chords.complete(c, t, "g-1"), [GROUP]),
}


@pytest.mark.parametrize("verb", STATEMENTS)
def test_a_statement_reads_its_index_and_never_the_whole_table(
    cursor: Cursor, filled: str, verb: str
) -> None:
    execute, indexes = STATEMENTS[verb]
    explaining = Explaining(cursor)
    execute(explaining, filled)
    for table in ("cloacina_executions", "cloacina_events"):
        assert f"Seq Scan on {table}" not in explaining.plan, explaining.plan
    for index in indexes if verb != "submit" else ["Conflict Arbiter Indexes: cloacina_executions_pkey"]:
        assert index in explaining.plan, explaining.plan
