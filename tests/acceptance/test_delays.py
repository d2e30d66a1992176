"""ETA, countdown and retry delays live in the row: nothing that restarts or forgets can lose them."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from tests.support import brokers
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from tests.acceptance.stage import Stage

BOTH_BROKERS = pytest.mark.parametrize("broker_url", ["redis", "rabbitmq"], indirect=True)


def lateness(stage: Stage, result: object, key: str, number: int) -> float:
    """Seconds from the instant in the row, read before, to the start of that number."""
    due_at = stage.row(result).run_at
    seconds = (stage.wait_for_runs(key, number)[-1].started_at - due_at).total_seconds()
    print(f"FIGURE late for {key}: {seconds:.2f} s")
    return seconds


@BOTH_BROKERS
def test_due_executions_start_within_a_second_of_their_time(stage: Stage) -> None:
    stage.worker()
    for n in range(4):
        result = stage.bazaar.fail.apply_async((f"late{n}", 0), countdown=1 + n * 0.3, tenant=stage.tenant)
        assert stage.row(result).state == "pending"
        assert 0 <= lateness(stage, result, f"late{n}", 1) <= 1.0
        assert stage.row(result).attempt == 1


def test_an_eta_is_an_instant_and_one_in_the_past_is_now(stage: Stage) -> None:
    stage.worker()
    eta = stage.now() + timedelta(seconds=2)
    later = stage.bazaar.fail.apply_async(("eta", 0), eta=eta, tenant=stage.tenant)
    past = stage.bazaar.fail.apply_async(("past", 0), eta=eta - timedelta(days=1), tenant=stage.tenant)
    assert past.get(timeout=15) == 1
    assert stage.runs("eta") == []
    assert later.get(timeout=15) == 1
    late = (stage.runs("eta")[0].started_at - eta).total_seconds()
    assert 0 <= late <= 1.0


def test_a_countdown_survives_the_death_of_every_process_and_of_the_brokers_memory(
    stage: Stage, broker_url: str
) -> None:
    worker = stage.worker()
    result = stage.bazaar.fail.apply_async(("survivor", 0), countdown=4, tenant=stage.tenant)
    worker.kill9(whole=True)
    brokers.empty_redis(broker_url)
    stage.worker()
    assert stage.runs("survivor") == []
    assert 0 <= lateness(stage, result, "survivor", 1) <= 1.0


def test_a_retry_delay_survives_the_death_of_every_process_and_of_the_brokers_memory(
    stage: Stage, broker_url: str
) -> None:
    worker = stage.worker()
    result = stage.send("busy", "retried", 4.0)
    stage.wait_for_runs("retried", 1)
    stage.wait_for_state(result, "pending")
    worker.kill9(whole=True)
    brokers.empty_redis(broker_url)
    stage.worker()
    assert 0 <= lateness(stage, result, "retried", 2) <= 1.0
    assert stage.row(result).recoveries == 0


def test_what_came_due_while_nobody_ran_starts_with_the_next_worker(stage: Stage) -> None:
    result = stage.bazaar.fail.apply_async(("overdue", 0), countdown=0.5, tenant=stage.tenant)
    eventually(lambda: stage.now() > stage.row(result).run_at, 5, "the row to be due")
    stage.worker()
    ready_at = stage.now()
    run = stage.wait_for_runs("overdue", 1)[0]
    assert (run.started_at - ready_at).total_seconds() <= 1.0


def test_messages_that_a_broker_forgot_are_rung_again(stage: Stage, broker_url: str) -> None:
    results = [stage.send("fail", f"forgotten{n}", 0) for n in range(5)]
    brokers.empty_redis(broker_url)
    stage.worker(env={"BAZAAR_STRANDED_AFTER": "2"})
    assert [result.get(timeout=15) for result in results] == [1] * 5
    assert "rung_again" in stage.kinds(results[0])
