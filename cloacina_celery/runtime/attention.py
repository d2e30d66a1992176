"""Which tenants a sweep looks at: those that may have work each time, and all of them within a few minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from cloacina_celery.store import busy
from cloacina_celery.store.database import Database

AUDIT_INTERVAL = 300.0
"""Seconds within which every tenant is looked at, whether a mark says so or not."""


class Attention:
    """Choose tenants by the marks in the catalog, and a turn of the others.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._clock = clock
        self._last = clock()
        self._owed = 0.0
        self._next = ""

    def choose(self, tenants: Sequence[str]) -> list[str]:
        """Return those of the tenants that are to be looked at now, in their order."""
        with self._database.statement() as cursor:
            marked = busy.marked(cursor)
        turn = self._take_turn(sorted(set(tenants) - marked))
        return [tenant for tenant in tenants if tenant in marked or tenant in turn]

    def _take_turn(self, idle: list[str]) -> frozenset[str]:
        now = self._clock()
        self._owed += len(idle) * (now - self._last) / AUDIT_INTERVAL
        self._last = now
        count = min(int(self._owed), len(idle))
        self._owed -= int(self._owed)
        if not count:
            return frozenset()
        # By name and not by position: tenants come and go between two turns.
        start = next((at for at, name in enumerate(idle) if name > self._next), 0)
        turn = (idle[start:] + idle[:start])[:count]
        self._next = turn[-1]
        return frozenset(turn)
