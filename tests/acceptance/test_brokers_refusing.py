"""The broker refuses: submissions do not wait for it, recovery does not, and what waited leaves in its order."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from kombu import Connection, Queue

from cloacina_celery.chaos.proxy import Proxy
from cloacina_celery.plugin import breaker
from cloacina_celery.runtime.reaper import Reaper
from tests.support.brokers import EACH_KIND, EACH_RABBITMQ
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cloacina_celery import Cloacina
    from tests.acceptance.stage import Stage

FIRST = 3.0
"""Seconds that the submission may take which finds out that the broker does not answer."""
LATER = 0.05
"""Seconds that the next ones may take, of which each costs little more than its row."""


@pytest.fixture
def wire(broker_url: str) -> Iterator[Proxy]:
    """What stands between this test's apps and their broker."""
    with Proxy.in_front_of(broker_url) as proxy:
        yield proxy


@pytest.fixture
def broker_environment(broker_environment: dict[str, str], wire: Proxy) -> dict[str, str]:
    """As elsewhere, with the broker behind the wire."""
    return {
        **broker_environment,
        "CLOACINA_BROKER_URL": wire.url(broker_environment["CLOACINA_BROKER_URL"]),
    }


@EACH_KIND
@pytest.mark.parametrize("trouble", ["refuses", "refuses when known", "is silent", "is a black hole"])
def test_a_broker_that_does_not_answer_costs_one_submission_a_moment_and_the_next_ones_nothing(
    stage: Stage, wire: Proxy, trouble: str
) -> None:
    with ExitStack() as stack:
        match trouble:
            case "refuses":
                wire.refuse()
            case "refuses when known":
                stage.send("add", 0, 0)
                wire.refuse()
            case "is silent":
                wire.hang()
            case _:
                wire.close()
                stack.enter_context(black_hole(wire.port))
        first, *later = (timed(lambda: stage.send("add", 1, 1)) for _ in range(201))
    print(f"FIGURE a broker that {trouble}: first {first:.3f} s, later {max(later):.3f} s")
    assert first < FIRST
    # Another process on this machine may take a slice out of one or two of them.
    assert sorted(later)[-5] < LATER
    assert sum(later) < LATER * len(later)
    assert unrung(stage) == 201


@pytest.mark.parametrize("broker_url", ["redis"], indirect=True)
def test_a_known_broker_that_falls_silent_costs_no_more(stage: Stage, wire: Proxy) -> None:
    stage.send("add", 0, 0)
    wire.hang()
    first, *later = (timed(lambda: stage.send("add", 1, 1)) for _ in range(50))
    assert first < FIRST
    assert sorted(later)[-5] < LATER
    assert unrung(stage) == 50


