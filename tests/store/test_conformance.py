"""The statements do what the pure core says: any sequence of moves, made of a row in Postgres and of one in memory.

An example is one transaction, in which ``now()`` stands still: the core's instants are seconds from it, and time
passes by moving the row's instants. It is rolled back, so that each example has the tenant for itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloacina_celery.core.lifecycle import Recover, State, after_loss
from cloacina_celery.core.limits import Limits
from cloacina_celery.core.protocol import EXPIRED, FENCE, MOVES, OF_WORKER, Ask, Row, submitted
from cloacina_celery.core.tenancy import FIRST_EPOCH
from cloacina_celery.store import executions, limits, queries, recovery, ringing, settlements, tenancy
from tests.store.rows import ERROR, EXECUTION_ID, LEASE, submission

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloacina_celery.store.database import Cursor, Database

STRANDED = 10.0
CLAIMANT = "by the test"
FENCED: dict[str, Callable[[Cursor, str, Ask], object]] = {
    "succeed": lambda c, t, ask: settlements.succeed(c, t, EXECUTION_ID, ask.attempt, None),
    "retry": lambda c, t, ask: settlements.retry(
        c, t, EXECUTION_ID, ask.attempt, error=ERROR, delay=ask.delay
    ),
    "fail": lambda c, t, ask: settlements.end_failed(
        c, t, EXECUTION_ID, ask.attempt, error=ERROR, reason="test"
    ),
    "replace": lambda c, t, ask: settlements.park(c, t, EXECUTION_ID, ask.attempt),
    "release": lambda c, t, ask: settlements.release_attempt(c, t, EXECUTION_ID, ask.attempt, reason="test"),
    "end cancelled": lambda c, t, ask: settlements.end_cancelled(
        c, t, EXECUTION_ID, ask.attempt, reason="test"
    ),
    "heartbeat": lambda c, t, ask: executions.heartbeat(c, t, [(EXECUTION_ID, ask.attempt)], lease_ttl=LEASE),
    "claim": lambda c, t, ask: executions.claim(
        c,
        t,
        EXECUTION_ID,
        attempt=ask.attempt,
        worker_id=ask.worker or 0,
        lease_ttl=LEASE,
        policy=None,
        epoch=FIRST_EPOCH,
        claimant=CLAIMANT,
    ),
    "find claim": lambda c, t, ask: executions.find_claim(
        c, t, EXECUTION_ID, attempt=ask.attempt, claimant=CLAIMANT, lease_ttl=LEASE
    ),
    "unring": lambda c, t, ask: ringing.unring(c, t, [(EXECUTION_ID, ask.attempt)]),
    "defer": lambda c, t, ask: (
        limits.put(c, t, Limits(is_paused=True)),
        limits.claim(
            c, t, EXECUTION_ID, attempt=ask.attempt, worker_id=ask.worker or 0, lease_ttl=LEASE, policy=None
        ),
    )[1],
    "ring waiting": lambda c, t, _: (
        limits.put(c, t, Limits(max_concurrent_tasks=9)),
        limits.ring_waiting(c, t, limit=9),
    )[1],
    "free waiting": lambda c, t, _: (limits.put(c, t, Limits()), c.rowcount)[1],
    "cancel": lambda c, t, ask: queries.cancel(c, t, EXECUTION_ID, reason="test"),
    "requeue": lambda c, t, ask: queries.requeue(c, t, EXECUTION_ID, reason="test"),
    "release all": lambda c, t, ask: recovery.release(c, t, ask.worker or 0, reason="test"),
    "give back": lambda c, t, _: tenancy.give_back_all(c, t, "test"),
    "ring": lambda c, t, ask: ringing.ring_due(c, t, limit=9),
    "ring again": lambda c, t, ask: ringing.ring_stranded(c, t, limit=9, stranded_after=STRANDED),
}
"""Moves that are one statement; each answers whether it changed the row."""
LOOKS = {
    "expired": (EXPIRED, lambda c, t, ask: recovery.lock_expired(c, t, limit=9)),
    "of worker": (OF_WORKER, lambda c, t, ask: recovery.lock_of_worker(c, t, ask.worker or 0, limit=9)),
    "attempt": (FENCE, lambda c, t, ask: recovery.lock_attempt(c, t, EXECUTION_ID, ask.attempt)),
}
PASSES = {
    "lease_expires_at": lambda row: replace(
        row, lease_expires_at=row.lease_expires_at and row.lease_expires_at - 100
    ),
    "run_at": lambda row: replace(row, run_at=row.run_at - 100),
    "rung_at": lambda row: replace(row, rung_at=None if row.rung_at is None else row.rung_at - 100),
}
WEIGHTED = ["submit", "submit failed", "claim", "claim", "claim", *FENCED, *LOOKS, *PASSES]

Step = tuple[str, int, int, float, float | None, bool]
"""A verb, how far off its attempt is, its worker, its delay, the turn of a recovery, and whether a message leaves."""
STEPS = st.lists(
    st.tuples(
        st.sampled_from(WEIGHTED),
        st.sampled_from([0, 0, 0, 0, -1, 1]),
        st.sampled_from([41, 42]),
        st.sampled_from([0.0, 60.0]),
        st.sampled_from([None, None, 0.0, 90.0]),
        st.booleans(),
    ),
    min_size=10,
    max_size=30,
)
PLAIN = (0, 41, 0.0, None, True)
ASKED = (
    PLAIN,
    (-1, 41, 0.0, None, True),
    (1, 41, 0.0, None, True),
    (0, 42, 60.0, None, True),
    (0, 41, 0.0, 90.0, False),
)
BEGUN = (
    [],
    ["submit failed"],
    ["submit"],
    ["submit", "rung_at"],
    ["submit", "defer"],
    ["submit", "claim"],
    ["submit", "claim", "heartbeat", "lease_expires_at"],
    *(["submit", "claim", verb] for verb in ("succeed", "retry", "fail", "replace", "release", "cancel")),
    ["submit", "claim", "of worker"],
    ["submit", "claim", "of worker", "claim"],
    ["submit", "claim", "of worker", "claim", "of worker"],
)
"""Ways to each kind of row."""


class _OverError(Exception):
    """Rolls an example back."""


def stored(cursor: Cursor, tenant: str) -> Row | None:
    """Read the row, its instants as seconds from now."""

    def seconds(column: str) -> str:
        return (
            f"CASE WHEN isfinite({column}) THEN extract(epoch FROM {column} - now())::float8"
            f" WHEN {column} IS NOT NULL THEN 'infinity'::float8 END"
        )

    cursor.execute(
        f"SELECT state, attempt, failures, recoveries, releases, max_recoveries, {seconds('run_at')},"
        f" {seconds('rung_at')}, {seconds('lease_expires_at')}, worker_id, message <> ''"
        f" FROM {tenant}.cloacina_executions WHERE id = %s",
        (EXECUTION_ID,),
    )
    found = cursor.fetchone()
    return None if found is None else Row(**{**dict(zip(Row.__dataclass_fields__, found, strict=True)),
                                             "state": State(found[0])})  # fmt: skip


def recorded(cursor: Cursor, tenant: str) -> list[tuple[str, int]]:
    """Read the events."""
    cursor.execute(f"SELECT kind, attempt FROM {tenant}.cloacina_events ORDER BY id")
    return [(kind, attempt) for kind, attempt in cursor.fetchall()]


def step(cursor: Cursor, tenant: str, row: Row | None, verb: str, ask: Ask) -> tuple[Row | None, str | None]:
    """Make one move in both; return the core's row and event, having compared whether anything was changed."""
    if verb == "submit":
        got = executions.submit(
            cursor,
            tenant,
            submission(delay=ask.delay, max_recoveries=ask.max_recoveries, is_rung=ask.is_rung),
        )
        if row is None:
            after: Row | None = submitted(ask)
        else:
            after = MOVES["take over"].apply(row, ask) or MOVES["take over failed"].apply(row, ask)
        assert (got is not None) == (after is not None)
        return after, "submitted"
    if verb == "submit failed":
        executions.submit_failed(cursor, tenant, submission(message=""), error="{}", reason="test")
        return (
            Row(state=State.FAILED, max_recoveries=0, has_message=False) if row is None else None
        ), "failed"
    if verb in PASSES:
        cursor.execute(f"UPDATE {tenant}.cloacina_executions SET {verb} = {verb} - interval '100 s'")
        return (PASSES[verb](row) if row else None), None
    if verb in LOOKS:
        guard, look = LOOKS[verb]
        orphans = look(cursor, tenant, ask)
        assert bool(orphans) == (row is not None and guard.admits(row, ask))
        if row is None or not orphans:
            return None, None
        decision = after_loss(recoveries=row.recoveries, max_recoveries=row.max_recoveries)
        cursor.execute("SELECT now() + make_interval(secs => %s)", (ask.not_before,))
        (not_before,) = cursor.fetchone() or (None,)
        recovery.recover(cursor, tenant, orphans[0], reason="test", not_before=not_before)
        move = MOVES["recover" if isinstance(decision, Recover) else "abandon"]
        delay = decision.delay if isinstance(decision, Recover) else 0.0
        return move.apply(row, replace(ask, attempt=row.attempt, delay=delay)), move.event
    answer = FENCED[verb](cursor, tenant, ask)
    after = MOVES[verb].apply(row, ask) if row else None
    assert bool(answer) == (after is not None)
    return after, MOVES[verb].event


