"""A tenant's life under real workers: nothing starts that must not, nothing is lost, nothing comes back."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from kombu import Connection

from tests.acceptance.stage import BAZAAR
from tests.support.processes import celery
from tests.support.shop_tables import prepare_shop
from tests.support.waiting import LOCKS, eventually, never, wait_for_row

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg2 import extensions

    from tests.acceptance.stage import Stage


def count(stage: Stage, state: str) -> int:
    return int(stage.bazaar.cloacina.executions(stage.tenant).count().get(state, 0))


def test_a_suspension_under_load_starts_nothing_loses_nothing_and_spends_no_budget(stage: Stage) -> None:
    running = stage.send("block", "a")
    waiting = [stage.send("add", n, 1) for n in range(60)]
    stage.worker(concurrency=2)
    stage.wait_for_runs("a", 1)
    stage.bazaar.cloacina.tenants.suspend(stage.tenant)
    ended = count(stage, "succeeded")
    stage.open_gate("a-1")
    stage.wait_for_state(running, "succeeded")
    # Submitted while it was suspended, and declined by the worker like those before.
    late = stage.send("add", 1, 1)
    eventually(lambda: _rung(stage) == 0, why="the worker to have put all messages back into their rows")
    assert count(stage, "succeeded") == ended + 1
    stage.bazaar.cloacina.tenants.resume(stage.tenant)
    assert [result.get(timeout=30) for result in waiting] == [n + 1 for n in range(60)]
    assert late.get(timeout=30) == 2
    rows = [stage.row(result) for result in [*waiting, late]]
    assert {(row.attempt, row.failures, row.recoveries, row.releases) for row in rows} == {(1, 0, 0, 0)}
    assert {tuple(stage.kinds(result)) for result in waiting} == {("submitted", "claimed", "succeeded")}


def test_what_is_given_back_runs_again_after_the_resumption_and_wrote_nothing(stage: Stage) -> None:
    result = stage.send("block", "a")
    worker = stage.worker(concurrency=2)
    stage.wait_for_runs("a", 1)
    stage.bazaar.cloacina.tenants.suspend(stage.tenant, give_back=True)
    stage.open_gate("a-1")
    worker.wait_log("settle.fenced: attempt 1")
    assert (stage.row(result).state, stage.notes("a")) == ("pending", [])
    stage.bazaar.cloacina.tenants.resume(stage.tenant)
    stage.open_gate("a-2")
    stage.wait_for_state(result, "succeeded")
    assert [note.attempt for note in stage.notes("a")] == [2]
    row = stage.row(result)
    assert (row.attempt, row.releases, row.recoveries, row.failures) == (2, 1, 0, 0)


def test_a_drain_lets_the_rest_run_to_its_end_and_a_chain_too(stage: Stage) -> None:
    blocked = stage.send("block", "a")
    add = stage.bazaar.add
    with stage.bazaar.cloacina.tenant(stage.tenant):
        chained = (add.s(1, 1) | add.s(10) | add.s(100)).apply_async()
    stage.worker(concurrency=1)
    stage.wait_for_runs("a", 1)
    left = stage.bazaar.cloacina.tenants.drain(stage.tenant)
    assert (left.pending, left.running) == (1, 1)
    stage.open_gate("a-1")
    assert not stage.bazaar.cloacina.tenants.drain(stage.tenant, wait=True, timeout=30)
    assert chained.get(timeout=5) == 112
    stage.wait_for_state(blocked, "succeeded")
    assert stage.bazaar.cloacina.tenants.drop(stage.tenant)


def test_a_zombie_of_a_dropped_tenant_finds_nothing_of_the_one_that_has_its_name(
    stage: Stage, database_url: str
) -> None:
    tenants, tenant = stage.bazaar.cloacina.tenants, stage.tenant
    tenants.create("tenant_other")
    prepare_shop(database_url, "tenant_other")
    worker = stage.worker(tenants=[tenant, "tenant_other"], concurrency=2)
    call = stage.bazaar.block
    old = call.apply_async(("a",), tenant=tenant, idempotency_key="key")
    (run,) = stage.wait_for_runs("a", 1)
    os.kill(run.pid, signal.SIGSTOP)
    try:
        tenants.drop(tenant, now=True)
        assert stage.bazaar.add.apply_async((1, 2), tenant="tenant_other").get(timeout=15) == 3
        tenants.create(tenant)
        prepare_shop(database_url, tenant)
        new = call.apply_async(("b",), tenant=tenant, idempotency_key="key")
        assert new.id != old.id
        stage.open_gate("a-1")
        stage.bazaar.app.control.add_consumer(tenant)
        stage.wait_for_runs("b", 1, 30)
    finally:
        os.kill(run.pid, signal.SIGCONT)
    # Its gate is open in the new tenant's table, which is where it looks now: it wants to settle, and cannot.
    worker.wait_log(rf"{old.id}\] ignored", 30)
    stage.open_gate("b-1")
    stage.wait_for_state(new, "succeeded")
    assert [execution.id for execution in stage.bazaar.cloacina.executions(tenant).list()] == [new.id]
    assert (stage.notes("a"), len(stage.notes("b"))) == ([], 1)
    assert worker.is_running


def test_a_worker_that_starts_late_serves_its_other_tenants_and_brings_a_removed_one_not_back(
    stage: Stage,
) -> None:
    tenants = stage.bazaar.cloacina.tenants
    tenants.create("tenant_gone")
    tenants.drop("tenant_gone")
    late = stage.worker(tenants=[stage.tenant, "tenant_gone"])
    assert stage.send("add", 1, 2).get(timeout=15) == 3
    late.wait_log(r"tenant.gone: queue tenant_gone is not consumed: .* was removed")
    alone = stage.start_worker(tenants=["tenant_gone"])
    assert alone.wait_exit() == 78
    assert "tenant_gone" not in [one.name for one in tenants.list()]


def test_a_running_worker_forgets_a_tenant_that_another_process_dropped(stage: Stage) -> None:
    tenants = stage.bazaar.cloacina.tenants
    tenants.create("tenant_gone")
    worker = stage.worker(tenants=[stage.tenant, "tenant_gone"])
    tenants.drop("tenant_gone")
    assert stage.send("add", 1, 2).get(timeout=15) == 3
    # It may have looked once more before it heard.
    said = worker.log.count("sweep.failed")
    assert said <= 1
    never(lambda: worker.log.count("sweep.failed") > said, 7, "the sweep to look for it again")


BROKERS = pytest.mark.parametrize("broker_url", ["redis", "rabbitmq"], indirect=True)


@BROKERS
def test_a_drop_takes_the_queue_from_a_worker_that_goes_on_with_its_others(
    stage: Stage, new_tenant_name: Callable[[], str], broker_url: str
) -> None:
    other = new_tenant_name()
    tenants = stage.bazaar.cloacina.tenants
    tenants.create(other)
    worker = stage.worker(tenants=[stage.tenant, other])
    assert stage.send("add", 1, 2).get(timeout=15) == 3
    assert tenants.drop(stage.tenant)
    with Connection(broker_url) as connection, pytest.raises(connection.channel_errors):
        connection.default_channel.queue_declare(queue=stage.tenant, passive=True)
    assert stage.bazaar.add.apply_async((3, 4), tenant=other).get(timeout=15) == 7
    assert worker.is_running


@BROKERS
def test_a_renamed_tenants_work_goes_on_in_the_workers_that_it_had(
    stage: Stage, new_tenant_name: Callable[[], str], broker_url: str
) -> None:
    tenants, new = stage.bazaar.cloacina.tenants, new_tenant_name()
    stage.worker(concurrency=1)
    assert stage.send("add", 1, 2).get(timeout=15) == 3
    tenants.suspend(stage.tenant)
    waiting = [stage.send("add", n, n) for n in range(5)]
    tenants.rename(stage.tenant, new)
    tenants.resume(new)
    moved = [stage.bazaar.cloacina.result(result.id, tenant=new) for result in waiting]
    assert [result.get(timeout=20) for result in moved] == [0, 2, 4, 6, 8]
    assert stage.bazaar.add.apply_async((3, 4), tenant=new).get(timeout=15) == 7


def test_a_drop_whose_process_is_killed_is_completed_by_the_next_one(
    stage: Stage, observer_of: Callable[[], extensions.connection]
) -> None:
    stage.send("add", 1, 2)
    holder = observer_of()
    holder.autocommit = False
    with holder.cursor() as cursor:
        cursor.execute(f"SELECT 1 FROM {stage.tenant}.cloacina_executions")
    verb = ("cloacina", "tenant", "drop", stage.tenant, "--now", "--yes")
    dropping = stage.processes.start("drop", [*celery(BAZAAR), *verb])
    wait_for_row(
        stage.observer,
        f"SELECT 1 FROM {LOCKS} WHERE mode = 'AccessExclusiveLock' AND NOT granted",
        why="the drop to stand at the table",
    )
    dropping.kill9()
    holder.close()
    tenants = stage.bazaar.cloacina.tenants
    assert tenants.get(stage.tenant).state == "suspended"
    done = stage.processes.cli(*verb, app=BAZAAR)
    assert done.stdout == f"tenant {stage.tenant} dropped\n"
    assert (tenants.get(stage.tenant).state, tenants.get(stage.tenant).unfinished) == ("removed", None)


def _rung(stage: Stage) -> int:
    with stage.observer.cursor() as cursor:
        cursor.execute(
            f"SELECT count(*) FROM {stage.tenant}.cloacina_executions WHERE state = 'pending' AND rung_at IS NOT NULL"
        )
        row = cursor.fetchone()
    assert row is not None
    return int(row[0])
