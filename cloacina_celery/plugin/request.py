"""What the worker's main process does about a durable task: it knows who runs, and sees who dies."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionWithTraceback
from celery.exceptions import Terminated, TimeLimitExceeded
from celery.worker import state
from celery.worker.request import Request

from cloacina_celery.plugin.envelope import ATTEMPT_HEADER, TENANT_HEADER
from cloacina_celery.store.workers import Reserved

if TYPE_CHECKING:
    from cloacina_celery.plugin.recovery import Recovery

NAMED_AFTER = 2.0
"""Seconds after which a message that waits in this worker is named: a worker that keeps up names none."""


class DurableRequest(Request):
    """A request whose row is recovered at once when the process that ran it is lost."""

    @property
    def held(self) -> tuple[str, str, int] | None:
        """Tenant, execution id and attempt of this request; ``None`` for a message that is not ours."""
        headers = self._request_dict
        tenant, attempt = headers.get(TENANT_HEADER), headers.get(ATTEMPT_HEADER)
        if not isinstance(tenant, str) or not isinstance(attempt, int):
            return None
        return tenant, self.id, attempt

    @property
    def _recovery(self) -> Recovery:
        recovery: Recovery = self._app.cloacina.parts.recovery
        return recovery

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        """Recover the attempt if its process died; whatever the child itself reported is settled already."""
        exc = exc_info.exception
        if isinstance(exc, ExceptionWithTraceback):
            exc = exc.exc
        if return_ok or isinstance(exc, MemoryError):
            super().on_failure(exc_info, send_failed_event, return_ok)
            return
        state.task_ready(self)
        self.acknowledge()
        if isinstance(exc, TimeLimitExceeded) or self._already_cancelled or self._already_revoked:
            return
        if isinstance(exc, Terminated):
            self._announce_revoked("terminated", True, str(exc), False)
            return
        if self.held is not None:
            self._recovery.attempt_lost(*self.held, reason=f"its process died: {exc}")

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Settle an attempt that ran into its hard time limit as failed, by its policy."""
        if soft:
            super().on_timeout(soft, timeout)
            return
        state.task_ready(self)
        self.acknowledge()
        if self.held is not None and not state.should_terminate:
            self._recovery.attempt_timed_out(
                *self.held, error=TimeLimitExceeded(timeout), request=self._context
            )

    def _announce_cancelled(self, *args: Any, **kwargs: Any) -> None:
        # Its parameters differ between the Celery versions that we support.
        super()._announce_cancelled(*args, **kwargs)
        if self.held is not None:
            self._recovery.attempt_ended_by_worker(*self.held)


def held_attempts() -> list[tuple[str, str, int]]:
    """List the durable attempts that run in this worker."""
    return [request.held for request in _durable(state.active_requests) if request.held is not None]


class ReservedMessages:
    """Knows the durable messages that were delivered to this worker and have not started, and since when."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def by_tenant(self) -> dict[str, Reserved]:
        """Count them by tenant, and name those that have been here for some seconds."""
        now = time.monotonic()
        active = set(_durable(state.active_requests))
        waiting = [
            request.held
            for request in _durable(state.reserved_requests)
            if request not in active and request.held is not None
        ]
        self._since = {held[1]: self._since.get(held[1], now) for held in waiting}
        found: dict[str, Reserved] = {}
        for tenant, execution_id, _ in waiting:
            before = found.get(tenant, Reserved(count=0))
            is_named = now - self._since[execution_id] >= NAMED_AFTER
            found[tenant] = Reserved(
                count=before.count + 1, ids=(*before.ids, execution_id) if is_named else before.ids
            )
        return found


def _durable(requests: Iterable[Request]) -> list[DurableRequest]:
    # The worker's event loop changes these sets while this thread reads them.
    for _ in range(10):
        with suppress(RuntimeError):
            return [request for request in list(requests) if isinstance(request, DurableRequest)]
    return []
