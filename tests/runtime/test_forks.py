"""A child is never forked in the middle of a send, whose locks it would inherit for ever."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
from kombu.transport import redis

from cloacina_celery.runtime import forks
from cloacina_celery.runtime.forks import without_fork
from tests.support.brokers import EACH_KIND
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from types import ModuleType

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

CHILD_PATIENCE = 10


def forked_child(work: Any = lambda: None) -> int:
    """Fork, have the child do the work, and return how it ended: 0 for well."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(CHILD_PATIENCE)
        try:
            work()
        except BaseException:  # noqa: BLE001  # a child of pytest must not go on as another pytest
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


class Sender(threading.Thread):
    """A thread that is inside until it is told to leave."""

    def __init__(self, order: list[str]) -> None:
        super().__init__(daemon=True)
        self.entered, self.may_leave = threading.Event(), threading.Event()
        self._order = order

    def run(self) -> None:
        with without_fork():
            self.entered.set()
            self.may_leave.wait()
            self._order.append("sent")


def test_a_fork_waits_for_the_end_of_a_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "PATIENCE", 60.0)
    order: list[str] = []
    sender = Sender(order)
    sender.start()
    sender.entered.wait()

    def fork() -> None:
        forked_child()
        order.append("forked")

    forker = threading.Thread(target=fork, daemon=True)
    forker.start()
    eventually(lambda: forks._gate._is_held_for_fork, why="the fork to wait at the gate")
    sender.may_leave.set()
    forker.join()
    assert order == ["sent", "forked"]


def test_a_send_that_does_not_end_holds_no_fork_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "PATIENCE", 0.1)
    sender = Sender([])
    sender.start()
    sender.entered.wait()
    try:
        assert forked_child() == 0
    finally:
        sender.may_leave.set()
        sender.join()


def test_a_child_may_send_and_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with without_fork():
            pass
        assert forked_child() == 0

    with without_fork():
        monkeypatch.setattr(forks, "PATIENCE", 0.1)
        assert forked_child(work) == 0


def test_a_child_forked_while_a_channel_opens_can_send(
    shop: ModuleType, tenant_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the keeper rings at a worker's start: this child used to hang in a lock of kombu's."""
    shop.cloacina.tenants.create(tenant_name)
    opens, may_open = threading.Event(), threading.Event()
    create_client = redis.Channel._create_client

    def slowly(channel: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is ringing:
            opens.set()
            may_open.wait()
        return create_client(channel, *args, **kwargs)

    monkeypatch.setattr(redis.Channel, "_create_client", slowly)
    depth = shop.cloacina.parts.publisher.queue_depth
    ringing = threading.Thread(target=depth, args=(tenant_name,), daemon=True)
    ringing.start()
    opens.wait()
    ended: list[int] = []
    forking = threading.Thread(
        target=lambda: ended.append(forked_child(lambda: depth(tenant_name))), daemon=True
    )
    forking.start()
    eventually(lambda: forks._gate._is_held_for_fork or ended, why="the fork to begin")
    may_open.set()
    forking.join()
    ringing.join()
    assert ended == [0]


@EACH_KIND
def test_a_child_sends_by_a_connection_of_its_own_and_leaves_its_parents_as_it_is(
    shop: ModuleType, tenant_name: str
) -> None:
    shop.cloacina.tenants.create(tenant_name)
    publisher = shop.cloacina.parts.publisher

    def connection() -> Any:
        with publisher.connections.producer() as producer:
            return producer.connection.connection

    def send() -> None:
        shop.add.apply_async((1, 1), tenant=tenant_name)
        assert publisher.queue_depth(tenant_name) is not None

    send()
    before = connection()

    def send_as_a_child() -> None:
        send()
        assert connection() is not before

    assert forked_child(send_as_a_child) == 0
    send()
    assert connection() is before
    eventually(lambda: publisher.queue_depth(tenant_name) == 3, why="all three messages")
