"""Messages that nobody should have sent: each is refused in words, and the worker goes on."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from kombu import Connection

from tests.support.waiting import eventually

if TYPE_CHECKING:
    from tests.acceptance.stage import Stage


def messages(tenant: str) -> list[tuple[str, Any, dict[str, Any], str]]:
    """Name, body, headers and content type of each bad message."""
    body = json.dumps([[1, 2], {}, {}])
    good = {"task": "bazaar.add", "id": str(uuid.uuid4()), "lang": "py", "root_id": None, "argsrepr": "()"}
    ours = {**good, "cloacina_tenant": tenant, "cloacina_attempt": 1}
    js = "application/json"
    return [
        ("no headers and no body", "", {}, js),
        ("garbage for JSON", "{{{", ours, js),
        ("bytes", b"\x80\x81\xfe", ours, "application/octet-stream"),
        ("a pickle", b"\x80\x04N.", ours, "application/x-python-serialize"),
        ("an unknown task", body, {**ours, "task": "bazaar.unknown"}, js),
        ("no tenant and no attempt", body, good, js),
        ("a tenant that is a number", body, {**ours, "cloacina_tenant": 5}, js),
        ("an attempt that is a word", body, {**ours, "cloacina_attempt": "one"}, js),
        ("an attempt beyond all bounds", body, {**ours, "cloacina_attempt": 10**15}, js),
        ("another tenant's message", body, {**ours, "cloacina_tenant": "tenant_other"}, js),
        ("a tenant whose name is SQL", body, {**ours, "cloacina_tenant": 'x"; DROP SCHEMA public; --'}, js),
        ("an execution that nobody submitted", body, ours, js),
        ("a body that is no triple", json.dumps({"a": 1}), ours, js),
        ("arguments that are no list", json.dumps([5, {}, {}]), {**ours, "id": str(uuid.uuid4())}, js),
        ("a task that is a number", body, {**ours, "task": 7}, js),
        ("an id that is a number", body, {**ours, "id": 7}, js),
        ("no id", body, {**ours, "id": None}, js),
        ("an id with a NUL", body, {**ours, "id": "a\x00b"}, js),
        ("an eta that is none", body, {**ours, "eta": "tomorrow"}, js),
        ("a time limit that is none", body, {**ours, "timelimit": "long"}, js),
    ]


NAMES = [name for name, *_ in messages("tenant_x")]


@pytest.mark.parametrize("broker_url", ["redis", "rabbitmq"], indirect=True)
def test_a_worker_outlives_every_bad_message(stage: Stage, broker_url: str) -> None:
    worker = stage.worker(concurrency=1)
    for name, body, headers, content_type in messages(stage.tenant):
        send_raw(broker_url, stage.tenant, body, headers, content_type)
        result = stage.send("add", 1, 2)
        eventually(result.ready, why=f"the worker to go on after {name}")
    for _, body, headers, content_type in messages(stage.tenant)[:4]:
        send_raw(broker_url, stage.bazaar.cloacina.settings.control_queue, body, headers, content_type)
    assert stage.send("add", 1, 2).get(timeout=15) == 3
    assert worker.is_running
    assert worker.log.count(" ready.") == 1
    assert "message.refused" in worker.log


def test_a_runner_outlives_every_bad_message(stage: Stage, broker_url: str, database_url: str) -> None:
    from cloacina_celery import Runner

    with Runner.with_schema(database_url, stage.tenant, app=stage.bazaar.app) as runner:
        for name, body, headers, content_type in messages(stage.tenant):
            send_raw(broker_url, stage.tenant, body, headers, content_type)
            assert runner.execute("bazaar.add", 1, 2).get(timeout=15) == 3, name


def send_raw(broker_url: str, queue: str, body: Any, headers: dict[str, Any], content_type: str) -> None:
    with Connection(broker_url) as connection:
        connection.Producer().publish(
            body,
            routing_key=queue,
            exchange="",
            headers=headers,
            content_type=content_type,
            content_encoding="binary" if isinstance(body, bytes) else "utf-8",
            serializer=None,
        )
