"""Chains, groups, chords and callbacks of durable tasks: they keep their tenant, also after a recovery."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from celery import chain, chord, group
from celery.result import AsyncResult

from cloacina_celery.errors import InvalidPayload
from tests.acceptance.stage import BAZAAR
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from tests.acceptance.stage import Stage


@pytest.fixture
def bazaar(standing: Stage) -> Any:
    """The app's module, with the tenant bound."""
    with standing.bazaar.cloacina.tenant(standing.tenant):
        yield standing.bazaar


def test_a_result_answers_from_the_row(standing: Stage, bazaar: Any) -> None:
    result = bazaar.add.delay(2, 3)
    assert result.get(timeout=15) == 5
    assert (result.state, result.successful(), result.ready(), result.failed()) == (
        "SUCCESS",
        True,
        True,
        False,
    )
    assert bazaar.app.backend is not None


def test_a_result_can_be_had_again_by_its_id(standing: Stage, bazaar: Any) -> None:
    result = bazaar.add.delay(2, 3)
    result.get(timeout=15)
    assert AsyncResult(result.id, app=bazaar.app).get(timeout=5) == 5
    assert bazaar.app.AsyncResult(result.id).state == "SUCCESS"
    assert bazaar.add.AsyncResult(result.id).get(timeout=5) == 5
    assert bazaar.cloacina.result(result.id).get(timeout=5) == 5


def test_a_running_task_shows_as_started(standing: Stage, bazaar: Any) -> None:
    result = bazaar.block.delay("started")
    standing.wait_for_runs("started", 1)
    assert result.state == "STARTED"
    standing.open_gate("started-1")
    result.get(timeout=15)


def test_a_task_can_be_sent_by_its_name(standing: Stage, bazaar: Any) -> None:
    result = bazaar.app.send_task("bazaar.add", (2, 3))
    assert AsyncResult(result.id, app=bazaar.app).get(timeout=15) == 5
    assert standing.row(result).state == "succeeded"


def test_a_task_sent_from_a_task_has_the_same_tenant(standing: Stage, bazaar: Any) -> None:
    child = bazaar.parent.delay("child").get(timeout=15)
    standing.wait_for_state(child, "succeeded")


def test_a_chain_keeps_its_tenant(standing: Stage, bazaar: Any) -> None:
    result = chain(bazaar.add.s(1, 1), bazaar.add.s(10), bazaar.add.s(100)).delay()
    assert result.get(timeout=15) == 112
    assert result.parent.get(timeout=5) == 12
    assert result.parent.parent.get(timeout=5) == 2
    last = chain(bazaar.add.s(1, 1), bazaar.tenant_of_call.s()).delay()
    assert last.get(timeout=15) == standing.tenant


def test_a_chain_whose_first_task_fails_tells_the_last(standing: Stage, bazaar: Any) -> None:
    result = chain(bazaar.boom.s(), bazaar.add.s(10), bazaar.add.s(100)).delay()
    with pytest.raises(ValueError, match="boom"):
        result.get(timeout=15)
    assert standing.row(result).state == "failed"


def test_a_group_keeps_its_tenant(standing: Stage, bazaar: Any) -> None:
    result = group(bazaar.add.s(n, n) for n in range(5)).delay()
    assert result.get(timeout=15) == [0, 2, 4, 6, 8]
    assert result.successful()


def test_a_chord_keeps_its_tenant(standing: Stage, bazaar: Any) -> None:
    result = chord([bazaar.add.s(n, n) for n in range(5)])(bazaar.total.s())
    assert result.get(timeout=15) == 20
    assert standing.row(result).state == "succeeded"


def test_a_chord_counts_also_members_that_are_chains(standing: Stage, bazaar: Any) -> None:
    result = chord([chain(bazaar.add.s(1, 1), bazaar.add.s(10)), bazaar.add.s(2, 2)])(bazaar.total.s())
    assert result.get(timeout=15) == 16


def test_a_chord_in_a_chain_goes_on(standing: Stage, bazaar: Any) -> None:
    result = chain(bazaar.add.s(1, 1), group(bazaar.add.s(1), bazaar.add.s(2)), bazaar.total.s()).delay()
    assert result.get(timeout=15) == 7


def test_an_empty_chord_runs_its_body(standing: Stage, bazaar: Any) -> None:
    assert chord([], app=bazaar.app)(bazaar.total.s()).get(timeout=15) == 0


