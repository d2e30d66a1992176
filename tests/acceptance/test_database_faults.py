"""The database vanishes, in every way: nothing is lost, nothing is settled twice, and callers hear the truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from cloacina_celery.errors import DatabaseUnavailable
from tests.support.modules import imported_anew
from tests.support.waiting import wait_for_row

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from cloacina_celery.chaos.proxy import Proxy
    from tests.acceptance.stage import Stage
    from tests.support.processes import WorkerProcess


@pytest.fixture
def proxied_worker(stage: Stage, proxied: dict[str, str]) -> WorkerProcess:
    """A worker with one child behind the proxy."""
    return stage.worker(concurrency=1, env=proxied)


@pytest.fixture
def proxied_bazaar(proxied: dict[str, str], broker_url: str) -> Iterator[ModuleType]:
    """The bazaar in this process, behind the proxy: a caller."""
    with imported_anew("tests.acceptance.bazaar", {**proxied, "CLOACINA_BROKER_URL": broker_url}) as bazaar:
        yield bazaar
        bazaar.cloacina.database.dispose()


# --- the answer to a commit is lost ---


@pytest.mark.parametrize("sends_again_by", ["idempotency_key", "task_id"])
def test_a_submission_whose_answer_is_lost_is_there_and_sending_it_again_finds_it(
    stage: Stage, proxied_database: Proxy, proxied_bazaar: ModuleType, sends_again_by: str
) -> None:
    def send() -> Any:
        return proxied_bazaar.remember.apply_async(("k",), tenant=stage.tenant, **{sends_again_by: "once"})

    proxied_database.lose_commits(matching="'submitted'")
    with pytest.raises(DatabaseUnavailable):
        send()
    proxied_database.wait_for_lost_commits()
    again = send()
    assert again.id == send().id
    assert stage.kinds(again) == ["submitted"]
    stage.worker(concurrency=1, env={"BAZAAR_STRANDED_AFTER": "1"})
    assert again.get(timeout=15) == 1
    assert len(stage.runs("k")) == len(stage.notes("k")) == 1


def test_a_claim_whose_answer_is_lost_is_found_and_runs_in_the_same_moment(
    stage: Stage, proxied_database: Proxy, proxied_worker: WorkerProcess
) -> None:
    proxied_database.lose_commits(matching="'claimed'")
    result = stage.send("remember", "k")
    assert result.get(timeout=5) == 1
    proxied_database.wait_for_lost_commits()
    assert stage.kinds(result) == ["submitted", "claimed", "succeeded"]
    assert len(stage.runs("k")) == len(stage.notes("k")) == 1
    proxied_worker.wait_log(r"claim\.found: claim of attempt 1 of")


@pytest.mark.parametrize(
    ("task", "arguments", "kind", "end", "runs"),
    [
        ("remember", {}, "succeeded", "succeeded", 1),
        ("block_without_effects", {}, "succeeded", "succeeded", 1),
        ("fail", {"failures": 1}, "retry_scheduled", "succeeded", 2),
        ("refuse", {}, "failed", "failed", 1),
        ("ignore", {}, "cancelled", "cancelled", 1),
        ("reject", {"requeue": True}, "released", "succeeded", 2),
        ("self_retry", {"failures": 1}, "retry_scheduled", "succeeded", 2),
    ],
)
def test_a_settlement_whose_answer_is_lost_is_found_and_not_done_again(
    stage: Stage,
    proxied_database: Proxy,
    proxied_worker: WorkerProcess,
    task: str,
    arguments: dict[str, Any],
    kind: str,
    end: str,
    runs: int,
) -> None:
    proxied_database.lose_commits(matching=f"'{kind}'")
    stage.open_gate("k-1")
    result = stage.send(task, "k", **arguments)
    (committed,) = proxied_database.wait_for_lost_commits()
    assert f"'{kind}'" in committed
    row = stage.wait_for_state(result, end)
    proxied_worker.wait_log(rf"settle\.found: attempt 1 of .* \({kind}\)")
    assert len(stage.runs("k")) == runs
    assert stage.kinds(result).count(kind) == 1
    assert row.attempt == runs
    assert row.recoveries == 0
    assert len(stage.notes("k")) == (1 if task == "remember" else 0)


def test_what_follows_a_settlement_whose_answer_is_lost_is_sent_at_once(
    stage: Stage, proxied_database: Proxy, proxied_worker: WorkerProcess
) -> None:
    # Without effects, and with them in the session's transaction.
    for number, first in enumerate(("add", "remember")):
        arguments = (1, 2) if first == "add" else ("k",)
        task = getattr(stage.bazaar, first)
        proxied_database.lose_commits(matching="'succeeded'.*'submitted'")
        chain = task.s(*arguments) | stage.bazaar.record_value.s("after")
        result = chain.apply_async(tenant=stage.tenant)
        assert result.get(timeout=8) == (3 if first == "add" else 1)
        assert len(proxied_database.wait_for_lost_commits(number + 1)) == number + 1
    proxied_worker.wait_log(r"settle\.found")


def test_a_replacement_whose_answer_is_lost_takes_over_once(
    stage: Stage, proxied_database: Proxy, proxied_worker: WorkerProcess
) -> None:
    proxied_database.lose_commits(matching="'replaced'")
    result = stage.send("replaced", "task")
    assert result.get(timeout=15) == 5
    proxied_database.wait_for_lost_commits()
    assert stage.kinds(result).count("replaced") == 1
    proxied_worker.wait_log(r"settle\.found: .*\(replaced\)")


def test_a_recovery_whose_answer_is_lost_is_done_once_and_its_task_starts_again(
    stage: Stage, proxied_database: Proxy, proxied: dict[str, str]
) -> None:
    doomed = stage.worker(concurrency=1)
    result = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    stage.worker(concurrency=1, env={**proxied, "BAZAAR_STRANDED_AFTER": "1"})
    proxied_database.lose_commits(matching="'recovered'")
    doomed.kill9()
    proxied_database.wait_for_lost_commits()
    stage.wait_for_runs("k", 2)
    stage.open_gate("k-2")
    assert result.get(timeout=15) == 2
    assert stage.kinds(result).count("recovered") == 1


def test_a_worker_that_gives_its_work_back_and_gets_no_answer_has_given_it_back_once(
    stage: Stage, proxied_database: Proxy, proxied_worker: WorkerProcess
) -> None:
    result = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    stage.worker(concurrency=1)
    proxied_database.lose_commits(matching="'released'")
    proxied_worker.quit()
    proxied_database.wait_for_lost_commits()
    stage.wait_for_runs("k", 2)
    proxied_worker.wait_exit()
    stage.open_gate("k-2")
    assert result.get(timeout=15) == 2
    assert stage.kinds(result) == ["submitted", "claimed", "released", "claimed", "succeeded"]


# --- the connection breaks under the task ---


def test_a_connection_cut_under_a_statement_costs_a_recovery_and_no_failure(stage: Stage) -> None:
    stage.worker(concurrency=1)
    result = stage.send("wait_in_statement", "k")
    wait_for_row(
        stage.observer,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE query LIKE '%%pg_sleep(60)%%' AND state = 'active' AND pid <> pg_backend_pid()"
        " AND datname = current_database()",
    )
    assert result.get(timeout=15) == 2
    row = stage.row(result)
    assert (row.failures, row.recoveries) == (0, 1)
    assert len(stage.notes("k")) == 1
    reason = stage.events(result)[2].reason or ""
    assert "its connection to the database broke" in reason


@pytest.mark.parametrize(
    "how", ["in a statement", "and raise another error", "and say nothing", "in a submission", "by idling"]
)
def test_a_task_that_breaks_its_connection_each_time_is_abandoned_and_none_of_its_effects_remain(
    stage: Stage, how: str
) -> None:
    stage.worker(concurrency=1)
    result = stage.send("lose_connection", "k", how)
    row = stage.wait_for_state(result, "abandoned", 20)
    # A commit that does not get through may be anybody's fault, so it is free at first.
    free = 3 if how == "by idling" else 0
    assert (row.attempt, row.failures, row.recoveries, row.releases) == (2 + free, 0, 1, free)
    assert stage.notes("k") == []
    assert stage.kinds(result)[-1] == "abandoned"
    expected = "went away before it was settled" if free else "its connection to the database broke"
    assert expected in (stage.events(result)[-1].reason or "")


def test_a_task_that_wants_a_connection_during_an_outage_waits_for_it_and_loses_nothing(
    stage: Stage, proxied_database: Proxy, proxied_worker: WorkerProcess
) -> None:
    result = stage.send("enter_late", "k")
    stage.wait_for_runs("k", 1)
    proxied_database.refuse()
    stage.open_gate("k-1")
    proxied_worker.wait_log(r"attempt\.waiting")
    proxied_database.forward()
    assert result.get(timeout=15) == 1
    row = stage.row(result)
    assert (row.attempt, row.failures, row.recoveries, row.releases) == (1, 0, 0, 0)
    assert len(stage.notes("k")) == 1


def test_a_task_whose_session_finds_no_server_waits_for_it(
    stage: Stage, proxied_database: Proxy, proxied_worker: WorkerProcess
) -> None:
    result = stage.send("note_late", "k")
    stage.wait_for_runs("k", 1)
    proxied_database.refuse()
    stage.open_gate("k-1")
    proxied_worker.wait_log(r"attempt\.waiting")
    proxied_database.forward()
    assert result.get(timeout=15) == 1
    assert stage.row(result).recoveries == 0


def test_a_caller_whose_session_breaks_in_a_submission_hears_it_in_our_words(
    stage: Stage, proxied_database: Proxy, proxied_bazaar: ModuleType
) -> None:
    with (  # noqa: PT012  # the block is what breaks
        pytest.raises(DatabaseUnavailable, match="connection broke"),
        proxied_bazaar.cloacina.session(stage.tenant) as session,
    ):
        session.execute(text("SELECT 1"))
        proxied_database.cut()
        proxied_bazaar.add.delay(1, 2)
    with stage.observer.cursor() as cursor:
        cursor.execute(f"SELECT count(*) FROM {stage.tenant}.cloacina_executions")
        assert cursor.fetchone() == (0,)


def test_another_database_that_does_not_answer_is_a_failure_like_any_other(stage: Stage) -> None:
    stage.worker(concurrency=1)
    result = stage.send("lose_another_database", "k")
    row = stage.wait_for_state(result, "failed")
    assert (row.attempt, row.failures, row.recoveries) == (3, 3, 0)
