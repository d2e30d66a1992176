"""A worker dies, in every way that it can: its task runs again in time, and its row says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.acceptance.stage import report
from tests.support.waiting import eventually, never, wait_for_row

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg2 import extensions

    from tests.acceptance.stage import Stage

BOTH_BROKERS = pytest.mark.parametrize("broker_url", ["redis", "rabbitmq"], indirect=True)


@BOTH_BROKERS
def test_a_killed_child_has_its_task_start_again_within_a_second(stage: Stage) -> None:
    stage.worker()
    result = stage.send("block", "k")
    (first,) = stage.wait_for_runs("k", 1)
    killed_at = stage.kill_child(first)
    second = stage.wait_for_runs("k", 2)[1]
    assert report("kill -9 of a child", killed_at, second) <= 1.0
    assert (second.attempt, second.is_recovery) == (2, True)
    stage.open_gate("k-2")
    assert result.get(timeout=15) == 2
    row = stage.row(result)
    assert (row.attempt, row.recoveries, row.failures, row.releases) == (2, 1, 0, 0)
    assert stage.kinds(result) == ["submitted", "claimed", "recovered", "claimed", "succeeded"]
    assert "its process died" in (stage.events(result)[2].reason or "")
    assert [note.attempt for note in stage.notes("k")] == [2]


@BOTH_BROKERS
def test_a_killed_worker_has_its_task_start_again_elsewhere_within_five_seconds(stage: Stage) -> None:
    doomed = stage.worker(concurrency=1)
    result = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    other = stage.worker(concurrency=1)
    killed_at = stage.now()
    doomed.kill9()
    second = stage.wait_for_runs("k", 2)[1]
    assert report("kill -9 of a worker", killed_at, second) <= 5.0
    assert second.pid in other.children()
    stage.open_gate("k-2")
    assert result.get(timeout=15) == 2
    row = stage.row(result)
    assert (row.attempt, row.recoveries, row.failures) == (2, 1, 0)
    recovered = stage.events(result)[2]
    assert recovered.kind == "recovered"
    assert "liveness lock is gone" in (recovered.reason or "")
    assert doomed.nodename in (recovered.worker or "")
    assert [note.attempt for note in stage.notes("k")] == [2]


def test_a_machine_that_loses_its_power_has_its_tasks_start_again_elsewhere(stage: Stage) -> None:
    doomed = stage.worker(concurrency=2)
    stage.send("block", "a")
    stage.send("block", "b")
    stage.wait_for_runs("a", 1)
    stage.wait_for_runs("b", 1)
    stage.worker(concurrency=2)
    killed_at = stage.now()
    doomed.kill9(whole=True)
    for key in ("a", "b"):
        assert report("kill -9 of all processes", killed_at, stage.wait_for_runs(key, 2)[1]) <= 5.0


def test_where_no_other_worker_runs_the_next_one_to_start_takes_over(stage: Stage) -> None:
    doomed = stage.worker(concurrency=1)
    result = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    doomed.kill9()
    started_at = stage.now()
    stage.worker(concurrency=1)
    second = stage.wait_for_runs("k", 2)[1]
    assert report("kill -9 of the only worker, from the next one's start", started_at, second) <= 5.0
    stage.open_gate("k-2")
    assert result.get(timeout=15) == 2


def test_a_frozen_worker_loses_its_task_and_settles_nothing_when_it_thaws(stage: Stage) -> None:
    zombie = stage.worker(concurrency=1)
    result = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    other = stage.worker(concurrency=1)
    frozen_at = stage.now()
    zombie.stop_signal()
    second = stage.wait_for_runs("k", 2, timeout=40)[1]
    assert report("SIGSTOP of a worker", frozen_at, second) <= 30.0
    assert second.pid in other.children()
    assert "lease ran out" in (stage.events(result)[2].reason or "")

    # The zombie comes to its end before the rightful attempt does.
    zombie.cont()
    stage.open_gate("k-1")
    zombie.wait_log(r"settle\.fenced: attempt 1 of")
    row = stage.row(result)
    assert (row.state, row.attempt, row.recoveries) == ("running", 2, 1)
    assert stage.notes("k") == []

    stage.open_gate("k-2")
    assert result.get(timeout=15) == 2
    assert [note.attempt for note in stage.notes("k")] == [2]
    assert stage.kinds(result).count("succeeded") == 1

    # And it goes on serving its tenant.
    other.kill9()
    assert stage.send("add", 1, 2).get(timeout=15) == 3


def test_a_zombie_that_thaws_after_the_end_changes_nothing(stage: Stage) -> None:
    short = {"BAZAAR_LEASE_TTL": "3"}
    zombie = stage.worker(concurrency=1, env=short)
    result = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    stage.worker(concurrency=1, env=short)
    zombie.stop_signal()
    stage.wait_for_runs("k", 2)
    stage.open_gate("k-2")
    assert result.get(timeout=15) == 2
    settled = stage.row(result)
    zombie.cont()
    stage.open_gate("k-1")
    zombie.wait_log(r"settle\.fenced: attempt 1 of")
    assert stage.row(result) == settled
    assert [note.attempt for note in stage.notes("k")] == [2]


@pytest.mark.parametrize("how", ["os._exit", "SIGSEGV", "SIGTERM", "sys.exit"])
def test_a_task_that_takes_its_process_along_runs_again(stage: Stage, how: str) -> None:
    # os._exit(137) is how the kernel's out-of-memory killer looks to a shell, SIGKILL how it looks to a parent.
    # Of a child that leaves by itself billiard says so first, and may give it a second more: its slot is not free
    # for so long, and what is lost runs in the other one.
    stage.worker(concurrency=2 if how == "sys.exit" else 1)
    result = stage.send("die_once", "k", how)
    assert result.get(timeout=15) == 2
    first, second = stage.runs("k")
    assert report(f"death by {how}", first.started_at, second) <= 1.0
    row = stage.row(result)
    assert (row.recoveries, row.failures) == (1, 0)


def test_a_child_dies_among_busy_ones_and_only_its_task_runs_again(stage: Stage) -> None:
    stage.worker(concurrency=3)
    results = {key: stage.send("block", key) for key in ("a", "b", "c")}
    runs = {key: stage.wait_for_runs(key, 1)[0] for key in results}
    stage.kill_child(runs["b"])
    stage.wait_for_runs("b", 2)
    for gate in ("a-1", "b-2", "c-1"):
        stage.open_gate(gate)
    assert {key: result.get(timeout=15) for key, result in results.items()} == {"a": 1, "b": 2, "c": 1}


def test_a_warm_shutdown_lets_tasks_finish_and_keeps_their_leases_meanwhile(stage: Stage) -> None:
    short = {"BAZAAR_LEASE_TTL": "3"}
    worker = stage.worker(concurrency=1, env=short)
    result = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    stage.worker(concurrency=1, env=short)
    worker.terminate()
    worker.wait_log("Warm shutdown")
    never(lambda: len(stage.runs("k")) > 1, 5.0, "a second start of a task whose worker is finishing it")
    stage.open_gate("k-1")
    assert worker.wait_exit() == 0
    assert result.get(timeout=15) == 1
    row = stage.row(result)
    assert (row.attempt, row.recoveries, row.releases) == (1, 0, 0)
    assert "worker.stopped" in worker.log


@BOTH_BROKERS
def test_a_cold_shutdown_gives_its_task_back_at_once_and_spends_no_budget(stage: Stage) -> None:
    worker = stage.worker(concurrency=1)
    result = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    stage.worker(concurrency=1)
    quit_at = stage.now()
    worker.quit()
    second = stage.wait_for_runs("k", 2)[1]
    assert report("SIGQUIT of a worker", quit_at, second) <= 3.0
    assert not second.is_recovery
    worker.wait_exit()
    stage.open_gate("k-2")
    assert result.get(timeout=15) == 2
    row = stage.row(result)
    assert (row.attempt, row.recoveries, row.releases, row.failures) == (2, 0, 1, 0)
    assert stage.kinds(result) == ["submitted", "claimed", "released", "claimed", "succeeded"]


def test_a_shutdown_waits_for_no_locked_tenant_and_gives_the_others_their_work_back(
    stage: Stage, new_tenant_name: Callable[[], str], observer_of: Callable[[], extensions.connection]
) -> None:
    locked = new_tenant_name()
    stage.bazaar.cloacina.tenants.create(locked)
    worker = stage.worker(tenants=[locked, stage.tenant], concurrency=1)
    result = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    with observer_of().cursor() as cursor:
        cursor.execute(f"BEGIN; LOCK TABLE {locked}.cloacina_executions IN ACCESS EXCLUSIVE MODE")
    worker.quit()
    worker.wait_exit(15)
    row = stage.row(result)
    assert (row.state, row.recoveries, row.releases) == ("pending", 0, 1)


def test_a_cold_shutdown_of_the_only_worker_leaves_its_task_to_the_next_one(stage: Stage) -> None:
    worker = stage.worker(concurrency=2)
    results = [stage.send("block", key) for key in ("a", "b")]
    for key in ("a", "b"):
        stage.wait_for_runs(key, 1)
    worker.quit()
    worker.wait_exit()
    for result in results:
        row = stage.row(result)
        assert (row.state, row.recoveries, row.releases) == ("pending", 0, 1)
    stage.worker(concurrency=2)
    for key, result in zip(("a", "b"), results, strict=True):
        stage.wait_for_runs(key, 2)
        stage.open_gate(f"{key}-2")
        assert result.get(timeout=15) == 2


def test_a_poison_task_ends_abandoned_after_its_budget_and_its_errback_runs(stage: Stage) -> None:
    stage.worker(concurrency=1)
    bazaar = stage.bazaar
    result = bazaar.poison.apply_async(("k",), tenant=stage.tenant, link_error=bazaar.record_error.s())
    row = stage.wait_for_state(result, "abandoned", 20)
    assert (row.attempt, row.recoveries, row.failures) == (2, 1, 0)
    assert len(stage.runs("k")) == 2
    assert result.state == "FAILURE"
    with pytest.raises(Exception, match="abandoned: lost 2 times"):
        result.get(timeout=5)
    stage.wait_for_runs(f"error-{result.id}", 1)
    assert stage.kinds(result) == ["submitted", "claimed", "recovered", "claimed", "abandoned"]
    # The worker that it killed twice is alive and well.
    assert stage.send("add", 1, 2).get(timeout=15) == 3


def test_a_chord_with_a_poison_member_fails_and_does_not_wait_for_ever(stage: Stage) -> None:
    from celery import chord

    stage.worker(concurrency=2)
    bazaar = stage.bazaar
    with bazaar.cloacina.tenant(stage.tenant):
        result = chord([bazaar.add.s(1, 1), bazaar.poison.s("k")])(
            bazaar.total.s().on_error(bazaar.record_error.s())
        )
    with pytest.raises(Exception, match="abandoned"):
        result.get(timeout=20)
    assert stage.row(result).state == "failed"
    stage.wait_for_runs(f"error-{result.id}", 1)


@pytest.mark.parametrize("with_note", [True, False])
def test_a_database_that_drops_every_connection_costs_a_run_and_loses_nothing(
    stage: Stage, tmp_path_factory: pytest.TempPathFactory, with_note: bool
) -> None:
    worker = stage.worker(concurrency=1)
    directory = tmp_path_factory.mktemp("files")
    result = stage.send("hold", "k", str(directory), with_note=with_note)
    stage.wait_for_runs("k", 1)
    with stage.observer.cursor() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    stage.bazaar.cloacina.database.dispose()
    dropped_at = stage.now()
    (directory / "k-1").touch()
    (directory / "k-2").touch()
    stage.wait_for_state(result, "succeeded", 12)
    runs = stage.runs("k")
    report("a dropped database connection", dropped_at, runs[-1])
    assert len(runs) <= 2
    row = stage.row(result)
    assert (row.failures, row.recoveries) == (0, 0)
    assert len(stage.notes("k")) == int(with_note)
    # The worker is not taken for dead, and goes on.
    assert stage.send("add", 1, 2).get(timeout=15) == 3
    assert worker.is_running
    assert "worker.dead" not in worker.log


def test_a_worker_whose_liveness_connection_breaks_is_not_robbed_of_its_tasks(stage: Stage) -> None:
    worker = stage.worker(concurrency=1)
    result = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    stage.worker(concurrency=1)
    with stage.observer.cursor() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(a.pid) FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
            " WHERE l.locktype = 'advisory' AND a.datname = current_database()"
        )
    worker.wait_log(r"liveness\.lost")
    never(lambda: len(stage.runs("k")) > 1, 4.0, "a second start of a task whose worker lives")
    stage.open_gate("k-1")
    assert result.get(timeout=15) == 1
    eventually(lambda: "worker.dead" not in worker.log, 1.0, "nobody to be called dead")


@pytest.mark.parametrize("task", ["block", "block_without_effects"])
def test_a_child_that_is_killed_in_the_middle_of_its_settlement_is_settled_once(
    stage: Stage, observer_of: Callable[[], extensions.connection], task: str
) -> None:
    # With effects the settlement is a statement in their transaction, without it is one that commits by itself.
    stage.worker(concurrency=1)
    stage.open_gate("k-2")
    locker = observer_of()
    result = stage.send(task, "k")
    first = stage.wait_for_runs("k", 1)[0]
    with locker.cursor() as cursor:
        # A settlement writes its event last: here it stands, with its row's new state in hand.
        cursor.execute(f"BEGIN; LOCK TABLE {stage.tenant}.cloacina_events IN SHARE MODE")
    stage.open_gate("k-1")
    wait_for_row(
        stage.observer,
        "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()",
    )
    stage.kill_child(first)
    with locker.cursor() as cursor:
        cursor.execute("ROLLBACK")
    assert stage.wait_for_state(result, "succeeded", 25).failures == 0
    assert stage.kinds(result).count("succeeded") == 1
    assert len(stage.notes("k")) == (1 if task == "block" else 0)
