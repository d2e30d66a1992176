"""A noisy tenant's long tasks keep a quiet tenant waiting no longer than one running task's time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cloacina_celery.plugin.doorbell import MEMORY, SHORT
from tests.support.waiting import eventually, never

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.acceptance.stage import Stage

NAP = 0.5
SLACK = 0.25
"""Seconds for the way through the broker and two busy cores."""


EACH_CHOOSING = pytest.mark.parametrize(
    ("broker_url", "pool"),
    [("redis", "prefork"), ("redis", "threads"), ("rabbitmq", "prefork"), ("rabbitmq-quorum", "prefork")],
    indirect=["broker_url"],
)
"""Where a worker chooses whose task comes next: to other pools RabbitMQ sends at random, and they keep its order."""


@EACH_CHOOSING
def test_a_quiet_tenants_task_starts_within_one_of_a_noisy_tenants_ten_thousand(
    stage: Stage, pool: str, new_tenant_name: Callable[[], str]
) -> None:
    quiet = new_tenant_name()
    stage.bazaar.cloacina.tenants.create(quiet)
    flood(stage, 10_000)
    stage.worker(tenants=["tenant_x*"], concurrency=2, pool=pool)
    eventually(lambda: stage.bazaar.cloacina.executions(stage.tenant).count().get("succeeded", 0) >= 3)
    for _ in range(5):
        result = stage.bazaar.nap.apply_async((0,), tenant=quiet)
        result.get(timeout=30)
        row = stage.row(result, quiet)
        assert row.started_at is not None
        waited = (row.started_at - row.submitted_at).total_seconds()
        print(f"FIGURE quiet behind 10,000 x {NAP} s on 2 slots: {waited:.2f} s")
        assert waited <= NAP + SLACK


@EACH_CHOOSING
def test_a_tenant_gets_as_many_turns_as_its_weight_and_the_turns_that_nobody_takes(
    stage: Stage, pool: str, new_tenant_name: Callable[[], str]
) -> None:
    light, heavy = stage.tenant, new_tenant_name()
    tenants = stage.bazaar.cloacina.tenants
    tenants.create(heavy)
    for tenant in (light, heavy):
        stage.bazaar.cloacina.submit_many([stage.bazaar.nap.s(0.1) for _ in range(120)], tenant=tenant)
    stage.worker(tenants=["tenant_x*"], concurrency=2, pool=pool)
    eventually(lambda: len(starts(stage, light, heavy)) >= 20)
    # By turns, but for what came before the other's first message.
    assert 8 <= starts(stage, light, heavy)[:20].count(heavy) <= 12
    tenants.limit(heavy, weight=4)
    before = len(starts(stage, light, heavy))
    # Two looks into the catalog, within which the worker has heard of it.
    eventually(lambda: len(starts(stage, light, heavy)) >= before + 40 + 50)
    later = starts(stage, light, heavy)[before + 40 :][:50]
    print(f"FIGURE of 50 starts, with weights 4 and 1: {later.count(heavy)} and {later.count(light)}")
    assert 38 <= later.count(heavy) <= 42
    eventually(lambda: len(starts(stage, light, heavy)) == 240, 60)
    # The light one had every slot once the heavy one was through: no turn is kept for nobody.
    rest = starts(stage, light, heavy)[-20:]
    assert rest == [light] * 20


@pytest.mark.parametrize("broker_url", ["rabbitmq"], indirect=True)
def test_plain_tasks_with_an_eta_that_fill_a_window_hold_up_nobody(
    stage: Stage, new_tenant_name: Callable[[], str]
) -> None:
    """A worker holds them until they are due, and a window of one queue cannot be widened."""
    quiet = new_tenant_name()
    stage.bazaar.cloacina.tenants.create(quiet)
    worker = stage.worker(tenants=["tenant_x*"], concurrency=2)
    for number in range(20):
        stage.bazaar.plain_record.apply_async(
            (number, stage.tenant, f"held {number}"), countdown=12, queue=stage.tenant
        )
    worker.wait_log(r"window\.shared")
    assert stage.send("add", 2, 3).get(timeout=5) == 5
    assert not stage.runs("held 0")
    for number in range(20):
        stage.wait_for_runs(f"held {number}", 1)
    worker.wait_log(r"window\.each")
    results = [
        stage.bazaar.add.apply_async((1, number), tenant=tenant)
        for number in range(30)
        for tenant in (stage.tenant, quiet)
    ]
    assert [result.get(timeout=15) for result in results] == [1 + n for n in range(30) for _ in range(2)]
    assert worker.log.count("window.shared") == 1


def test_what_is_taken_ahead_while_tasks_are_short_is_not_while_they_are_long(
    stage: Stage, new_tenant_name: Callable[[], str]
) -> None:
    worker = stage.worker(concurrency=2)
    for _ in range(200):
        stage.send("add", 1, 2)
    eventually(lambda: stage.bazaar.cloacina.executions(stage.tenant).count().get("succeeded", 0) == 200)
    held = [stage.send("block", f"k{number}") for number in range(2)]
    for number in range(2):
        stage.wait_for_runs(f"k{number}", 1)
    # Within this time the last short tasks are of the past.
    never(lambda: False, SHORT * MEMORY + 0.1)
    later = [stage.send("add", 2, 3) for _ in range(20)]
    never(
        lambda: any(f"[{result.id}] received" in worker.log for result in later), 1.0, "a message in reserve"
    )
    for number in range(2):
        stage.open_gate(f"k{number}-1")
    assert [result.get(timeout=15) for result in later] == [5] * 20
    assert [result.get(timeout=15) for result in held] == [1, 1]


def starts(stage: Stage, *tenants: str) -> list[str]:
    """Return whose executions have started, in order."""
    with stage.observer.cursor() as cursor:
        union = " UNION ALL ".join(
            f"SELECT started_at, '{tenant}' FROM {tenant}.cloacina_executions WHERE started_at IS NOT NULL"
            for tenant in tenants
        )
        cursor.execute(f"{union} ORDER BY 1")
        return [tenant for _, tenant in cursor.fetchall()]


def flood(stage: Stage, number: int) -> None:
    """Submit many naps at once."""
    for start in range(0, number, 500):
        stage.bazaar.cloacina.submit_many(
            [stage.bazaar.nap.s(NAP) for _ in range(start, min(start + 500, number))], tenant=stage.tenant
        )
