"""A kill in the middle of a chain and of a chord's header: both go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from celery import chain, chord

if TYPE_CHECKING:
    from tests.acceptance.stage import Stage

BOTH_BROKERS = pytest.mark.parametrize("broker_url", ["redis", "rabbitmq"], indirect=True)


@BOTH_BROKERS
def test_a_chain_goes_on_after_a_recovery_in_its_middle(stage: Stage) -> None:
    stage.worker(concurrency=1)
    bazaar = stage.bazaar
    with bazaar.cloacina.tenant(stage.tenant):
        result = chain(bazaar.add.s(1, 1), bazaar.die_once.si("k", "SIGKILL"), bazaar.add.s(10)).delay()
    assert result.get(timeout=20) == 12
    assert stage.row(result.parent).recoveries == 1


def test_a_chord_goes_on_after_a_recovery_in_its_header(stage: Stage) -> None:
    doomed = stage.worker(concurrency=2)
    bazaar = stage.bazaar
    with bazaar.cloacina.tenant(stage.tenant):
        result = chord([bazaar.block.s("a"), bazaar.block.s("b"), bazaar.add.s(1, 1)])(bazaar.total.s())
    stage.wait_for_runs("a", 1)
    stage.wait_for_runs("b", 1)
    stage.worker(concurrency=2)
    doomed.kill9()
    for key in ("a", "b"):
        stage.wait_for_runs(key, 2)
        stage.open_gate(f"{key}-2")
    assert result.get(timeout=20) == 6
    assert len(bazaar.cloacina.executions(stage.tenant).list(task="bazaar.total")) == 1
