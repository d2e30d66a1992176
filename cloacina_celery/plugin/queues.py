"""A tenant's queue as the broker has it: taken from its consumers, emptied, deleted, and seen to be gone."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from kombu.exceptions import KombuError, OperationalError
from kombu.transport import redis, virtual

from cloacina_celery.core.tenancy import Verb
from cloacina_celery.errors import TenantUnfinished
from cloacina_celery.plugin.rounds import can_weigh
from cloacina_celery.runtime.forks import without_fork
from cloacina_celery.store import workers

if TYPE_CHECKING:
    from kombu import Connection

    from cloacina_celery.plugin.kernel import Kernel
    from cloacina_celery.plugin.publisher import Publisher

BROKER_TROUBLE = (KombuError, OperationalError, OSError)

TRIES = 5
PAUSE = 0.3
"""Seconds between tries: for so long a consumer may take to hear that it is to leave, or to declare it again."""


class TenantQueues:
    """Make and remove the queues of tenants."""

    def __init__(self, kernel: Kernel, publisher: Publisher) -> None:
        self._kernel = kernel
        self._publisher = publisher

    @property
    def are_chosen_here(self) -> bool:
        """Whether workers choose whose message comes next, and by weight: else the broker does."""
        connection = self._kernel.app.connection_for_read()
        transport = connection.get_transport_cls()
        if issubclass(transport, redis.Transport):
            return can_weigh(connection.transport_options.get("queue_order_strategy"))
        # RabbitMQ sends messages ahead of each queue, and the worker chooses among them.
        return bool(transport.driver_type == "amqp")

    def declare(self, name: str) -> None:
        """Make the queue, as far as the broker is there: who declared it once does not do so again by itself."""
        with suppress(*BROKER_TROUBLE), without_fork(), self._kernel.app.connection_for_write() as connection:
            self._publisher.queue_of(name).bind(connection.default_channel).declare()

    def hand_over(self, old: str, new: str) -> None:
        """Have the workers that run consume the new queue of a tenant, as they did its old one, until they restart."""
        with self._kernel.database.statement() as cursor:
            nodes = [w.name.partition(" on ")[0] for w in workers.alive(cursor) if old in w.tenants]
        if nodes:
            with suppress(*BROKER_TROUBLE), without_fork():
                self._kernel.app.control.add_consumer(new, destination=nodes)

    def remove(self, name: str, verb: Verb) -> None:
        """Delete the queue with what is in it, and look whether it is gone.

        Raises:
            TenantUnfinished: the broker is away, or a consumer declares the queue again and again.
        """
        app = self._kernel.app
        try:
            with without_fork():
                app.control.cancel_consumer(name)
                for _ in range(TRIES):
                    with app.connection_for_write() as connection:
                        self._delete(name, connection)
                    with app.connection_for_write() as connection:
                        if not _exists(name, connection):
                            return
                    time.sleep(PAUSE)
        except (*BROKER_TROUBLE, *app.connection_for_read().connection_errors) as error:
            raise TenantUnfinished(
                name, verb, f"the broker did not delete its queue ({' '.join(str(error).split())})"
            ) from error
        raise TenantUnfinished(name, verb, f"a worker declares its queue anew: stop those with -Q {name}")

    def _delete(self, name: str, connection: Connection) -> None:
        channel = connection.default_channel
        if isinstance(channel, virtual.Channel):
            # These know the bindings of their own declarations only, and delete nothing else.
            self._publisher.queue_of(name).bind(channel).declare()
        channel.queue_delete(queue=name)


def _exists(name: str, connection: Connection) -> bool:
    try:
        connection.default_channel.queue_declare(queue=name, passive=True)
    except connection.channel_errors:
        return False
    return True
