"""Promises of the process helpers, on real workers of a plain Celery app."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.support import ROOT
from tests.support.processes import START_PATIENCE, Processes, group_members
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

PLAIN = "tests.support.plain_app:app"


@pytest.fixture
def plain(import_app: Callable[[str], ModuleType]) -> ModuleType:
    return import_app("tests.support.plain_app")


def is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("broker_url", ["redis", "rabbitmq"], indirect=True)
def test_a_worker_runs_tasks_on_either_broker(
    processes: Processes, plain: ModuleType, tenant_name: str
) -> None:
    worker = processes.worker(PLAIN, queues=[tenant_name]).wait_ready()
    assert plain.add.apply_async((2, 3), queue=tenant_name).get(timeout=30) == 5
    assert plain.process_id.apply_async(queue=tenant_name).get(timeout=30) in worker.children()
    assert len(worker.children()) == 2


@pytest.mark.parametrize("pool", ["threads", "gevent", "solo"])
def test_a_worker_runs_on_any_pool(
    processes: Processes, plain: ModuleType, tenant_name: str, pool: str
) -> None:
    worker = processes.worker(PLAIN, queues=[tenant_name], pool=pool).wait_ready()
    assert plain.process_id.apply_async(queue=tenant_name).get(timeout=30) == worker.pid


def test_a_killed_worker_takes_its_children_along_and_a_new_one_goes_on(
    processes: Processes, plain: ModuleType, tenant_name: str, tmp_path: Path
) -> None:
    first = processes.worker(PLAIN, queues=[tenant_name]).wait_ready()
    plain.hold.apply_async((str(tmp_path),), queue=tenant_name)
    eventually((tmp_path / "held").exists, why="the task to start")
    assert int((tmp_path / "held").read_text()) in first.children()
    children = first.children()
    first.kill9()
    assert first.exit_code == -signal.SIGKILL
    assert not first.is_running
    assert first.children() == []
    eventually(lambda: all(map(is_gone, children)), why="the pool to follow its worker")
    processes.worker(PLAIN, queues=[tenant_name]).wait_ready()
    assert plain.add.apply_async((1, 1), queue=tenant_name).get(timeout=30) == 2


def test_a_killed_child_is_replaced(processes: Processes, tenant_name: str) -> None:
    worker = processes.worker(PLAIN, queues=[tenant_name], concurrency=1).wait_ready()
    (child,) = worker.children()
    os.kill(child, signal.SIGKILL)
    # Celery sees it at once, or at its next round of 5 s: it looks for the exit code as soon as the child's
    # pipe closes, which the kernel does a moment before there is one.
    eventually(lambda: worker.children() not in ([], [child]), why="another child")
    assert worker.is_running


def test_a_worker_that_is_asked_ends_with_zero(processes: Processes, tenant_name: str) -> None:
    warm, cold = (processes.worker(PLAIN, queues=[tenant_name]) for _ in range(2))
    warm.wait_ready().terminate()
    cold.wait_ready().quit()
    assert warm.wait_exit() == 0
    assert cold.wait_exit() == 0
    warm.wait_log("Warm shutdown")
    cold.wait_log("Cold shutdown")


def test_a_frozen_worker_does_nothing_until_it_goes_on(
    processes: Processes, plain: ModuleType, tenant_name: str
) -> None:
    worker = processes.worker(PLAIN, queues=[tenant_name]).wait_ready()
    tree = [worker.pid, *worker.children()]
    worker.stop_signal()
    eventually(
        lambda: {psutil.Process(pid).status() for pid in tree} == {psutil.STATUS_STOPPED}, why="all to stop"
    )
    result = plain.add.apply_async((2, 2), queue=tenant_name)
    assert not result.ready()
    worker.cont()
    assert result.get(timeout=30) == 4


def test_nothing_is_left_at_the_end(processes: Processes, tenant_name: str) -> None:
    frozen, killed = (processes.worker(PLAIN, queues=[tenant_name]).wait_ready() for _ in range(2))
    members = group_members(frozen.pid) + group_members(killed.pid)
    assert len(members) == 6
    frozen.stop_signal()
    killed.kill9(whole=True)
    processes.end_all()
    assert all(map(is_gone, members))


def test_beats_run_side_by_side(processes: Processes) -> None:
    for beat in [processes.beat(PLAIN), processes.beat(PLAIN)]:
        beat.wait_ready().wait_log("Sending due task tick")


def test_the_command_line_answers_on_separate_streams(processes: Processes) -> None:
    answer = processes.cli("report", app=PLAIN)
    assert answer.returncode == 0
    assert "broker_url" in answer.stdout
    assert processes.cli("no-such-command", app=PLAIN).returncode == 2


def test_a_log_that_can_not_come_any_more_is_not_waited_for(processes: Processes) -> None:
    program = processes.start("greeter", [sys.executable, "-c", "print('hello'); raise SystemExit(7)"])
    assert program.wait_log("^hel(lo)$").group(1) == "lo"
    with pytest.raises(AssertionError, match=r"greeter1 ended with exit code 7 before it logged 'goodbye'"):
        program.wait_log("goodbye")
    assert program.wait_exit() == 7


def test_processes_see_the_tests_settings_and_no_others(
    processes: Processes, database_url: str, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOACINA_LEASE_TTL", "1")
    environment = processes.environment({"CLOACINA_BROKER_URL": None, "EXTRA": "yes"})
    ours = {key: value for key, value in environment.items() if key.startswith("CLOACINA_")}
    assert ours == {"CLOACINA_DATABASE_URL": database_url}
    assert environment["EXTRA"] == "yes"
    assert processes.environment()["CLOACINA_BROKER_URL"] == broker_url


STARTER = """
import subprocess, sys
from tests.support.processes import leash_environment, on_leash

program = [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"]
child = subprocess.Popen(on_leash(program), env=leash_environment({}), stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the leash is Linux's")
def test_what_a_killed_pytest_started_dies_with_it() -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with starter:
        assert starter.stdout is not None
        child = int(starter.stdout.readline())
        assert not is_gone(child)
        starter.kill()
        eventually(lambda: is_gone(child), why="the child to die with its starter")


FAILING_TEST = """
import sys

def test_that_fails(processes):
    processes.start("greeter", [sys.executable, "-c", "print('the', 'last', 'words')"]).wait_exit()
    assert False, "on purpose"
"""


def test_a_failed_tests_report_carries_the_logs(tmp_path: Path, database_server: str, redis_url: str) -> None:
    (tmp_path / "conftest.py").write_text("pytest_plugins = ['tests.conftest']")
    (tmp_path / "test_failing.py").write_text(FAILING_TEST)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CLOACINA_DATABASE_URL": database_server,
            "CLOACINA_BROKER_URL": redis_url,
        },
        capture_output=True,
        text=True,
        timeout=START_PATIENCE,
        check=False,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert re.search(r"log of greeter1 \(pid \d+, exit code 0\)[ -]*\nthe last words\n", run.stdout), (
        run.stdout
    )
