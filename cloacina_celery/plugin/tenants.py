"""What operators and programs do with tenants; the command line does the same."""

from __future__ import annotations

import builtins
import fnmatch
import getpass
import os
import socket
import time
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from cloacina_celery.core.tenancy import Verb, after
from cloacina_celery.core.tenant import LEGACY_TENANT, is_tenant_name, validate_tenant_name
from cloacina_celery.errors import (
    InvalidPayload,
    InvalidTenantName,
    TenantUnfinished,
    UnknownTenant,
)
from cloacina_celery.plugin.envelope import Envelope
from cloacina_celery.plugin.queues import TenantQueues
from cloacina_celery.store import archives, audit, catalog, migrate, moves, removal, tenancy
from cloacina_celery.store.audit import AuditEntry
from cloacina_celery.store.catalog import Tenant
from cloacina_celery.store.moves import Inventory
from cloacina_celery.store.tenancy import Left
from cloacina_celery.telemetry import log

if TYPE_CHECKING:
    from cloacina_celery.plugin.parts import Parts

DRAIN_LOOK = 0.5
"""Seconds between two looks at what a draining tenant has left."""


Progress = Callable[[Left], object]


class Tenants:
    """The tenants of the database.

    Each verb can be done again: one that was interrupted goes on where it was, one that is done changes nothing.
    ``by`` says who does it, for the audit; by default the process' user and host.
    """

    def __init__(self, parts: Parts) -> None:
        self._kernel = parts.kernel
        self._queues = TenantQueues(parts.kernel, parts.publisher)

    # Coming to be

    def create(self, name: str, *, legacy: bool = False, by: str | None = None) -> bool:
        """Make a tenant exist, and tell whether it is new.

        The name of a removed tenant begins anew: nothing of the earlier one is found again.

        Args:
            name: schema and queue.
            legacy: allows ``public``, an existing single-tenant deployment's schema.

        Raises:
            InvalidTenantName: the name breaks the rule, or differs from a tenant's only in case.
            SchemaMismatch: the tenant is there at another revision.
            TenantStateRefused: its removal has not been finished.
        """
        self._check_name(name, legacy=legacy)
        is_new = catalog.create(self._kernel.database, name, legacy=legacy, by=by or operator())
        self._kernel.tenants.forget(name)
        if is_new:
            if self._kernel.tenants.epoch_of(name) > 1:
                self._queues.declare(name)
            log("tenant.created", tenant=name)
        return is_new

    def open(self, name: str, *, legacy: bool = False) -> None:
        """Make the tenant of a worker that starts exist, unless it was removed.

        Raises:
            UnknownTenant: it was removed, and a worker that starts late must not bring it back.
        """
        validate_tenant_name(name, allow_legacy=legacy)
        found = catalog.find(self._kernel.database, name)
        if found is not None:
            if not found.standing.exists:
                raise UnknownTenant(name, removed=True, moved_to=found.moved_to)
            legacy = found.is_legacy
        self.create(name, legacy=legacy)

    def open_for(self, queues: Sequence[str]) -> builtins.list[str]:
        """Make the tenants of a starting worker's queues exist at our revision.

        A queue is a tenant's if the catalog knows it, or if its name matches ``cloacina_auto_create``: then the
        first start creates it.

        Returns:
            The queues of removed tenants, which nobody must consume.

        Raises:
            InvalidTenantName: a name matches but cannot be a tenant's.
            SchemaMismatch: a tenant, or the catalog, is at a revision that this version cannot work with.
            UnknownTenant: all of the queues are removed tenants'.
        """
        settings, database = self._kernel.settings, self._kernel.database
        migrate.ensure_catalog(database)
        patterns = [pattern.strip() for pattern in settings.auto_create.split(",")]
        ordinary = {self._kernel.app.conf.task_default_queue, settings.control_queue}
        known = catalog.find_all(database, [queue for queue in queues if is_tenant_name(queue)])
        removed = []
        for queue in queues:
            if queue in known and not known[queue].standing.exists:
                # The worker's other tenants must not wait until somebody has changed its command line.
                removed.append(UnknownTenant(queue, removed=True, moved_to=known[queue].moved_to))
                log("tenant.gone", tenant=queue, error=removed[-1])
            elif queue in known:
                catalog.create(database, queue, legacy=queue == LEGACY_TENANT)
            elif queue not in ordinary and any(fnmatch.fnmatchcase(queue, pattern) for pattern in patterns):
                self.create(queue)
        if removed and len(removed) == len(queues):
            raise removed[0]
        return [error.tenant for error in removed]

    # Looking

    def list(self, *, with_removed: bool = False) -> builtins.list[Tenant]:
        """List the tenants by name, and on request what is left of removed ones."""
        return catalog.tenants(self._kernel.database, with_removed=with_removed)

    def get(self, name: str) -> Tenant:
        """Return one tenant's row of the catalog, also a removed one's.

        Raises:
            UnknownTenant: there never was one of this name.
        """
        validate_tenant_name(name, allow_legacy=True)
        found = catalog.find(self._kernel.database, name)
        if found is None:
            raise UnknownTenant(name)
        return found

    def left(self, name: str) -> Left:
        """Count what has not ended."""
        with self._kernel.rows(name) as cursor:
            return tenancy.count_open(cursor, name)

    def audit(self, name: str | None = None, *, limit: int = 100) -> builtins.list[AuditEntry]:
        """List what was done to a tenant of this name, or to all, in order; the last ``limit`` steps."""
        return audit.history(self._kernel.database, name, limit=limit)

    # Working and not working

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

    # Moving

    def rename(self, old: str, new: str, *, by: str | None = None) -> bool:
        """Give a suspended tenant another name, as schema and as queue, and tell whether that was still to do.

        Its rows, settings and idempotency keys come with it; workers that run take the new queue instead of the old
        one; it stays suspended until `resume`.

        Raises:
            InvalidTenantName: the new name cannot be a tenant's, or ``old`` is ``public``.
            TenantStateRefused: it is not suspended, something runs in it, or the new name is in use.
            TenantUnfinished: it is moved, and the old queue is not gone yet; do it again.
            UnknownTenant: there is none of the old name.
        """
        if old == LEGACY_TENANT:
            raise InvalidTenantName(
                old, "'public' is renamed by no one: `tenant adopt` moves our tables out of it"
            )
        return self._move(old, new, Verb.RENAME, by=by or operator())

    def adopt(self, new: str, *, source: str = LEGACY_TENANT, by: str | None = None) -> bool:
        """Move our tables out of ``public`` into a schema of their own, and tell whether that was still to do.

        The legacy tenant is suspended first, and the new one until `resume`. What else is in ``public`` stays.

        Raises:
            InvalidTenantName: the new name cannot be a tenant's, or the source is not ``public``.
            TenantStateRefused: something runs, or the new name is in use.
            TenantUnfinished: it is moved, and the old queue is not gone yet; do it again.
            UnknownTenant: ``public`` is no tenant.
        """
        self._check_adoption(new, source)
        by = by or operator()
        if self.get(source).standing.exists:
            self.suspend(source, by=by)
        return self._move(source, new, Verb.ADOPT, by=by)

    def plan_adoption(self, new: str, *, source: str = LEGACY_TENANT) -> Inventory:
        """Say what `adopt` would move, and change nothing.

        Raises:
            InvalidTenantName: as `adopt`.
            UnknownTenant: ``public`` is no tenant.
        """
        self._check_adoption(new, source)
        self.get(source).standing.require()
        return moves.inventory(self._kernel.database, source)

    def export(
        self, name: str, path: Path | str, *, programs: Path | None = None, by: str | None = None
    ) -> None:
        """Write a tenant's schema to a file in pg_dump's custom format, as it is at one moment.

        Args:
            programs: the folder of pg_dump; by default it is looked for on the PATH.

        Raises:
            ArchiveRefused: pg_dump is missing, older than the server, or fails.
            InvalidTenantName: it is ``public``, whose schema is not the tenant's alone.
            UnknownTenant: there is none of this name, or it was removed.
        """
        validate_tenant_name(name, allow_legacy=True)
        archives.export(
            self._kernel.database, name, Path(path).absolute(), programs=programs, by=by or operator()
        )

    def import_(
        self,
        path: Path | str,
        name: str | None = None,
        *,
        programs: Path | None = None,
        by: str | None = None,
    ) -> str:
        """Bring an exported tenant in, all of it or nothing, and return its name; it is suspended until `resume`.

        Rows, history and idempotency keys are as they were; what ran then waits to run again.

        Args:
            name: what it is to be called here; by default as it was there.
            programs: the folder of pg_restore; by default it is looked for on the PATH.

        Raises:
            ArchiveRefused: pg_restore is missing, the file is no archive of a tenant, or the database refuses it.
            SchemaMismatch: it was written by a newer version.
            TenantStateRefused: the name is in use.
        """
        path = Path(path).absolute()
        old = archives.schema_in(path, programs=programs)
        new = old if name is None else name
        self._check_name(new)
        archives.import_(
            self._kernel.database, path, new, by=by or operator(), programs=programs,
            rewrite=lambda message: Envelope.load(message).moved(old, new).dump("an imported execution"),
        )  # fmt: skip
        self._queues.declare(new)
        self._changed(new, "suspended", by=by or operator(), is_change=True)
        return new

    def _check_adoption(self, new: str, source: str) -> None:
        if source != LEGACY_TENANT:
            raise InvalidTenantName(
                source, "only 'public' is adopted from: `tenant rename` moves other tenants"
            )
        self._check_name(new)

    def _check_name(self, name: str, *, legacy: bool = False) -> None:
        validate_tenant_name(name, allow_legacy=legacy)
        if name == self._kernel.settings.control_queue:
            raise InvalidTenantName(
                name, "it is the control queue, which every worker consumes; choose another"
            )

    def _move(self, old: str, new: str, verb: Verb, *, by: str) -> bool:
        self._check_name(new)
        before = self.get(old)
        moves.move(
            self._kernel.database, old, new, verb, by=by,
            rewrite=lambda message: Envelope.load(message).moved(old, new).dump("a moved execution"),
        )  # fmt: skip
        self._kernel.tenants.forget(new)
        self._queues.declare(new)
        self._queues.hand_over(old, new)
        self._finish(old, verb, by=by)
        return before.standing.exists or before.unfinished is not None

    # Going

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

    def _finish(self, name: str, verb: Verb, *, by: str) -> None:
        """Do what follows the commit that left a tombstone, and say in it that it is done."""
        self._queues.remove(name, verb)
        with self._kernel.database.statement() as cursor:
            if not removal.is_gone(cursor, name):
                raise TenantUnfinished(
                    name, verb, "somebody made a schema of its name meanwhile: look, and drop it"
                )
        if removal.confirm(self._kernel.database, name, verb, by=by, detail="schema and queue are gone"):
            self._changed(name, "removed", by=by, is_change=True)

    def _changed(self, name: str, state: str, *, by: str, is_change: bool) -> None:
        self._kernel.tenants.forget(name)
        if is_change:
            log("tenant.changed", tenant=name, state=state, by=by)


def operator() -> str:
    """Name who runs this process, and where."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user has a number and no name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _is_duration(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) and value >= 0
