"""The reaper: installed with the plugin, served by any worker, for all tenants, whatever state one is in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.acceptance.stage import report
from tests.support.shop_tables import prepare_shop
from tests.support.waiting import eventually, never

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.acceptance.stage import Stage

OFTEN = {"BAZAAR_SWEEP_INTERVAL": "1"}


def new_tenant(stage: Stage, new_tenant_name: Callable[[], str], database_url: str) -> str:
    tenant = new_tenant_name()
    stage.bazaar.cloacina.tenants.create(tenant)
    prepare_shop(database_url, tenant)
    return tenant


def depth(stage: Stage, tenant: str) -> int:
    return int(stage.bazaar.cloacina.parts.publisher.queue_depth(tenant))


@pytest.mark.parametrize("broker_url", ["redis", "rabbitmq"], indirect=True)
def test_beat_has_tenants_swept_that_no_worker_serves_by_workers_whose_slots_are_all_busy(
    stage: Stage, new_tenant_name: Callable[[], str], database_url: str
) -> None:
    other = new_tenant(stage, new_tenant_name, database_url)
    busy = stage.worker(concurrency=1, env=OFTEN)
    stage.send("block", "busy")
    stage.wait_for_runs("busy", 1)
    row = stage.bazaar.add.apply_async((1, 2), tenant=other, countdown=0.5)
    never(lambda: depth(stage, other), 2.0, "a message for a tenant that nobody sweeps")
    stage.beat(env=OFTEN)
    eventually(lambda: depth(stage, other), 10, "the sweep to publish the other tenant's row")
    assert stage.row(row, other).state == "pending"
    assert busy.is_running


def test_beat_has_orphans_recovered_of_tenants_whose_only_worker_died(
    stage: Stage, new_tenant_name: Callable[[], str], database_url: str
) -> None:
    other = new_tenant(stage, new_tenant_name, database_url)
    doomed = stage.worker(tenants=[other], concurrency=1)
    stage.worker(concurrency=1, env=OFTEN)
    stage.beat(env=OFTEN)
    result = stage.bazaar.block.apply_async(("k",), tenant=other)
    eventually(lambda: stage.row(result, other).state == "running", why="the task to start")
    doomed.kill9()
    eventually(lambda: stage.row(result, other).state == "pending", 5, "the orphan's recovery")
    assert stage.row(result, other).recoveries == 1
    eventually(lambda: depth(stage, other) == 1, 5, "its message, which leaves after the commit")


def test_beat_sweeps_also_where_the_app_assigns_its_schedule_after_the_plugin(
    stage: Stage, new_tenant_name: Callable[[], str], database_url: str
) -> None:
    own = {**OFTEN, "BAZAAR_OWN_SCHEDULE": "yes"}
    other = new_tenant(stage, new_tenant_name, database_url)
    stage.worker(concurrency=1, env=own)
    stage.bazaar.add.apply_async((1, 2), tenant=other, countdown=0.1)
    beat = stage.beat(env=own)
    eventually(lambda: depth(stage, other), 10, "the sweep to publish the other tenant's row")
    assert "cloacina-sweep" in beat.log


def test_no_beat_entry_is_added_where_recovery_is_off(stage: Stage) -> None:
    beat = stage.beat(env={**OFTEN, "BAZAAR_RECOVERY": "off"})
    never(lambda: "cloacina-sweep" in beat.log, 2.5, "a sweep that was switched off")


def test_two_beats_and_three_workers_ring_each_row_once(stage: Stage) -> None:
    for _ in range(3):
        stage.start_worker(concurrency=1, env=OFTEN)
    for _ in range(2):
        stage.beat(env=OFTEN)
    results = [
        stage.bazaar.fail.apply_async((f"due{n}", 0), countdown=0.5, tenant=stage.tenant) for n in range(20)
    ]
    assert [result.get(timeout=20) for result in results] == [1] * 20
    assert [len(stage.runs(f"due{n}")) for n in range(20)] == [1] * 20
    assert {tuple(stage.kinds(result)) for result in results} == {("submitted", "claimed", "succeeded")}


def test_one_tenants_missing_table_and_anothers_locked_one_do_not_stop_the_others(
    stage: Stage, new_tenant_name: Callable[[], str], database_url: str, observer_of: Callable[[], object]
) -> None:
    broken = new_tenant(stage, new_tenant_name, database_url)
    locked = new_tenant(stage, new_tenant_name, database_url)
    tenants = [broken, locked, stage.tenant]
    short = {**OFTEN, "BAZAAR_LEASE_TTL": "6"}
    doomed = stage.worker(tenants=tenants, concurrency=5, env=short)
    stage.bazaar.block.apply_async(("in-locked",), tenant=locked)
    stage.send("block", "healthy")
    stage.send("block", "killed")
    result = stage.wait_for_runs("healthy", 1)[0]
    killed = stage.wait_for_runs("killed", 1)[0]
    with stage.observer.cursor() as cursor:
        cursor.execute(f'DROP TABLE "{broken}".cloacina_executions')
    locker = observer_of()
    with locker.cursor() as cursor:  # type: ignore[attr-defined]
        cursor.execute(f'BEGIN; LOCK TABLE "{locked}".cloacina_executions IN ACCESS EXCLUSIVE MODE')

    # A child dies: its task starts again in time.
    killed_at = stage.kill_child(killed)
    assert (
        report("kill -9 of a child beside a locked tenant", killed_at, stage.wait_for_runs("killed", 2)[1])
        <= 1.0
    )
    # A delay ends: the row is rung in time.
    due = stage.bazaar.fail.apply_async(("due", 0), countdown=1, tenant=stage.tenant)
    assert due.get(timeout=15) == 1
    late = stage.runs("due")[0].started_at - stage.row(due).run_at
    print(f"FIGURE late beside a locked tenant: {late.total_seconds():.2f} s")
    assert late.total_seconds() <= 1.0
    # From here on beat has all tenants swept as well, and gets as far as the healthy ones.
    stage.beat(env=short)
    # The leases of healthy tasks are extended all the while.
    never(lambda: len(stage.runs("healthy")) > 1, 7.0, "a healthy task to lose its lease")
    assert result.attempt == 1
    # A worker dies: its tasks start again elsewhere in time.
    stage.worker(tenants=[stage.tenant], concurrency=3, env=short)
    killed_at = stage.now()
    doomed.kill9()
    assert (
        report("kill -9 of a worker beside a locked tenant", killed_at, stage.wait_for_runs("healthy", 2)[1])
        <= 5.0
    )
    # And when the lock goes, the tenant that had it is served as well.
    with locker.cursor() as cursor:  # type: ignore[attr-defined]
        cursor.execute("ROLLBACK")
    eventually(
        lambda: stage.bazaar.cloacina.executions(locked).list(state="pending"),
        20,
        "the locked tenant's recovery",
    )


def test_a_backlog_behind_a_busy_worker_is_not_rung_again_and_a_lost_message_is(stage: Stage) -> None:
    soon = {"BAZAAR_STRANDED_AFTER": "1"}
    stage.worker(concurrency=1, env=soon, extra=["--prefetch-multiplier=5"])
    stage.send("block", "busy")
    stage.wait_for_runs("busy", 1)
    waiting = [stage.send("add", n, n) for n in range(12)]

    def rung_again() -> list[str]:
        return [result.id for result in waiting if "rung_again" in stage.kinds(result)]

    # Some of the twelve are in the queue, the others reserved by the worker; six looks find neither missing.
    never(rung_again, 4.0, "a ring for a row that merely waits")
    with stage.bazaar.app.connection_for_write() as connection:
        assert connection.default_channel.queue_purge(stage.tenant) > 0
    eventually(rung_again, 10, "the purged messages to be sent again")
    stage.open_gate("busy-1")
    for n, result in enumerate(waiting):
        assert result.get(timeout=20) == 2 * n
