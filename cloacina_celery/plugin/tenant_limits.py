"""What operators and programs do with a tenant's limits."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Any, Final

from cloacina_celery.core.limits import Limits
from cloacina_celery.core.tenant import validate_tenant_name
from cloacina_celery.plugin.tenant_base import TenantBase, operator
from cloacina_celery.store import limits
from cloacina_celery.telemetry import log


class Unchanged(Enum):
    """Stands for what a call leaves as it is, where ``None`` has a meaning of its own."""

    UNCHANGED = "unchanged"


UNCHANGED: Final = Unchanged.UNCHANGED


class TenantLimits(TenantBase):
    """Limits, changed while workers run."""

    def limits(self, name: str) -> Limits:
        """Return a tenant's limits.

        Raises:
            UnknownTenant: there is none of this name.
        """
        with self._kernel.database.statement() as cursor:
            return limits.get(cursor, validate_tenant_name(name, allow_legacy=True))

    def limit(
        self,
        name: str,
        *,
        max_concurrent_tasks: int | Unchanged | None = UNCHANGED,
        max_rate: float | Unchanged | None = UNCHANGED,
        paused: bool | Unchanged = UNCHANGED,
        weight: int | Unchanged = UNCHANGED,
        by: str | None = None,
    ) -> Limits:
        """Change some of a tenant's limits while its workers run, and return them all; they obey within seconds.

        Args:
            max_concurrent_tasks: attempts that run at once, on all workers together; ``None`` is no limit.
            max_rate: starts per second; ``None`` is no limit.
            paused: whether nothing of the tenant starts. What runs goes on, and submissions are taken.
            weight: turns for each of a tenant of weight 1, while both have work waiting on a worker.

        Raises:
            SettingsError: a limit is out of range.
            UnknownTenant: there is none of this name.
        """
        validate_tenant_name(name, allow_legacy=True)
        given = {
            "max_concurrent_tasks": max_concurrent_tasks,
            "max_rate": max_rate,
            "is_paused": paused,
            "weight": weight,
        }
        wanted: dict[str, Any] = {key: value for key, value in given.items() if value is not UNCHANGED}
        with self._kernel.database.transaction() as cursor:
            changed = replace(limits.get(cursor, name, lock=True), **wanted)
            limits.put(cursor, name, changed, by=by or operator())
        log(
            "tenant.limited", tenant=name, tasks=changed.max_concurrent_tasks or "any number of",
            rate=changed.max_rate or "any number of", paused=changed.is_paused, weight=changed.weight,
        )  # fmt: skip
        if "weight" in wanted and not self._queues.are_chosen_here:
            log("weight.unheeded", tenant=name)
        return changed
