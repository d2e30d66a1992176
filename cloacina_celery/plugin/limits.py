"""Tenants' limits in a process of workers: who has any, and whom a freed slot wakes."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cloacina_celery.runtime.looks import look
from cloacina_celery.store import busy, limits
from cloacina_celery.store.bounded import LOOK_TIMEOUT_MS, bounded_transaction
from cloacina_celery.store.database import after_fork_in_child
from cloacina_celery.store.driver_errors import in_words
from cloacina_celery.telemetry import log

if TYPE_CHECKING:
    from cloacina_celery.plugin.kernel import Kernel
    from cloacina_celery.plugin.publisher import Publisher

FRESH = 1.0
"""Seconds for which a process goes by what it knows: a limit takes effect that much later at the most."""

CHANGES = 30.0
"""Seconds of changes that are read each time: longer than the commit of one takes. After longer, all is read anew."""

LOOK_INTERVAL = 0.5
ROUND_INTERVAL = 2.0
"""Seconds between two looks at all limited tenants that may have work; those with waiting rows are seen each time."""


class Limiter:
    """Knows which tenants are limited, and rings their waiting rows when there is room.

    An unlimited tenant costs a look into a set. The catalog is asked once a second by each process that claims,
    and answers with what has changed.
    """

    def __init__(self, kernel: Kernel, publisher: Publisher) -> None:
        self._kernel = kernel
        self._publisher = publisher
        self._limited: frozenset[str] = frozenset()
        self._asked_at = float("-inf")
        self._asking = threading.Lock()
        self._crowded: frozenset[str] = frozenset()
        self._round_at = float("-inf")
        after_fork_in_child(self._forget_after_fork)

    def _forget_after_fork(self) -> None:
        # The lock may have been held by a thread that does not exist here, whose question nobody answers.
        self._asking = threading.Lock()
        self._asked_at = float("-inf")

    def is_limited(self, tenant: str) -> bool:
        """Tell whether a tenant had any limit a second ago.

        Raises:
            DatabaseUnavailable: what is known is too old, and the database does not say.
        """
        # Of many threads one asks; the others go by what was known before.
        if time.monotonic() - self._asked_at > FRESH and self._asking.acquire(blocking=False):
            try:
                self._ask()
            finally:
                self._asking.release()
        return tenant in self._limited

    def _ask(self) -> None:
        now = time.monotonic()
        with self._kernel.database.statement() as cursor:
            if now - self._asked_at > CHANGES / 2:
                self._limited = frozenset(limits.limited(cursor))
            else:
                changes = dict(limits.changed(cursor, within=CHANGES))
                self._limited = (self._limited - changes.keys()) | {
                    name for name, is_limited in changes.items() if is_limited
                }
        self._asked_at = now

    def slot_freed(self, tenant: str) -> None:
        """Ring the row that has waited longest, if the tenant is limited; what fails here, `look` makes good."""
        try:
            if not self.is_limited(tenant):
                return
            with bounded_transaction(self._kernel.database) as cursor:
                rings = limits.ring_next(cursor, tenant)
            self._publisher.publish_rings(rings)
        except Exception as error:  # noqa: BLE001  # the attempt is settled, whatever this row's message holds
            _tell(tenant, error)

    def look(self, tenants: Sequence[str]) -> None:
        """Ring what waits and has room: rates go on, limits are raised, and executions end without their worker."""
        for tenant in self._find_crowded(tenants):
            if not self._publisher.can_publish(tenant):
                continue
            try:
                with bounded_transaction(self._kernel.database, lock_timeout_ms=LOOK_TIMEOUT_MS) as cursor:
                    rings = limits.ring_waiting(cursor, tenant, limit=self._kernel.settings.sweep_batch)
                self._publisher.publish_rings(rings)
            except Exception as error:  # noqa: BLE001  # nothing in one tenant's rows may stop the others
                _tell(tenant, error)

    def _find_crowded(self, tenants: Sequence[str]) -> list[str]:
        now = time.monotonic()
        if now - self._round_at < ROUND_INTERVAL:
            watched = self._crowded
        else:
            # A tenant with a row that waits is marked as one that may have work.
            with self._kernel.database.statement() as cursor:
                watched = busy.marked(cursor)
            self._round_at = now
        wanted = [tenant for tenant in tenants if tenant in watched and self.is_limited(tenant)]
        crowded = list(look(self._kernel.database, wanted, limits.waiting, on_trouble=_tell))
        self._crowded = frozenset(crowded)
        return crowded


def _tell(tenant: str, error: Exception) -> None:
    log("limits.failed", tenant=tenant, error=in_words(error))
