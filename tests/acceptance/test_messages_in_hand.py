"""Messages that RabbitMQ sent ahead of a free slot go back before it ends the connection of who keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.waiting import never

if TYPE_CHECKING:
    from tests.acceptance.stage import Stage

EACH_TYPE = pytest.mark.parametrize("broker_url", ["rabbitmq", "rabbitmq-quorum"], indirect=True)


@EACH_TYPE
def test_what_waits_behind_a_long_task_for_long_is_done_by_another_worker(stage: Stage) -> None:
    busy = stage.worker(concurrency=1, env={"BAZAAR_HELD_FOR": "2"})
    long = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    behind = [stage.send("add", 2, number) for number in range(3)]
    busy.wait_log(r"message\.handed_back")
    # With nobody else there they have come back to it, and are handed back again.
    stage.worker(concurrency=1)
    assert [result.get(timeout=30) for result in behind] == [2, 3, 4]
    assert len(stage.runs("k")) == 1
    stage.open_gate("k-1")
    assert long.get(timeout=15) == 1
    assert [stage.row(result).attempt for result in (*behind, long)] == [1] * 4


@EACH_TYPE
def test_plain_messages_are_not_handed_back(stage: Stage) -> None:
    busy = stage.worker(concurrency=1, env={"BAZAAR_HELD_FOR": "1"})
    stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    stage.bazaar.plain_record.apply_async((1, stage.tenant), queue=stage.tenant)
    behind = stage.send("add", 2, 3)
    busy.wait_log(r"message\.handed_back: 1 messages")
    never(
        lambda: busy.log.count("Task bazaar.plain_record[") != 1,
        3.0,
        "a plain message that came a second time",
    )
    stage.open_gate("k-1")
    stage.wait_for_runs("plain", 1)
    assert behind.get(timeout=15) == 5
