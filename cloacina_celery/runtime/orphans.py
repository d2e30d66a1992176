"""Orphans: one tenant's executions whose attempt was lost are moved on, in turns, and what follows them is done."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime

from cloacina_celery.core.lifecycle import Abandon, Recover
from cloacina_celery.core.settings import Settings
from cloacina_celery.errors import DatabaseUnavailable
from cloacina_celery.runtime.stranded import Publish
from cloacina_celery.runtime.units import CursorUnit, settlement
from cloacina_celery.store import recovery, turns
from cloacina_celery.store.bounded import LOCK_TIMEOUT_MS, bound
from cloacina_celery.store.database import Cursor, Database
from cloacina_celery.store.driver_errors import PassingTrouble, in_words
from cloacina_celery.store.recovery import Orphan, Recovered
from cloacina_celery.telemetry import log

OnAbandoned = Callable[[str, Recovered], None]


class Orphans:
    """Recover what has lost its attempt, or abandon it; see `Reaper` for the arguments."""

    def __init__(
        self, database: Database, settings: Settings, *, publish: Publish, on_abandoned: OnAbandoned
    ) -> None:
        self._database = database
        self._settings = settings
        self._publish = publish
        self._on_abandoned = on_abandoned

    def recover(
        self,
        tenant: str,
        lock: Callable[[Cursor], list[Orphan]],
        *,
        reason: str,
        lock_timeout_ms: int = LOCK_TIMEOUT_MS,
    ) -> int:
        """Move on what ``lock`` finds and locks in the tenant; return how many."""
        with settlement(self._database, tenant) as unit:
            cursor = unit.cursor()
            bound(cursor, lock_timeout_ms=lock_timeout_ms)
            orphans = lock(cursor)
            recovered = [
                recovery.recover(cursor, tenant, orphan, reason=reason, not_before=turn)
                for orphan, turn in self._turns(tenant, orphans)
            ]
            for one in recovered:
                if isinstance(one.decision, Abandon):
                    self._follow(unit, one)
        for one in recovered:
            log(
                "recover.done", tenant=tenant, execution_id=one.execution_id, attempt=one.attempt, reason=reason,
                decision=f"abandoned: {one.decision.reason}" if isinstance(one.decision, Abandon)
                else f"runs again in its turn, at {one.not_before:%H:%M:%S.%f}" if one.not_before
                else f"runs again in {one.decision.delay:g} s" if one.decision.delay else "runs again at once",
            )  # fmt: skip
        self._publish([one.ring for one in recovered if one.ring is not None])
        return len(recovered)

    def _follow(self, unit: CursorUnit, abandoned: Recovered) -> None:
        try:
            with unit.part():
                self._on_abandoned(unit.tenant, abandoned)
        except (DatabaseUnavailable, *PassingTrouble):
            # It may well succeed the next time, together with the abandonment.
            raise
        except Exception as error:  # noqa: BLE001  # an errback is the user's, and the message may be bad
            log(
                "recover.unfollowed",
                tenant=unit.tenant,
                execution_id=abandoned.execution_id,
                error=in_words(error),
            )

    def _turns(self, tenant: str, orphans: list[Orphan]) -> list[tuple[Orphan, datetime | None]]:
        going = [orphan for orphan in orphans if isinstance(orphan.decision, Recover)]
        if not going:
            return [(orphan, None) for orphan in orphans]
        taken = turns.take(
            self._database,
            tenant,
            rate=self._settings.recovery_rate,
            burst=self._settings.recovery_burst,
            draws=[random.random() for _ in going],
        )
        turn_of = {orphan.execution_id: turn for orphan, turn in zip(going, taken, strict=True)}
        return [(orphan, turn_of.get(orphan.execution_id)) for orphan in orphans]
