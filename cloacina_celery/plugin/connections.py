"""Connections to the broker that a caller can wait for: each step of it ends in an answer or in an error, in time.

Celery's own wait as long as the app's settings let them: by default without end for a Redis that accepts a
connection and says nothing, and for RabbitMQ once it has shaken hands. That is right for a plain task, whose
message is all there is of it. A durable task's row is committed, and its message may leave later; so these are
connections of our own, with a bound, beside those of the app, whose settings they take over otherwise.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from amqp.exceptions import (
    AccessRefused,
    ChannelError,
    MessageNacked,
    NotFound,
    PreconditionFailed,
    ResourceLocked,
)
from kombu.connection import ConnectionPool
from kombu.exceptions import OperationalError
from kombu.pools import ProducerPool

from cloacina_celery.runtime.forks import without_fork

if TYPE_CHECKING:
    from kombu import Connection, Producer

    from cloacina_celery.plugin.kernel import Kernel

R = TypeVar("R")

_TIMEOUTS = ("socket_timeout", "socket_connect_timeout")
"""The options of kombu's Redis transport that bound a step; other transports overlook them."""


# Of RabbitMQ: other arguments than the queue has, no right to it, another's exclusive queue, no such queue.
_OF_A_QUEUE = {str(error.code) for error in (AccessRefused, NotFound, PreconditionFailed, ResourceLocked)}


class BrokerRefuses(Exception):
    """The broker did not do it: it is down, silent, full, or knows us not."""


class QueueRefuses(BrokerRefuses):
    """The broker did not do it for one queue."""


class _Pool(ConnectionPool):
    # kombu would shut the sockets down in a forked child, and with them those of its parent.
    close_after_fork = False


class _Producers(ProducerPool):
    close_after_fork = False


class BoundedConnections:
    """A pool of connections for messages of rows, one per process."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._producers: tuple[int, ProducerPool] | None = None
        self._inherited: list[ProducerPool] = []

    @contextmanager
    def producer(self) -> Iterator[Producer]:
        """Lend a producer; no child is forked while it is in use.

        It is as the last one left it: connected, not yet connected, or connected to a broker that is gone.
        """
        with without_fork(), self._pool().acquire(block=True) as producer:
            yield producer

    def do(self, producer: Producer, work: Callable[[], R]) -> R:
        """Do ``work`` with the producer, once more if its connection had been open and turned out to be gone.

        What did not answer in time is not tried a second time: the next answer would take as long.

        Raises:
            BrokerRefuses: the broker cannot be reached, did not answer in time, or does not do it.
            QueueRefuses: it does not do it for this one queue.
        """
        connection = producer.connection
        was_open = connection.connected
        named = (*connection.connection_errors, *connection.channel_errors, OperationalError, MessageNacked)
        # kombu counts it among Redis' for the sake of its consumers; here it is of a bad message, such as one that
        # names a compression which nobody knows, and the broker is not to be blamed, nor left alone, for it.
        trouble = tuple(error for error in named if error is not KeyError)
        while True:
            began = time.monotonic()
            is_open = False
            try:
                self._open(connection)
                is_open = True
                return work()
            except trouble as error:
                self.drop(producer)
                is_stale = was_open and time.monotonic() - began < self.timeout / 2
                if is_open and is_of_a_queue(error):
                    raise QueueRefuses(as_text(error)) from error
                if not is_stale:
                    raise BrokerRefuses(as_text(error)) from error
                was_open = False

    @property
    def timeout(self) -> float:
        """Seconds that each step may take."""
        return self._kernel.settings.publish_timeout

    @staticmethod
    def drop(producer: Producer) -> None:
        """Leave the connection without a word: a broker that is silent would not answer a goodbye either."""
        connection = producer.connection
        connection.collect()
        producer.revive(connection)

    def _open(self, connection: Connection) -> None:
        if connection.connected:
            return
        # Each of the broker's addresses once.
        connection.ensure_connection(
            max_retries=max(len(connection.alt) - 1, 0),
            interval_start=0, interval_step=0, interval_max=0, reraise_as_library_errors=False,
        )  # fmt: skip
        # py-amqp has a time limit for its handshake, and after that none for an answer.
        transport = getattr(connection.connection, "transport", None)
        sock = getattr(transport, "sock", None)
        if sock is not None:
            sock.settimeout(self.timeout)

    def _pool(self) -> ProducerPool:
        pid = os.getpid()
        if self._producers is not None and self._producers[0] != pid:
            # Kept, and never used: were it collected, the sockets that it shares with the parent would be closed.
            self._inherited.append(self._producers[1])
            self._producers = None
        if self._producers is None:
            app = self._kernel.app
            given = dict(app.conf.broker_transport_options)
            bounds = {name: min(given.get(name) or self.timeout, self.timeout) for name in _TIMEOUTS}
            connection = app.connection_for_write(
                connect_timeout=min(app.conf.broker_connection_timeout or self.timeout, self.timeout),
                transport_options=bounds,
            )
            limit = app.conf.broker_pool_limit
            self._producers = (pid, _Producers(_Pool(connection, limit=limit), limit=limit))
        return self._producers[1]


def is_of_a_queue(error: BaseException) -> bool:
    """Tell whether the broker refused because of one queue: others may do well."""
    return isinstance(error, MessageNacked) or (
        isinstance(error, ChannelError) and str(error.reply_code) in _OF_A_QUEUE
    )


def is_not_found(error: ChannelError) -> bool:
    """Tell whether there is no such queue."""
    return str(error.reply_code) == str(NotFound.code)


def as_text(error: BaseException) -> str:
    """Say what is wrong in one line."""
    return " ".join(str(error).split()) or repr(error)
