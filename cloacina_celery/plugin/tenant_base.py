"""What all verbs on tenants share: who exists, who comes to be, and how a removal ends."""

from __future__ import annotations

import builtins
import fnmatch
import getpass
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cloacina_celery.core.tenancy import Verb
from cloacina_celery.core.tenant import LEGACY_TENANT, is_tenant_name, validate_tenant_name
from cloacina_celery.errors import InvalidTenantName, TenantUnfinished, UnknownTenant
from cloacina_celery.plugin import isolation
from cloacina_celery.plugin.queues import TenantQueues
from cloacina_celery.store import audit, catalog, migrate, removal, tenancy
from cloacina_celery.store.audit import AuditEntry
from cloacina_celery.store.catalog import Tenant
from cloacina_celery.store.tenancy import Left
from cloacina_celery.telemetry import log

if TYPE_CHECKING:
    from cloacina_celery.plugin.parts import Parts


class TenantBase:
    """The tenants that there are, and new ones."""

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

    def open_for(self, queues: Sequence[str], *, selects: bool = False) -> builtins.list[str]:
        """Make the tenants of a starting worker's queues exist at our revision.

        A queue is a tenant's if the catalog knows it, or if its name matches ``cloacina_auto_create``: then the
        first start creates it.

        Args:
            selects: whether the worker will serve tenants that it does not name as well.

        Returns:
            The queues of removed tenants, which nobody must consume.

        Raises:
            InvalidTenantName: a name matches but cannot be a tenant's.
            SchemaMismatch: a tenant, or the catalog, is at a revision that this version cannot work with.
            UnknownTenant: all of the queues are removed tenants'.
            IsolationRefused: the database's login may not serve one of them.
        """
        settings, database = self._kernel.settings, self._kernel.database
        migrate.ensure_catalog(database)
        patterns = [pattern.strip() for pattern in settings.auto_create.split(",")]
        ordinary = {self._kernel.app.conf.task_default_queue, settings.control_queue}

        def creates(queue: str) -> bool:
            return queue not in ordinary and any(fnmatch.fnmatchcase(queue, pattern) for pattern in patterns)

        self._kernel.own_tenant = isolation.own_tenant(database, queues, creates, selects=selects)
        known = catalog.find_all(database, [queue for queue in queues if is_tenant_name(queue)])
        removed = []
        for queue in queues:
            if queue in known and not known[queue].standing.exists:
                # The worker's other tenants must not wait until somebody has changed its command line.
                removed.append(UnknownTenant(queue, removed=True, moved_to=known[queue].moved_to))
                log("tenant.gone", tenant=queue, error=removed[-1])
            elif queue in known:
                catalog.create(database, queue, legacy=queue == LEGACY_TENANT)
            elif creates(queue):
                self.create(queue)
        if removed and len(removed) == len(queues):
            raise removed[0]
        isolation.check(database, queues)
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

    # For the verbs

    def _check_name(self, name: str, *, legacy: bool = False) -> None:
        validate_tenant_name(name, allow_legacy=legacy)
        if name == self._kernel.settings.control_queue:
            raise InvalidTenantName(
                name, "it is the control queue, which every worker consumes; choose another"
            )
        if name == self._kernel.app.conf.task_default_queue:
            raise InvalidTenantName(
                name, "it is the app's task_default_queue, by which plain tasks travel; choose another"
            )

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
