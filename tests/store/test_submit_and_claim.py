"""A row is submitted once, and each attempt of it is claimed once."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from cloacina_celery import RetryPolicy
from cloacina_celery.core.lifecycle import State
from cloacina_celery.store import executions, queries, settlements
from cloacina_celery.store.executions import Claim, Submitted
from tests.store.rows import (
    EXECUTION_ID,
    LEASE,
    Rival,
    bring_to,
    claim,
    events,
    read,
    run,
    shift,
    submission,
    submit,
)
from tests.support.waiting import database_time

if TYPE_CHECKING:
    from psycopg2 import extensions

    from cloacina_celery.store.database import Cursor, Database

SLACK = timedelta(seconds=5)


@pytest.mark.parametrize("prepare", [False, True])
def test_a_due_row_is_born_pending_rung_and_recorded(cursor: Cursor, tenant: str, prepare: bool) -> None:
    policy = json.dumps(RetryPolicy(max_attempts=9).to_stored())
    made = executions.submit(cursor, tenant, submission(policy=policy), prepare=prepare)
    assert made == Submitted(attempt=1, is_due=True)
    row = read(cursor, tenant)
    assert (row.state, row.attempt, row.policy, row.rung_at) == (State.PENDING, 0, policy, row.run_at)
    assert events(cursor, tenant) == [("submitted", 0)]


def test_a_delayed_row_waits_on_the_databases_clock_and_is_not_rung(
    cursor: Cursor, tenant: str, observer: extensions.connection
) -> None:
    now = database_time(observer)
    assert executions.submit(cursor, tenant, submission(delay=3600.0)) == Submitted(attempt=1, is_due=False)
    row = read(cursor, tenant)
    assert row.rung_at is None
    assert timedelta(0) <= row.run_at - now - timedelta(hours=1) < SLACK


@pytest.mark.parametrize(("hours", "is_due"), [(2, False), (-2, True)])
def test_an_eta_is_kept_as_the_instant_it_is(
    cursor: Cursor, tenant: str, observer: extensions.connection, hours: int, is_due: bool
) -> None:
    eta = database_time(observer) + timedelta(hours=hours)
    assert executions.submit(cursor, tenant, submission(eta=eta)) == Submitted(attempt=1, is_due=is_due)
    assert read(cursor, tenant).run_at == eta
    assert (claim(cursor, tenant) is not None) is is_due


@pytest.mark.parametrize("state", list(State))
def test_a_second_submission_of_an_id_changes_nothing_whatever_the_state(
    cursor: Cursor, tenant: str, state: State
) -> None:
    bring_to(cursor, tenant, state)
    before, history = read(cursor, tenant), events(cursor, tenant)
    assert executions.submit(cursor, tenant, submission(message="[]", max_recoveries=9)) is None
    assert (read(cursor, tenant), events(cursor, tenant)) == (before, history)


def test_the_same_id_in_two_tenants_is_two_executions(cursor: Cursor, tenant: str, other_tenant: str) -> None:
    for name in (tenant, other_tenant):
        submit(cursor, name)
    assert claim(cursor, tenant)
    assert read(cursor, other_tenant).state is State.PENDING


@pytest.mark.parametrize("first_commits", [True, False])
def test_of_two_racing_submissions_exactly_one_inserts(
    database: Database, cursor: Cursor, tenant: str, observer: extensions.connection, first_commits: bool
) -> None:
    rival: Rival | None = None
    try:
        with database.transaction() as first:
            assert executions.submit(first, tenant, submission()) is not None
            rival = Rival(database, lambda second: executions.submit(second, tenant, submission()))
            rival.wait_until_blocked(observer)
            if not first_commits:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert rival is not None
    assert (rival.answer() is None) is first_commits
    assert events(cursor, tenant) == [("submitted", 0)]


def test_a_parked_row_is_taken_over_by_the_submission_that_replaces_it(cursor: Cursor, tenant: str) -> None:
    run(cursor, tenant)
    assert settlements.park(cursor, tenant, EXECUTION_ID, 1)
    assert claim(cursor, tenant, attempt=2) is None
    made = executions.submit(cursor, tenant, submission(task="shop.other", message="[]"))
    assert made == Submitted(attempt=2, is_due=True)
    assert read(cursor, tenant).message == "[]"
    assert claim(cursor, tenant, attempt=2)
    assert events(cursor, tenant) == [
        ("submitted", 0), ("claimed", 1), ("replaced", 1), ("submitted", 1), ("claimed", 2),
    ]  # fmt: skip


def test_a_row_that_failed_before_it_ran_is_taken_over_when_its_forerunner_ran_after_all(
    cursor: Cursor, tenant: str
) -> None:
    executions.submit_failed(
        cursor, tenant, submission(message=""), error="{}", reason="what it follows failed"
    )
    row = read(cursor, tenant)
    assert (row.state, row.error) == (State.FAILED, "{}")
    executions.submit_failed(cursor, tenant, submission(message=""), error='{"a": 1}', reason="again")
    assert read(cursor, tenant) == row
    assert executions.submit(cursor, tenant, submission()) == Submitted(attempt=1, is_due=True)
    row = read(cursor, tenant)
    assert (row.state, row.error, row.settled_at) == (State.PENDING, None, None)


@pytest.mark.parametrize("prepare", [False, True])
def test_a_claim_opens_a_lease_on_the_databases_clock(
    cursor: Cursor, tenant: str, observer: extensions.connection, prepare: bool
) -> None:
    submit(cursor, tenant)
    now = database_time(observer)
    claimed = executions.claim(
        cursor, tenant, EXECUTION_ID, attempt=1, worker_id=7, lease_ttl=LEASE, policy="{}", prepare=prepare
    )
    assert claimed == Claim(attempt=1, failures=0, recoveries=0, policy="{}")
    row = read(cursor, tenant)
    assert (row.state, row.attempt, row.worker_id) == (State.RUNNING, 1, 7)
    assert row.lease_expires_at is not None
    assert timedelta(0) <= row.lease_expires_at - now - timedelta(seconds=LEASE) < SLACK
    assert events(cursor, tenant) == [("submitted", 0), ("claimed", 1)]


def test_a_claim_whose_answer_was_lost_is_found_by_the_one_who_made_it_and_by_nobody_else(
    cursor: Cursor, tenant: str
) -> None:
    submit(cursor, tenant)

    def claim(claimant: str) -> Claim | None:
        return executions.claim(
            cursor,
            tenant,
            EXECUTION_ID,
            attempt=1,
            worker_id=7,
            lease_ttl=LEASE,
            policy="{}",
            claimant=claimant,
        )

    def find(claimant: str, attempt: int = 1) -> Claim | None:
        return executions.find_claim(
            cursor, tenant, EXECUTION_ID, attempt=attempt, claimant=claimant, lease_ttl=LEASE
        )

    assert find("this child") is None
    assert claim("this child") is not None
    # A doubled message in another child of the same worker, whose own claim got no answer either.
    assert claim("that child") is None
    assert find("that child") is None
    assert find("this child", attempt=2) is None
    before = read(cursor, tenant)
    assert find("this child") == Claim(attempt=1, failures=0, recoveries=0, policy="{}")
    after = read(cursor, tenant)
    assert after.lease_expires_at > before.lease_expires_at
    assert after.attempt == before.attempt
    assert settlements.release_attempt(cursor, tenant, EXECUTION_ID, 1, reason="it took too long")
    assert find("this child") is None


def test_a_claim_keeps_the_policy_that_the_row_was_promised(cursor: Cursor, tenant: str) -> None:
    submit(cursor, tenant, policy='{"max_attempts": 9}')
    claimed = executions.claim(
        cursor, tenant, EXECUTION_ID, attempt=1, worker_id=7, lease_ttl=LEASE, policy='{"max_attempts": 1}'
    )
    assert claimed is not None
    assert claimed.policy == read(cursor, tenant).policy == '{"max_attempts": 9}'


@pytest.mark.parametrize("prepare", [False, True])
def test_only_the_claims_own_commit_is_asynchronous(cursor: Cursor, tenant: str, prepare: bool) -> None:
    submit(cursor, tenant)
    cursor.execute("SHOW synchronous_commit")
    before = cursor.fetchone()
    assert executions.claim(
        cursor, tenant, EXECUTION_ID, attempt=1, worker_id=7, lease_ttl=LEASE, policy=None, prepare=prepare
    )
    cursor.execute("SHOW synchronous_commit")
    assert cursor.fetchone() == before


@pytest.mark.parametrize("attempt", [-1, 0, 2, 3])
def test_a_message_for_another_attempt_declines(cursor: Cursor, tenant: str, attempt: int) -> None:
    submit(cursor, tenant)
    before = read(cursor, tenant)
    assert claim(cursor, tenant, attempt=attempt) is None
    assert (read(cursor, tenant), events(cursor, tenant)) == (before, [("submitted", 0)])


@pytest.mark.parametrize("state", [state for state in State if state is not State.PENDING])
@pytest.mark.parametrize("attempt", [1, 2])
def test_a_message_for_a_row_that_is_not_pending_declines(
    cursor: Cursor, tenant: str, state: State, attempt: int
) -> None:
    bring_to(cursor, tenant, state)
    before, history = read(cursor, tenant), events(cursor, tenant)
    assert claim(cursor, tenant, attempt=attempt) is None
    assert (read(cursor, tenant), events(cursor, tenant)) == (before, history)


def test_a_message_from_before_a_recovery_or_a_retry_declines(cursor: Cursor, tenant: str) -> None:
    bring_to(cursor, tenant, State.PENDING)
    assert claim(cursor, tenant, attempt=1) is None
    claimed = claim(cursor, tenant, attempt=2)
    assert claimed is not None
    assert claimed.attempt == 2


def test_a_message_that_is_early_or_whose_row_is_missing_declines(cursor: Cursor, tenant: str) -> None:
    assert claim(cursor, tenant, "nobody") is None
    submit(cursor, tenant, delay=60.0)
    assert claim(cursor, tenant) is None
    shift(cursor, tenant, "run_at", -60)
    assert claim(cursor, tenant) is not None


@pytest.mark.parametrize("first_commits", [True, False])
def test_of_two_racing_claims_of_an_attempt_exactly_one_gets_it(
    database: Database, cursor: Cursor, tenant: str, observer: extensions.connection, first_commits: bool
) -> None:
    submit(cursor, tenant)
    rival: Rival | None = None
    try:
        with database.transaction() as first:
            assert claim(first, tenant, worker_id=1)
            rival = Rival(database, lambda second: claim(second, tenant, worker_id=2))
            rival.wait_until_blocked(observer)
            if not first_commits:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert rival is not None
    assert (rival.answer() is None) is first_commits
    row = read(cursor, tenant)
    assert (row.attempt, row.worker_id) == (1, 1 if first_commits else 2)
    assert events(cursor, tenant) == [("submitted", 0), ("claimed", 1)]


@pytest.mark.parametrize("first", ["claim", "cancel"])
def test_a_claim_and_a_cancellation_follow_each_other_in_either_order(
    database: Database, cursor: Cursor, tenant: str, observer: extensions.connection, first: str
) -> None:
    submit(cursor, tenant)

    def cancel(lent: Cursor) -> bool:
        return queries.cancel(lent, tenant, EXECUTION_ID, reason="test")

    works: dict[str, Any] = {"claim": lambda lent: claim(lent, tenant), "cancel": cancel}
    second = next(name for name in works if name != first)
    with database.transaction() as lent:
        assert works[first](lent)
        rival = Rival(database, works[second])
        rival.wait_until_blocked(observer)
    # A running attempt is cancelled as well; a cancelled one is not claimed.
    assert bool(rival.answer()) is (second == "cancel")
    assert read(cursor, tenant).state is State.CANCELLED
    assert settlements.succeed(cursor, tenant, EXECUTION_ID, 1, None) is False
