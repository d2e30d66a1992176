"""Publishing: messages leave after their rows are committed, and a broker that is down loses nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from amqp.exceptions import ChannelError
from kombu.transport import virtual

from cloacina_celery.errors import CloacinaError, DatabaseUnavailable
from cloacina_celery.plugin.breaker import Breaker
from cloacina_celery.plugin.connections import BoundedConnections, BrokerRefuses, QueueRefuses, is_not_found
from cloacina_celery.plugin.doorbell import at_the_head
from cloacina_celery.plugin.envelope import Envelope
from cloacina_celery.store import ringing
from cloacina_celery.store.driver_errors import DriverError, in_words
from cloacina_celery.store.ringing import Ring
from cloacina_celery.telemetry import log

if TYPE_CHECKING:
    from celery.app.amqp import Queues
    from kombu import Producer, Queue

    from cloacina_celery.plugin.kernel import Kernel

QUEUE_PAUSE = 10.0
"""Seconds for which a tenant is not tried again whose queue the broker refused: somebody has to mend that."""

Outgoing = tuple[str, int, Callable[["Producer"], None]]
"""Execution id, the attempt that it rings for, and what sends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstRing:
    """The first message of a new row, as Celery built it: later ones are made from the row."""

    tenant: str
    execution_id: str
    attempt: int
    task: str
    message: tuple[dict[str, Any], dict[str, Any], Any, Any]
    properties: dict[str, Any]


class Publisher:
    """Send the messages of committed rows to their tenants' queues."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._breaker = Breaker()
        self._refused_until: dict[str, float] = {}
        self._queues: Queues | None = None
        self.connections = BoundedConnections(kernel)

    def publish(self, ring: FirstRing) -> None:
        """Publish a new row's message; the row is committed, so a broker that refuses is logged and not raised."""

        def send(producer: Producer) -> None:
            self._send(producer, ring.task, ring.message, ring.tenant, ring.properties)

        self._publish(ring.tenant, [(ring.execution_id, ring.attempt, send)])

    def publish_rings(self, rings: Sequence[Ring]) -> None:
        """Publish messages from rows; what the broker refuses is noted in the row and left to a later poll."""
        for tenant, of_tenant in groupby(rings, key=lambda ring: ring.tenant):
            self._publish(
                tenant,
                [(ring.execution_id, ring.attempt, partial(self._send_ring, ring)) for ring in of_tenant],
            )

    def can_publish(self, queue: str) -> bool:
        """Tell whether the broker has not just refused, neither altogether nor this queue."""
        return not self._breaker.is_open and time.monotonic() >= self._refused_until.get(queue, 0.0)

    def queue_depth(self, tenant: str) -> int | None:
        """Count the messages that wait in a tenant's queue; ``None`` if the broker does not say."""
        if not self.can_publish(tenant):
            return None
        try:
            with self.connections.producer() as producer:
                return self.connections.do(producer, partial(self._look, producer, tenant))
        except BrokerRefuses:
            return None

    def queue_of(self, tenant: str) -> Queue:
        """Return a tenant's queue as a worker that is started with its name declares it."""
        listed: Queue | None = self._kernel.app.amqp.queues.get(tenant)
        if listed is not None:
            return listed
        if self._queues is None:
            # Not app.amqp.queues itself: a worker started without -Q consumes all that is in there.
            self._queues = self._kernel.app.amqp.Queues(None, create_missing=True)
        queue: Queue = self._queues[tenant]
        return queue

    def _publish(self, tenant: str, messages: Sequence[Outgoing]) -> None:
        outcomes = self.send_each(tenant, [send for _, _, send in messages])
        for (execution_id, _, _), error in zip(messages, outcomes, strict=False):
            if error is not None:
                # It stays rung: as a due row it would fail at each poll, as a stranded one it is tried now and then.
                log("message.unsendable", tenant=tenant, execution_id=execution_id, error=in_words(error))
        unsent = [(execution_id, attempt) for execution_id, attempt, _ in messages[len(outcomes) :]]
        # If the database is away too, the rows stay committed as rung, and the sweep finds them stranded.
        if unsent:
            with suppress(CloacinaError, DriverError), self._kernel.database.statement() as cursor:
                ringing.unring(cursor, tenant, unsent)

    def send_each(self, queue: str, sends: Sequence[Callable[[Producer], object]]) -> list[Exception | None]:
        """Send to a queue in order, for as long as the broker takes it; return what became of each that was tried.

        That is ``None`` for one that the broker took, or what is wrong with one that cannot be sent.

        Raises:
            DatabaseUnavailable: it had to be asked, and did not answer.
        """
        outcomes: list[Exception | None] = []
        if not self.can_publish(queue) or not self._breaker.admits(patience=self.connections.timeout):
            return outcomes
        began, refusals = time.monotonic(), self._breaker.refusals
        try:
            with self.connections.producer() as producer:
                # Whoever had to wait for a producer may have waited for somebody to whom the broker refused.
                while len(outcomes) < len(sends) and self._breaker.refusals == refusals:
                    began = time.monotonic()
                    outcomes.append(self._try(producer, sends[len(outcomes)]))
            if None in outcomes:
                self._refused_until.pop(queue, None)
                self._note_answer()
        except QueueRefuses as error:
            self._refused_until[queue] = time.monotonic() + QUEUE_PAUSE
            log("queue.refused", queue=queue, error=str(error), seconds=QUEUE_PAUSE)
            self._note_answer()
        except BrokerRefuses as error:
            pause = self._breaker.refused(after=time.monotonic() - began)
            log("broker.refused", error=str(error), seconds=pause)
        return outcomes

    def _try(self, producer: Producer, send: Callable[[Producer], object]) -> Exception | None:
        try:
            self.connections.do(producer, partial(send, producer))
        except (BrokerRefuses, DatabaseUnavailable):
            raise
        except Exception as error:  # noqa: BLE001  # one bad message is none of the others' trouble
            # Nobody knows what of it is on the wire.
            self.connections.drop(producer)
            return error
        return None

    def _note_answer(self) -> None:
        was_open_for = self._breaker.accepted()
        if was_open_for is not None:
            log("broker.back", seconds=was_open_for)

    def _look(self, producer: Producer, tenant: str) -> int:
        channel = producer.channel
        try:
            return int(channel.queue_declare(queue=tenant, passive=True).message_count)
        except ChannelError as error:
            if not is_not_found(error):
                raise
            if not isinstance(channel, virtual.Channel):
                # RabbitMQ has closed the channel over it. A new one will declare the queue when it publishes.
                self.connections.drop(producer)
            return 0

    def _send_ring(self, ring: Ring, producer: Producer) -> None:
        envelope = Envelope.load(ring.message)
        epoch = self._kernel.tenants.epoch_of(ring.tenant)
        headers = envelope.ringing_for(ring.tenant, epoch, ring.attempt, ring.failures)
        message: Any = (headers, {}, envelope.body, None)
        with at_the_head(producer) if ring.goes_first else nullcontext():
            self._send(producer, headers["task"], message, ring.tenant, envelope.properties)

    def _send(
        self, producer: Producer, task: str, message: Any, tenant: str, properties: dict[str, Any]
    ) -> None:
        send: Callable[..., Any] = self._kernel.send
        send(
            producer, task, message, queue=self.queue_of(tenant), serializer="json", retry=False, **properties
        )
