"""What operators and programs do with tenants; the command line does the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import isfinite

from cloacina_celery.core.tenancy import Verb, after
from cloacina_celery.core.tenant import validate_tenant_name
from cloacina_celery.errors import InvalidPayload
from cloacina_celery.plugin.tenant_base import operator
from cloacina_celery.plugin.tenant_limits import TenantLimits
from cloacina_celery.plugin.tenant_logins import TenantLogins
from cloacina_celery.plugin.tenant_moves import TenantMoves
from cloacina_celery.store import catalog, removal, tenancy
from cloacina_celery.store.tenancy import Left
from cloacina_celery.telemetry import log

DRAIN_LOOK = 0.5
"""Seconds between two looks at what a draining tenant has left."""


Progress = Callable[[Left], object]


class Tenants(TenantMoves, TenantLimits, TenantLogins):
    """The tenants of the database.

    Each verb can be done again: one that was interrupted goes on where it was, one that is done changes nothing.
    ``by`` says who does it, for the audit; by default the process' user and host.
    """

    def suspend(
        self, name: str, *, give_back: bool = False, refuse_submits: bool = False, by: str | None = None
    ) -> bool:
        """Let nothing new start, and tell whether that changed anything.

        What runs goes on to its end, unless it is given back.
        What is submitted waits for `resume`, unless it is refused.

        Args:
            give_back: makes what runs pending again; its effects are rolled back, and no budget is spent.
            refuse_submits: has submissions raise SubmitRefused, within a second in all processes.

        Raises:
            UnknownTenant: there is none of this name, or it was removed.
        """
        database, by = self._kernel.database, by or operator()
        validate_tenant_name(name, allow_legacy=True)
        is_change = tenancy.suspend(database, name, by=by, refuse_submits=refuse_submits)
        count = tenancy.give_back(database, name, by=by) if give_back else 0
        self._changed(name, "suspended", by=by, is_change=is_change or count > 0)
        return is_change or count > 0

    def resume(self, name: str, *, by: str | None = None) -> bool:
        """Let a suspended or draining tenant work again; what waited is sent, oldest first, at the polls' pace.

        Raises:
            UnknownTenant: there is none of this name, or it was removed.
        """
        by = by or operator()
        validate_tenant_name(name, allow_legacy=True)
        is_change = tenancy.resume(self._kernel.database, name, by=by)
        self._changed(name, "active", by=by, is_change=is_change)
        return is_change

    def drain(
        self,
        name: str,
        *,
        wait: bool = False,
        timeout: float | None = None,
        progress: Progress = lambda _: None,
        by: str | None = None,
    ) -> Left:
        """Refuse what is submitted from outside the tenant's own tasks, let the rest run to its end.

        Args:
            wait: returns only when nothing is left.
            timeout: seconds to wait at the most; ``None`` is for ever.
            progress: told what is left, twice a second.

        Returns:
            What is left.

        Raises:
            UnknownTenant: there is none of this name, or it was removed.
        """
        by = by or operator()
        validate_tenant_name(name, allow_legacy=True)
        self._changed(name, "draining", by=by, is_change=tenancy.drain(self._kernel.database, name, by=by))
        left = self.left(name)
        deadline = None if timeout is None else time.monotonic() + timeout
        while wait and left and (deadline is None or time.monotonic() < deadline):
            progress(left)
            time.sleep(DRAIN_LOOK)
            left = self.left(name)
        return left

    def set(self, name: str, *, by: str | None = None, **retention: float | None) -> bool:
        """Give a tenant ``retain_succeeded`` or ``retain_failed`` of its own, in seconds; ``None`` takes it away.

        Raises:
            InvalidPayload: there is no such time, or it is no number of seconds of at least 0.
            UnknownTenant: there is none of this name, or it was removed.
        """
        validate_tenant_name(name, allow_legacy=True)
        for column, value in retention.items():
            if column not in ("retain_succeeded", "retain_failed"):
                raise InvalidPayload(f"a tenant has no {column}: set retain_succeeded or retain_failed")
            if value is not None and not _is_duration(value):
                raise InvalidPayload(f"{column} is a number of seconds of at least 0, not {value!r}")
        return tenancy.set_retention(self._kernel.database, name, retention, by=by or operator())

    def isolate(self, name: str) -> None:
        """Give a tenant its role, and hand over to it what the login owns in its schema; twice does no harm.

        Raises:
            UnknownTenant: there is none of this name.
            IsolationRefused: it is ``public``, the login may not create roles, or somebody holds a lock there.
        """
        for left in catalog.isolate(self._kernel.database, name):
            log("isolation.kept", tenant=name, object=left)

    def drop(
        self,
        name: str,
        *,
        now: bool = False,
        timeout: float = 0.0,
        progress: Progress = lambda _: None,
        by: str | None = None,
    ) -> bool:
        """Remove a tenant with all that is in its schema, and its queue; of ``public`` only this package's tables.

        It returns when both are gone and were seen to be. The name stays as a tombstone: no message, worker or
        process brings it back, only `create`.

        Args:
            now: also if executions have not ended; they are gone with it. Else it drains first.
            timeout: seconds to wait for them to end.
            progress: told what is left, twice a second.

        Returns:
            Whether anything was left to do.

        Raises:
            TenantStateRefused: some have not ended in time; the tenant drains.
            TenantUnfinished: the schema is gone, the queue is not yet; do it again.
            UnknownTenant: there is none of this name.
        """
        database, by = self._kernel.database, by or operator()
        found = self.get(name).standing
        if not found.exists and after(Verb.DROP, found) and found.unfinished is None:
            return False
        if found.exists:
            if now:
                self.suspend(name, refuse_submits=True, by=by)
                removal.remove_now(database, name, by=by)
            else:
                self.drain(name, wait=True, timeout=timeout, progress=progress, by=by)
                removal.remove(database, name, by=by)
        self._kernel.tenants.forget(name)
        self._finish(name, Verb.DROP, by=by)
        return True


def _is_duration(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) and value >= 0