@EACH_KIND
def test_a_connection_that_was_cut_meanwhile_is_replaced_without_a_refusal(
    stage: Stage, wire: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    stage.send("add", 0, 0)
    for sent in range(1, 4):
        # What the broker has not read yet is lost with the wire, and the sweep's business.
        eventually(lambda sent=sent: depth(stage) == sent, why="the broker to have what was sent")
        assert wire.cut() > 0
        stage.send("add", 1, 1)
    assert unrung(stage) == 0
    eventually(lambda: depth(stage) == 4, why="all messages")
    assert [record for record in caplog.records if record.name == "cloacina"] == []


@EACH_KIND
def test_all_messages_and_all_looks_at_queues_take_one_connection(stage: Stage, wire: Proxy) -> None:
    stage.send("add", 0, 0)
    before = wire.connection_count
    for _ in range(20):
        stage.send("add", 1, 1)
        depth(stage)
    assert wire.connection_count == before


@EACH_KIND
def test_what_waited_for_the_broker_leaves_oldest_first_and_a_batch_at_a_time(
    stage: Stage, wire: Proxy, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than sending them takes, so that the sweep still finds the broker left alone.
    monkeypatch.setattr(breaker, "MIN_PAUSE", 5.0)
    reaper = reaper_with_batch(stage.bazaar.cloacina, 10)
    wire.refuse()
    submitted = [stage.send("add", n, n).id for n in range(25)]
    assert reaper.sweep([stage.tenant]) == 0
    wire.forward()
    eventually(lambda: stage.bazaar.cloacina.parts.publisher.can_publish(stage.tenant))
    left = []
    for size in (10, 10, 5):
        assert reaper.sweep([stage.tenant]) == size
        left += taken(broker_url, stage.tenant)
        assert len(left) == len(submitted) - unrung(stage)
    assert left == submitted


@EACH_KIND
def test_a_worker_recovers_what_its_child_held_while_the_broker_is_silent(stage: Stage, wire: Proxy) -> None:
    stage.worker(concurrency=1)
    result = stage.send("block", "k")
    (run,) = stage.wait_for_runs("k", 1)
    wire.hang()
    killed_at = stage.kill_child(run)
    row = eventually(lambda: stage.row(result).recoveries and stage.row(result), 10, "the recovery")
    assert row.state == "pending"
    waited = (stage.events(result)[2].at - killed_at).total_seconds()
    print(f"FIGURE recovery behind a silent broker: {waited:.2f} s")
    wire.forward()
    stage.wait_for_runs("k", 2)
    stage.open_gate("k-2")
    assert result.get(timeout=20) == 2


@EACH_KIND
def test_a_settlement_waits_a_moment_only_for_a_broker_that_does_not_take_what_follows(
    stage: Stage, wire: Proxy
) -> None:
    worker = stage.worker(concurrency=1)
    bazaar = stage.bazaar
    with bazaar.cloacina.tenant(stage.tenant):
        last = (bazaar.block.s("k") | bazaar.add.s(1) | bazaar.add.s(1)).delay()
    stage.wait_for_runs("k", 1)
    first = last.parent.parent
    wire.hang()
    stage.open_gate("k-1")
    stage.wait_for_state(first, "succeeded")
    # The child says so after it has done all that follows.
    waited = timed(lambda: eventually(lambda: f"block[{first.id}] succeeded in" in worker.log, FIRST))
    print(f"FIGURE from a settlement behind a silent broker to the child's end: {waited:.2f} s")
    wire.forward()
    assert last.get(timeout=30) == 3


@EACH_RABBITMQ
def test_a_queue_that_was_made_with_other_arguments_is_named_and_its_rows_wait(
    stage: Stage,
    broker_url: str,
    new_tenant_name: Callable[[], str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = new_tenant_name()
    stage.bazaar.cloacina.tenants.create(other)
    with Connection(broker_url) as connection:
        Queue(stage.tenant, routing_key=stage.tenant, max_length=5)(connection.default_channel).declare()
    results = [stage.send("add", n, n) for n in range(3)]
    assert unrung(stage) == 3
    refused = [record.getMessage() for record in caplog.records if record.name == "cloacina"]
    assert len(refused) == 1
    assert "PRECONDITION_FAILED" in refused[0]
    assert f"queue {stage.tenant}" in refused[0]
    assert "delete the queue" in refused[0]
    # Nobody else's matter.
    stage.bazaar.add.apply_async((1, 1), tenant=other)
    eventually(lambda: depth(stage, other) == 1, why="the other tenant's message")
    with Connection(broker_url) as connection:
        Queue(stage.tenant, channel=connection.default_channel).delete()
    stage.worker()
    assert [result.get(timeout=20) for result in results] == [0, 2, 4]


class black_hole:  # noqa: N801  # used as a function is
    """A port of this machine on which connecting never ends: its backlog is full, and nobody accepts."""

    def __init__(self, port: int) -> None:
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", port))
        self._listener.listen(0)
        self._waiting: list[socket.socket] = []

    def __enter__(self) -> None:
        for _ in range(4):
            waiting = socket.socket()
            waiting.setblocking(False)
            with suppress(BlockingIOError):
                waiting.connect(self._listener.getsockname())
            self._waiting.append(waiting)

    def __exit__(self, *_: object) -> None:
        for each in (*self._waiting, self._listener):
            each.close()


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def unrung(stage: Stage) -> int:
    with stage.observer.cursor() as cursor:
        cursor.execute(
            f"SELECT count(*) FROM {stage.tenant}.cloacina_executions WHERE state = 'pending' AND rung_at IS NULL"
        )
        row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def depth(stage: Stage, tenant: str | None = None) -> Any:
    return stage.bazaar.cloacina.parts.publisher.queue_depth(tenant or stage.tenant)


def taken(broker_url: str, queue: str) -> list[str]:
    """Take the queue's messages in the order in which a worker would, past the wire."""
    ids = []
    with Connection(broker_url) as connection:
        while (message := connection.default_channel.basic_get(queue, no_ack=True)) is not None:
            ids.append(message.headers["id"])
    return ids


def reaper_with_batch(cloacina: Cloacina, batch: int) -> Reaper:
    parts = cloacina.parts
    return Reaper(
        cloacina.database, replace(cloacina.settings, sweep_batch=batch),
        publish=parts.publisher.publish_rings, send_letters=parts.outbox.send,
        can_publish=parts.publisher.can_publish, queue_depth=parts.publisher.queue_depth,
        on_abandoned=lambda *_: None,
    )  # fmt: skip
