"""A legacy deployment on public beside tenants in their schemas; embedded runners; first starts and refusals."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from cloacina_celery import Runner
from tests.acceptance.stage import report
from tests.support.shop_tables import prepare_shop
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from tests.acceptance.stage import Stage

RUNNER_PROGRAM = """
import sys, time
from cloacina_celery import Runner
from tests.acceptance.bazaar import app, DATABASE_URL
with Runner.with_schema(DATABASE_URL, sys.argv[1], app=app):
    print("runner ready", flush=True)
    time.sleep(300)
"""


def legacy(stage: Stage, database_url: str) -> None:
    with stage.observer.cursor() as cursor:
        cursor.execute("CREATE TABLE public.orders (n int); INSERT INTO public.orders VALUES (42)")
    stage.bazaar.cloacina.tenants.create("public", legacy=True)
    prepare_shop(database_url, "public")


def orders(stage: Stage) -> list[tuple[int]]:
    with stage.observer.cursor() as cursor:
        cursor.execute("SELECT n FROM public.orders")
        return list(cursor.fetchall())


def test_a_legacy_worker_and_tenants_workers_share_database_and_app(stage: Stage, database_url: str) -> None:
    legacy(stage, database_url)
    stage.worker(tenants=["public"], concurrency=1)
    stage.worker(concurrency=1)
    call = stage.bazaar.tenant_of_call
    assert call.apply_async((), tenant="public").get(timeout=15) == "public"
    assert call.apply_async((), tenant=stage.tenant).get(timeout=15) == stage.tenant
    assert len(stage.bazaar.cloacina.executions("public").list()) == 1
    assert len(stage.bazaar.cloacina.executions(stage.tenant).list()) == 1
    stage.bazaar.cloacina.tenants.drop("public")
    assert orders(stage) == [(42,)]


def test_a_workers_first_start_creates_its_tenant_and_the_next_one_finds_it(
    stage: Stage, new_tenant_name: object
) -> None:
    name = new_tenant_name()  # type: ignore[operator]
    first = stage.worker(tenants=[name], concurrency=1)
    assert f"tenant.created: tenant {name} created" in first.log
    assert stage.bazaar.add.apply_async((1, 2), tenant=name).get(timeout=15) == 3
    first.terminate()
    first.wait_exit()
    second = stage.worker(tenants=[name], concurrency=1)
    assert "tenant.created" not in second.log
    assert stage.bazaar.add.apply_async((1, 2), tenant=name).get(timeout=15) == 3


@pytest.mark.parametrize(
    ("change", "mend"),
    [
        ("UPDATE {s}.cloacina_version SET version_num = 't9999'", "upgrade cloacina_celery"),
        ("DROP TABLE {s}.cloacina_version", "cloacina schema migrate {s}"),
    ],
    ids=["newer", "older"],
)
def test_a_worker_refuses_a_schema_at_another_revision_and_says_what_mends_it(
    stage: Stage, change: str, mend: str
) -> None:
    with stage.observer.cursor() as cursor:
        cursor.execute(change.format(s=stage.tenant))
    worker = stage.start_worker()
    assert worker.wait_exit(60) == 78
    assert mend.format(s=stage.tenant) in worker.log
    assert "Traceback" not in worker.log


def test_a_tenants_runner_and_a_legacy_runner_run_side_by_side_in_one_process(
    stage: Stage, database_url: str
) -> None:
    legacy(stage, database_url)
    app = stage.bazaar.app
    with (
        Runner.with_schema(database_url, stage.tenant, app=app, max_concurrent_tasks=2) as ours,
        Runner(database_url, app=app) as old,
    ):
        assert ours.execute("bazaar.tenant_of_call").get(timeout=15) == stage.tenant
        assert old.execute("bazaar.tenant_of_call").get(timeout=15) == "public"
        assert ours.execute("bazaar.fail", "flaky", 1).get(timeout=15) == 2
        many = [ours.execute("bazaar.add", n, n) for n in range(30)]
        assert [one.get(timeout=15) for one in many] == [2 * n for n in range(30)]
    assert orders(stage) == [(42,)]


def test_a_runner_that_is_shut_down_at_once_gives_its_work_back(stage: Stage, database_url: str) -> None:
    runner = Runner.with_schema(database_url, stage.tenant, app=stage.bazaar.app, max_concurrent_tasks=2)
    result = runner.execute("bazaar.block", "k")
    stage.wait_for_runs("k", 1)
    runner.shutdown(wait=False)
    row = stage.row(result)
    assert (row.state, row.recoveries, row.releases) == ("pending", 0, 1)
    # Its thread comes to its end, and finds the fence closed.
    stage.open_gate("k-1")
    with Runner.with_schema(database_url, stage.tenant, app=stage.bazaar.app) as next_one:
        stage.wait_for_runs("k", 2)
        stage.open_gate("k-2")
        assert result.get(timeout=15) == 2
        assert next_one.execute("bazaar.add", 1, 1).get(timeout=15) == 2
    eventually(lambda: len(stage.notes("k")) == 1, why="one attempt's effect")
    assert stage.notes("k")[0].attempt == 2


def test_a_killed_process_with_a_runner_is_recovered_from_by_a_worker(stage: Stage) -> None:
    doomed = stage.processes.start("runner", [sys.executable, "-c", RUNNER_PROGRAM, stage.tenant])
    doomed.wait_log("runner ready")
    result = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    stage.worker(concurrency=1)
    killed_at = stage.now()
    doomed.kill9()
    assert report("kill -9 of a runner", killed_at, stage.wait_for_runs("k", 2)[1]) <= 5.0
    stage.open_gate("k-2")
    assert result.get(timeout=15) == 2
