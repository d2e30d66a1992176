"""The watch: how much a reaper believes of what it sees, told loudly when that changes."""

from __future__ import annotations

from collections.abc import Sequence

from cloacina_celery.core.doubt import Look, Outlook, Promises, after_look
from cloacina_celery.core.settings import Settings
from cloacina_celery.errors import DatabaseUnavailable
from cloacina_celery.runtime.trust import steady_clock
from cloacina_celery.store import workers
from cloacina_celery.store.database import Database
from cloacina_celery.telemetry import log


class Watch:
    """Look at the register again and again, and keep what may be judged by it (see `core.doubt`)."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._promises = Promises(
            grace=settings.liveness_grace,
            heartbeat_interval=settings.heartbeat_interval,
            lease_ttl=settings.lease_ttl,
        )
        self._outlook: Outlook | None = None
        self._reached_at: float | None = None
        self._has_failed = False

    @property
    def judges_leases(self) -> bool:
        """Whether a lease that ran out is lost, as of the last look."""
        return self._outlook is not None and self._outlook.judges_leases(self._promises)

    def reached(self) -> None:
        """Note that the database has just answered: work that takes long is no silence."""
        self._reached_at = steady_clock()

    def note_answer(self, error: Exception | None = None) -> None:
        """Note that the database answered, if only with an error, or could not be reached."""
        if isinstance(error, DatabaseUnavailable):
            self._has_failed = True
        else:
            self.reached()

    def look(self) -> Sequence[workers.DeadWorker]:
        """Return the workers that are dead beyond doubt.

        Raises:
            DatabaseUnavailable: the database did not answer.
        """
        asked_at = steady_clock()
        with self._database.statement() as cursor:
            register = workers.look(
                cursor, grace=self._settings.liveness_grace, lease_ttl=self._settings.lease_ttl
            )
        before, self._outlook = (
            self._outlook,
            after_look(
                self._outlook,
                Look(
                    asked_at=asked_at,
                    answered_at=steady_clock(),
                    database_at=register.database_at,
                    known=register.known,
                    silent=register.silent,
                    reached_at=self._reached_at,
                    has_failed=self._has_failed,
                ),
                self._promises,
            ),
        )
        self._has_failed = False
        self.reached()
        self._tell(before, self._outlook)
        if not self._outlook.judges_locks:
            return ()
        return [dead for dead in register.dead if dead.had_lock or self.judges_leases]

    def _tell(self, before: Outlook | None, after: Outlook) -> None:
        was = before.pause if before else None
        if after.pause is not None and after.pause != was:
            log(
                "sweep.paused",
                reason=after.pause.reason,
                seconds=f"{after.pause.until - after.last.answered_at:.1f}",
            )
        elif was is not None and after.pause is None:
            log("sweep.resumed", reason=was.reason)
