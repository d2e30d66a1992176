"""A task fails: what happens next is what its row's policy promised, or what Celery's own words mean."""

from __future__ import annotations

import json
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from celery.exceptions import MaxRetriesExceededError, TimeLimitExceeded

if TYPE_CHECKING:
    from tests.acceptance.stage import Stage
    from tests.support.shop_tables import Run


def gaps(runs: list[Run]) -> list[float]:
    return [(b.started_at - a.started_at).total_seconds() for a, b in pairwise(runs)]


def test_a_failed_task_is_retried_and_each_error_stays_readable(standing: Stage) -> None:
    result = standing.send("fail", "readable", 2)
    assert result.get(timeout=15) == 3
    row = standing.row(result)
    assert (row.state, row.attempt, row.failures, row.recoveries) == ("succeeded", 3, 2, 0)
    errors = [event.error for event in standing.events(result) if event.kind == "retry_scheduled"]
    assert [error and error["exc_message"] for error in errors] == [
        ["failure 1 of readable"],
        ["failure 2 of readable"],
    ]
    assert all(error and "Traceback" in error["traceback"] for error in errors)


def test_a_task_that_fails_each_time_fails_after_all_its_attempts(standing: Stage) -> None:
    result = standing.send("fail", "spent")
    with pytest.raises(OSError, match="failure 3 of spent"):
        result.get(timeout=15)
    assert [run.attempt for run in standing.runs("spent")] == [1, 2, 3]
    assert result.state == "FAILURE"
    assert result.successful() is False
    assert "failure 3 of spent" in result.traceback
    assert standing.kinds(result)[-1] == "failed"


def test_an_error_that_the_policy_gives_up_on_is_final(standing: Stage) -> None:
    result = standing.send("refuse", "refused")
    with pytest.raises(Exception, match="refused"):
        result.get(timeout=15)
    assert len(standing.runs("refused")) == 1
    assert "not retried by the policy" in (standing.events(result)[-1].reason or "")


def test_an_error_may_say_when_to_come_back(standing: Stage) -> None:
    result = standing.send("busy", "later", 2.0)
    assert result.get(timeout=15) == 2
    (gap,) = gaps(standing.runs("later"))
    assert 2.0 <= gap <= 3.0


def test_celerys_autoretry_means_the_same_durably(standing: Stage) -> None:
    result = standing.send("autoretry", "auto", 2)
    assert result.get(timeout=15) == 3
    spent = standing.send("autoretry", "auto-spent", 99)
    with pytest.raises(OSError, match="failure 3"):
        spent.get(timeout=15)
    assert len(standing.runs("auto-spent")) == 3


def test_celerys_retry_backoff_means_the_same_durably(standing: Stage) -> None:
    result = standing.send("backoff", "backoff")
    assert result.get(timeout=15) == 3
    first, second = gaps(standing.runs("backoff"))
    assert 1.0 <= first <= 2.0
    assert 2.0 <= second <= 3.0


def test_without_retry_settings_an_exception_is_final_as_celery_has_it(standing: Stage) -> None:
    result = standing.send("no_retry", "once")
    with pytest.raises(OSError, match="once"):
        result.get(timeout=15)
    assert len(standing.runs("once")) == 1


def test_self_retry_runs_the_task_again_and_counts(standing: Stage) -> None:
    assert standing.send("self_retry", "self", 2).get(timeout=15) == [3, 2]
    assert standing.row(standing.send("self_retry", "self-one", 0)).failures == 0


def test_self_retry_ends_with_its_own_error_when_its_retries_are_spent(standing: Stage) -> None:
    result = standing.send("self_retry", "self-spent", 99)
    with pytest.raises(OSError, match="failure 3"):
        result.get(timeout=15)
    assert len(standing.runs("self-spent")) == 3
    assert not isinstance(result.result, MaxRetriesExceededError)


def test_self_retry_may_change_the_arguments_of_the_same_execution(standing: Stage) -> None:
    result = standing.send("self_retry_args", "args", "first")
    assert result.get(timeout=15) == "second"
    assert [run.execution_id for run in standing.runs("args")] == [result.id, result.id]


def test_self_retry_without_an_exception_retries_too(standing: Stage) -> None:
    result = standing.send("self_retry_quietly", "quiet")
    assert result.get(timeout=15) == "returned"
    assert len(standing.runs("quiet")) == 2


