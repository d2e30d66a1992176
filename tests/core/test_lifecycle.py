"""What follows a failure and a loss: two budgets, neither of which spends the other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloacina_celery import RetryPolicy
from cloacina_celery.core.lifecycle import (
    RECOVERY_DELAY_CAP,
    TERMINAL_STATES,
    Abandon,
    Fail,
    Recover,
    Retry,
    State,
    after_failure,
    after_loss,
)
from cloacina_celery.core.retry import MAX_RETRY_AFTER, lineage

OS_ERROR = lineage(OSError)


def test_four_states_are_terminal() -> None:
    assert set(State) - TERMINAL_STATES == {State.PENDING, State.RUNNING}
    assert {"succeeded", "failed", "abandoned", "cancelled"} == TERMINAL_STATES


@pytest.mark.parametrize("max_attempts", [1, 2, 5])
def test_the_last_of_max_attempts_failures_is_final(max_attempts: int) -> None:
    policy = RetryPolicy(max_attempts=max_attempts)
    decisions = [after_failure(policy, failures=n, error=OS_ERROR, random=0.5) for n in range(max_attempts)]
    assert [type(decision) for decision in decisions] == [Retry] * (max_attempts - 1) + [Fail]
    assert decisions[-1] == Fail(reason=f"failure {max_attempts} of at most {max_attempts}")


def test_an_error_that_is_not_retried_is_final_at_once_and_the_reason_names_it() -> None:
    policy = RetryPolicy(max_attempts=5, give_up_on=(ValueError,))
    decision = after_failure(policy, failures=0, error=lineage(UnicodeError), random=0.5)
    assert decision == Fail(reason="builtins.UnicodeError is not retried by the policy")


def test_the_nth_failure_waits_for_the_nth_delay() -> None:
    policy = RetryPolicy(max_attempts=9, initial_delay=1, max_delay=100, jitter=False)
    delays = [after_failure(policy, failures=n, error=OS_ERROR, random=0.5) for n in range(4)]
    assert delays == [Retry(delay=1), Retry(delay=2), Retry(delay=4), Retry(delay=8)]


@pytest.mark.parametrize(
    ("wish", "delay"),
    [
        (None, 10.0),
        (3.0, 10.0),
        (45.0, 45.0),
        (7200.0, 7200.0),
        (1e12, MAX_RETRY_AFTER),
        (float("inf"), MAX_RETRY_AFTER),
    ],
)
def test_a_retry_after_lengthens_the_delay_beyond_the_cap_but_not_beyond_a_week(
    wish: float | None, delay: float
) -> None:
    policy = RetryPolicy(initial_delay=10, max_delay=20, jitter=False)
    assert after_failure(policy, failures=0, error=OS_ERROR, random=0.5, retry_after=wish) == Retry(
        delay=delay
    )


def test_a_retry_after_grants_no_further_attempt() -> None:
    policy = RetryPolicy(max_attempts=1)
    assert isinstance(after_failure(policy, failures=0, error=OS_ERROR, random=0.5, retry_after=1.0), Fail)


def test_the_first_recovery_is_at_once_and_the_following_ones_wait_longer_each_time() -> None:
    decisions = [after_loss(recoveries=n, max_recoveries=9) for n in range(9)]
    assert decisions == [Recover(delay=d) for d in (0, 1, 2, 4, 8, 16, 32, 60, 60)]
    assert after_loss(recoveries=10**6, max_recoveries=10**7) == Recover(delay=RECOVERY_DELAY_CAP)


@pytest.mark.parametrize("max_recoveries", [0, 1, 3])
def test_one_loss_more_than_max_recoveries_abandons(max_recoveries: int) -> None:
    assert isinstance(after_loss(recoveries=max_recoveries - 1, max_recoveries=max_recoveries), Recover) or (
        max_recoveries == 0
    )
    decision = after_loss(recoveries=max_recoveries, max_recoveries=max_recoveries)
    assert decision == Abandon(
        reason=f"lost {max_recoveries + 1} times, and at most {max_recoveries} recoveries are allowed"
    )


@given(
    max_attempts=st.integers(min_value=1, max_value=6),
    max_recoveries=st.integers(min_value=0, max_value=6),
    fates=st.lists(st.sampled_from(["fail", "lose", "release", "succeed"]), max_size=40),
    random=st.floats(min_value=0, max_value=1, exclude_max=True),
)
def test_each_attempt_is_paid_for_and_each_budget_is_its_own(
    max_attempts: int, max_recoveries: int, fates: list[str], random: float
) -> None:
    policy = RetryPolicy(max_attempts=max_attempts)
    attempt = failures = recoveries = releases = losses = 0
    state = State.PENDING
    for fate in fates:
        attempt, state = attempt + 1, State.RUNNING
        assert attempt <= 1 + failures + recoveries + releases
        if fate == "release":
            releases, state = releases + 1, State.PENDING
        elif fate == "succeed":
            state = State.SUCCEEDED
        elif fate == "fail":
            decision = after_failure(policy, failures=failures, error=OS_ERROR, random=random)
            failures += 1
            state = State.PENDING if isinstance(decision, Retry) else State.FAILED
        else:
            lost = after_loss(recoveries=recoveries, max_recoveries=max_recoveries)
            losses += 1
            if isinstance(lost, Recover):
                recoveries, state = recoveries + 1, State.PENDING
            else:
                state = State.ABANDONED
        if state in TERMINAL_STATES:
            break
        assert failures < max_attempts
        assert recoveries <= max_recoveries
    # Each terminal state was reached by its own budget, in full and no further.
    assert (state is State.FAILED) == (failures == max_attempts)
    assert (state is State.ABANDONED) == (losses == max_recoveries + 1)
    assert recoveries <= max_recoveries
