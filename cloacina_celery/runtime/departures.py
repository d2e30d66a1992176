"""Departures: what a worker held when it died is recovered, what it holds when it is shut down is given back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from cloacina_celery.core.settings import Settings
from cloacina_celery.errors import DatabaseUnavailable
from cloacina_celery.runtime.looks import Troubled, look
from cloacina_celery.runtime.orphans import Orphans
from cloacina_celery.runtime.stranded import LostMessages, Publish
from cloacina_celery.store import busy, recovery, workers
from cloacina_celery.store.bounded import LOOK_TIMEOUT_MS, bounded_transaction
from cloacina_celery.store.database import Database
from cloacina_celery.store.workers import DeadWorker
from cloacina_celery.telemetry import log

BURIED_AT_ONCE = 10
"""Dead workers that one look at their tenants is for; the next ones are left for other reapers to begin with."""


class Departures:
    """Find by few looks where a worker held anything, however many tenants it served.

    The tenants that are marked as busy are looked at first: what was held is nearly always there, and goes on at
    once. The others are looked at all the same, as a mark may be missing.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        publish: Publish,
        orphans: Orphans,
        lost: LostMessages,
        troubled: Troubled,
    ) -> None:
        self._database = database
        self._settings = settings
        self._publish = publish
        self._orphans = orphans
        self._lost = lost
        self._troubled = troubled
        self._unseen: dict[int, set[str]] = {}
        """Of each dead worker, the tenants in which it has not been seen to hold nothing since it was found dead."""

    def bury(self, dead: Sequence[DeadWorker]) -> int:
        """Recover what the dead workers held, and ring for what had been delivered to them; return how many.

        A worker is entered as stopped when each of its tenants has answered that it holds nothing there any more.

        Args:
            dead: all that are dead now. Who is not among them is forgotten: it may come back, and die again.
        """
        self._unseen = {
            # The register leaves out tenants that were dropped meanwhile.
            worker.worker_id: self._unseen[worker.worker_id].intersection(worker.tenants)
            for worker in dead
            if worker.worker_id in self._unseen
        }
        return sum(
            self._bury(dead[start : start + BURIED_AT_ONCE]) for start in range(0, len(dead), BURIED_AT_ONCE)
        )

    def release(self, tenants: Iterable[str], worker_id: int, *, reason: str) -> int:
        """Give back what a worker still holds at the end of its shutdown; return how many.

        Raises:
            DatabaseUnavailable: the database went away.
            Exception: a tenant could not be looked at; what the worker holds there is recovered after it.
        """
        released = 0
        troubles: list[Exception] = []

        def note(tenant: str, error: Exception) -> None:
            self._troubled.note(tenant, error)
            troubles.append(error)

        with self._database.statement() as cursor:
            busy_first = _busy_first(tenants, busy.marked(cursor))
        see = partial(recovery.holders, worker_ids=[worker_id])
        for tenant, holders in look(self._database, busy_first, see, on_trouble=note):
            if not holders:
                continue
            try:
                with bounded_transaction(self._database) as cursor:
                    rings = recovery.release(cursor, tenant, worker_id, reason=reason)
                self._publish(rings)
                released += len(rings)
            except DatabaseUnavailable:
                raise
            except Exception as error:  # noqa: BLE001  # the others have their work back all the same
                note(tenant, error)
        if troubles:
            raise troubles[-1]
        return released

    def _bury(self, dead: Sequence[DeadWorker]) -> int:
        # The row locks let one reaper at a time bury a worker; if it dies over it, the next one goes on.
        with bounded_transaction(self._database) as cursor:
            locked = workers.lock_dead(cursor, [worker.worker_id for worker in dead])
            mine = [worker for worker in dead if worker.worker_id in locked]
            marked = busy.marked(cursor) if mine else frozenset()
            for worker in mine:
                if worker.worker_id not in self._unseen:
                    log("worker.dead", worker_id=worker.worker_id, name=worker.name, reason=worker.reason)
                    self._unseen[worker.worker_id] = set(worker.tenants)
            unseen = set().union(*(self._unseen[worker.worker_id] for worker in mine))
            found = self._recover_held(mine, _busy_first(unseen, marked))
            # Once more where there was something: there may be more than a batch, or a child that outlives it claims.
            found_again = self._recover_held(mine, list(found))
            for worker in mine:
                if not self._unseen[worker.worker_id]:
                    workers.stop(cursor, worker.worker_id, reason=f"found dead: {worker.reason}")
        self._ring_lost(sorted({tenant for worker in mine for tenant in worker.tenants if tenant in marked}))
        return sum(found.values()) + sum(found_again.values())

    def _recover_held(self, dead: Sequence[DeadWorker], tenants: Sequence[str]) -> dict[str, int]:
        """Recover what dead workers hold in the tenants; return how many by tenant, where there was something."""
        found: dict[str, int] = {}
        by_id = {worker.worker_id: worker for worker in dead}
        see = partial(recovery.holders, worker_ids=list(by_id))
        for tenant, holders in self._troubled.look(tenants, see):
            for worker_id in by_id.keys() - holders:
                self._unseen[worker_id].discard(tenant)
            try:
                for worker_id in holders:
                    recovered = self._orphans.recover(
                        tenant,
                        partial(
                            recovery.lock_of_worker,
                            tenant=tenant,
                            worker_id=worker_id,
                            limit=self._settings.sweep_batch,
                        ),
                        reason=f"its worker died: {by_id[worker_id].reason}",
                        lock_timeout_ms=LOOK_TIMEOUT_MS,
                    )
                    found[tenant] = found.get(tenant, 0) + recovered
            except Exception as error:  # noqa: BLE001  # nothing in one tenant's rows may stop the others
                self._troubled.note(tenant, error)
        return found

    def _ring_lost(self, tenants: Sequence[str]) -> None:
        # Messages that had been delivered to them and not started died with them.
        grace = self._settings.liveness_grace
        for seen in self._troubled.look(tenants, partial(recovery.glance, stranded_after=grace)):
            if seen.is_stranded:
                try:
                    self._lost.ring(seen.tenant, stranded_after=grace)
                except Exception as error:  # noqa: BLE001  # as above
                    self._troubled.note(seen.tenant, error)


def _busy_first(tenants: Iterable[str], marked: frozenset[str]) -> list[str]:
    return sorted(tenants, key=lambda tenant: (tenant not in marked, tenant))
