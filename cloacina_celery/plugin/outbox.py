"""Plain tasks that follow a durable one: their messages are committed with its settlement, and leave after it."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from kombu import Exchange, Queue, serialization

from cloacina_celery.plugin.envelope import dump_json, load_json
from cloacina_celery.store import outbox
from cloacina_celery.store.driver_errors import in_words
from cloacina_celery.store.outbox import Letter
from cloacina_celery.telemetry import log

if TYPE_CHECKING:
    from kombu import Producer

    from cloacina_celery.plugin.kernel import Kernel
    from cloacina_celery.plugin.publisher import Publisher
    from cloacina_celery.runtime.context import Unit


class Outbox:
    """Send plain messages at least once, however the process that settled ends."""

    def __init__(self, kernel: Kernel, publisher: Publisher) -> None:
        self._kernel = kernel
        self._publisher = publisher

    def post(self, unit: Unit, name: str, message: Any, options: dict[str, Any]) -> None:
        """Keep a message in the settling transaction, and send it once that has committed.

        Raises:
            InvalidPayload: JSON cannot carry an option or a header of the call.
        """
        stored = self._dump(name, message, options)
        letter_id = outbox.put(unit.cursor(), unit.tenant, name, stored)
        letter = Letter(id=letter_id, task=name, message=stored)
        unit.after_commit(lambda: self._send_now(unit.tenant, letter))

    def send(self, letters: Sequence[Letter]) -> list[int]:
        """Send messages, and return the ids of those that the broker has taken; a bad one does not stop the others."""
        return [letter.id for letter in letters if self._try(letter)]

    def _try(self, letter: Letter) -> bool:
        try:
            outcomes = self._publisher.send_each(self._queue_name(letter), [partial(self._send, letter)])
        except Exception as error:  # noqa: BLE001  # anything may be wrong with what is stored
            outcomes = [error]
        if outcomes == [None]:
            return True
        wrong = outcomes[0] if outcomes else None
        words = "the broker refused it" if wrong is None else in_words(wrong)
        log("callback.unsent", task=letter.task, error=words)
        return False

    def _send_now(self, tenant: str, letter: Letter) -> None:
        if not self.send([letter]):
            return
        try:
            with self._kernel.database.statement() as cursor:
                outbox.remove(cursor, tenant, [letter.id])
        except Exception as error:  # noqa: BLE001  # what it follows is settled and committed, and stays so
            # The sweep will send it a second time.
            log("callback.unsent", task=letter.task, error=in_words(error))

    def _dump(self, name: str, message: Any, options: dict[str, Any]) -> str:
        headers, properties, body, sent_event = message
        kept = {key: _name_of(value) for key, value in options.items() if key not in _PASSING}
        serializer = options.get("serializer") or self._kernel.app.conf.task_serializer
        if serializer != "json":
            # Never decoded again on its way: what a tenant's schema holds must not reach a pickle.
            content_type, encoding, encoded = serialization.dumps(body, serializer=serializer)
            body = b64encode(encoded if isinstance(encoded, bytes) else encoded.encode(encoding)).decode()
            properties = {**properties, "content_type": content_type, "content_encoding": encoding}
        return dump_json(
            [headers, properties, body, sent_event, kept],
            f"arguments or options of {name}, which follows a durable task,",
        )

    def _queue_name(self, letter: Letter) -> str:
        *_, options = load_json(letter.message)
        return str(options.get("queue") or self._kernel.app.conf.task_default_queue)

    def _send(self, letter: Letter, producer: Producer) -> None:
        headers, properties, body, sent_event, options = load_json(letter.message)
        if "content_type" in properties:
            body = b64decode(body)
        queue = options.pop("queue", None)
        if queue is not None:
            queues = self._kernel.app.amqp.queues
            options["queue"] = queues.get(queue) or queues.new_missing(queue)
        self._kernel.send(producer, letter.task, (headers, properties, body, sent_event), **options)


_PASSING = ("connection", "producer", "event_dispatcher", "declare")
"""Options that belong to the process that made the message."""


def _name_of(value: Any) -> Any:
    return value.name if isinstance(value, (Queue, Exchange)) else value
