"""Publishing: messages leave after their rows are committed, and a broker that is down loses nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kombu import Queue
from kombu.exceptions import KombuError, OperationalError

from cloacina_celery.errors import CloacinaError
from cloacina_celery.plugin.doorbell import at_the_head
from cloacina_celery.plugin.envelope import Envelope
from cloacina_celery.runtime.forks import without_fork
from cloacina_celery.store import executions
from cloacina_celery.store.executions import Ring
from cloacina_celery.telemetry import log

if TYPE_CHECKING:
    from cloacina_celery.plugin.kernel import Kernel

BROKER_PAUSE = 1.0
"""Seconds for which a broker that refused a message is not tried again in the background."""

PUBLISH_RETRY = {"max_retries": 2, "interval_start": 0, "interval_step": 0.1, "interval_max": 0.2}
"""Enough for a connection that went stale; for a broker that is down there is the row."""

# Errors of a broker that is down or refuses; what else may go wrong is a mistake and must be seen.
BROKER_TROUBLE = (KombuError, OperationalError, OSError)


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
        self._down_until = 0.0
        self._queues: dict[str, Queue] = {}

    def publish(self, ring: FirstRing, producer: Any = None) -> None:
        """Publish a new row's message; the row is committed, so a broker that refuses is logged and not raised.

        Args:
            producer: the caller's, if it still has one; else one is taken from the app's pool.
        """
        try:
            with without_fork(), self._kernel.app.producer_or_acquire(producer) as acquired:
                self._send(acquired, ring.task, ring.message, ring.tenant, ring.properties)
        except BROKER_TROUBLE as error:
            self._unring(ring.tenant, ring.execution_id, ring.attempt, error)

    def publish_rings(self, rings: Sequence[Ring]) -> None:
        """Publish messages from rows; what the broker refuses is noted in the row and left to the next poll."""
        if not rings:
            return
        done = 0
        try:
            with without_fork(), self._kernel.app.producer_or_acquire() as producer:
                for ring in rings:
                    self._send_ring(producer, ring)
                    done += 1
        except BROKER_TROUBLE as error:
            self._down_until = time.monotonic() + BROKER_PAUSE
            for ring in rings[done:]:
                self._unring(ring.tenant, ring.execution_id, ring.attempt, error)

    def can_publish(self) -> bool:
        """Tell whether the broker has not just refused."""
        return time.monotonic() >= self._down_until

    def queue_depth(self, tenant: str) -> int | None:
        """Count the messages that wait in a tenant's queue; ``None`` if the broker does not say."""
        try:
            with without_fork(), self._kernel.app.connection_for_write() as connection:
                channel = connection.default_channel
                try:
                    return int(channel.queue_declare(queue=tenant, passive=True).message_count)
                except connection.channel_errors:
                    return 0  # no such queue, so nothing waits in it
                except connection.connection_errors:
                    return None  # redis' own errors are none of Python's or kombu's
        except BROKER_TROUBLE:
            return None

    def _send_ring(self, producer: Any, ring: Ring) -> None:
        envelope = Envelope.load(ring.message)
        epoch = self._kernel.tenants.epoch_of(ring.tenant)
        headers = envelope.ringing_for(ring.tenant, epoch, ring.attempt, ring.failures)
        message: Any = (headers, {}, envelope.body, None)
        with at_the_head(producer) if ring.goes_first else nullcontext():
            self._send(producer, headers["task"], message, ring.tenant, envelope.properties)

    def _send(self, producer: Any, task: str, message: Any, tenant: str, properties: dict[str, Any]) -> None:
        send: Callable[..., Any] = self._kernel.send
        send(
            producer,
            task,
            message,
            queue=self.queue_of(tenant),
            serializer="json",
            retry=True,
            retry_policy=PUBLISH_RETRY,
            **properties,
        )

    def queue_of(self, tenant: str) -> Queue:
        """Return a tenant's queue as the app declares its queues."""
        queue = self._queues.get(tenant)
        if queue is None:
            queues = self._kernel.app.amqp.queues
            # Not added to app.amqp.queues: a worker started without -Q consumes all that is in there.
            queue = self._queues[tenant] = queues.get(tenant) or queues.new_missing(tenant)
        return queue

    def _unring(self, tenant: str, execution_id: str, attempt: int, error: BaseException) -> None:
        text = " ".join(str(error).split())
        log("submit.unpublished", tenant=tenant, execution_id=execution_id, error=text)
        # If the database is away too, the row stays committed as rung, and the sweep finds it stranded.
        with suppress(CloacinaError), self._kernel.database.statement() as cursor:
            executions.unring(cursor, tenant, execution_id, attempt)
