"""Log records that say for which tenant they were written."""

from __future__ import annotations

import logging

from cloacina_celery.runtime.context import bound_tenant, current_attempt


class TenantFilter(logging.Filter):
    """Give each record of a handler ``tenant``, ``execution_id`` and ``attempt``, and let all of them pass.

    They are those of the running execution, or of the bound tenant, or what one of our own events is about; ``None``
    where there is none, so that a format may name them always.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Write them into the record, unless somebody has written them before."""
        about = getattr(record, "cloacina", {})
        attempt = current_attempt()
        found = {
            "tenant": about.get("tenant", bound_tenant()),
            "execution_id": about.get("execution_id", attempt and attempt.id),
            "attempt": about.get("attempt", attempt and attempt.attempt),
        }
        for name, value in found.items():
            vars(record).setdefault(name, value)
        return True
