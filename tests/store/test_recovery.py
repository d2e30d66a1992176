"""What the reaper finds and moves on, and what it leaves alone."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from cloacina_celery.core.lifecycle import Abandon, Recover, State
from cloacina_celery.store import outbox, recovery, ringing, settlements, workers
from cloacina_celery.store.recovery import Glance
from cloacina_celery.store.workers import Reserved
from tests.store.rows import (
    EXECUTION_ID,
    MESSAGE,
    WORKER,
    bring_to,
    claim,
    events,
    expire,
    read,
    run,
    shift,
    submit,
)
from tests.support.waiting import database_time

if TYPE_CHECKING:
    from psycopg2 import extensions

    from cloacina_celery.store.database import Cursor, Database

SLACK = timedelta(seconds=5)


def test_expired_leases_are_found_and_valid_ones_are_not(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    for name in ("fresh", "old", "older"):
        run(cursor, tenant, name)
    expire(cursor, tenant, "old", 1)
    expire(cursor, tenant, "older", 9)
    for state in State:
        if state is not State.RUNNING:
            bring_to(cursor, tenant, state, f"in {state}")
    with database.transaction() as lent:
        assert [o.execution_id for o in recovery.lock_expired(lent, tenant, limit=10)] == ["older", "old"]
        assert [o.execution_id for o in recovery.lock_expired(lent, tenant, limit=1)] == ["older"]


def test_a_dead_workers_attempts_are_found_by_their_worker(
    database: Database, cursor: Cursor, tenant: str, other_tenant: str
) -> None:
    run(cursor, tenant, "mine")
    run(cursor, tenant, "another's", worker_id=WORKER + 1)
    run(cursor, tenant, "mine, settled")
    assert settlements.succeed(cursor, tenant, "mine, settled", 1, None)
    assert recovery.holders(cursor, [tenant, other_tenant], [WORKER, WORKER + 1, WORKER + 2]) == [
        (tenant, {WORKER, WORKER + 1}),
        (other_tenant, frozenset()),
    ]
    with database.transaction() as lent:
        found = recovery.lock_of_worker(lent, tenant, WORKER, limit=10)
        assert [o.execution_id for o in found] == ["mine"]
        recovery.recover(lent, tenant, found[0], reason="test")
    assert recovery.holders(cursor, [tenant], [WORKER, WORKER + 1]) == [(tenant, {WORKER + 1})]


def test_a_lost_attempt_runs_again_at_once_and_then_later_each_time_until_it_is_abandoned(
    database: Database, cursor: Cursor, tenant: str, observer: extensions.connection
) -> None:
    submit(cursor, tenant, max_recoveries=2)
    for attempt, delay in [(1, 0.0), (2, 1.0)]:
        assert claim(cursor, tenant, attempt=attempt)
        now = database_time(observer)
        with database.transaction() as lent:
            (orphan,) = recovery.lock_attempt(lent, tenant, EXECUTION_ID, attempt)
            recovered = recovery.recover(lent, tenant, orphan, reason="its machine burnt")
        assert recovered.decision == Recover(delay=delay)
        row = read(cursor, tenant)
        assert (row.state, row.recoveries, row.failures, row.lease_expires_at) == (
            State.PENDING,
            attempt,
            0,
            None,
        )
        assert timedelta(0) <= row.run_at - now - timedelta(seconds=delay) < SLACK
        # Who is due now is published by the reaper itself; who waits is rung by a poll.
        assert (recovered.ring is None) is (row.rung_at is None) is (delay > 0)
        if recovered.ring is not None:
            assert (recovered.ring.attempt, recovered.ring.recoveries, recovered.ring.message) == (
                2,
                1,
                MESSAGE,
            )
        shift(cursor, tenant, "run_at", -delay)
    assert claim(cursor, tenant, attempt=3)
    with database.transaction() as lent:
        (orphan,) = recovery.lock_attempt(lent, tenant, EXECUTION_ID, 3)
        recovered = recovery.recover(lent, tenant, orphan, reason="its machine burnt")
    assert isinstance(recovered.decision, Abandon)
    assert recovered.ring is None
    row = read(cursor, tenant)
    assert (row.state, row.attempt, row.recoveries) == (State.ABANDONED, 3, 2)
    assert row.settled_at is not None
    assert json.loads(row.error or "")["exc_message"] == [
        "abandoned: lost 3 times, and at most 2 recoveries are allowed; the last time: its machine burnt"
    ]
    assert [kind for kind, _ in events(cursor, tenant)].count("recovered") == 2
    assert events(cursor, tenant)[-1] == ("abandoned", 3)


def test_a_worker_that_signs_off_gives_back_all_it_holds_and_nothing_else(
    cursor: Cursor, tenant: str
) -> None:
    run(cursor, tenant, "mine")
    run(cursor, tenant, "another's", worker_id=WORKER + 1)
    bring_to(cursor, tenant, State.SUCCEEDED, "settled")
    (ring,) = recovery.release(cursor, tenant, WORKER, reason="shut down")
    assert (ring.execution_id, ring.attempt, ring.tenant) == ("mine", 2, tenant)
    row = read(cursor, tenant, "mine")
    assert (row.state, row.releases, row.failures, row.recoveries) == (State.PENDING, 1, 0, 0)
    assert row.rung_at is not None
    assert events(cursor, tenant, "mine")[-1] == ("released", 1)
    assert read(cursor, tenant, "another's").state is State.RUNNING
    assert not settlements.succeed(cursor, tenant, "mine", 1, None)


def test_due_rows_that_nobody_rang_for_are_rung_once_oldest_first(cursor: Cursor, tenant: str) -> None:
    for name, seconds in [("third", -1.0), ("first", -9.0), ("second", -5.0), ("not yet", 60.0)]:
        submit(cursor, tenant, name, delay=60.0)
        shift(cursor, tenant, "run_at", seconds - 60, name)
    submit(cursor, tenant, "rung at birth")
    assert [ring.execution_id for ring in ringing.ring_due(cursor, tenant, limit=2)] == ["first", "second"]
    assert [ring.execution_id for ring in ringing.ring_due(cursor, tenant, limit=9)] == ["third"]
    assert ringing.ring_due(cursor, tenant, limit=9) == []
    assert ringing.count_rung(cursor, tenant) == 4


def test_what_a_living_worker_has_reserved_needs_no_message_in_the_queue(cursor: Cursor, tenant: str) -> None:
    for n in range(4):
        submit(cursor, tenant, f"e-{n}")
    alive, dead = (workers.register(cursor, name=name, tenants=[tenant]) for name in ("alive", "dead"))
    workers.heartbeat(cursor, alive, {tenant: Reserved(count=3), "tenant_other": Reserved(count=5)})
    workers.heartbeat(cursor, dead, {tenant: Reserved(count=1)})
    assert ringing.count_rung(cursor, tenant) == 0
    workers.stop(cursor, dead, reason="test")
    assert ringing.count_rung(cursor, tenant) == 1
    # Who is frozen says nothing any more of what it has, and keeps it from nobody.
    cursor.execute(
        "UPDATE cloacina.workers SET heartbeat_at = now() - interval '6 s' WHERE id = %s", (alive,)
    )
    assert ringing.count_rung(cursor, tenant) == 4


def test_a_message_that_a_worker_has_long_had_is_known_by_its_row_and_hides_no_other(
    cursor: Cursor, tenant: str
) -> None:
    for n in range(4):
        submit(cursor, tenant, f"e-{n}")
        shift(cursor, tenant, "rung_at", -30.0 + n, f"e-{n}")
    worker_id = workers.register(cursor, name="busy", tenants=[tenant])
    workers.heartbeat(cursor, worker_id, {tenant: Reserved(count=2, ids=("e-0", "e-1"))})
    assert ringing.count_rung(cursor, tenant) == 2
    # Its first row has run elsewhere; the message that it still has is void.
    assert claim(cursor, tenant, "e-0")
    assert ringing.count_rung(cursor, tenant) == 2
    rings = ringing.ring_stranded(cursor, tenant, limit=9, stranded_after=10)
    assert {ring.execution_id for ring in rings} == {"e-2", "e-3"}


def test_only_rows_that_others_have_overtaken_have_surely_lost_their_place_in_a_queue(
    cursor: Cursor, tenant: str
) -> None:
    def found(*, lost_for: float | None = None) -> set[str]:
        with cursor.connection.cursor() as lent:
            lent.execute("BEGIN")
            rings = ringing.ring_stranded(
                lent, tenant, limit=9, stranded_after=10, only_overtaken=True, lost_for=lost_for
            )
            lent.execute("ROLLBACK")
        return {ring.execution_id for ring in rings}

    for name, seconds in [
        ("a", -60.0),
        ("b", -50.0),
        ("running", -40.0),
        ("c", -30.0),
        ("done", -25.0),
        ("d", -20.0),
    ]:
        submit(cursor, tenant, name)
        for column in ("rung_at", "submitted_at"):
            shift(cursor, tenant, column, seconds, name)
    assert found() == set()
    assert claim(cursor, tenant, "running")
    assert found() == {"a", "b"}
    assert claim(cursor, tenant, "done")
    assert settlements.succeed(cursor, tenant, "done", 1, None)
    assert found() == {"a", "b", "c"}
    # What was recovered went to the head of the queue: it has overtaken everybody, and that says nothing.
    with cursor.connection.cursor() as lent:
        (orphan,) = recovery.lock_attempt(lent, tenant, "running", 1)
        recovery.recover(lent, tenant, orphan, reason="test")
    assert claim(cursor, tenant, "running", attempt=2)
    assert found() == {"a", "b", "c"}
    assert found(lost_for=0.0) == {"a", "b", "c", "d"}


def test_a_stranded_row_is_rung_again_for_the_same_attempt_and_the_longest_waiting_first(
    cursor: Cursor, tenant: str
) -> None:
    for name, seconds in [("b", -20.0), ("a", -30.0), ("recent", -5.0), ("running", -40.0), ("unrung", 0.0)]:
        submit(cursor, tenant, name, delay=60.0 if name == "unrung" else None)
        shift(cursor, tenant, "rung_at", seconds, name)
    assert claim(cursor, tenant, "running")
    (ring,) = ringing.ring_stranded(cursor, tenant, limit=1, stranded_after=10)
    assert (ring.execution_id, ring.attempt) == ("a", 1)
    assert [r.execution_id for r in ringing.ring_stranded(cursor, tenant, limit=9, stranded_after=10)] == [
        "b"
    ]
    assert ringing.ring_stranded(cursor, tenant, limit=9, stranded_after=10) == []
    assert read(cursor, tenant, "a").attempt == 0
    assert events(cursor, tenant, "a") == [("submitted", 0), ("rung_again", 0)]


@pytest.mark.parametrize("kind", ["due", "expired", "stranded", "letters", "nothing"])
def test_a_glance_sees_which_tenant_has_which_work(
    cursor: Cursor, tenant: str, other_tenant: str, kind: str
) -> None:
    match kind:
        case "due":
            submit(cursor, tenant, delay=60.0)
            shift(cursor, tenant, "run_at", -61)
        case "expired":
            run(cursor, tenant)
            expire(cursor, tenant)
        case "stranded":
            submit(cursor, tenant)
            shift(cursor, tenant, "rung_at", -11)
        case "letters":
            outbox.put(cursor, tenant, "plain.task", "[]")
            cursor.execute(f"UPDATE {tenant}.cloacina_outbox SET created_at = now() - interval '11 s'")
        case _:
            outbox.put(cursor, tenant, "plain.task", "[]")
            submit(cursor, tenant, "delayed", delay=60.0)
            submit(cursor, tenant, "just rung")
            run(cursor, tenant, "running")
            bring_to(cursor, tenant, State.FAILED, "settled")
    seen = recovery.glance(cursor, [other_tenant, tenant], stranded_after=10)
    expected = Glance(
        tenant=tenant,
        is_due=kind == "due",
        is_expired=kind == "expired",
        is_stranded=kind == "stranded",
        has_letters=kind == "letters",
    )
    assert seen == ([] if kind == "nothing" else [expected])
