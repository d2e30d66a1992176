"""How many messages RabbitMQ sends ahead from each classic queue, with none of them acknowledged."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from kombu import Connection, Consumer, Queue

from cloacina_celery.plugin.windows import QueueWindows
from tests.support.waiting import eventually, never

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kombu.message import Message


class Wired:
    """A consumer of two queues of fifty messages each, on a pool of two slots with Celery's multiplier."""

    def __init__(self, connection: Connection, names: list[str]) -> None:
        channel = connection.default_channel
        queues = [Queue(name, channel=channel) for name in names]
        for queue in queues:
            queue.declare()
            for number in range(50):
                connection.Producer().publish(number, routing_key=queue.name)
        self.pool = SimpleNamespace(num_processes=2, is_green=False)
        self.controller = SimpleNamespace(max_concurrency=None)
        self.prefetch_multiplier = 4
        self.task_consumer = Consumer(channel, queues, on_message=self._take)
        self.names = names
        self.taken: Counter[str] = Counter()
        self._connection = connection

    @property
    def max_prefetch_count(self) -> int:
        """As Celery's consumer has it."""
        return self.pool.num_processes * self.prefetch_multiplier

    def sent(self) -> tuple[int, ...]:
        """Take what comes until nothing does, and count what has come of each queue in all."""
        with suppress(TimeoutError):
            while True:
                self._connection.drain_events(timeout=0.05)
        return tuple(self.taken[name] for name in self.names)

    def _take(self, message: Message) -> None:
        self.taken[message.delivery_info["routing_key"]] += 1


@pytest.fixture
def wired(amqp_url: str, new_tenant_name: Callable[[], str]) -> Iterator[Wired]:
    """A consumer that has not begun."""
    with Connection(amqp_url) as connection:
        yield Wired(connection, [new_tenant_name(), new_tenant_name()])


@pytest.fixture
def windows(wired: Wired) -> QueueWindows:
    """The windows of a consumer that has begun."""
    windows = QueueWindows(wired)
    windows.open()
    wired.task_consumer.consume()
    eventually(lambda: wired.sent() == (8, 8), why="eight of each queue")
    never(lambda: wired.sent() != (8, 8), 0.3, "more of them")
    return windows


def test_a_few_that_are_held_leave_each_queue_its_window(wired: Wired, windows: QueueWindows) -> None:
    for count in (9, 11, 8):
        windows.follow(count)
    never(lambda: wired.sent() != (8, 8), 0.3, "more of them")


def test_what_could_fill_one_window_makes_all_share_one_that_follows(
    wired: Wired, windows: QueueWindows
) -> None:
    windows.follow(12)
    # All sixteen that are unacknowledged count in the one window.
    never(lambda: wired.sent() != (8, 8), 0.3, "more of them")
    windows.follow(20)
    eventually(lambda: sum(wired.sent()) == 20, why="four more")
    never(lambda: sum(wired.sent()) != 20, 0.3, "more of them")


def test_any_number_is_any_number(wired: Wired, windows: QueueWindows) -> None:
    windows.follow(0)
    eventually(lambda: wired.sent() == (50, 50), why="all of them")


def test_after_they_have_run_each_queue_has_its_window_again(wired: Wired, windows: QueueWindows) -> None:
    windows.follow(12)
    windows.follow(9)
    never(lambda: wired.sent() != (8, 8), 0.3, "more of them")
    windows.follow(8)
    # Consumers that begin anew: what the old ones had does not count.
    eventually(lambda: wired.sent() == (16, 16), why="eight of each queue")


def test_a_pool_that_grows_widens_each_window_and_one_that_shrinks_leaves_it(
    wired: Wired, windows: QueueWindows
) -> None:
    wired.pool.num_processes = 1
    windows.follow(4)
    wired.pool.num_processes = 3
    windows.follow(12)
    eventually(lambda: wired.sent() == (20, 20), why="twelve of each queue")


def test_an_autoscaled_pool_has_the_windows_of_its_greatest_size_from_the_beginning(wired: Wired) -> None:
    wired.controller.max_concurrency = 3
    windows = QueueWindows(wired)
    windows.open()
    wired.task_consumer.consume()
    eventually(lambda: wired.sent() == (12, 12), why="twelve of each queue")
    wired.pool.num_processes = 3
    windows.follow(12)
    never(lambda: wired.sent() != (12, 12), 0.3, "more of them")
