"""In which order a worker takes from queues, and from the requests in its hands."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
from kombu.asynchronous.semaphore import LaxBoundedSemaphore
from kombu.utils.scheduling import round_robin_cycle

from cloacina_celery.plugin.rounds import WaitingRequests, WeightedCycle, slots_of


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


@pytest.mark.parametrize(
    ("max_concurrency", "is_green", "slots"), [(None, False, 3), (None, True, 5), (9, False, 9)]
)
def test_slots_are_what_may_run_and_not_what_runs(
    max_concurrency: int | None, slots: int, *, is_green: bool
) -> None:
    """Celery 5.5 counts a gevent pool's running tasks where it has the others' size."""
    pool = SimpleNamespace(num_processes=0 if is_green else 3, limit=5, is_green=is_green)
    assert (
        slots_of(SimpleNamespace(pool=pool, controller=SimpleNamespace(max_concurrency=max_concurrency)))
        == slots
    )


class Slots:
    """Celery's semaphore with our queue of waiting requests, and what came through it."""

    def __init__(self, number: int, weights: dict[str, int] | None = None) -> None:
        self.begun: list[str] = []
        self.consumed = set("abc")
        self.semaphore = LaxBoundedSemaphore(number)
        self.waiting = WaitingRequests(lambda: weights or {}, lambda: self.consumed)
        self.waiting.take_over(self.semaphore)

    def come(self, queues: str) -> None:
        """Have a request of each of these queues come in."""
        for queue in queues:
            request = SimpleNamespace(delivery_info={"routing_key": queue})
            self.semaphore.acquire(
                lambda request: self.begun.append(request.delivery_info["routing_key"]), request
            )

    def end(self, number: int) -> str:
        """Free so many slots, and return which requests begin in them."""
        before = len(self.begun)
        for _ in range(number):
            self.semaphore.release()
        return "".join(self.begun[before:])


def test_a_request_goes_before_those_of_a_queue_that_had_its_turn() -> None:
    slots = Slots(2)
    slots.come("aaaaaaab")
    assert slots.begun == ["a", "a"]
    assert slots.end(2) == "ba"
    slots.come("b")
    assert slots.end(5) == "baaaa"
    assert len(slots.waiting) == 0


def test_requests_of_one_queue_begin_in_the_order_in_which_they_came() -> None:
    semaphore = LaxBoundedSemaphore(1)
    WaitingRequests(dict, lambda: ["a"]).take_over(semaphore)
    begun: list[int] = []
    for number in range(5):
        semaphore.acquire(
            lambda request: begun.append(request.number),
            SimpleNamespace(number=number, delivery_info={"routing_key": "a"}),
        )
    for _ in range(4):
        semaphore.release()
    assert begun == [0, 1, 2, 3, 4]


def test_requests_in_hand_have_as_many_turns_as_their_tenants_weight() -> None:
    slots = Slots(1, {"a": 3})
    slots.come("c" + "aaaaaa" + "bbb")
    assert slots.end(9) == "baaabaaab"


def test_a_slot_for_which_no_request_waits_is_free_again() -> None:
    slots = Slots(2)
    slots.come("aaa")
    assert slots.end(1) == "a"
    assert slots.end(2) == ""
    assert slots.semaphore.value == 2
    slots.come("bbb")
    assert slots.end(1) == "b"


def test_what_waits_is_forgotten_with_its_connection() -> None:
    slots = Slots(1)
    slots.come("aab")
    slots.semaphore.clear()
    assert slots.end(1) == ""
    slots.come("ab")
    assert slots.end(1) == "b"


def test_what_is_taken_out_is_wanted_and_old_and_the_rest_keeps_its_place() -> None:
    slots = Slots(1)
    slots.come("caabab")
    assert slots.waiting.take_out(60, bool) == []
    taken = slots.waiting.take_out(0, lambda request: request.delivery_info["routing_key"] == "a")
    assert [request.delivery_info["routing_key"] for request in taken] == ["a", "a", "a"]
    assert len(slots.waiting) == 2
    slots.come("a")
    assert slots.end(4) == "bab"
    slots.come("b")
    assert slots.begun[-1] == "b"


def test_what_waited_before_is_taken_over() -> None:
    slots = Slots(1)
    semaphore = LaxBoundedSemaphore(1)
    slots.semaphore = semaphore
    slots.come("aaab")
    WaitingRequests(dict, lambda: slots.consumed).take_over(semaphore)
    assert slots.end(3) == "baa"


def test_queues_that_are_gone_are_not_kept_in_the_round() -> None:
    slots = Slots(1)
    slots.come("ab")
    slots.end(1)
    slots.consumed = {"c"}
    slots.come("c")
    assert slots.waiting._cycle.items == ["c"]
