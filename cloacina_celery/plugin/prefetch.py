"""What a worker has been sent ahead of its free slots: in turns of its tenants, and not for ever.

RabbitMQ ends the channel over which a message was sent that is unacknowledged for too long, and Celery's worker
ends with it. One that waits for a slot behind long tasks goes back to the queue before.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from celery import bootsteps
from celery.worker import state

from cloacina_celery.plugin.request import DurableRequest
from cloacina_celery.plugin.rounds import WaitingRequests
from cloacina_celery.plugin.windows import QueueWindows
from cloacina_celery.telemetry import log

HELD_FOR = 1200.0
"""Seconds after which a durable message that waits in a worker goes back to RabbitMQ.

RabbitMQ's own patience (``consumer_timeout``) is 1,800 by default. Not sooner, since a quorum queue puts what it
gets back behind all others; a classic one puts it into its place.
"""

LOOK_INTERVAL = 30.0
"""Seconds between two looks for such messages."""


class PrefetchStep(bootsteps.StartStopStep):
    """Order what waits for a slot of a prefork pool, at each connection anew.

    The other pools keep what they have in the order in which it came, out of our reach.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)
    _look: Any = None

    def start(self, consumer: Any) -> None:
        """Take the queue of waiting requests over, and on RabbitMQ open the windows and look after old messages."""
        semaphore = consumer.controller.semaphore
        if semaphore is None:
            return
        if not isinstance(semaphore._waiting, WaitingRequests):
            kernel, queues = consumer.app.cloacina.parts.kernel, consumer.app.amqp.queues
            WaitingRequests(lambda: kernel.weights, lambda: queues.consume_from).take_over(semaphore)
        if consumer.connection.transport.driver_type != "amqp":
            return
        if QueueWindows.fit(consumer):
            # After a lost connection Celery begins with a smaller window and widens it as tasks end; ours are static.
            consumer.qos_global, consumer._maximum_prefetch_restored = False, True
            consumer.initial_prefetch_count = consumer.qos.value = consumer.max_prefetch_count
            windows = QueueWindows(consumer)
            windows.open()
            consumer.qos.callback = windows.follow
        self._look = consumer.timer.call_repeatedly(LOOK_INTERVAL, partial(hand_back_old, semaphore._waiting))

    def stop(self, consumer: Any) -> None:
        """Look no more: the messages go with their connection."""
        if self._look is not None:
            self._look.cancel()
            self._look = None

    terminate = stop


def hand_back_old(waiting: WaitingRequests) -> None:
    """Give back to their queues the durable messages that have waited here for long.

    Plain messages stay: a quorum queue counts how often one was given back, and drops it in the end. A durable
    one is then missed by the sweep, and sent again.
    """
    old = waiting.take_out(HELD_FOR, lambda request: isinstance(request, DurableRequest) and request.held)
    for request in old:
        state.task_ready(request)
        request.reject(requeue=True)
    if old:
        log("message.handed_back", number=len(old), seconds=f"{HELD_FOR:.0f}")
