"""Light messages on Redis: not kept a second time where a row does, and put first where they were first already.

kombu emulates acknowledgements on Redis by writing each delivered message into a hash and an index, and by
removing it there when it is acknowledged: nearly half of the work of a worker's main process. A durable task's
message is a doorbell; if a worker dies with it, the row is found stranded and rung again. So its delivery is
only counted, for the prefetch limit, as kombu itself does where ``ack_emulation`` is off. All other messages
are kept as ever.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from celery import bootsteps
from celery.worker import state
from kombu.transport import redis, virtual
from kombu.utils import json

from cloacina_celery.plugin.envelope import TENANT_HEADER
from cloacina_celery.plugin.rounds import WeightedCycle, can_weigh, slots_of
from cloacina_celery.store.driver_errors import one_line
from cloacina_celery.telemetry import log

SHORT = 0.025
"""Seconds that a task takes on average while a worker takes messages ahead."""

DEFAULT_MULTIPLIER = 4
"""Celery's own prefetch multiplier: whoever sets a greater one wants messages taken ahead, and has them."""

MEMORY = 8
"""How many of the latest messages, for each slot, that average is of."""


class Reserve:
    """Says whether a worker takes messages for slots that are not free yet.

    What it has in reserve goes before whatever comes later, so a tenant's long tasks in there keep all others
    waiting for as long as they run. While tasks are short that is no time, and taking ahead saves each of them
    the way to the broker and back; so a reserve is kept only while messages go through quickly.

    Args:
        slots: how many tasks run at once.
        taken: how many messages the worker has, running ones included.
        is_allowed: ``False`` keeps none, however short the tasks are.
    """

    def __init__(self, *, slots: Callable[[], int], taken: Callable[[], int], is_allowed: bool) -> None:
        self._slots = slots
        self._taken = taken
        self._is_allowed = is_allowed
        self._times: deque[float] = deque(maxlen=MEMORY * max(slots(), 1))

    def note(self) -> None:
        """Note that a message was taken."""
        self._times.append(time.monotonic())

    def has_place(self) -> bool:
        """Tell whether another message may be taken."""
        # The cheap question first: it is asked several times for each message.
        return (self._is_allowed and self._goes_quickly()) or self._taken() < self._slots()

    def _goes_quickly(self) -> bool:
        # Where no more than the slots hold is taken, one is taken for each that ends: so often do tasks end.
        times = self._times
        return len(times) == times.maxlen and time.monotonic() - times[0] < SHORT * MEMORY


class DoorbellQoS(redis.QoS):
    """kombu's bookkeeping of delivered messages, without Redis for those of durable tasks, and with a fair reserve."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._light: set[str] = set()
        self.reserve: Reserve | None = None

    def can_consume(self) -> bool:
        """Tell whether another message may be taken."""
        return (self.reserve is None or self.reserve.has_place()) and bool(super().can_consume())

    def append(self, message: Any, delivery_tag: str) -> None:
        """Count a delivered message, and keep it unless a row does."""
        if self.reserve is not None:
            self.reserve.note()
        if TENANT_HEADER in (message.headers or ()):
            self._light.add(delivery_tag)
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Forget an acknowledged message."""
        if delivery_tag in self._light:
            self._light.discard(delivery_tag)
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Forget a rejected message, after putting it back if asked to."""
        if delivery_tag in self._light:
            self._light.discard(delivery_tag)
            if requeue:
                virtual.Channel._restore(self.channel, self._delivered[delivery_tag])
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().reject(delivery_tag, requeue=requeue)

    def restore_unacked(self, client: Any = None) -> None:
        """Put back what was delivered and not started, at the end of the channel, as far as the broker is there.

        A broker that went away is why most channels end, and by then this one cannot reach it any more. An error
        would end the worker. Rows ring again; other messages are in Redis until their visibility timeout.
        """
        self._flush()
        light = [self._delivered.pop(tag) for tag in list(self._light) if tag in self._delivered]
        self._light.clear()
        try:
            for message in light:
                virtual.Channel._restore(self.channel, message)
            if self._delivered:
                super().restore_unacked(client)
        except Exception as error:  # noqa: BLE001  # kombu has no client any more, and trips over that
            log("messages.kept", error=one_line(error))


@contextmanager
def at_the_head(producer: Any) -> Iterator[None]:
    """Have what is published in the block go to its queue's head, where the broker has such a place: on Redis.

    It is where kombu puts back what a closing channel had in its hands. AMQP has no such place for a new message.
    """
    try:
        channel = producer.channel
    except Exception:  # noqa: BLE001  # the publish itself will meet it, and says what is wrong
        yield
        return
    if not isinstance(channel, redis.Channel):
        yield
        return
    channel._put = partial(_put_first, channel)
    try:
        yield
    finally:
        del channel._put


def _put_first(channel: Any, queue: str, message: Any, **options: Any) -> None:
    key = channel._q_for_pri(queue, channel._get_message_priority(message, reverse=False))
    batch = options.get("_publish_batch")
    if batch is not None:
        batch.add("rpush", key, json.dumps(message))
        return
    with channel.conn_or_acquire() as client:
        client.rpush(key, json.dumps(message))


class DoorbellStep(bootsteps.StartStopStep):
    """Use `DoorbellQoS` and `WeightedCycle` on the consumer's channel, at each connection anew."""

    requires = ("celery.worker.consumer.connection:Connection",)

    def start(self, consumer: Any) -> None:
        """Replace the channel's bookkeeping and its round of queues before its first message."""
        channel = consumer.connection.default_channel
        if not isinstance(channel, redis.Channel):
            return
        kernel = consumer.app.cloacina.parts.kernel
        if can_weigh(channel.queue_order_strategy):
            channel._queue_cycle = WeightedCycle(lambda: kernel.weights, channel._queue_cycle.items)
        if not channel.ack_emulation:
            return
        channel.QoS = DoorbellQoS
        before = channel._qos
        if before is not None:
            before._on_collect.cancel()
            channel._qos = DoorbellQoS(channel, before.prefetch_count)
        is_forbidden = bool(consumer.app.conf.get("worker_disable_prefetch"))
        if is_forbidden or consumer.prefetch_multiplier <= DEFAULT_MULTIPLIER:
            channel.qos.reserve = Reserve(
                slots=lambda: slots_of(consumer),
                taken=lambda: len(state.reserved_requests),
                # Celery would see to this setting on the object that was here before.
                is_allowed=not is_forbidden,
            )

    def stop(self, consumer: Any) -> None:
        """Leave the channel to its connection."""

    terminate = stop
