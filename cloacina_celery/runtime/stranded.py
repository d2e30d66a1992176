"""Lost messages: found by counting, and sent again without ringing a backlog again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from cloacina_celery.core.settings import Settings
from cloacina_celery.runtime.trust import steady_clock
from cloacina_celery.store import ringing
from cloacina_celery.store.bounded import bounded_transaction
from cloacina_celery.store.database import Database
from cloacina_celery.store.ringing import Ring
from cloacina_celery.telemetry import log

Publish = Callable[[Sequence[Ring]], None]
QueueDepth = Callable[[str], int | None]

IN_FLIGHT = 1.0
"""Seconds between a row's commit and its message's arrival that are nothing unusual."""


class LostMessages:
    """Ring again for pending rows whose message is in no queue and in no worker's hands.

    How many are missing is a difference of two counts; which ones is not said by the broker. A queue that is seen
    empty has lost all that was rung before. Else those are missing that others have overtaken: to guess would put
    messages into it that nobody misses, and these would hide the missing ones until they are worked off.
    """

    def __init__(
        self, database: Database, settings: Settings, *, publish: Publish, queue_depth: QueueDepth
    ) -> None:
        self._database = database
        self._settings = settings
        self._publish = publish
        self._queue_depth = queue_depth
        self._looked_at: dict[str, float] = {}
        self._lost_at: dict[str, float] = {}
        self._unfinished: set[str] = set()

    def is_time(self, tenant: str) -> bool:
        """Tell whether a tenant's queue is to be counted again; a refill that goes on is not kept waiting."""
        looked_at = self._looked_at.get(tenant, float("-inf"))
        return tenant in self._unfinished or steady_clock() - looked_at >= self._settings.stranded_after / 2

    def ring(self, tenant: str, *, stranded_after: float) -> int:
        """Ring for what is missing, at most a batch; return how many.

        Args:
            stranded_after: seconds that a message must have been on its way to count as lost.
        """
        now = self._looked_at[tenant] = steady_clock()
        is_unfinished = tenant in self._unfinished
        self._unfinished.discard(tenant)
        depth = self._queue_depth(tenant)
        if depth is None:
            return 0
        lost_at = self._lost_at.pop(tenant, None)
        if depth == 0:
            lost_at = now - IN_FLIGHT
        elif lost_at is not None and not is_unfinished and now - lost_at > 2 * self._settings.stranded_after:
            lost_at = None  # by now all that was lost then has been old enough
        if lost_at is not None:
            self._lost_at[tenant] = lost_at
        with bounded_transaction(self._database) as cursor:
            # A backlog is not a loss: as long as the queue holds a message for each waiting row, none is rung.
            missing = ringing.count_rung(cursor, tenant) - depth
            if missing <= 0:
                return 0
            rings = ringing.ring_stranded(
                cursor,
                tenant,
                limit=min(missing, self._settings.sweep_batch),
                stranded_after=stranded_after,
                only_overtaken=depth > 0,
                lost_for=None if lost_at is None else now - lost_at,
            )
        if len(rings) == self._settings.sweep_batch:
            self._unfinished.add(tenant)
        if lost_at is None:
            # Overtaken: it has waited its turn. What is sent to the head last comes first.
            rings = [replace(ring, goes_first=True) for ring in reversed(rings)]
        self._publish(rings)
        if rings:
            log("sweep.stranded", tenant=tenant, count=len(rings))
        return len(rings)
