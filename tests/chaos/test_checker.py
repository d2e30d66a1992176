"""The checker finds each thing that must not be in a history, and nothing in one where all is well."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cloacina_celery.chaos.checker import (
    BUDGET,
    CALLBACKS,
    EFFECTS,
    FAILED,
    FOREIGN,
    LEASE_RAN_OUT,
    LOST,
    NEEDLESS,
    PROCESSES,
    RAN_TWICE,
    STUCK,
    TWICE,
    UNFIT,
    UNSTRUCK,
    check,
)
from cloacina_celery.chaos.faults import Done
from cloacina_celery.chaos.history import Effect, Event, History, Line, Row
from cloacina_celery.chaos.measure import MESSAGE, RUN, Recovery
from cloacina_celery.chaos.plan import HOLDS_GIL, WITH_CALLBACK, Planned

TENANT = "tenant_one"
BEGIN = datetime(2030, 1, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    """An instant of the made-up run."""
    return BEGIN + timedelta(seconds=seconds)


def event(kind: str, attempt: int, seconds: float = 1.0) -> Event:
    """An event of the execution `a`, by worker 7."""
    return Event(tenant=TENANT, execution_id="a", at=at(seconds), kind=kind, attempt=attempt, worker_id=7)


def line(attempt: int) -> Line:
    """A start of user code of `a`."""
    return Line(execution_id="a", attempt=attempt, tenant=TENANT, pid=1, at=at(1))


@pytest.fixture
def history() -> History:
    """One execution whose first run was lost with its worker, and whose second succeeded."""
    return History(
        planned={"a": Planned(id="a", tenant=TENANT, kind="plain", order={})},
        rows=[
            Row(tenant=TENANT, id="a", state="succeeded", attempt=2, failures=0, recoveries=1, releases=0,
                meant_for=TENANT)
        ],
        events=[
            event("submitted", 0, 0), event("claimed", 1, 1), event("recovered", 1, 5), event("claimed", 2, 6),
            event("succeeded", 2, 7),
        ],
        effects=[Effect(tenant=TENANT, execution_id="a", attempt=2, meant_for=TENANT)],
        lines=[line(1), line(2)],
        faults=[Done(kind="kill -9 of a worker", at=at(4), detail="", pids=(77,))],
        worker_pids={7: 77},
        calm_until=at(4),
    )  # fmt: skip


def kinds(history: History) -> set[str]:
    """What the checker finds."""
    return {finding.kind for finding in check(history).findings}


def test_a_history_in_which_all_is_well(history: History) -> None:
    verdict = check(history)
    assert verdict.is_clean
    assert (verdict.executions, verdict.attempts, verdict.recoveries) == (1, 2, 1)


def test_recovery_is_measured_from_the_fault_to_the_next_claim(history: History) -> None:
    assert check(history).recovered == [Recovery(2.0, "a", "kill -9 of a worker", RUN)]


def test_the_loss_of_a_message_is_measured_too(history: History) -> None:
    history.faults = [Done(kind="queue emptied", at=at(0.5), detail="", lost_ids=("a",))]
    assert [(one.seconds, one.what) for one in check(history).recovered] == [(0.5, MESSAGE), (5.0, RUN)]


def test_a_row_that_is_missing(history: History) -> None:
    history.rows, history.events, history.effects, history.lines = [], [], [], []
    assert kinds(history) == {LOST}


def test_an_end_that_was_not_expected(history: History) -> None:
    history.rows = [replace(history.rows[0], state="failed", failures=1)]
    history.events[-1] = event("failed", 2, 7)
    history.effects = []
    assert kinds(history) == {LOST, FAILED}


def test_an_order_without_its_execution(history: History) -> None:
    history.orders = [(TENANT, "b")]
    assert kinds(history) == {LOST}


def test_a_rolled_back_execution_that_is_there(history: History) -> None:
    history.ghosts = [("a", TENANT)]
    assert kinds(history) == {LOST}


def test_an_execution_that_has_not_ended(history: History) -> None:
    history.rows = [replace(history.rows[0], state="running")]
    history.events.pop()
    history.effects = []
    assert kinds(history) == {STUCK}


@pytest.mark.parametrize("attempts", [[], [2, 2], [1], [1, 2]])
def test_effects_that_are_not_exactly_those_of_the_settled_attempt(
    history: History, attempts: list[int]
) -> None:
    history.effects = [replace(history.effects[0], attempt=attempt) for attempt in attempts]
    assert kinds(history) == {EFFECTS}


def test_a_second_settlement(history: History) -> None:
    history.events.append(event("succeeded", 2, 8))
    assert kinds(history) == {TWICE, UNFIT}


def test_a_recovery_of_what_had_been_recovered(history: History) -> None:
    history.events.insert(3, event("recovered", 1, 5.5))
    assert kinds(history) == {TWICE, UNFIT}


def test_a_settlement_by_a_lost_attempt(history: History) -> None:
    history.events.insert(4, event("retry_scheduled", 1, 6.5))
    assert kinds(history) == {TWICE, UNFIT}


def test_a_requeue_opens_what_was_settled(history: History) -> None:
    history.events += [event("requeued", 2, 8), event("claimed", 3, 9), event("cancelled", 3, 10)]
    assert TWICE not in kinds(history)


def test_an_attempt_that_ran_twice(history: History) -> None:
    history.lines.append(line(2))
    assert kinds(history) == {RAN_TWICE}


def test_a_run_without_a_claim(history: History) -> None:
    history.lines.append(line(3))
    assert kinds(history) == {RAN_TWICE}


def test_a_row_elsewhere(history: History) -> None:
    history.rows = [replace(history.rows[0], tenant="tenant_two")]
    assert kinds(history) == {FOREIGN}


def test_an_effect_elsewhere(history: History) -> None:
    history.effects = [replace(history.effects[0], tenant="tenant_two")]
    assert kinds(history) == {FOREIGN}


def test_an_attempt_that_nothing_explains(history: History) -> None:
    history.rows = [replace(history.rows[0], recoveries=0)]
    assert kinds(history) == {BUDGET}


def test_a_second_ring_before_any_fault(history: History) -> None:
    history.events.insert(1, event("rung_again", 0, 0.5))
    assert kinds(history) == {NEEDLESS}


def test_a_second_ring_after_a_fault(history: History) -> None:
    history.events.insert(3, event("rung_again", 1, 5.5))
    assert check(history).is_clean


def test_a_process_that_ended_by_itself(history: History) -> None:
    history.ended_badly = ["worker1 ended by itself, with exit code 1"]
    assert kinds(history) == {PROCESSES}


def failed_once(history: History) -> History:
    """The same with a failure between."""
    history.rows = [replace(history.rows[0], attempt=3, failures=1)]
    history.events[-1:] = [event("retry_scheduled", 2, 7), event("claimed", 3, 8), event("succeeded", 3, 9)]
    history.effects = [replace(history.effects[0], attempt=3)]
    history.lines.append(line(3))
    return history


def test_a_failure_that_nobody_ordered(history: History) -> None:
    assert kinds(failed_once(history)) == {FAILED}


@pytest.mark.parametrize("order", [{"failures": 1}, {"hangs": True}])
def test_a_failure_that_was_ordered(history: History, order: dict[str, Any]) -> None:
    history.planned["a"] = replace(history.planned["a"], order=order)
    assert check(failed_once(history)).is_clean


def test_a_message_lost_twice_before_its_claim_is_one_recovery_from_the_last_loss(history: History) -> None:
    history.faults = [
        Done(kind="queue emptied", at=at(0.2), detail="", lost_ids=("a",)),
        Done(kind="one message in ten lost", at=at(0.75), detail="", lost_ids=("a",)),
    ]
    lost = [one for one in check(history).recovered if one.what == MESSAGE]
    assert lost == [Recovery(0.25, "a", "one message in ten lost", MESSAGE)]


def test_messages_lost_before_two_claims_are_two_recoveries(history: History) -> None:
    history.faults = [
        Done(kind="queue emptied", at=at(0.5), detail="", lost_ids=("a",)),
        Done(kind="queue emptied", at=at(5.75), detail="", lost_ids=("a",)),
    ]
    assert [one.seconds for one in check(history).recovered if one.what == MESSAGE] == [0.25, 0.5]


def test_the_loss_of_a_message_that_had_been_claimed_costs_nothing(history: History) -> None:
    history.faults = [Done(kind="queue emptied", at=at(2), detail="", lost_ids=("a",))]
    assert not [one for one in check(history).recovered if one.what == MESSAGE]


def crash(seconds: float) -> Done:
    """A crash of Postgres that took half a second."""
    return Done(
        kind="crash of Postgres", at=at(seconds), until=at(seconds + 0.5), detail="", is_crash=True,
        is_total=True,
    )  # fmt: skip


def test_a_claim_that_a_crash_of_postgres_forgot_is_counted_apart(history: History) -> None:
    history.lines = [replace(line(1), at=at(0.5)), line(1), line(2)]
    history.faults = [crash(0.7)]
    verdict = check(history)
    assert verdict.is_clean
    assert verdict.repeated_by_crash == 1


@pytest.mark.parametrize(
    ("first", "second", "crashed"),
    [
        pytest.param(0.5, 0.6, 0.7, id="before the crash both"),
        pytest.param(1.3, 1.4, 0.7, id="after the crash both"),
        pytest.param(0.5, 9.0, 5.0, id="long before the crash"),
    ],
)
def test_a_crash_excuses_no_other_second_run(
    history: History, first: float, second: float, crashed: float
) -> None:
    history.lines = [replace(line(1), at=at(first)), replace(line(1), at=at(second)), line(2)]
    history.faults = [crash(crashed)]
    assert kinds(history) == {RAN_TWICE}


def test_a_crash_excuses_one_second_run_and_not_two(history: History) -> None:
    history.lines = [replace(line(1), at=at(0.5)), line(1), replace(line(1), at=at(1.5)), line(2)]
    history.faults = [crash(0.7)]
    assert kinds(history) == {RAN_TWICE}


def test_a_crash_excuses_no_second_claim(history: History) -> None:
    history.events.insert(2, event("claimed", 1, 2))
    history.faults = [crash(1.5)]
    assert kinds(history) == {RAN_TWICE, UNFIT}


def test_a_lease_that_was_lost_under_a_c_call(history: History) -> None:
    history.planned["a"] = replace(history.planned["a"], kind=HOLDS_GIL)
    history.events[2] = replace(history.events[2], reason=f"{LEASE_RAN_OUT}: its worker hung")
    assert check(history).is_clean, "its worker was struck"
    history.faults = []
    assert kinds(history) == {UNSTRUCK}


def test_a_plain_callback_that_was_never_sent(history: History) -> None:
    history.planned["a"] = replace(history.planned["a"], kind=WITH_CALLBACK)
    assert kinds(history) == {CALLBACKS}
    history.callbacks = frozenset({"a"})
    assert check(history).is_clean


def test_a_history_that_the_protocol_cannot_have_made(history: History) -> None:
    early = replace(
        history, events=[event("submitted", 0, 0), event("claimed", 2, 6), event("succeeded", 2, 7)]
    )
    (finding,) = (one for one in check(early).findings if one.kind == UNFIT)
    assert finding.what == "claimed as attempt 2, but the row was pending with attempt 0"
