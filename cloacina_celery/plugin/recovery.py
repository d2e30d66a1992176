"""What becomes of attempts that cannot settle themselves: lost, timed out, revoked, ended by their worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.app.task import Context

from cloacina_celery.plugin.envelope import TENANT_HEADER, Envelope
from cloacina_celery.runtime.context import bind_tenant
from cloacina_celery.runtime.reaper import Reaper
from cloacina_celery.store import queries, settlements
from cloacina_celery.store.bounded import bounded_transaction
from cloacina_celery.store.recovery import Recovered

if TYPE_CHECKING:
    from cloacina_celery.plugin.kernel import Kernel
    from cloacina_celery.plugin.outbox import Outbox
    from cloacina_celery.plugin.publisher import Publisher
    from cloacina_celery.plugin.results import Backends
    from cloacina_celery.plugin.settler import Settler


class Recovery:
    """Move such attempts on, from the worker's main process."""

    def __init__(
        self, kernel: Kernel, publisher: Publisher, outbox: Outbox, settler: Settler, backends: Backends
    ) -> None:
        self._kernel = kernel
        self._publisher = publisher
        self._outbox = outbox
        self._settler = settler
        self._backends = backends

    def reaper(self) -> Reaper:
        """Make a reaper that publishes through the app."""
        return Reaper(
            self._kernel.database,
            self._kernel.settings,
            publish=self._publisher.publish_rings,
            send_letters=self._outbox.send,
            can_publish=self._publisher.can_publish,
            queue_depth=self._publisher.queue_depth,
            on_abandoned=self._on_abandoned,
        )

    def recover_attempt(self, tenant: str, execution_id: str, attempt: int, *, reason: str) -> bool:
        """Recover a lost attempt now; ``False`` if it has ended otherwise.

        Raises:
            DatabaseUnavailable, LockNotAvailable: it must be tried again.
        """
        return self.reaper().recover_attempt(tenant, execution_id, attempt, reason=reason) > 0

    def attempt_lost(self, tenant: str, execution_id: str, attempt: int, *, reason: str) -> None:
        """Recover an attempt whose process the worker saw die."""
        self._kernel.in_background(
            lambda: self.reaper().recover_attempt(tenant, execution_id, attempt, reason=reason)
        )

    def attempt_timed_out(
        self, tenant: str, execution_id: str, attempt: int, *, error: Exception, request: Any
    ) -> None:
        """Settle an attempt that the worker killed for its time limit."""
        self._kernel.in_background(
            lambda: self._settler.settle_timed_out(tenant, execution_id, attempt, error, request)
        )

    def attempt_ended_by_worker(self, tenant: str, execution_id: str, attempt: int) -> None:
        """Give back an attempt that the worker ended for its own reasons: a shutdown, a lost broker."""

        def release() -> None:
            with bounded_transaction(self._kernel.database) as cursor:
                settlements.release_attempt(
                    cursor, tenant, execution_id, attempt, reason="ended by its worker"
                )

        self._kernel.in_background(release)

    def revoked(self, execution_id: str, reason: str, request: Any) -> None:
        """Cancel the row of a task that was revoked, or that expired before anybody ran it."""
        headers = getattr(request, "headers", None) or {}
        tenant = headers.get(TENANT_HEADER) or self._kernel.locations.find(execution_id)
        if tenant is None:
            return

        def cancel() -> None:
            with bounded_transaction(self._kernel.database) as cursor:
                queries.cancel(cursor, tenant, execution_id, reason=reason)

        self._kernel.in_background(cancel)

    def _on_abandoned(self, tenant: str, recovered: Recovered) -> None:
        backend = self._backends.of(tenant)
        with bind_tenant(tenant):
            error = backend.exception_to_python(recovered.error)
            backend.after_failure(_context_of(Envelope.load(recovered.message)), error, None)


def _context_of(envelope: Envelope) -> Context:
    """Make the request context that Celery's failure hooks expect from a stored message."""
    args, kwargs, embed = envelope.body
    return Context({**envelope.headers, **(embed or {}), "args": args, "kwargs": kwargs, "delivery_info": {}})
