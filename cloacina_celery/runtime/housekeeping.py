"""Housekeeping: what has ended long ago is deleted, and marks that say nothing any more are taken away."""

from __future__ import annotations

import time
from collections.abc import Iterable

from cloacina_celery.core.settings import Settings
from cloacina_celery.runtime.looks import Troubled
from cloacina_celery.store import busy, retention
from cloacina_celery.store.bounded import bounded_transaction
from cloacina_celery.store.catalog import Tenant
from cloacina_celery.store.database import Database
from cloacina_celery.telemetry import log

PRUNE_INTERVAL = 3600.0
"""Seconds between two looks for old executions of a tenant that had no full batch of them."""

TENANTS_AT_ONCE = 100
"""Tenants that are pruned, and whose marks are looked at, in one go: what is lost with a worker must not wait for
thousands that were made, or fell idle, at the same time."""


class Housekeeping:
    """Tidy up behind the tenants, a small batch at a time; one tenant's trouble is noted and stops no other's.

    Args:
        settings: how long things are kept where the tenant has no times of its own.
        troubled: the tenants that are better left alone for now.
    """

    def __init__(self, database: Database, settings: Settings, troubled: Troubled) -> None:
        self._database = database
        self._settings = settings
        self._troubled = troubled
        self._next_prune: dict[str, float] = {}

    def tidy(self, tenants: Iterable[Tenant], *, chosen: Iterable[str]) -> None:
        """Prune the chosen ones of all tenants, look at old marks, and forget workers that nothing names any more."""
        now_looked_at = frozenset(chosen)
        kept = {self._settings.retain_succeeded, self._settings.retain_failed}
        places = TENANTS_AT_ONCE
        for tenant in tenants:
            succeeded_after = _own_or(tenant.retain_succeeded, self._settings.retain_succeeded)
            failed_after = _own_or(tenant.retain_failed, self._settings.retain_failed)
            kept |= {succeeded_after, failed_after}
            if places and tenant.name in now_looked_at and self._is_time_to_prune(tenant.name):
                places -= 1
                self._prune(tenant.name, succeeded_after=succeeded_after, failed_after=failed_after)
        self._review_marks()
        # An entry outlives the events that name it, so that `execution show` can always say who it was.
        with bounded_transaction(self._database) as cursor:
            retention.forget_workers(cursor, stopped_after=max(kept) if all(kept) else 0)

    def _review_marks(self) -> None:
        with bounded_transaction(self._database) as cursor:
            old = busy.old(cursor, limit=TENANTS_AT_ONCE)
        for tenant in old:
            try:
                with bounded_transaction(self._database) as cursor:
                    busy.renew_or_remove(cursor, tenant)
            except Exception as error:  # noqa: BLE001  # nothing in one tenant may stop the others
                self._troubled.note(tenant, error)

    def _is_time_to_prune(self, tenant: str) -> bool:
        return time.monotonic() >= self._next_prune.get(tenant, 0.0) and not self._troubled.includes(tenant)

    def _prune(self, tenant: str, *, succeeded_after: float, failed_after: float) -> None:
        try:
            with bounded_transaction(self._database) as cursor:
                pruned = retention.prune(
                    cursor,
                    tenant,
                    succeeded_after=succeeded_after,
                    failed_after=failed_after,
                    limit=self._settings.sweep_batch,
                )
        except Exception as error:  # noqa: BLE001  # as above
            self._troubled.note(tenant, error)
            return
        # A full batch means that there is more: the next sweep goes on. Else an hour is soon enough.
        is_more = pruned == self._settings.sweep_batch
        self._next_prune[tenant] = time.monotonic() + (0.0 if is_more else PRUNE_INTERVAL)
        if pruned:
            log("sweep.pruned", tenant=tenant, count=pruned)


def _own_or(own: float | None, setting: float) -> float:
    return setting if own is None else own
