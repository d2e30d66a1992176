"""Callers are processes too: they race for one key, and they die between their commit and their message."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tests.support.waiting import LOCKS, eventually

if TYPE_CHECKING:
    from tests.acceptance.stage import Stage

START = 4711
"""The advisory lock at which the racing callers wait for the start."""

RACE = f"""
import sys
from tests.acceptance.bazaar import DATABASE_URL, cloacina, remember
from tests.support.databases import connect

tenant, key = sys.argv[1:]
start = connect(DATABASE_URL).cursor()
start.execute("SELECT pg_advisory_lock_shared({START})")
print("id", remember.apply_async((key,), tenant=tenant, idempotency_key=key).id)
"""

DIE = """
import os, sys
from celery.signals import before_task_publish
from tests.acceptance.bazaar import remember

@before_task_publish.connect
def die(**_):
    os._exit(9)

remember.apply_async((sys.argv[2],), tenant=sys.argv[1], task_id="orphan")
"""


def test_processes_that_race_for_one_key_all_get_the_one_execution(stage: Stage) -> None:
    with stage.observer.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s)", (START,))
        callers = [
            stage.processes.start("caller", [sys.executable, "-c", RACE, stage.tenant, "k"]) for _ in range(4)
        ]

        def all_wait() -> bool:
            cursor.execute(f"SELECT count(*) FROM {LOCKS} WHERE locktype = 'advisory' AND NOT granted")
            return bool(cursor.fetchone() == (4,))

        eventually(all_wait, 60, "the callers to wait for the start")
        cursor.execute("SELECT pg_advisory_unlock(%s)", (START,))
    assert [caller.wait_exit() for caller in callers] == [0, 0, 0, 0]
    ids = {caller.wait_log(r"^id (\S+)$")[1] for caller in callers}
    assert ids == {stage.bazaar.cloacina.execution_id("k", tenant=stage.tenant)}
    stage.worker(concurrency=2)
    (id_,) = ids
    stage.wait_for_state(id_, "succeeded")
    assert stage.kinds(id_) == ["submitted", "claimed", "succeeded"]
    assert len(stage.runs("k")) == len(stage.notes("k")) == 1


def test_a_caller_that_dies_between_its_commit_and_its_message_has_its_call_run(stage: Stage) -> None:
    caller = stage.processes.start("caller", [sys.executable, "-c", DIE, stage.tenant, "k"])
    assert caller.wait_exit() == 9
    assert stage.kinds("orphan") == ["submitted"]
    stage.worker(concurrency=1, env={"BAZAAR_STRANDED_AFTER": "1"})
    stage.wait_for_state("orphan", "succeeded")
    assert stage.kinds("orphan") == ["submitted", "rung_again", "claimed", "succeeded"]
    assert len(stage.notes("k")) == 1
