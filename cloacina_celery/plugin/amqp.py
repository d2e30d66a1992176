"""Sending: the one place that every path of Celery passes on its way to the broker, and that may refuse."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from celery.utils.imports import symbol_by_name

from cloacina_celery.errors import InvalidPayload
from cloacina_celery.plugin.envelope import DELAY_HEADERS
from cloacina_celery.plugin.submitter import OWN_OPTIONS
from cloacina_celery.plugin.task import is_durable
from cloacina_celery.runtime.context import current_unit

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.amqp import Queues
    from kombu import Queue

    from cloacina_celery.plugin.parts import Parts


class DurableAMQP:
    """Mixed into the app's own AMQP class: durable tasks become rows first, all others pass untouched."""

    parts: Parts

    def as_task_v2(
        self, task_id: str, name: str, args: Any = None, kwargs: Any = None, countdown: Any = None, eta: Any = None,
        *rest: Any, **options: Any,
    ) -> Any:  # fmt: skip
        """Build the message; a durable task's delay stays out of it, since the row keeps it."""
        durable = is_durable(self.parts.kernel.app, name, options)
        self.parts.kernel.messages.note(task_id, is_durable=durable)
        build = super().as_task_v2  # type: ignore[misc]  # of the app's AMQP class, mixed in at install
        if not durable:
            return build(task_id, name, args, kwargs, countdown, eta, *rest, **options)
        message = build(task_id, name, args, kwargs, None, None, *rest, **options)
        message.headers[DELAY_HEADERS["countdown"]] = countdown
        message.headers[DELAY_HEADERS["eta"]] = eta
        return message

    @cached_property
    def plain_task_sender(self) -> Callable[..., Any]:
        """Celery's own sender, which knows nothing of rows."""
        send: Callable[..., Any] = super()._create_task_sender()  # type: ignore[misc]  # as above
        return send

    def Queues(self, *args: Any, **options: Any) -> Queues:  # noqa: N802  # Celery's name
        """Make the app's queues; a tenant's is a quorum queue where the app's default queue is one."""
        return with_the_apps_type(super().Queues(*args, **options), self.parts.kernel.app)  # type: ignore[misc]

    def _create_task_sender(self) -> Callable[..., Any]:
        send, parts, app = self.plain_task_sender, self.parts, self.parts.kernel.app

        def send_task_message(producer: Any, name: str, message: Any, **options: Any) -> Any:
            if is_durable(app, name, options):
                return parts.submitter.submit(producer, name, message, options)
            for option in OWN_OPTIONS:
                if options.pop(option, None) is not None:
                    raise InvalidPayload(
                        f"{option}= was given for {name}, which is not a durable task: "
                        "decorate it with @cloacina.task or base=DurableTask"
                    )
            unit = current_unit()
            if unit is not None and unit.is_settlement:
                # A plain callback of a durable task: committed with the settlement, it leaves after it.
                parts.outbox.post(unit, name, message, options)
                return None
            return send(producer, name, message, **options)

        return send_task_message


def with_the_apps_type(queues: Queues, app: Celery) -> Queues:
    """Have queues that come into being by their name alone all be of one type, on whichever path.

    RabbitMQ refuses whoever declares a queue with another type than it has, and a tenant's queue is listed in no
    configuration: senders make it as a missing one, ``control add_consumer`` as an added one, whose type Celery
    does not set. And ``task_create_missing_queue_type`` came with Celery 5.6, so ``task_default_queue_type`` does.
    """
    build, add = queues.new_missing, queues.add_compat

    def new_missing(name: str) -> Queue:
        queue = build(name)
        if app.conf.task_default_queue_type == "quorum":
            queue.queue_arguments = {"x-queue-type": "quorum", **(queue.queue_arguments or {})}
        return queue

    def add_compat(name: str, **options: Any) -> Queue:
        missing = new_missing(name)
        if missing.queue_arguments:
            options.setdefault("queue_arguments", missing.queue_arguments)
        if options.get("exchange") == name:
            options["exchange_type"] = missing.exchange.type
        return add(name, **options)

    queues.new_missing, queues.add_compat = new_missing, add_compat
    return queues


def install(app: Celery, parts: Parts) -> None:
    """Mix `DurableAMQP` into the app's AMQP class, whether or not the app has used it yet."""
    base = symbol_by_name(app.amqp_cls)
    mixed = type(f"Durable{base.__name__}", (DurableAMQP, base), {"parts": parts})
    existing = app.__dict__.pop("amqp", None)
    app.amqp_cls = mixed
    if existing is not None:
        app.amqp.queues = with_the_apps_type(existing.queues, app)
