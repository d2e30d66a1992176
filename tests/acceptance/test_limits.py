"""Limits of tenants on running workers: never exceeded, changed at run time, and no slot idle for them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from cloacina_celery.core.lifecycle import State
from tests.support.waiting import eventually, never

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from tests.acceptance.stage import Stage

NAP = 0.5
"""Seconds of a task that fills a slot: long against what it costs a busy machine to fill the slot again."""

BOTH_BROKERS = pytest.mark.parametrize("broker_url", ["redis", "rabbitmq"], indirect=True)


@BOTH_BROKERS
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_no_more_than_the_limit_run_at_once_on_all_workers_and_no_slot_is_idle(
    stage: Stage, pool: str, new_tenant_name: Callable[[], str]
) -> None:
    free = new_tenant_name()
    stage.bazaar.cloacina.tenants.create(free)
    stage.bazaar.cloacina.tenants.limit(stage.tenant, max_concurrent_tasks=3)
    for _ in range(40):
        stage.send("nap", NAP)
    for _ in range(10):
        stage.bazaar.nap.apply_async((NAP,), tenant=free)
    for worker in [stage.start_worker(tenants=["tenant_x*"], pool=pool, concurrency=4) for _ in range(2)]:
        worker.wait_ready()
    wait_until_done(stage, stage.tenant, 40)
    wait_until_done(stage, free, 10)
    # The other tenant had the slots that the limited one may not use.
    assert moments(stage, free)[-1][0] < moments(stage, stage.tenant)[-1][0]
    assert most_at_once(stage, stage.tenant) == 3
    ideal = 40 * NAP / 3
    took = span(stage, stage.tenant)
    print(f"FIGURE 40 x {NAP:g} s, three at once: {took:.2f} s, at best {ideal:.2f} s")
    assert took < ideal * 1.5


def test_one_row_that_somebody_holds_waits_and_the_tenants_others_run(stage: Stage) -> None:
    stage.bazaar.cloacina.tenants.limit(stage.tenant, max_concurrent_tasks=9)
    held = stage.send("add", 1, 2)
    with stage.observer.cursor() as holder:
        holder.execute(f"BEGIN; SELECT FROM {stage.tenant}.cloacina_executions FOR UPDATE")
        try:
            worker = stage.worker(concurrency=2)
            worker.wait_log(r"claim\.waiting.*another transaction holds the execution's row")
            assert stage.send("add", 3, 4).get(timeout=15) == 7
        finally:
            holder.execute("ROLLBACK")
    assert held.get(timeout=15) == 3


def test_those_that_wait_start_in_order(stage: Stage) -> None:
    stage.bazaar.cloacina.tenants.limit(stage.tenant, max_concurrent_tasks=1)
    stage.worker(concurrency=4)
    first = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    results = [stage.send("nap", 0.02) for _ in range(20)]
    eventually(lambda: [stage.kinds(result)[-1] for result in results] == ["deferred"] * 20)
    stage.open_gate("k-1")
    assert first.get(timeout=15) == 1
    wait_until_done(stage, stage.tenant, 21)
    starts = [stage.row(result).started_at for result in results]
    assert starts == sorted(starts)
    # Each end rings the next at once: by the watch alone it would be one in half a second.
    assert (starts[-1] - starts[0]).total_seconds() < 5.0


def test_a_limit_is_set_raised_and_lifted_while_workers_run(stage: Stage) -> None:
    stage.worker(concurrency=4)
    tenants = stage.bazaar.cloacina.tenants
    tenants.limit(stage.tenant, max_concurrent_tasks=1)
    never(
        lambda: count(stage, stage.tenant, State.RUNNING), 1.2
    )  # within which every process has heard of it
    results = [stage.send("block", f"k{number}") for number in range(4)]
    eventually(lambda: count(stage, stage.tenant, State.RUNNING) == 1)
    never(lambda: count(stage, stage.tenant, State.RUNNING) > 1, 2.0)
    tenants.limit(stage.tenant, max_concurrent_tasks=2)
    eventually(lambda: count(stage, stage.tenant, State.RUNNING) == 2, 5)
    never(lambda: count(stage, stage.tenant, State.RUNNING) > 2, 1.5)
    tenants.limit(stage.tenant, max_concurrent_tasks=None)
    eventually(lambda: count(stage, stage.tenant, State.RUNNING) == 4, 5)
    for number in range(4):
        stage.open_gate(f"k{number}-1")
    assert [result.get(timeout=15) for result in results] == [1] * 4


@BOTH_BROKERS
def test_a_paused_tenant_starts_nothing_and_goes_on_when_it_is_resumed(stage: Stage, broker_url: str) -> None:
    tenants = stage.bazaar.cloacina.tenants
    worker = stage.worker(tenants=["tenant_x*"], concurrency=1)
    running = stage.send("block", "running")
    stage.wait_for_runs("running", 1)
    reserved = stage.send("add", 1, 2)
    if broker_url.startswith("amqp"):  # on Redis a worker takes nothing ahead of a task that runs long
        worker.wait_log(rf"Task bazaar.add\[{reserved.id}\] received")
    tenants.limit(stage.tenant, paused=True)
    worker.wait_log(f"Canceling queue {stage.tenant}")
    later = stage.send("add", 2, 3)
    delayed = stage.bazaar.add.apply_async((3, 4), tenant=stage.tenant, countdown=0.5)
    never(lambda: stage.row(running).state != "running", 1.2)  # within which every process has heard of it
    # What runs ends, what was received and what comes waits.
    stage.open_gate("running-1")
    assert running.get(timeout=15) == 1
    never(lambda: any(stage.row(one).attempt for one in (reserved, later, delayed)), 2.5, "a start")
    tenants.limit(stage.tenant, paused=False)
    assert [one.get(timeout=10) for one in (reserved, later, delayed)] == [3, 5, 7]
    assert worker.log.count("Started consuming from") == 1


def test_a_worker_that_starts_leaves_a_paused_tenant_alone(stage: Stage) -> None:
    tenants = stage.bazaar.cloacina.tenants
    tenants.limit(stage.tenant, paused=True)
    result = stage.send("add", 1, 2)
    stage.worker()
    never(lambda: stage.row(result).attempt, 2.0, "a start")
    tenants.limit(stage.tenant, paused=False)
    assert result.get(timeout=10) == 3


def test_a_rate_is_kept_by_all_workers_together(stage: Stage) -> None:
    stage.bazaar.cloacina.tenants.limit(stage.tenant, max_rate=5)
    for _ in range(20):
        stage.send("nap", 0)
    for worker in [stage.start_worker() for _ in range(2)]:
        worker.wait_ready()
    wait_until_done(stage, stage.tenant, 20)
    starts = sorted(at for at, kind in moments(stage, stage.tenant) if kind == "claimed")
    for first in starts:
        within = [at for at in starts if 0 <= (at - first).total_seconds() < 1.0]
        assert len(within) <= 10  # a full bucket, and what comes in while it is emptied
    took = (starts[-1] - starts[0]).total_seconds()
    print(f"FIGURE 20 starts at 5/s: {took:.2f} s, at best 3.00 s")
    assert 2.9 <= took <= 4.5


def test_a_slot_of_a_worker_that_was_killed_is_free_again_and_the_limit_holds_meanwhile(
    stage: Stage,
) -> None:
    stage.bazaar.cloacina.tenants.limit(stage.tenant, max_concurrent_tasks=2)
    doomed = stage.worker(concurrency=2)
    results = [stage.send("nap", 0.3) for _ in range(12)]
    eventually(lambda: count(stage, stage.tenant, State.SUCCEEDED) >= 2)
    other = stage.worker(concurrency=4)
    doomed.kill9(whole=True)
    wait_until_done(stage, stage.tenant, 12)
    assert other.is_running
    assert most_at_once(stage, stage.tenant) == 2
    assert {stage.row(result).state for result in results} == {State.SUCCEEDED}


def test_an_operator_sets_and_sees_limits_by_the_command_line(stage: Stage) -> None:
    def cli(*given: str, verb: str = "limit") -> str:
        done = stage.processes.cli(
            "cloacina", "tenant", verb, stage.tenant, *given, app="tests.acceptance.bazaar"
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert cli() == f"tenant {stage.tenant}: no limits\n"
    assert "at most 4 tasks at once, at most 10 starts per second, paused, weight 3" in cli(
        "--max-concurrent-tasks", "4", "--rate", "600/m", "--pause", "--weight", "3", "--by", "ann"
    )
    assert json.loads(cli("--rate", "none", "--resume", "--json")) == {
        "name": stage.tenant, "max_concurrent_tasks": 4, "max_rate": None, "is_paused": False,
        "weight": 3,
    }  # fmt: skip
    for wrong, says in [
        (("--max-concurrent-tasks", "0"), "at least 1"),
        (("--max-concurrent-tasks", "many"), "a whole number or 'none'"),
        (("--rate", "10/week"), "10/s, 600/m or 5/h"),
        (("--rate", "0/s"), "10/s, 600/m or 5/h"),
        (("--rate", "-1"), "10/s, 600/m or 5/h"),
        (("--max-concurrent-tasks", "-4"), "a whole number or 'none'"),
        (("--weight", "0"), "from 1 to 100"),
        (("--weight", "-1"), "a whole number"),
        (("--pause", "--resume"), "say one of the two"),
        (("--by", "ann"), "none is given to change"),
    ]:
        done = stage.processes.cli(
            "cloacina", "tenant", "limit", stage.tenant, *wrong, app="tests.acceptance.bazaar"
        )
        assert done.returncode == 1
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
    assert cli() == f"tenant {stage.tenant}: at most 4 tasks at once, weight 3\n"
    shown = json.loads(cli("--json", verb="show"))
    assert (shown["max_concurrent_tasks"], shown["max_rate"], shown["is_paused"], shown["weight"]) == (
        4, None, False, 3,
    )  # fmt: skip
    changes = [entry for entry in shown["audit"] if entry["verb"] == "limit"]
    assert [entry["operator"] == "ann" for entry in changes] == [True, False]
    assert changes[1]["detail"] == "max_rate = none, was 10, is_paused = false, was true"


@pytest.mark.parametrize(
    ("broker_url", "strategy", "is_heeded"),
    [
        ("redis", None, True),
        ("redis", "sorted", False),
        ("rabbitmq", None, True),
    ],
    indirect=["broker_url"],
)
def test_a_weight_that_changes_nothing_is_said_to_whoever_sets_it(
    stage: Stage, caplog: pytest.LogCaptureFixture, strategy: str | None, *, is_heeded: bool
) -> None:
    if strategy:
        stage.bazaar.app.conf.broker_transport_options = {"queue_order_strategy": strategy}
    stage.bazaar.cloacina.tenants.limit(stage.tenant, max_rate=5)
    assert "weight.unheeded" not in caplog.text
    stage.bazaar.cloacina.tenants.limit(stage.tenant, weight=4)
    assert ("weight.unheeded" in caplog.text) is not is_heeded


def count(stage: Stage, tenant: str, state: State) -> int:
    """Count the tenant's executions in a state."""
    number: int = stage.bazaar.cloacina.executions(tenant).count().get(state, 0)
    return number


def wait_until_done(stage: Stage, tenant: str, number: int) -> None:
    """Return once so many executions have succeeded."""
    eventually(
        lambda: count(stage, tenant, State.SUCCEEDED) == number, 60, f"{number} executions of {tenant}"
    )


def moments(stage: Stage, tenant: str) -> list[tuple[datetime, str]]:
    """Return when attempts began and ended, in order."""
    with stage.observer.cursor() as cursor:
        cursor.execute(
            f"SELECT at, kind FROM {tenant}.cloacina_events "
            "WHERE kind IN ('claimed', 'succeeded', 'recovered', 'released') ORDER BY at, id"
        )
        return list(cursor.fetchall())


def most_at_once(stage: Stage, tenant: str) -> int:
    """Return how many attempts ran at once at the most."""
    running = most = 0
    for _, kind in moments(stage, tenant):
        running += 1 if kind == "claimed" else -1
        most = max(most, running)
    return most


def span(stage: Stage, tenant: str) -> float:
    """Return the seconds from the first start to the last end."""
    events = moments(stage, tenant)
    return (events[-1][0] - events[0][0]).total_seconds()
