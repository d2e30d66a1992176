"""Looks at many tenants in few statements, such that one tenant's trouble keeps no other from being seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from cloacina_celery.runtime.watch import Watch
from cloacina_celery.store.bounded import LOOK_TIMEOUT_MS, bounded_transaction
from cloacina_celery.store.database import Cursor, Database
from cloacina_celery.store.driver_errors import DriverError, in_words
from cloacina_celery.telemetry import log

LOOK_AT_ONCE = 25
"""Tenants in one statement: with more it is no faster, and its plan makes the backend grow for good."""

TROUBLED_PAUSE = 5.0
"""Seconds for which a tenant that could not be looked at is looked at alone and no more."""

Seen = TypeVar("Seen")
See = Callable[[Cursor, Sequence[str]], list[Seen]]
OnTrouble = Callable[[str, Exception], None]


def look(
    database: Database, tenants: Sequence[str], see: See[Seen], *, on_trouble: OnTrouble
) -> Iterator[Seen]:
    """Yield what ``see`` returns of the tenants, a batch at a time; who cannot be looked at is told and left out.

    Raises:
        DatabaseUnavailable: the database went away.
    """
    for start in range(0, len(tenants), LOOK_AT_ONCE):
        yield from _look_at(database, tenants[start : start + LOOK_AT_ONCE], see, on_trouble)


def _look_at(
    database: Database, tenants: Sequence[str], see: See[Seen], on_trouble: OnTrouble
) -> Iterator[Seen]:
    try:
        with bounded_transaction(database, lock_timeout_ms=LOOK_TIMEOUT_MS) as cursor:
            seen = see(cursor, tenants)
    except DriverError as error:
        if len(tenants) == 1:
            on_trouble(tenants[0], error)
            return
        seen = None
    if seen is not None:
        yield from seen
        return
    # Somebody in the batch cannot be looked at; the others must not wait for them.
    for tenant in tenants:
        yield from _look_at(database, [tenant], see, on_trouble)


class Troubled:
    """The tenants with which something went wrong a moment ago.

    Args:
        watch: told of each answer of the database, and of each that failed to come.
    """

    def __init__(self, database: Database, watch: Watch) -> None:
        self._database = database
        self._watch = watch
        self._until: dict[str, float] = {}

    def includes(self, tenant: str) -> bool:
        """Tell whether a tenant is better left alone for now."""
        return time.monotonic() < self._until.get(tenant, 0.0)

    def note(self, tenant: str, error: Exception) -> None:
        """Note what went wrong with a tenant: it is left alone for a while."""
        self._watch.note_answer(error)
        self._until[tenant] = time.monotonic() + TROUBLED_PAUSE
        log("sweep.failed", tenant=tenant, error=in_words(error))

    def look(self, tenants: Sequence[str], see: See[Seen]) -> Iterator[Seen]:
        """Look at the tenants, and note those that cannot be looked at.

        Raises:
            DatabaseUnavailable: the database went away.
        """

        def see_and_note(cursor: Cursor, batch: Sequence[str]) -> list[Seen]:
            seen = see(cursor, batch)
            self._watch.reached()
            return seen

        return look(self._database, tenants, see_and_note, on_trouble=self.note)