def test_a_retry_in_between_shows_as_celerys_retry_state(standing: Stage) -> None:
    result = standing.send("busy", "between", 60.0)
    standing.wait_for_state(result, "pending")
    standing.wait_for_runs("between", 1)
    standing.wait_for_state(result, "pending")
    assert result.state == "RETRY"
    assert result.successful() is False
    result.revoke()
    assert result.state == "REVOKED"


def test_a_rejected_message_is_a_failure_and_a_requeued_one_runs_again(standing: Stage) -> None:
    rejected = standing.bazaar.reject.apply_async(("rejected",), {"requeue": False}, tenant=standing.tenant)
    standing.wait_for_state(rejected, "failed")
    assert len(standing.runs("rejected")) == 1
    requeued = standing.bazaar.reject.apply_async(("requeued",), {"requeue": True}, tenant=standing.tenant)
    assert requeued.get(timeout=15) == 2
    row = standing.row(requeued)
    assert (row.failures, row.recoveries, row.releases) == (0, 0, 1)


def test_an_ignored_execution_ends_cancelled(standing: Stage) -> None:
    result = standing.send("ignore", "ignored")
    row = standing.wait_for_state(result, "cancelled")
    assert row.attempt == 1
    assert "Ignore" in (standing.events(result)[-1].reason or "")


def test_a_hard_time_limit_is_a_failure_by_policy(standing: Stage) -> None:
    result = standing.send("hard_limit", "hard")
    assert result.get(timeout=20) == 2
    row = standing.row(result)
    assert (row.failures, row.recoveries) == (1, 0)
    error = standing.events(result)[2].error
    assert error is not None
    assert error["exc_type"] == "TimeLimitExceeded"


def test_a_hard_time_limit_on_the_last_attempt_fails_and_calls_the_errback(standing: Stage) -> None:
    bazaar = standing.bazaar
    result = bazaar.hard_limit_always.apply_async(
        ("hard-last",), tenant=standing.tenant, link_error=bazaar.record_error.s()
    )
    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=10)
    standing.wait_for_runs(f"error-{result.id}", 1)
    assert standing.row(result).recoveries == 0


def test_a_soft_time_limit_can_be_caught_and_is_else_a_failure_by_policy(standing: Stage) -> None:
    caught = standing.bazaar.soft_limit.apply_async(("caught",), {"catch": True}, tenant=standing.tenant)
    assert caught.get(timeout=15) == "caught"
    missed = standing.bazaar.soft_limit.apply_async(("missed",), {"catch": False}, tenant=standing.tenant)
    assert missed.get(timeout=15) == "attempt 2"
    assert standing.row(missed).failures == 1


def test_what_the_database_refuses_at_the_commit_is_a_failure_by_policy(standing: Stage) -> None:
    result = standing.send("unsettleable", "deferred")
    with pytest.raises(Exception, match="duplicate key"):
        result.get(timeout=12)
    row = standing.row(result)
    assert (row.failures, row.recoveries) == (3, 0)


def test_a_users_before_start_that_raises_is_a_failure_by_policy(standing: Stage) -> None:
    result = standing.send("early", "early")
    with pytest.raises(OSError, match="before_start failed"):
        result.get(timeout=12)
    assert standing.runs("early") == []
    assert len(standing.runs("before-early")) == 3
    assert standing.row(result).failures == 3


def test_memory_that_python_is_refused_is_a_failure_by_policy_and_the_worker_goes_on(standing: Stage) -> None:
    result = standing.send("out_of_memory", "memory")
    assert result.get(timeout=15) == 2
    assert standing.row(result).failures == 1
    assert standing.send("add", 1, 2).get(timeout=15) == 3


def test_an_error_that_json_cannot_carry_is_told_by_its_text(standing: Stage) -> None:
    # Busy's argument is a timedelta here: the exception cannot be rebuilt from JSON, its words can.
    with standing.bazaar.cloacina.tenant(standing.tenant):
        result = standing.bazaar.busy.delay("timed", timedelta(seconds=1).total_seconds())
    assert result.get(timeout=15) == 2
    json.dumps([event.error for event in standing.events(result)])
