"""How a tenant's queue is declared: the same by whoever sends to it and by whoever consumes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery
from celery.app.defaults import NAMESPACES

from cloacina_celery import Cloacina

if TYPE_CHECKING:
    from collections.abc import Callable

    from kombu import Queue

QUORUM = {"x-queue-type": "quorum"}
HAS_MISSING_TYPE = "create_missing_queue_type" in NAMESPACES["task"]


def app_with(**settings: Any) -> tuple[Celery, Cloacina]:
    app = Celery("queues", broker="amqp://", set_as_current=False)
    app.conf.update(settings)
    return app, Cloacina(app, database_url="postgresql://nowhere/nothing")


def of_worker(**settings: Any) -> Queue:
    app, _ = app_with(**settings)
    app.amqp.queues.select(["tenant_a"])
    return app.amqp.queues["tenant_a"]


def of_added_consumer(**settings: Any) -> Queue:
    app, _ = app_with(**settings)
    return app.amqp.queues.select_add(
        "tenant_a", exchange="tenant_a", exchange_type="direct", routing_key=None
    )


def of_sender(**settings: Any) -> Queue:
    _, cloacina = app_with(**settings)
    return cloacina.parts.publisher.queue_of("tenant_a")


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({}, {}),
        ({"task_default_queue_type": "quorum"}, QUORUM),
        ({"task_queue_max_priority": 5}, {"x-max-priority": 5}),
        ({"task_create_missing_queues": False, "task_default_queue_type": "quorum"}, QUORUM),
        pytest.param(
            {"task_create_missing_queue_type": "quorum"},
            QUORUM,
            marks=pytest.mark.skipif(not HAS_MISSING_TYPE, reason="a setting of Celery 5.6"),
        ),
    ],
    ids=["nothing", "a type", "priorities", "no missing queues", "a type of missing queues"],
)
def test_a_tenants_queue_has_the_same_arguments_for_all(
    settings: dict[str, Any], arguments: dict[str, Any]
) -> None:
    makers = [of_sender, of_added_consumer]
    if settings.get("task_create_missing_queues", True):
        makers.append(of_worker)
    assert [maker(**settings).queue_arguments or {} for maker in makers] == [arguments] * len(makers)


@pytest.mark.skipif(not HAS_MISSING_TYPE, reason="a setting of Celery 5.6")
@pytest.mark.parametrize("maker", [of_sender, of_worker, of_added_consumer])
def test_a_tenants_queue_has_the_same_exchange_for_all(maker: Callable[..., Queue]) -> None:
    queue = maker(task_create_missing_queue_exchange_type="topic")
    assert (queue.exchange.name, queue.exchange.type, queue.routing_key) == ("tenant_a", "topic", "tenant_a")


def test_a_queue_that_the_app_lists_is_declared_as_it_is_listed() -> None:
    from kombu import Queue

    listed = Queue("tenant_a", routing_key="tenant_a", queue_arguments={"x-delivery-limit": 3})
    assert of_sender(task_queues=[listed]).queue_arguments == {"x-delivery-limit": 3}


def test_a_sender_does_not_make_a_worker_consume_what_it_has_sent_to() -> None:
    app, cloacina = app_with()
    cloacina.parts.publisher.queue_of("tenant_a")
    assert list(app.amqp.queues.consume_from) == ["celery"]


def test_a_queue_type_set_before_the_plugin_came_holds_too() -> None:
    app = Celery("queues", broker="amqp://", set_as_current=False)
    app.conf.task_default_queue_type = "quorum"
    assert app.amqp.queues  # made without the plugin
    Cloacina(app, database_url="postgresql://nowhere/nothing")
    assert app.amqp.queues["tenant_a"].queue_arguments == QUORUM
