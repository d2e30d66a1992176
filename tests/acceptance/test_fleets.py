"""Workers that serve a selection of tenants: those that come and go are followed without a restart."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from cloacina_celery.chaos.proxy import Proxy
from cloacina_celery.core.shard import shard_of
from tests.support.shop_tables import prepare_shop
from tests.support.waiting import eventually, never

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.acceptance.stage import Stage

BOTH_BROKERS = pytest.mark.parametrize("broker_url", ["redis", "rabbitmq"], indirect=True)


@BOTH_BROKERS
@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_a_pattern_takes_new_tenants_within_seconds_and_drops_removed_ones(
    stage: Stage, pool: str, new_tenant_name: Callable[[], str]
) -> None:
    worker = stage.worker(tenants=["tenant_x*"], pool=pool)
    assert stage.send("add", 1, 2).get(timeout=15) == 3
    new = new_tenant_name()
    stage.bazaar.cloacina.tenants.create(new)
    created_at = stage.now()
    result = stage.bazaar.add.apply_async((2, 3), tenant=new)
    assert result.get(timeout=15) == 5
    started_at = stage.row(result, new).started_at
    assert started_at is not None
    assert (started_at - created_at).total_seconds() < 5.0
    eventually(lambda: new in registered_tenants(stage), why="the register to name the new tenant")
    stage.bazaar.cloacina.tenants.drop(new)
    worker.wait_log(f"Canceling queue {new}", timeout=15)
    never(lambda: f"sweep of {new} failed" in worker.log.partition("Canceling queue")[2], 1.5)
    # The same name again is another tenant.
    stage.bazaar.cloacina.tenants.create(new)
    assert stage.bazaar.add.apply_async((3, 4), tenant=new).get(timeout=15) == 7
    assert stage.send("add", 1, 2).get(timeout=15) == 3


@BOTH_BROKERS
def test_a_worker_that_lost_its_broker_serves_whoever_came_meanwhile_and_not_whoever_went(
    stage: Stage, broker_url: str, new_tenant_name: Callable[[], str]
) -> None:
    gone, new = new_tenant_name(), new_tenant_name()
    stage.bazaar.cloacina.tenants.create(gone)
    with Proxy.in_front_of(broker_url) as proxy:
        worker = stage.worker(tenants=["tenant_x*"], env={"CLOACINA_BROKER_URL": proxy.url(broker_url)})
        assert stage.bazaar.add.apply_async((1, 1), tenant=gone).get(timeout=15) == 2
        stage.bazaar.cloacina.tenants.drop(gone)
        stage.bazaar.cloacina.tenants.create(new)
        assert proxy.cut() > 0
        assert stage.bazaar.add.apply_async((2, 3), tenant=new).get(timeout=30) == 5
        worker.wait_log(f"Canceling queue {gone}", timeout=15)
        assert proxy.cut() > 0
        assert stage.send("add", 1, 2).get(timeout=30) == 3
        assert stage.bazaar.add.apply_async((4, 5), tenant=new).get(timeout=30) == 9
        assert gone not in active_queues(stage, worker.nodename)
        worker.terminate()
        assert worker.wait_exit() == 0


def test_shards_share_the_tenants_among_them(stage: Stage, new_tenant_name: Callable[[], str]) -> None:
    names = [stage.tenant, *(new_tenant_name() for _ in range(11))]
    for name in names[1:6]:
        stage.bazaar.cloacina.tenants.create(name)
    workers = {
        shard: stage.start_worker(tenants=[f"tenant_x*@{shard}/3"], concurrency=1) for shard in (1, 2, 3)
    }
    for worker in workers.values():
        worker.wait_ready()
    for name in names[6:]:
        stage.bazaar.cloacina.tenants.create(name)
    results = {name: stage.bazaar.tenant_of_call.apply_async((1,), tenant=name) for name in names}
    assert {name: result.get(timeout=20) for name, result in results.items()} == {n: n for n in names}
    for shard, worker in workers.items():
        mine = {name for name in names if shard_of(name, 3) == shard}
        eventually(lambda w=worker, m=mine: tenant_queues(stage, w.nodename) == m, why=f"shard {shard}")


def test_what_is_excluded_is_left_to_others(stage: Stage, new_tenant_name: Callable[[], str]) -> None:
    big = new_tenant_name()
    stage.bazaar.cloacina.tenants.create(big)
    worker = stage.worker(tenants=["tenant_x*"], extra=["-X", big])
    assert stage.send("add", 1, 2).get(timeout=15) == 3
    assert tenant_queues(stage, worker.nodename) == {stage.tenant}
    later = new_tenant_name()
    stage.bazaar.cloacina.tenants.create(later)
    assert stage.bazaar.add.apply_async((2, 3), tenant=later).get(timeout=15) == 5
    assert tenant_queues(stage, worker.nodename) == {stage.tenant, later}


def test_a_queue_that_an_operator_cancels_stays_cancelled(
    stage: Stage, new_tenant_name: Callable[[], str]
) -> None:
    other = new_tenant_name()
    worker = stage.worker(tenants=["tenant_x*"])
    stage.bazaar.app.control.cancel_consumer(stage.tenant, destination=[worker.nodename])
    worker.wait_log(f"Canceling queue {stage.tenant}")
    stage.bazaar.cloacina.tenants.create(other)
    assert stage.bazaar.add.apply_async((2, 3), tenant=other).get(timeout=15) == 5
    assert tenant_queues(stage, worker.nodename) == {other}
    stage.bazaar.app.control.add_consumer(stage.tenant, destination=[worker.nodename])
    assert stage.send("add", 1, 2).get(timeout=15) == 3


def test_a_tenant_at_another_revision_is_left_out_until_it_is_migrated(
    stage: Stage, new_tenant_name: Callable[[], str]
) -> None:
    old = new_tenant_name()
    stage.bazaar.cloacina.tenants.create(old)
    set_revision(stage, old, "t0000")
    worker = stage.worker(tenants=["tenant_x*"])
    worker.wait_log(rf"selection.left_out: tenant {old} is selected and not served")
    assert stage.send("add", 1, 2).get(timeout=15) == 3
    result = stage.bazaar.add.apply_async((2, 3), tenant=old)
    never(lambda: stage.row(result, old).attempt > 0, 2.5, "a claim in a schema of another revision")
    from cloacina_celery.store.migrate import TENANT_HEAD

    set_revision(stage, old, TENANT_HEAD)
    assert result.get(timeout=15) == 5
    assert len(re.findall("selection.left_out", worker.log)) == 1


# On Redis a worker takes nothing ahead of a task that runs long.
@pytest.mark.parametrize("broker_url", ["rabbitmq"], indirect=True)
def test_messages_of_a_removed_tenant_that_a_worker_has_in_its_hands_are_declined(
    stage: Stage, new_tenant_name: Callable[[], str], database_url: str
) -> None:
    doomed = new_tenant_name()
    stage.bazaar.cloacina.tenants.create(doomed)
    prepare_shop(database_url, doomed)
    worker = stage.worker(tenants=["tenant_x*"], concurrency=1)
    result = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    kept = stage.bazaar.block.apply_async(("other",), tenant=doomed)
    worker.wait_log(rf"Task bazaar.block\[{kept.id}\] received")
    stage.bazaar.cloacina.tenants.drop(doomed, now=True)
    worker.wait_log(f"Canceling queue {doomed}")
    stage.open_gate("k-1")
    assert result.get(timeout=15) == 1
    worker.wait_log(rf"message.refused: message {kept.id}")
    assert stage.send("add", 1, 2).get(timeout=15) == 3


def test_a_selection_that_can_select_nothing_ends_the_start(stage: Stage) -> None:
    worker = stage.start_worker(tenants=["tenant_x*@9/8"])
    assert worker.wait_exit() == 78
    assert "cloacina: cannot start: queue 'tenant_x*@9/8' asks for shard 9 of 8" in worker.log


def test_a_pattern_that_matches_nobody_yet_waits_for_the_first(
    stage: Stage, new_tenant_name: Callable[[], str]
) -> None:
    stage.bazaar.cloacina.tenants.drop(stage.tenant)
    stage.worker(tenants=["tenant_x*"])
    first = new_tenant_name()
    stage.bazaar.cloacina.tenants.create(first)
    created_at = stage.now()
    result = stage.bazaar.add.apply_async((2, 3), tenant=first)
    assert result.get(timeout=15) == 5
    started_at = stage.row(result, first).started_at
    assert started_at is not None
    print(f"FIGURE first task of a new tenant: {(started_at - created_at).total_seconds():.2f} s")


def registered_tenants(stage: Stage) -> set[str]:
    """Return whose executions the worker may hold, as the register has it."""
    with stage.observer.cursor() as cursor:
        cursor.execute("SELECT tenants FROM cloacina.workers WHERE stopped_at IS NULL")
        return {name for (names,) in cursor.fetchall() for name in names}


def active_queues(stage: Stage, nodename: str) -> set[str]:
    """Ask a worker which queues it consumes."""
    answer = stage.bazaar.app.control.inspect([nodename], timeout=5).active_queues() or {}
    return {queue["name"] for queue in answer.get(nodename, ())}


def tenant_queues(stage: Stage, nodename: str) -> set[str]:
    """Ask a worker which tenants' queues it consumes."""
    return {name for name in active_queues(stage, nodename) if name.startswith("tenant_")}


def set_revision(stage: Stage, tenant: str, revision: str) -> None:
    """Write another revision into a tenant's schema."""
    with stage.observer.cursor() as cursor:
        cursor.execute(f'UPDATE "{tenant}".cloacina_version SET version_num = %s', (revision,))
