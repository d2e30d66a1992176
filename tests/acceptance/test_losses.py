"""The broker loses messages, some or all: each execution runs all the same, and a backlog is not taken for a loss."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from psycopg2 import sql

from tests.support import brokers
from tests.support.waiting import eventually, never

if TYPE_CHECKING:
    from datetime import datetime

    from tests.acceptance.stage import Stage

BOTH_BROKERS = pytest.mark.parametrize("broker_url", ["redis", "rabbitmq"], indirect=True)
IN_TIME = 30.0


def count(stage: Stage, what: str) -> int:
    """Count the tenant's rows, or its events, for which an SQL condition holds."""
    table = "cloacina_events" if what.startswith("kind") else "cloacina_executions"
    with stage.observer.cursor() as cursor:
        cursor.execute(f"SELECT count(*) FROM {stage.tenant}.{table} WHERE {what}")
        row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def keep_busy(stage: Stage, slots: int) -> None:
    """Have the worker's slots taken until `let_go`."""
    for n in range(slots):
        stage.send("block", f"busy{n}")
        stage.wait_for_runs(f"busy{n}", 1)


def let_go(stage: Stage, slots: int) -> None:
    for n in range(slots):
        stage.open_gate(f"busy{n}-1")


def send_many(stage: Stage, number: int) -> None:
    for n in range(number):
        stage.send("add", n, n)


def purge(stage: Stage) -> int:
    with stage.bazaar.app.connection_for_write() as connection:
        return int(connection.default_channel.queue_purge(stage.tenant))


def report_all_done(stage: Stage, number: int, lost_at: datetime, what: str) -> float:
    """Wait until all have succeeded, and print and return the seconds since the loss."""
    eventually(lambda: count(stage, "state = 'succeeded'") == number, 60, f"all {number} to succeed")
    with stage.observer.cursor() as cursor:
        cursor.execute(
            f"SELECT extract(epoch FROM max(settled_at) - %s)::float8 FROM {stage.tenant}.cloacina_executions",
            (lost_at,),
        )
        (seconds,) = cursor.fetchone() or (0.0,)
    rung = count(stage, "kind = 'rung_again'")
    print(f"FIGURE {what}: {seconds:.1f} s; rung again {rung}")
    assert count(stage, "kind = 'claimed'") == number
    return float(seconds)


@BOTH_BROKERS
def test_a_thousand_waiting_executions_whose_queue_was_emptied_run_within_half_a_minute(stage: Stage) -> None:
    stage.worker(concurrency=2)
    keep_busy(stage, 2)
    send_many(stage, 1000)
    assert purge(stage) > 900
    lost_at = stage.now()
    let_go(stage, 2)
    assert report_all_done(stage, 1002, lost_at, "1,000 messages purged") <= IN_TIME


def test_a_broker_that_comes_back_empty_again_and_again_is_filled_again_each_time(
    stage: Stage, broker_url: str
) -> None:
    stage.worker(concurrency=2)
    keep_busy(stage, 2)
    send_many(stage, 1000)
    client = brokers.redis_client(broker_url)
    waiting = client.llen(stage.tenant)
    brokers.empty_redis(broker_url)
    for _ in range(2):
        eventually(lambda: client.llen(stage.tenant) >= waiting - 10, 30, f"{waiting} messages to be there")
        brokers.empty_redis(broker_url)
    lost_at = stage.now()
    let_go(stage, 2)
    assert report_all_done(stage, 1002, lost_at, "all lost three times, from the last time") <= IN_TIME


def test_one_message_in_ten_that_is_lost_from_a_busy_queue_is_found(stage: Stage, broker_url: str) -> None:
    stage.worker(concurrency=2)
    keep_busy(stage, 2)
    send_many(stage, 1000)
    client = brokers.redis_client(broker_url)
    lost = client.lrange(stage.tenant, 0, -1)[5::10]
    for message in lost:
        assert client.lrem(stage.tenant, 1, message) == 1
    lost_at = stage.now()
    let_go(stage, 2)
    assert report_all_done(stage, 1002, lost_at, f"{len(lost)} of 1,000 messages lost") <= IN_TIME
    assert count(stage, "kind = 'rung_again'") <= 1.5 * len(lost)


