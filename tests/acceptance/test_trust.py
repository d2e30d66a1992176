"""A run that lost its execution stops working on it: by itself, by its session, or by its process's end."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from tests.support.waiting import wait_for_row

if TYPE_CHECKING:
    from tests.acceptance.stage import Stage


def test_a_child_whose_main_process_is_frozen_doubts_its_lease_before_the_database_gives_it_away(
    stage: Stage,
) -> None:
    worker = stage.worker(concurrency=1, env={"BAZAAR_LEASE_TTL": "3"})
    result = stage.send("doubt", "k")
    stage.wait_for_runs("k", 1)
    # By now its claim alone would be trusted no more: the child knows of the heartbeats.
    wait_for_row(
        stage.observer,
        f"SELECT 1 FROM {stage.tenant}.cloacina_executions WHERE lease_expires_at > started_at + interval '7 s'",
    )
    assert stage.runs("k-doubted") == []
    os.kill(worker.pid, signal.SIGSTOP)
    (doubted,) = stage.wait_for_runs("k-doubted", 1)
    stage.wait_for_runs("k-refused", 1)
    expires_at = wait_for_row(
        stage.observer, f"SELECT lease_expires_at FROM {stage.tenant}.cloacina_executions"
    )[0]
    assert doubted.started_at < expires_at
    assert stage.row(result).state == "running"
    assert stage.notes("k-late") == []
    os.kill(worker.pid, signal.SIGCONT)
    worker.wait_log(r"settle\.fenced: attempt 1 of")


def test_a_cancelled_execution_finds_its_session_closed_and_its_effects_rolled_back(stage: Stage) -> None:
    worker = stage.worker(concurrency=1)
    result = stage.send("go_on", "k")
    stage.wait_for_runs("k", 1)
    stage.bazaar.cloacina.executions(stage.tenant).cancel(result.id)
    stage.open_gate("k")
    stage.wait_for_runs("k-refused", 1)
    worker.wait_log(r"settle\.fenced: attempt 1 of")
    assert stage.row(result).state == "cancelled"
    assert stage.notes("k") == stage.notes("k-late") == []


def test_a_cancelled_execution_can_have_its_process_ended_and_the_worker_goes_on(stage: Stage) -> None:
    stage.worker(concurrency=1)
    result = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    done = stage.processes.cli(
        "cloacina",
        "execution",
        "cancel",
        stage.tenant,
        result.id,
        "--terminate",
        app="tests.acceptance.bazaar:app",
    )
    assert "cancelled" in done.stdout
    # Its only slot is free again, though nobody opened the gate.
    assert stage.send("add", 1, 2).get(timeout=15) == 3
    assert stage.row(result).state == "cancelled"
    assert stage.kinds(result) == ["submitted", "claimed", "cancelled"]
