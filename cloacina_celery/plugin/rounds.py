"""Whose turn it is: a worker goes round its tenants' queues, and round the messages that it has in its hands.

On Redis it is the worker who chooses the queue. RabbitMQ sends what it likes; what was sent ahead of a free slot is
chosen from here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias

from kombu.asynchronous.semaphore import LaxBoundedSemaphore
from kombu.utils.scheduling import round_robin_cycle

Weights = Callable[[], Mapping[str, int]]
"""The weights of tenants by their names; who is not in it has 1."""


class WeightedCycle(round_robin_cycle):
    """kombu's round of queues, in which one keeps its place until it has had as many turns as its weight.

    A queue without a message is passed over in the same look, so no turn waits for it.

    Args:
        queues: in the order in which they are asked.
    """

    def __init__(self, weights: Weights, queues: Iterable[str] = ()) -> None:
        super().__init__(list(queues))
        self._weights = weights
        self._turns: dict[str, int] = {}

    def update(self, it: Iterable[str]) -> None:
        """Take other queues; turns that were begun go on."""
        super().update(it)
        self._turns = {queue: turns for queue, turns in self._turns.items() if queue in self.items}

    def rotate(self, last_used: str) -> str:
        """Count a turn of the queue that was taken from, and send it to the end after its last one."""
        weight = self._weights().get(last_used, 1)
        turns = self._turns.pop(last_used, 0) + 1
        if turns < weight:
            self._turns[last_used] = turns
        else:
            super().rotate(last_used)
        return last_used


Waiter: TypeAlias = tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]]
"""What Celery does with a request once a slot is free: a callback, and its arguments, the first of which is it."""


class WaitingRequests:
    """The requests that wait in a worker for a free slot: given out in turns of their queues.

    It stands in for the queue, first in and first out, of the semaphore that counts a prefork pool's slots.

    Args:
        consumed: the queues that the worker consumes; others are forgotten.
    """

    def __init__(self, weights: Weights, consumed: Callable[[], Collection[str]]) -> None:
        self._cycle = WeightedCycle(weights)
        self._consumed = consumed
        self._known: set[str] = set()
        self._waiting: dict[str, deque[tuple[float, Waiter]]] = {}

    def append(self, waiter: Waiter) -> None:
        """Have a request wait."""
        queue = waiter[1][0].delivery_info.get("routing_key") or ""
        if queue not in self._known:
            # Who was not here yet goes first.
            consumed = self._consumed()
            self._cycle.update(
                [queue, *(q for q in self._cycle.items if q in consumed or q in self._waiting)]
            )
            self._known = set(self._cycle.items)
        self._waiting.setdefault(queue, deque()).append((time.monotonic(), waiter))

    def popleft(self) -> Waiter:
        """Give out the request whose turn it is.

        Raises:
            IndexError: none waits.
        """
        # Where one tenant alone has work, the others' names are not looked through.
        order = self._waiting if len(self._waiting) == 1 else self._cycle.items
        queue = next((queue for queue in order if queue in self._waiting), None)
        if queue is None:
            raise IndexError("no request waits")
        of_queue = self._waiting[queue]
        _, waiter = of_queue.popleft()
        if not of_queue:
            del self._waiting[queue]
        self._cycle.rotate(queue)
        return waiter

    def take_out(self, seconds: float, wanted: Callable[[Any], object]) -> list[Any]:
        """Take the wanted requests out that have waited for so long, and return them, the oldest of a queue first."""
        before = time.monotonic() - seconds
        taken: list[Any] = []
        for queue, waiters in list(self._waiting.items()):
            kept: deque[tuple[float, Waiter]] = deque()
            for since, waiter in waiters:
                request = waiter[1][0]
                if since <= before and wanted(request):
                    taken.append(request)
                else:
                    kept.append((since, waiter))
            if kept:
                self._waiting[queue] = kept
            else:
                del self._waiting[queue]
        return taken

    def clear(self) -> None:
        """Forget all of them: their connection is gone, and the broker sends them again."""
        self._waiting.clear()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def take_over(self, semaphore: LaxBoundedSemaphore) -> None:
        """Stand in for a semaphore's queue from now on, and take what waits in it."""
        for waiter in semaphore._waiting:
            self.append(waiter)
        semaphore._waiting, semaphore._add_waiter, semaphore._pop_waiter = self, self.append, self.popleft


def slots_of(consumer: Any) -> int:
    """Count the tasks that a worker may run at once; of an autoscaled pool as many as it may grow to."""
    pool = consumer.pool
    # Celery 5.5 counts there what runs in a gevent pool.
    now = pool.limit if pool.is_green else pool.num_processes
    return int(getattr(consumer.controller, "max_concurrency", None) or now)


def can_weigh(strategy: object) -> bool:
    """Tell whether a ``queue_order_strategy`` is the round that weights are of, and not one of the user's choice."""
    return strategy in (None, "round_robin")
