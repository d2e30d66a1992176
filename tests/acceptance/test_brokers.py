"""The core of it on each kind of broker: Redis, RabbitMQ with classic queues, RabbitMQ with quorum queues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import chain
from kombu import Connection, Queue

from tests.support.brokers import EACH_KIND, EACH_RABBITMQ
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from tests.acceptance.stage import Stage


@EACH_KIND
def test_work_that_was_sent_before_any_worker_had_started_runs_and_a_chain_and_a_retry_go_on(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    bazaar = stage.bazaar
    early = [stage.send("add", n, n) for n in range(5)]
    delayed = bazaar.record_value.apply_async(("x", "late"), tenant=stage.tenant, countdown=0.5)
    worker = stage.worker()
    assert [result.get(timeout=15) for result in early] == [0, 2, 4, 6, 8]
    assert delayed.get(timeout=15) == "x"
    assert stage.send("fail", "once", 1).get(timeout=15) == 2
    with bazaar.cloacina.tenant(stage.tenant):
        assert chain(bazaar.add.s(1, 1), bazaar.add.s(10)).delay().get(timeout=15) == 12
    assert "Traceback" not in worker.log
    assert caplog.messages == []


@EACH_KIND
def test_what_a_killed_worker_ran_and_what_it_had_received_run_elsewhere_once(stage: Stage) -> None:
    doomed = stage.worker(concurrency=1, extra=["--prefetch-multiplier=5"])
    first = stage.send("block", "k")
    stage.wait_for_runs("k", 1)
    reserved = [stage.send("record_value", n, f"reserved{n}") for n in range(3)]
    eventually(lambda: depth(stage) == 0, why="the worker to have received all messages")
    stage.worker(concurrency=1)
    doomed.kill9()
    stage.wait_for_runs("k", 2)
    stage.open_gate("k-2")
    assert first.get(timeout=15) == 2
    assert [result.get(timeout=15) for result in reserved] == [0, 1, 2]
    assert [len(stage.runs(f"reserved{n}={n}")) for n in range(3)] == [1, 1, 1]
    assert [stage.row(result).attempt for result in reserved] == [1, 1, 1]


@EACH_KIND
def test_a_purged_queue_is_filled_again(stage: Stage) -> None:
    results = [stage.send("add", n, n) for n in range(20)]
    with stage.bazaar.app.connection_for_write() as connection:
        assert connection.default_channel.queue_purge(stage.tenant) == 20
    stage.worker(env={"BAZAAR_STRANDED_AFTER": "1"})
    assert [result.get(timeout=20) for result in results] == [2 * n for n in range(20)]
    assert all("rung_again" in stage.kinds(result) for result in results)


@EACH_KIND
def test_a_thousand_executions_whose_messages_are_all_lost_run_within_thirty_seconds(stage: Stage) -> None:
    bazaar = stage.bazaar
    stage.worker(concurrency=2)
    for key in ("a", "b"):
        stage.send("block", key)
        stage.wait_for_runs(key, 1)
    bazaar.cloacina.submit_many([bazaar.add.s(n, n) for n in range(1000)], tenant=stage.tenant)
    with bazaar.app.connection_for_write() as connection:
        eventually(lambda: depth(stage) > 900, why="the messages")
        assert connection.default_channel.queue_purge(stage.tenant) > 900
    lost_at = stage.now()
    for key in ("a", "b"):
        stage.open_gate(f"{key}-1")
    eventually(lambda: waiting(stage) == 0, 30, "all of them to have run")
    print(f"FIGURE 1,000 lost messages: {(stage.now() - lost_at).total_seconds():.1f} s")


@EACH_KIND
def test_one_message_in_ten_that_is_lost_from_a_busy_queue_is_found(stage: Stage, broker_url: str) -> None:
    bazaar = stage.bazaar
    bazaar.cloacina.submit_many([bazaar.add.s(n, n) for n in range(200)], tenant=stage.tenant)
    with Connection(broker_url) as connection:
        queue = Queue(stage.tenant, channel=connection.default_channel)
        messages = [eventually(queue.get, why="a message") for _ in range(200)]
        for number, message in enumerate(messages):
            (message.requeue if number % 10 else message.ack)()
    stage.worker(concurrency=2, env={"BAZAAR_STRANDED_AFTER": "1"})
    eventually(lambda: waiting(stage) == 0, 30, "all of them to have run")


@EACH_RABBITMQ
def test_all_queues_have_the_apps_type_whoever_declares_them_first(stage: Stage, broker_url: str) -> None:
    app, control = stage.bazaar.app, stage.bazaar.cloacina.settings.control_queue
    stage.send("add", 1, 1)  # the sender declares the tenant's queue, and the worker the control queue
    stage.worker()
    kind = {"x-queue-type": app.conf.task_default_queue_type}
    for name in (stage.tenant, control):
        with Connection(broker_url) as connection:
            Queue(name, routing_key=name, queue_arguments=kind)(connection.default_channel).queue_declare()


@EACH_RABBITMQ
def test_a_tenant_whose_queue_a_running_worker_adds_is_served(
    stage: Stage, new_tenant_name: Callable[[], str]
) -> None:
    worker = stage.worker(concurrency=1)
    other = new_tenant_name()
    stage.bazaar.cloacina.tenants.create(other)
    early = stage.bazaar.add.apply_async((1, 1), tenant=other)
    stage.bazaar.app.control.add_consumer(other, destination=[worker.nodename])
    assert early.get(timeout=15) == 2
    assert stage.bazaar.add.apply_async((1, 2), tenant=other).get(timeout=15) == 3


def depth(stage: Stage, tenant: str | None = None) -> Any:
    return stage.bazaar.cloacina.parts.publisher.queue_depth(tenant or stage.tenant)


def waiting(stage: Stage) -> int:
    with stage.observer.cursor() as cursor:
        cursor.execute(f"SELECT count(*) FROM {stage.tenant}.cloacina_executions WHERE state <> 'succeeded'")
        row = cursor.fetchone()
    assert row is not None
    return int(row[0])