def compare(database: Database, tenant: str, steps: list[Step]) -> None:
    """Make each move in both, and compare row and events after each."""
    row: Row | None = None
    events: list[tuple[str, int]] = []
    try:
        with database.transaction() as cursor:
            for verb, off, worker, delay, turn, is_rung in steps:
                attempt = (row.attempt if row else 0) + off + (verb in ("claim", "defer", "unring"))
                ask = Ask(
                    now=0.0, attempt=attempt, worker=worker, lease_ttl=LEASE, delay=delay,
                    not_before=turn, is_rung=is_rung, stranded_after=STRANDED, max_recoveries=1,
                )  # fmt: skip
                after, event = step(cursor, tenant, row, verb, ask)
                if after is not None:
                    row = after
                    events += [(event, row.attempt)] if event else []
                assert stored(cursor, tenant) == row, verb
                assert recorded(cursor, tenant) == events, verb
            raise _OverError
    except _OverError:
        pass


@pytest.mark.parametrize("verb", dict.fromkeys(WEIGHTED))
def test_each_move_does_to_each_row_what_the_core_says(database: Database, tenant: str, verb: str) -> None:
    for begun in BEGUN:
        for asked in ASKED:
            compare(database, tenant, [*((one, *PLAIN) for one in begun), (verb, *asked)])


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=STEPS)
def test_the_row_and_its_events_are_what_the_core_says_after_any_moves(
    database: Database, tenant: str, steps: list[Step]
) -> None:
    compare(database, tenant, [("submit", *PLAIN), *steps])
