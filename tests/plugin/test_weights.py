"""In which order a worker takes from queues that have weights."""

from __future__ import annotations

from collections import Counter

import pytest
from kombu.utils.scheduling import round_robin_cycle

from cloacina_celery.plugin.weights import WeightedCycle


def take(cycle: round_robin_cycle, number: int, *, full: str) -> str:
    """Take so many messages, each from the first queue in order that has one, as Redis does."""
    return "".join(
        cycle.rotate(next(queue for queue in cycle.consume(len(cycle.items)) if queue in full))
        for _ in range(number)
    )


def test_without_weights_it_is_kombus_own_round() -> None:
    cycles = (WeightedCycle(dict, "abc"), round_robin_cycle(list("abc")))
    for full in ("abc", "b", "ac", "abc"):
        ours, kombus = (take(cycle, 7, full=full) for cycle in cycles)
        assert ours == kombus


def test_a_queue_has_as_many_turns_as_its_weight() -> None:
    cycle = WeightedCycle(lambda: {"a": 4, "c": 2}, "abc")
    assert take(cycle, 14, full="abc") == "aaaabcc" * 2


def test_turns_that_a_queue_has_no_message_for_are_the_others() -> None:
    cycle = WeightedCycle(lambda: {"a": 4}, "abc")
    assert take(cycle, 2, full="abc") == "aa"
    assert take(cycle, 4, full="bc") == "bcbc"
    # What is left of them is there when it has messages again, and no more than that.
    assert take(cycle, 7, full="abc") == "aabcaaa"


def test_one_that_had_nothing_for_long_goes_first() -> None:
    cycle = WeightedCycle(lambda: {"b": 4}, "ab")
    take(cycle, 100, full="b")
    assert take(cycle, 1, full="ab") == "a"


def test_a_weight_is_changed_while_the_round_goes_on() -> None:
    weights = {"a": 100}
    cycle = WeightedCycle(lambda: weights, "ab")
    assert take(cycle, 5, full="ab") == "aaaaa"
    weights["a"] = 2
    assert take(cycle, 4, full="ab") == "abaa"


@pytest.mark.parametrize("weights", [{"a": 1, "b": 4}, {"a": 3, "b": 7, "c": 100}])
def test_of_full_queues_each_gets_its_share(weights: dict[str, int]) -> None:
    cycle = WeightedCycle(lambda: weights, weights)
    rounds = 5
    taken = take(cycle, rounds * sum(weights.values()), full="".join(weights))
    assert Counter(taken) == {queue: rounds * weight for queue, weight in weights.items()}


def test_queues_come_and_go_while_turns_are_counted() -> None:
    cycle = WeightedCycle(lambda: {"a": 3}, "ab")
    assert take(cycle, 2, full="ab") == "aa"
    cycle.update("abc")
    assert take(cycle, 3, full="abc") == "abc"
    cycle.update("bc")
    assert take(cycle, 2, full="bc") == "bc"
    # An end of a queue that the cycle does not know is none of its business.
    assert cycle.rotate("a") == "a"
