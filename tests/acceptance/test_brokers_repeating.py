"""The broker repeats, reorders, delivers late, gives back and drops: user code runs once per attempt."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from kombu import Connection, Queue

from cloacina_celery.chaos.proxy import Proxy
from tests.support.brokers import EACH_KIND
from tests.support.waiting import eventually, never

if TYPE_CHECKING:
    from kombu import Message

    from tests.acceptance.stage import Stage


@EACH_KIND
def test_messages_that_are_delivered_three_times_and_in_reverse_run_their_code_once(
    stage: Stage, broker_url: str
) -> None:
    results = [stage.send("fail", f"k{n}", n % 2) for n in range(10)]
    with confirming(broker_url) as connection:
        messages = [take(connection, stage.tenant) for _ in results]
        for message in reversed(messages):
            for _ in range(3):
                put(connection, stage.tenant, message)
    worker = stage.worker(concurrency=3)
    # Those of odd numbers fail once, and run a second time.
    assert [result.get(timeout=30) for result in results] == [1, 2] * 5
    eventually(lambda: worker.log.count("claim.declined") >= 20, why="all repetitions to be declined")
    for n, result in enumerate(results):
        assert [run.attempt for run in stage.runs(f"k{n}")] == [1, 2][: 1 + n % 2]
        assert stage.kinds(result).count("claimed") == 1 + n % 2


@EACH_KIND
def test_messages_of_old_attempts_and_of_the_present_one_that_come_late_run_nothing(
    stage: Stage, broker_url: str
) -> None:
    result = stage.send("block", "k")
    with confirming(broker_url) as connection:
        old = take(connection, stage.tenant)
        put(connection, stage.tenant, old)
        worker = stage.worker(concurrency=2)
        (run,) = stage.wait_for_runs("k", 1)
        stage.kill_child(run)
        stage.wait_for_runs("k", 2)
        for attempt in (1, 1, 2, 3):
            put(connection, stage.tenant, old, cloacina_attempt=attempt)
        eventually(lambda: worker.log.count("claim.declined") == 4, why="all to be declined while it runs")
        stage.open_gate("k-2")
        assert result.get(timeout=15) == 2
        for attempt in (1, 2, 3):
            put(connection, stage.tenant, old, cloacina_attempt=attempt)
        eventually(lambda: worker.log.count("claim.declined") == 7, why="all to be declined after its end")
    assert Counter(run.attempt for run in stage.runs("k")) == {1: 1, 2: 1}
    assert [note.attempt for note in stage.notes("k")] == [2]
    assert stage.kinds(result) == ["submitted", "claimed", "recovered", "claimed", "succeeded"]


@pytest.mark.parametrize("broker_url", ["redis"], indirect=True)
def test_a_visibility_timeout_that_runs_out_under_a_long_task_starts_it_no_second_time(stage: Stage) -> None:
    options = {"BAZAAR_TRANSPORT_OPTIONS": json.dumps({"visibility_timeout": 1})}
    for _ in range(2):
        stage.start_worker(concurrency=2, env=options)
    result = stage.send("block", "k")
    waiting = [stage.send("fail", f"w{n}", 0) for n in range(10)]
    stage.wait_for_runs("k", 1)
    never(lambda: len(stage.runs("k")) > 1, 4.0, "a second start of a task that runs")
    stage.open_gate("k-1")
    assert result.get(timeout=15) == 1
    assert [each.get(timeout=15) for each in waiting] == [1] * 10
    assert [len(stage.runs(f"w{n}")) for n in range(10)] == [1] * 10
    assert {tuple(stage.kinds(each)) for each in (result, *waiting)} == {
        ("submitted", "claimed", "succeeded")
    }


class TestACutWire:
    """A worker loses its connection with messages in its hands, which the broker gives out again."""

    @pytest.fixture
    def wire(self, broker_url: str) -> Any:
        with Proxy.in_front_of(broker_url) as proxy:
            yield proxy

    @pytest.fixture
    def broker_environment(self, broker_environment: dict[str, str], wire: Proxy) -> dict[str, str]:
        return {
            **broker_environment,
            "CLOACINA_BROKER_URL": wire.url(broker_environment["CLOACINA_BROKER_URL"]),
        }

    @EACH_KIND
    def test_what_runs_ends_and_what_was_received_runs_once(self, stage: Stage, wire: Proxy) -> None:
        stage.worker(concurrency=1, extra=["--prefetch-multiplier=5"])
        stage.worker(concurrency=1, extra=["--prefetch-multiplier=5"])
        running = [stage.send("block", key) for key in ("a", "b")]
        for key in ("a", "b"):
            stage.wait_for_runs(key, 1)
        received = [stage.send("fail", f"w{n}", 0) for n in range(6)]
        depth = stage.bazaar.cloacina.parts.publisher.queue_depth
        eventually(lambda: depth(stage.tenant) == 0, why="the workers to have received all messages")
        for _ in range(2):
            # The second time as soon as a worker is back; right after the first there is no wire to cut.
            eventually(wire.cut, why="a connection to cut")
        for key in ("a", "b"):
            stage.open_gate(f"{key}-1")
        assert [result.get(timeout=30) for result in running] == [1, 1]
        assert [result.get(timeout=30) for result in received] == [1] * 6
        assert [len(stage.runs(f"w{n}")) for n in range(6)] == [1] * 6
        assert all(stage.kinds(result).count("claimed") == 1 for result in (*running, *received))


@pytest.mark.parametrize("broker_url", ["rabbitmq-quorum"], indirect=True)
def test_a_message_that_a_quorum_queue_drops_at_its_delivery_limit_is_rung_again(
    stage: Stage, broker_url: str
) -> None:
    limited = {"x-queue-type": "quorum", "x-delivery-limit": 1}
    app, parts = stage.bazaar.app, stage.bazaar.cloacina.parts
    app.amqp.queues.add(Queue(stage.tenant, routing_key=stage.tenant, queue_arguments=limited))
    result = stage.send("add", 1, 1)
    with Connection(broker_url) as connection:
        for _ in range(2):
            get(connection, stage.tenant).requeue()
        never(lambda: parts.publisher.queue_depth(stage.tenant), 0.5, "a message beyond its delivery limit")
        assert parts.recovery.reaper()._lost.ring(stage.tenant, stranded_after=0.0) == 1
        assert get(connection, stage.tenant).headers["id"] == result.id
    assert stage.kinds(result) == ["submitted", "rung_again"]


def confirming(broker_url: str) -> Connection:
    """Open a connection whose messages are in their queue when `put` returns.

    A channel that is closed at once may else take along what a quorum queue has not taken yet.
    """
    return Connection(broker_url, transport_options={"confirm_publish": True})


def get(connection: Connection, queue: str) -> Message:
    return eventually(Queue(queue, channel=connection.default_channel).get, why=f"a message in {queue}")


def take(connection: Connection, queue: str) -> Message:
    message = get(connection, queue)
    message.ack()
    return message


def put(connection: Connection, queue: str, message: Message, **headers: Any) -> None:
    connection.Producer().publish(
        message.body, routing_key=queue, exchange="", headers={**message.headers, **headers},
        content_type=message.content_type, content_encoding=message.content_encoding, serializer=None,
        correlation_id=message.properties["correlation_id"],
    )  # fmt: skip
