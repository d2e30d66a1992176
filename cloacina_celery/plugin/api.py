"""What operators and programs ask of tenants and executions; the CLI prints the same."""

from __future__ import annotations

import builtins
import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cloacina_celery.core.lifecycle import State
from cloacina_celery.core.settings import MAX_INTEGER
from cloacina_celery.core.tenant import LEGACY_TENANT, validate_tenant_name
from cloacina_celery.errors import ExecutionNotFound, InvalidPayload, InvalidTenantName, TransitionRefused
from cloacina_celery.plugin import isolation
from cloacina_celery.store import catalog, migrate, queries
from cloacina_celery.store.catalog import Tenant
from cloacina_celery.store.queries import Event, Execution
from cloacina_celery.telemetry import log

if TYPE_CHECKING:
    from cloacina_celery.plugin.parts import Parts


class Tenants:
    """The tenants of the database."""

    def __init__(self, parts: Parts) -> None:
        self._kernel = parts.kernel

    def create(self, name: str, *, legacy: bool = False) -> bool:
        """Make a tenant exist, and tell whether it is new.

        Args:
            name: schema and queue.
            legacy: allows ``public``, an existing single-tenant deployment's schema.

        Raises:
            InvalidTenantName: the name breaks the rule, or differs from a tenant's only in case.
            SchemaMismatch: the tenant is there at another revision.
        """
        validate_tenant_name(name, allow_legacy=legacy)
        if name == self._kernel.settings.control_queue:
            raise InvalidTenantName(
                name, "it is the control queue, which every worker consumes; choose another"
            )
        is_new = catalog.create(self._kernel.database, name, legacy=legacy)
        self._kernel.tenants.learn(name)
        if is_new:
            log("tenant.created", tenant=name)
        return is_new

    def list(self) -> list[Tenant]:
        """List the tenants by name."""
        return catalog.tenants(self._kernel.database)

    def open_for(self, queues: Sequence[str]) -> None:
        """Make the tenants of a starting worker's queues exist at our revision.

        A queue is a tenant's if the catalog knows it, or if its name matches ``cloacina_auto_create``: then the
        first start creates it.

        Raises:
            InvalidTenantName: a name matches but cannot be a tenant's.
            SchemaMismatch: a tenant, or the catalog, is at a revision that this version cannot work with.
        """
        settings, database = self._kernel.settings, self._kernel.database
        migrate.ensure_catalog(database)
        patterns = [pattern.strip() for pattern in settings.auto_create.split(",")]
        ordinary = {self._kernel.app.conf.task_default_queue, settings.control_queue}
        for queue in queues:
            if self._kernel.tenants.knows(queue):
                catalog.create(database, queue, legacy=queue == LEGACY_TENANT)
            elif queue not in ordinary and any(fnmatch.fnmatchcase(queue, pattern) for pattern in patterns):
                self.create(queue)
        isolation.check(database, queues)

    def isolate(self, name: str) -> None:
        """Give a tenant its role, and hand over to it what the login owns in its schema; twice does no harm.

        Raises:
            UnknownTenant: there is none of this name.
            IsolationRefused: it is ``public``, the login may not create roles, or somebody holds a lock there.
        """
        for left in catalog.isolate(self._kernel.database, name):
            log("isolation.kept", tenant=name, object=left)

    def drop(self, name: str) -> None:
        """Remove a tenant with all that is in its schema; of ``public`` only this package's tables.

        Raises:
            UnknownTenant: there is none of this name.
        """
        catalog.drop(self._kernel.database, name)
        self._kernel.tenants.forget(name)


class Executions:
    """The executions of one tenant."""

    def __init__(self, parts: Parts, tenant: str) -> None:
        self._kernel = parts.kernel
        self._publisher = parts.publisher
        self.tenant = tenant

    def get(self, execution_id: str) -> Execution:
        """Return one execution.

        Raises:
            ExecutionNotFound: the tenant has none of this id.
        """
        if not is_text(execution_id):
            raise ExecutionNotFound(self.tenant, execution_id)
        with self._kernel.rows(self.tenant) as cursor:
            found = queries.get(cursor, self.tenant, execution_id)
        if found is None:
            raise ExecutionNotFound(self.tenant, execution_id)
        return found

    def list(self, *, state: str | None = None, task: str | None = None, limit: int = 100) -> list[Execution]:
        """List executions, newest first.

        Raises:
            InvalidPayload: there is no such state, task name or limit.
        """
        if state is not None and state not in list(State):
            raise InvalidPayload(f"unknown state {state!r}: one of {', '.join(State)}")
        if task is not None:
            _check_text("task", task)
        if not _is_count(limit):
            raise InvalidPayload(f"limit is a whole number of at least 1, not {limit!r}")
        with self._kernel.rows(self.tenant) as cursor:
            return queries.list_(
                cursor, self.tenant, state=State(state) if state else None, task=task, limit=limit
            )

    def count(self) -> dict[State, int]:
        """Count executions by state."""
        with self._kernel.rows(self.tenant) as cursor:
            return queries.count(cursor, self.tenant)

    def history(self, execution_id: str) -> builtins.list[Event]:
        """Return an execution's transitions in order.

        Raises:
            ExecutionNotFound: the tenant has none of this id.
        """
        self.get(execution_id)
        with self._kernel.rows(self.tenant) as cursor:
            return queries.history(cursor, self.tenant, execution_id)

    def cancel(
        self, execution_id: str, *, terminate: bool = False, reason: str = "cancelled by an operator"
    ) -> Execution:
        """End an execution that has not ended; nothing that a running attempt has done in the tenant remains.

        The attempt finds its next session refused and ``is_cancelled`` true, and cannot settle.

        Args:
            terminate: end the process that runs it, too, as Celery's ``revoke(terminate=True)`` does.
            reason: kept in the execution's history.

        Raises:
            ExecutionNotFound: the tenant has none of this id.
            TransitionRefused: it has ended already.
        """
        self.get(execution_id)
        _check_text("reason", reason)
        with self._kernel.rows(self.tenant) as cursor:
            is_cancelled = queries.cancel(cursor, self.tenant, execution_id, reason=reason)
        if is_cancelled and terminate:
            self._kernel.app.control.revoke(execution_id, terminate=True)
        found = self.get(execution_id)
        if not is_cancelled:
            raise TransitionRefused(
                execution_id, found.state, "cancel", "only pending and running ones can be"
            )
        return found

    def requeue(self, execution_id: str, *, reason: str = "requeued by an operator") -> Execution:
        """Make a failed, abandoned or cancelled execution pending again, with fresh budgets.

        Raises:
            ExecutionNotFound: the tenant has none of this id.
            TransitionRefused: it is in another state.
        """
        self.get(execution_id)
        _check_text("reason", reason)
        with self._kernel.rows(self.tenant) as cursor:
            ring = queries.requeue(cursor, self.tenant, execution_id, reason=reason)
        found = self.get(execution_id)
        if ring is None:
            hint = (
                "it never ran itself: requeue the execution that it was to follow"
                if found.state is State.FAILED
                else "only failed, abandoned and cancelled ones can be"
            )
            raise TransitionRefused(execution_id, found.state, "requeue", hint)
        self._kernel.busy_marks.ensure(self.tenant)
        self._publisher.publish_rings([ring])
        return found


def is_text(value: object) -> bool:
    """Tell whether a column can hold the value as a text that says something."""
    return isinstance(value, str) and value != "" and "\0" not in value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_INTEGER


def _check_text(name: str, value: object) -> None:
    if not is_text(value):
        raise InvalidPayload(f"{name} is a non-empty string without NUL characters, not {value!r}")
