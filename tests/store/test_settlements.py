"""Every write of a worker: what it records, and that the fence refuses all others."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from cloacina_celery import RetryPolicy
from cloacina_celery.core.lifecycle import Fail, Retry, State
from cloacina_celery.core.retry import lineage
from cloacina_celery.store import executions, queries, recovery, ringing, settlements
from tests.store.rows import ERROR, EXECUTION_ID, LEASE, bring_to, claim, events, expire, read, run, submit
from tests.support.waiting import database_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg2 import extensions

    from cloacina_celery.store.database import Cursor, Database

SLACK = timedelta(seconds=5)
NOT_RUNNING = [state for state in State if state is not State.RUNNING]
ONCE_MORE = RetryPolicy(max_attempts=2, initial_delay=40, backoff="fixed", jitter=False)


def fail(cursor: Cursor, tenant: str, execution_id: str, attempt: int) -> Any:
    return settlements.fail(
        cursor, tenant, execution_id, attempt,
        error=ERROR, lineage=lineage(OSError), random=0.5, default_policy=ONCE_MORE,
    )  # fmt: skip


def recover(cursor: Cursor, tenant: str, execution_id: str, attempt: int) -> bool:
    locked = recovery.lock_attempt(cursor, tenant, execution_id, attempt)
    return [recovery.recover(cursor, tenant, orphan, reason="test") for orphan in locked] != []


WRITES: dict[str, Callable[[Cursor, str, str, int], Any]] = {
    "succeed": lambda c, t, i, n: settlements.succeed(c, t, i, n, "7"),
    "succeed, prepared": lambda c, t, i, n: settlements.succeed(c, t, i, n, "7", prepare=True),
    "fail": fail,
    "retry": lambda c, t, i, n: settlements.retry(c, t, i, n, error=ERROR, delay=5.0),
    "end_failed": lambda c, t, i, n: settlements.end_failed(c, t, i, n, error=ERROR, reason="test"),
    "park": settlements.park,
    "release_attempt": lambda c, t, i, n: settlements.release_attempt(c, t, i, n, reason="test"),
    "end_cancelled": lambda c, t, i, n: settlements.end_cancelled(c, t, i, n, reason="test"),
    "heartbeat": lambda c, t, i, n: executions.heartbeat(c, t, [(i, n)], lease_ttl=LEASE),
    "recover": recover,
}
KINDS = {
    "succeed": "succeeded", "succeed, prepared": "succeeded", "fail": "retry_scheduled",
    "retry": "retry_scheduled", "end_failed": "failed", "park": "replaced", "release_attempt": "released",
    "end_cancelled": "cancelled", "recover": "recovered",
}  # fmt: skip
ENDS = {
    "succeed": State.SUCCEEDED, "succeed, prepared": State.SUCCEEDED, "end_failed": State.FAILED,
    "end_cancelled": State.CANCELLED,
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("wrong", ["attempt before", "attempt after", "other id", *NOT_RUNNING])
def test_a_write_of_another_attempt_or_to_a_row_that_does_not_run_changes_nothing(
    cursor: Cursor, tenant: str, write: str, wrong: str | State
) -> None:
    execution_id, attempt = EXECUTION_ID, 1
    if isinstance(wrong, State):
        bring_to(cursor, tenant, wrong)
    else:
        bring_to(cursor, tenant, State.PENDING)
        assert claim(cursor, tenant, attempt=2)
        attempt = {"attempt before": 1, "attempt after": 3, "other id": 2}[wrong]
        execution_id = "e-2" if wrong == "other id" else EXECUTION_ID
    before, history = read(cursor, tenant), events(cursor, tenant)
    assert not WRITES[write](cursor, tenant, execution_id, attempt)
    assert (read(cursor, tenant), events(cursor, tenant)) == (before, history)


@pytest.mark.parametrize("write", WRITES)
def test_a_write_for_one_tenant_leaves_the_same_id_of_another_alone(
    cursor: Cursor, tenant: str, other_tenant: str, write: str
) -> None:
    for name in (tenant, other_tenant):
        run(cursor, name)
    before, history = read(cursor, other_tenant), events(cursor, other_tenant)
    assert WRITES[write](cursor, tenant, EXECUTION_ID, 1)
    assert (read(cursor, other_tenant), events(cursor, other_tenant)) == (before, history)


@pytest.mark.parametrize("write", WRITES)
def test_the_holder_may_still_write_when_its_lease_ran_out_and_nobody_has_recovered_it(
    cursor: Cursor, tenant: str, write: str
) -> None:
    run(cursor, tenant)
    expire(cursor, tenant, seconds=3600)
    assert WRITES[write](cursor, tenant, EXECUTION_ID, 1)


@pytest.mark.parametrize("write", KINDS)
def test_each_transition_is_recorded_in_its_own_transaction(
    database: Database, cursor: Cursor, tenant: str, write: str
) -> None:
    run(cursor, tenant)
    begun = [("submitted", 0), ("claimed", 1)]

    def attempt_in_vain() -> None:
        with database.transaction() as lent:
            assert WRITES[write](lent, tenant, EXECUTION_ID, 1)
            assert events(lent, tenant) == [*begun, (KINDS[write], 1)]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attempt_in_vain()
    assert (events(cursor, tenant), read(cursor, tenant).state) == (begun, State.RUNNING)
    with database.transaction() as lent:
        assert WRITES[write](lent, tenant, EXECUTION_ID, 1)
    assert events(cursor, tenant) == [*begun, (KINDS[write], 1)]
    row = read(cursor, tenant)
    assert row.state is ENDS.get(write, State.PENDING)
    assert (row.settled_at is not None) is (write in ENDS)
    assert row.lease_expires_at is None


def test_a_result_is_kept_with_its_settlement(cursor: Cursor, tenant: str) -> None:
    run(cursor, tenant)
    assert settlements.succeed(cursor, tenant, EXECUTION_ID, 1, '{"total": 7}')
    assert read(cursor, tenant).result == '{"total": 7}'
    found = queries.get(cursor, tenant, EXECUTION_ID)
    assert found is not None
    assert (found.result, found.state, found.tenant) == ({"total": 7}, State.SUCCEEDED, tenant)


def test_failures_are_retried_by_the_policy_in_the_row_until_it_is_spent(
    database: Database, cursor: Cursor, tenant: str, observer: extensions.connection
) -> None:
    policy = RetryPolicy(max_attempts=3, initial_delay=40, backoff="linear", max_delay=100, jitter=False)
    submit(cursor, tenant, policy=json.dumps(policy.to_stored()))
    for attempt, seconds in [(1, 40), (2, 80)]:
        now = database_time(observer)
        assert claim(cursor, tenant, attempt=attempt)
        with database.transaction() as lent:
            assert fail(lent, tenant, EXECUTION_ID, attempt) == Retry(delay=seconds)
        row = read(cursor, tenant)
        assert (row.state, row.failures, row.rung_at) == (State.PENDING, attempt, None)
        assert timedelta(0) <= row.run_at - now - timedelta(seconds=seconds) < SLACK
        cursor.execute(f"UPDATE {tenant}.cloacina_executions SET run_at = now()")
    assert claim(cursor, tenant, attempt=3)
    with database.transaction() as lent:
        assert fail(lent, tenant, EXECUTION_ID, 3) == Fail(reason="failure 3 of at most 3")
    row = read(cursor, tenant)
    assert (row.state, row.failures, json.loads(row.error or "")) == (State.FAILED, 3, ERROR)
    reasons = [
        event.reason for event in queries.history(cursor, tenant, EXECUTION_ID) if event.error == ERROR
    ]
    assert reasons == ["in 40.0 s", "in 80.0 s", "failure 3 of at most 3"]


def test_a_row_without_a_policy_is_settled_by_the_workers_own(database: Database, tenant: str) -> None:
    with database.transaction() as lent:
        run(lent, tenant)
        assert fail(lent, tenant, EXECUTION_ID, 1) == Retry(delay=40)


def test_a_requested_retry_takes_its_instant_and_its_new_message(
    cursor: Cursor, tenant: str, observer: extensions.connection
) -> None:
    run(cursor, tenant)
    eta = database_time(observer) + timedelta(hours=3)
    assert settlements.retry(cursor, tenant, EXECUTION_ID, 1, error=ERROR, eta=eta, message="[1]")
    row = read(cursor, tenant)
    assert (row.run_at, row.message, row.failures) == (eta, "[1]", 1)


def test_giving_an_attempt_back_spends_no_budget_and_leaves_it_to_the_next_poll(
    cursor: Cursor, tenant: str
) -> None:
    run(cursor, tenant)
    assert settlements.release_attempt(cursor, tenant, EXECUTION_ID, 1, reason="test")
    row = read(cursor, tenant)
    assert (row.failures, row.recoveries, row.releases, row.rung_at) == (0, 0, 1, None)
    (ring,) = ringing.ring_due(cursor, tenant, limit=10)
    assert ring.attempt == 2


def test_a_heartbeat_extends_exactly_the_leases_that_are_held(
    cursor: Cursor, tenant: str, observer: extensions.connection
) -> None:
    for name in ("a", "b", "c", "d"):
        run(cursor, tenant, name)
        expire(cursor, tenant, name)
    assert settlements.succeed(cursor, tenant, "b", 1, None)
    now = database_time(observer)
    held = executions.heartbeat(cursor, tenant, [("a", 1), ("b", 1), ("c", 2), ("x", 1)], lease_ttl=LEASE)
    assert held == {"a"}
    extended = read(cursor, tenant, "a").lease_expires_at
    assert extended is not None
    assert timedelta(0) <= extended - now - timedelta(seconds=LEASE) < SLACK
    for name in ("c", "d"):
        lease = read(cursor, tenant, name).lease_expires_at
        assert lease is not None
        assert lease < now
    assert executions.heartbeat(cursor, tenant, [], lease_ttl=LEASE) == frozenset()


@pytest.mark.parametrize("state", [State.PENDING, State.RUNNING])
def test_what_has_not_ended_can_be_cancelled_and_its_attempt_is_fenced(
    cursor: Cursor, tenant: str, state: State
) -> None:
    bring_to(cursor, tenant, state)
    assert queries.cancel(cursor, tenant, EXECUTION_ID, reason="not wanted")
    assert read(cursor, tenant).state is State.CANCELLED
    assert queries.history(cursor, tenant, EXECUTION_ID)[-1].reason == "not wanted"
    assert not settlements.succeed(cursor, tenant, EXECUTION_ID, 1, None)
    assert claim(cursor, tenant, attempt=2) is None


@pytest.mark.parametrize("state", [s for s in State if s not in (State.PENDING, State.RUNNING)])
def test_what_has_ended_is_not_cancelled(cursor: Cursor, tenant: str, state: State) -> None:
    bring_to(cursor, tenant, state)
    before, history = read(cursor, tenant), events(cursor, tenant)
    assert not queries.cancel(cursor, tenant, EXECUTION_ID, reason="test")
    assert (read(cursor, tenant), events(cursor, tenant)) == (before, history)


@pytest.mark.parametrize("state", list(State))
def test_an_operator_requeues_what_failed_was_abandoned_or_cancelled_and_nothing_else(
    cursor: Cursor, tenant: str, state: State
) -> None:
    bring_to(cursor, tenant, state)
    before = read(cursor, tenant)
    ring = queries.requeue(cursor, tenant, EXECUTION_ID, reason="test")
    row = read(cursor, tenant)
    if state not in (State.FAILED, State.ABANDONED, State.CANCELLED):
        assert (ring, row) == (None, before)
        return
    assert ring is not None
    assert (ring.attempt, ring.failures, ring.recoveries) == (2, 0, 0)
    assert (row.state, row.failures, row.recoveries, row.settled_at) == (State.PENDING, 0, 0, None)
    assert events(cursor, tenant)[-1] == ("requeued", 1)
    # The attempt that was running when it was cancelled stays a zombie.
    assert not settlements.succeed(cursor, tenant, EXECUTION_ID, 1, None)
    assert claim(cursor, tenant, attempt=2)
    assert not settlements.succeed(cursor, tenant, EXECUTION_ID, 1, None)
    assert settlements.succeed(cursor, tenant, EXECUTION_ID, 2, None)


def test_a_message_that_did_not_leave_is_noted_unless_the_row_has_moved_on(
    cursor: Cursor, tenant: str
) -> None:
    submit(cursor, tenant)
    ringing.unring(cursor, tenant, [(EXECUTION_ID, 2)])
    assert read(cursor, tenant).rung_at is not None
    ringing.unring(cursor, tenant, [(EXECUTION_ID, 1)])
    assert read(cursor, tenant).rung_at is None
    (ring,) = ringing.ring_due(cursor, tenant, limit=10)
    assert (ring.execution_id, ring.attempt) == (EXECUTION_ID, 1)
