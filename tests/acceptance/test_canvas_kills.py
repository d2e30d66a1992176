"""A kill in the middle of a chain and of a chord's header: both go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from celery import chain, chord
from kombu.serialization import loads

from tests.acceptance.stage import report
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.acceptance.stage import Stage

BOTH_BROKERS = pytest.mark.parametrize("broker_url", ["redis", "rabbitmq"], indirect=True)


@BOTH_BROKERS
@pytest.mark.parametrize("way", ["link", "chain"])
def test_a_plain_task_is_sent_although_its_process_died_between_the_commit_and_the_send(
    stage: Stage, tmp_path: Path, way: str
) -> None:
    dying = {"BAZAAR_DIES_SENDING": str(tmp_path / "died"), "BAZAAR_STRANDED_AFTER": "2"}
    stage.worker(concurrency=1, env=dying)
    bazaar = stage.bazaar
    # In the tenant's queue, which no other test's worker consumes.
    plain = bazaar.plain_record.si("value", stage.tenant, "plain").set(queue=stage.tenant)
    with bazaar.cloacina.tenant(stage.tenant):
        if way == "link":
            result = bazaar.add.apply_async((1, 2), link=plain)
        else:
            result = chain(bazaar.add.s(1, 2), plain).apply_async().parent
    assert result.get(timeout=15) == 3
    died_at = stage.now()
    (run,) = stage.wait_for_runs("plain", 1)
    report("a plain task behind a child that died sending it", died_at, run)
    assert (tmp_path / "died").exists()
    assert stage.kinds(result) == ["submitted", "claimed", "succeeded"]
    with stage.observer.cursor() as cursor:
        cursor.execute(f"SELECT count(*) FROM {stage.tenant}.cloacina_outbox")
        assert cursor.fetchone() == (0,)


@pytest.mark.parametrize(
    ("serializer", "content_type"),
    [("json", "application/json"), ("pickle", "application/x-python-serialize")],
)
def test_a_plain_task_that_follows_keeps_its_queue_headers_and_serializer(
    stage: Stage, serializer: str, content_type: str
) -> None:
    stage.worker(concurrency=1)
    bazaar = stage.bazaar
    plain = bazaar.plain_add.si(1, 2).set(
        serializer=serializer, queue="elsewhere", headers={"colour": "green"}
    )
    bazaar.add.apply_async((1, 2), link=plain, tenant=stage.tenant)
    with bazaar.app.connection_for_read() as connection:
        channel = connection.default_channel
        message = eventually(lambda: channel.basic_get(queue="elsewhere", no_ack=True), 15, "the message")
    assert (message.content_type, message.headers["colour"]) == (content_type, "green")
    (x, y), kwargs, _embed = loads(message.body, content_type, message.content_encoding, force=True)
    assert (x, y, kwargs) == (1, 2, {})


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
