"""Weights: in which order a worker takes from its tenants' queues, where it is the worker who chooses: on Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

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


def can_weigh(strategy: object) -> bool:
    """Tell whether a ``queue_order_strategy`` is the round that weights are of, and not one of the user's choice."""
    return strategy in (None, "round_robin")