def test_a_chord_with_a_failing_member_fails_and_calls_its_errback(standing: Stage, bazaar: Any) -> None:
    result = chord([bazaar.add.s(1, 1), bazaar.boom.s()])(bazaar.total.s().on_error(bazaar.record_error.s()))
    with pytest.raises(Exception, match="boom"):
        result.get(timeout=15)
    standing.wait_for_runs(f"error-{result.id}", 1)
    assert standing.row(result).task == bazaar.total.name


def test_a_retried_member_does_not_count_twice(standing: Stage, bazaar: Any) -> None:
    result = chord([bazaar.fail.s("member", 1), bazaar.add.s(1, 1)])(bazaar.total.s())
    assert result.get(timeout=15) == 4


def test_link_calls_durable_and_plain_tasks(standing: Stage, bazaar: Any) -> None:
    plain = bazaar.plain_record.s(standing.tenant, "plain-link")
    result = bazaar.add.apply_async((2, 3), link=[bazaar.record_value.s("linked"), plain])
    assert result.get(timeout=15) == 5
    standing.wait_for_runs("linked=5", 1)
    eventually(lambda: standing.runs("plain-link"), 15, "the plain callback")
    assert len(standing.runs("linked=5")) == 1


def test_link_error_is_called_once_after_the_last_attempt(standing: Stage, bazaar: Any) -> None:
    result = bazaar.fail.apply_async(("linked-error",), link_error=bazaar.record_error.s())
    with pytest.raises(OSError, match="failure 3"):
        result.get(timeout=15)
    standing.wait_for_runs(f"error-{result.id}", 1)
    assert len(standing.runs("linked-error")) == 3
    assert len(standing.runs(f"error-{result.id}")) == 1


def test_an_errback_of_the_new_style_is_called_with_the_error_and_its_effects_stay(
    standing: Stage, bazaar: Any
) -> None:
    result = bazaar.boom.apply_async((), link_error=bazaar.record_error_inline.s())
    with pytest.raises(ValueError, match="boom"):
        result.get(timeout=15)
    eventually(lambda: standing.notes(f"{result.id}: ValueError"), 5, "the errback's note")


@pytest.mark.parametrize(("by", "expected"), [("task", 5), ("chain", 12), ("group", [2, 4]), ("chord", 6)])
def test_a_replaced_task_answers_with_its_replacements_result(
    standing: Stage, bazaar: Any, by: str, expected: object
) -> None:
    assert bazaar.replaced.delay(by).get(timeout=15) == expected


def test_a_task_replaced_by_a_plain_one_fails_instead_of_waiting_for_ever(
    standing: Stage, bazaar: Any
) -> None:
    with pytest.raises(Exception, match="plain_add"):
        bazaar.replaced.delay("plain").get(timeout=15)


def test_a_revoked_execution_does_not_run(standing: Stage, bazaar: Any) -> None:
    result = bazaar.record_value.apply_async((1, "revoked"), countdown=1)
    result.revoke()
    assert result.state == "REVOKED"
    follower = bazaar.record_value.apply_async((1, "follower"), countdown=2)
    follower.get(timeout=15)
    assert standing.runs("revoked=1") == []


def test_an_expired_execution_is_cancelled_and_does_not_run(standing: Stage, bazaar: Any) -> None:
    result = bazaar.record_value.apply_async((1, "expired"), countdown=1, expires=0.2)
    row = standing.wait_for_state(result, "cancelled")
    assert row.attempt == 0
    assert "expired" in (standing.events(result)[-1].reason or "")
    assert standing.runs("expired=1") == []


def test_a_running_execution_can_be_terminated(standing: Stage, bazaar: Any) -> None:
    result = bazaar.block.delay("terminated")
    standing.wait_for_runs("terminated", 1)
    done = standing.processes.cli("control", "terminate", "SIGKILL", result.id, app=BAZAAR)
    assert "terminate: tasks unknown" not in done.stdout
    row = standing.wait_for_state(result, "cancelled")
    assert row.attempt == 1
    assert standing.notes("terminated") == []
    assert bazaar.add.delay(1, 1).get(timeout=15) == 2


def test_a_chord_of_durable_and_plain_tasks_is_refused_before_anything_is_sent(
    standing: Stage, bazaar: Any
) -> None:
    before = len(bazaar.cloacina.executions().list(limit=1000))
    with pytest.raises(InvalidPayload, match="1 of the 2 tasks in a chord's header are plain"):
        chord([bazaar.add.s(1, 1), bazaar.plain_add.s(1, 1)])(bazaar.total.s())
    assert len(bazaar.cloacina.executions().list(limit=1000)) == before
