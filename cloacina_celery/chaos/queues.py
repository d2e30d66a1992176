"""What a broker may do to messages, done to them through kombu: the same on Redis and on RabbitMQ."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kombu import Connection, Producer, Queue

BATCH = 500
"""How many waiting messages one fault looks at; a longer queue keeps the rest as it is."""

KEPT_PROPERTIES = ("correlation_id", "reply_to", "priority")


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A message that was taken out of a queue, as it is put back."""

    queue: str
    body: Any
    headers: dict[str, Any]
    options: dict[str, Any]

    @property
    def execution_id(self) -> str:
        """The execution that it rings for."""
        return str(self.headers.get("id"))

    @property
    def noted_id(self) -> str:
        """The execution that a message of `chaos.tasks.NOTE` follows."""
        (execution_id,), _kwargs, _embed = json.loads(self.body)
        return str(execution_id)


def meddle(broker: Connection, queue: str, copies: Callable[[Taken], int]) -> list[Taken]:
    """Take the waiting messages out of a queue, put back as many copies of each as asked, and return all."""
    with broker.clone() as connection:
        channel = connection.default_channel
        taken: list[Taken] = []
        try:
            while len(taken) < BATCH and (message := channel.basic_get(queue=queue, no_ack=True)) is not None:
                taken.append(_taken(queue, message))
        except connection.channel_errors:
            return taken  # there is no such queue yet
        _put(channel, [one for one in taken for _ in range(copies(one))])
    return taken


def take_all(broker: Connection, queue: str) -> list[Taken]:
    """Take all messages out of a queue; none where there is no such queue."""
    found: list[Taken] = []
    while len(batch := meddle(broker, queue, lambda _: 0)) == BATCH:
        found += batch
    return found + batch


def put(broker: Connection, messages: Sequence[Taken]) -> None:
    """Send messages, as they once were."""
    with broker.clone() as connection:
        _put(connection.default_channel, messages)


def depth(broker: Connection, queue: str) -> int:
    """Count the messages that wait."""
    with broker.clone() as connection:
        try:
            return int(connection.default_channel.queue_declare(queue=queue, passive=True).message_count)
        except connection.channel_errors:
            return 0


def delete(broker: Connection, queues: Sequence[str]) -> None:
    """Delete queues with all that is in them."""
    with broker.clone() as connection:
        for name in queues:
            Queue(name, channel=connection.default_channel).delete()


def _taken(queue: str, message: Any) -> Taken:
    options = {name: message.properties.get(name) for name in KEPT_PROPERTIES}
    options |= {"content_type": message.content_type, "content_encoding": message.content_encoding}
    return Taken(queue=queue, body=message.body, headers=dict(message.headers), options=options)


def _put(channel: Any, messages: Sequence[Taken]) -> None:
    producer = Producer(channel)
    for one in messages:
        options = {name: value for name, value in one.options.items() if value is not None}
        producer.publish(one.body, exchange="", routing_key=one.queue, headers=one.headers, **options)
