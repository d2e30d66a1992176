"""The other pools: each runs, retries, and is recovered from by another worker after a kill -9."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.acceptance.stage import report
from tests.support.waiting import never

if TYPE_CHECKING:
    from tests.acceptance.stage import Stage

POOLS = pytest.mark.parametrize("pool", ["threads", "gevent", "solo"])


@POOLS
def test_a_pool_runs_retries_and_is_recovered_from(stage: Stage, pool: str) -> None:
    doomed = stage.worker(pool=pool)
    assert stage.send("add", 2, 3).get(timeout=15) == 5
    assert stage.send("fail", "flaky", 1).get(timeout=15) == 2
    assert [run.pid for run in stage.runs("flaky")] == [doomed.pid] * 2
    result = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    other = stage.worker(pool=pool)
    killed_at = stage.now()
    doomed.kill9()
    second = stage.wait_for_runs("k", 2)[1]
    assert report(f"kill -9 of a {pool} worker", killed_at, second) <= 5.0
    assert second.pid == other.pid
    stage.open_gate("k-2")
    assert result.get(timeout=15) == 2
    row = stage.row(result)
    assert (row.recoveries, row.failures) == (1, 0)
    assert [note.attempt for note in stage.notes("k")] == [2]


@POOLS
def test_a_pool_extends_the_leases_of_tasks_that_run_long(stage: Stage, pool: str) -> None:
    stage.worker(pool=pool, env={"BAZAAR_LEASE_TTL": "3"})
    result = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    stage.worker(pool=pool, env={"BAZAAR_LEASE_TTL": "3"})
    never(lambda: len(stage.runs("k")) > 1, 5.0, "a second start of a task whose worker lives")
    stage.open_gate("k-1")
    assert result.get(timeout=15) == 1


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_a_pool_runs_several_tenants_tasks_at_once_each_in_its_own_schema(
    stage: Stage, pool: str, new_tenant_name: object
) -> None:
    names = [stage.tenant, new_tenant_name(), new_tenant_name()]  # type: ignore[operator]
    for name in names[1:]:
        stage.bazaar.cloacina.tenants.create(name)
    stage.worker(tenants=names, pool=pool, concurrency=6)
    results = [
        (name, stage.bazaar.tenant_of_call.apply_async((n,), tenant=name))
        for n in range(10)
        for name in names
    ]
    assert all(result.get(timeout=20) == name for name, result in results)


@POOLS
def test_a_pools_warm_shutdown_lets_its_task_finish(stage: Stage, pool: str) -> None:
    worker = stage.worker(pool=pool)
    result = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    worker.terminate()
    worker.wait_log("Warm shutdown")
    stage.open_gate("k-1")
    assert result.get(timeout=15) == 1
    assert worker.wait_exit() == 0
    row = stage.row(result)
    assert (row.attempt, row.recoveries, row.releases) == (1, 0, 0)
