"""An ordinary day: work comes, fails once, goes on, ends; and nobody has anything to complain about."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import celery
import pytest
from celery import chain, chord

if TYPE_CHECKING:
    from tests.acceptance.stage import Stage


@pytest.mark.parametrize("broker_url", ["redis", "rabbitmq"], indirect=True)
def test_an_ordinary_run_logs_no_error_and_no_warning(stage: Stage) -> None:
    loud = {"PYTHONWARNINGS": "always", "BAZAAR_SWEEP_INTERVAL": "1"}
    worker = stage.worker(env=loud, extra=["--max-tasks-per-child=5"])
    beat = stage.beat(env=loud)
    bazaar = stage.bazaar
    with bazaar.cloacina.tenant(stage.tenant):
        assert [bazaar.add.delay(n, n).get(timeout=15) for n in range(12)] == [2 * n for n in range(12)]
        assert chain(bazaar.add.s(1, 1), bazaar.add.s(10)).delay().get(timeout=15) == 12
        assert chord([bazaar.add.s(1, 1), bazaar.add.s(2, 2)])(bazaar.total.s()).get(timeout=15) == 6
        assert bazaar.fail.delay("once", 1).get(timeout=15) == 2
        assert bazaar.record_value.apply_async(("x", "later"), countdown=1).get(timeout=15) == "x"
    stage.open_gate("k-1")
    assert stage.send("block", "k").get(timeout=15) == 1
    # Beat goes first: kombu warns of a sweep that comes in when the worker has just stopped to listen.
    beat.terminate()
    beat.wait_exit()
    worker.terminate()
    assert worker.wait_exit() == 0
    assert complaints(worker.log) == []
    # Celery 5.5's handler of SIGTERM keeps beat's connection to the broker until the interpreter's end.
    left_open = r"ResourceWarning: unclosed <socket" if celery.VERSION < (5, 6) else None
    assert [one for one in complaints(beat.log) if not (left_open and re.search(left_open, one))] == []


def complaints(log: str) -> list[str]:
    """Entries that an operator would look into, but for those that were asked for: a failure, a superuser's login."""
    wanted = re.compile(r"Traceback|ERROR|CRITICAL|WARNING|ResourceWarning|cloacina_celery/.*Warning")
    entries = re.split(r"(?m)^(?=\[\d{4}-)", log)
    asked_for = re.compile(r"failure 1 of once|isolation\.superuser")
    return [entry for entry in entries if wanted.search(entry) and not asked_for.search(entry)]
