"""Prefetch windows on RabbitMQ's classic queues: one for each queue, so that no tenant's messages fill another's.

Celery has one window for all of a worker's queues there, since with quorum queues it cannot have and otherwise it
wants to widen it: a plain task with an ETA is held by the worker, unacknowledged, until it is due. A window of one
queue holds for consumers that begin later only, so it is not widened; where such tasks would fill one, we go back to
the window that all queues share until they have run.
"""

from __future__ import annotations

from typing import Any

from celery.utils.quorum_queues import detect_quorum_queues
from kombu.common import PREFETCH_COUNT_MAX

from cloacina_celery.plugin.rounds import slots_of
from cloacina_celery.telemetry import log


class QueueWindows:
    """The prefetch windows of one connection's consumer: each queue's own, or one that all share.

    Args:
        consumer: Celery's, whose queues are not consumed yet.
    """

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._is_shared = False
        self._window = self._wanted_window()

    @staticmethod
    def fit(consumer: Any) -> bool:
        """Tell whether Celery has one window for all queues on this RabbitMQ, and it holds anything."""
        return (
            not consumer.connection.qos_semantics_matches_spec
            and not detect_quorum_queues(consumer.app, "amqp")[0]
            and consumer.initial_prefetch_count > 0
        )

    def open(self) -> None:
        """Give each queue a window of its own, from before the first message."""
        self._set_each(self._window)
        self._set_shared(0)

    def follow(self, prefetch_count: int) -> None:
        """Follow Celery, which says how many messages it wants unacknowledged: 0 is any number.

        What is more than the pool's share is held for later. Half a window of that may all be one queue's.
        """
        held = (prefetch_count or PREFETCH_COUNT_MAX) - self._consumer.max_prefetch_count
        if self._is_shared:
            if held <= 0:
                self._change(is_shared=False)
                log("window.each")
            else:
                self._set_shared(prefetch_count)
        elif held >= max(self._window // 2, 1):
            self._change(is_shared=True, prefetch_count=prefetch_count)
            log("window.shared", held=held)
        elif self._wanted_window() > self._window:
            self._change(is_shared=False)

    def _wanted_window(self) -> int:
        # An autoscaled pool grows and shrinks all the time, and each change would be every queue's.
        return int(slots_of(self._consumer) * self._consumer.prefetch_multiplier)

    def _change(self, *, is_shared: bool, prefetch_count: int = 0) -> None:
        tasks = self._consumer.task_consumer
        tasks.cancel()
        self._is_shared, self._window = is_shared, self._wanted_window()
        self._set_each(0 if is_shared else self._window)
        self._set_shared(prefetch_count if is_shared else 0)
        tasks.consume()

    def _set_each(self, count: int) -> None:
        self._consumer.task_consumer.qos(prefetch_count=count, apply_global=False)

    def _set_shared(self, count: int) -> None:
        self._consumer.task_consumer.qos(prefetch_count=count, apply_global=True)