def test_a_message_lost_from_a_long_backlog_is_rung_when_others_have_overtaken_it_and_goes_first(
    stage: Stage, broker_url: str
) -> None:
    """The last of the backlog is far away when the lost one near its head runs."""
    stage.worker(concurrency=1, env={"BAZAAR_STRANDED_AFTER": "2"})
    keep_busy(stage, 1)
    results = [stage.send("wait_a_bit", n) for n in range(300)]
    client = brokers.redis_client(broker_url)
    raw = client.lrange(stage.tenant, 0, -1)
    ids = [json.loads(one)["headers"]["id"] for one in raw]
    lost = [ids[-20], ids[20]]  # the head is at the end: one whose turn comes soon, one far away
    for execution_id in lost:
        client.lrem(stage.tenant, 1, raw[ids.index(execution_id)])
    let_go(stage, 1)
    row = stage.wait_for_state(lost[0], "succeeded", 20)
    assert row.state == "succeeded"
    assert count(stage, "state = 'pending'") > 150
    assert [r.id for r in results if "rung_again" in stage.kinds(r)] == [lost[0]]


def test_a_hundred_thousand_messages_behind_a_slow_worker_are_not_rung_again(
    stage: Stage, broker_url: str
) -> None:
    number = 100_000
    sample = stage.send("wait_a_bit", 0)
    client = brokers.redis_client(broker_url)
    (raw,) = client.lrange(stage.tenant, 0, -1)
    client.delete(stage.tenant)
    tag = json.loads(raw)["properties"]["delivery_tag"]
    template = raw.decode().replace(tag, "TAG").replace(sample.id, "ID")
    with stage.observer.cursor() as cursor:
        cursor.execute(
            sql.SQL(
                """
                INSERT INTO {s}.cloacina_executions
                    (id, task, max_recoveries, policy, message, submitted_at, rung_at)
                SELECT n || '-' || e.id, task, max_recoveries, policy, message,
                       now() - interval '60 s' + n * interval '0.1 ms', now() - interval '60 s' + n * interval '0.1 ms'
                FROM {s}.cloacina_executions e, generate_series(0, %s) n
                """
            ).format(s=sql.Identifier(stage.tenant)),
            (number - 1,),
        )
        cursor.execute(
            sql.SQL("DELETE FROM {s}.cloacina_executions WHERE id = %s").format(
                s=sql.Identifier(stage.tenant)
            ),
            (sample.id,),
        )
    for start in range(0, number, 10_000):
        client.lpush(
            stage.tenant,
            *(
                template.replace("TAG", str(uuid4())).replace("ID", f"{n}-{sample.id}")
                for n in range(start, start + 10_000)
            ),
        )
    worker = stage.worker(concurrency=1, env={"BAZAAR_STRANDED_AFTER": "1"})
    eventually(lambda: count(stage, "kind = 'claimed'") > 10, why="the worker to begin")
    # It looks for lost messages twice a second.
    never(lambda: count(stage, "kind = 'rung_again'") > number / 100, 10.0, "a backlog that is rung again")
    rung, ran = count(stage, "kind = 'rung_again'"), count(stage, "kind = 'claimed'")
    print(f"FIGURE of {number} that wait, {rung} were rung again while {ran} ran")
    assert count(stage, "state = 'pending'") > 0.9 * number
    worker.kill9(whole=True)
    client.delete(stage.tenant)


def test_ten_poison_tasks_among_healthy_ones_end_abandoned_with_their_history_and_the_others_go_on(
    stage: Stage,
) -> None:
    stage.worker(concurrency=2)
    healthy, poison = [], []
    for n in range(60):
        if n % 6 == 0:
            poison.append(stage.send("poison", f"p{n}"))
        healthy.append(stage.send("add", n, n))
    sent_at = stage.now()
    for result in healthy:
        stage.wait_for_state(result, "succeeded", 30)
    took = (stage.now() - sent_at).total_seconds()
    print(f"FIGURE 60 healthy tasks among 10 that kill: {took:.1f} s")
    assert took <= 15.0
    for result in poison:
        row = stage.wait_for_state(result, "abandoned", 40)
        assert (row.attempt, row.recoveries, row.failures) == (2, 1, 0)
        assert stage.kinds(result) == ["submitted", "claimed", "recovered", "claimed", "abandoned"]
        told: list[Any] = [
            event.reason for event in stage.events(result) if event.kind in ("recovered", "abandoned")
        ]
        assert all("signal 9 (SIGKILL)" in reason for reason in told)
    print(f"FIGURE all 10 abandoned: {(stage.now() - sent_at).total_seconds():.1f} s")
    assert {stage.row(result).attempt for result in healthy} == {1}
    assert stage.send("add", 1, 2).get(timeout=15) == 3
