"""Results that answer from the execution's row, without any other result backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import states
from celery.backends.base import Backend, SyncBackendMixin
from celery.exceptions import ChordError
from celery.exceptions import TimeoutError as WaitedTooLong
from celery.result import AsyncResult
from kombu.utils.uuid import uuid

from cloacina_celery.core.lifecycle import State
from cloacina_celery.errors import TenantNotBound
from cloacina_celery.plugin.envelope import load_json
from cloacina_celery.runtime.context import bound_tenant, current_unit, leave_attempt
from cloacina_celery.store import chords, executions, queries
from cloacina_celery.store.executions import Submission

if TYPE_CHECKING:
    from cloacina_celery.plugin.kernel import Kernel

OnRevoked = Callable[[str, str, Any], None]
"""Told the id, the reason and the request of a task that was revoked."""

FIRST_NAP = 0.002
LONGEST_NAP = 0.25

_CELERY_STATES = {
    State.PENDING: states.PENDING,
    State.RUNNING: states.STARTED,
    State.SUCCEEDED: states.SUCCESS,
    State.FAILED: states.FAILURE,
    State.ABANDONED: states.FAILURE,
    State.CANCELLED: states.REVOKED,
}
_CANCELLED_ERROR = {
    "exc_type": "TaskRevokedError",
    "exc_module": "celery.exceptions",
    "exc_message": ["cancelled"],
}


class DurableResult(AsyncResult):
    """A Celery result whose state is the row's; revoking it cancels the row."""

    def revoke(self, *args: Any, **kwargs: Any) -> None:
        """Cancel the execution, then tell the workers as Celery does."""
        self.backend.cancel(self.id)
        super().revoke(*args, **kwargs)


class DurableBackend(SyncBackendMixin, Backend):
    """Celery's view of the rows. It stores nothing on its own: settling an attempt has stored it.

    Args:
        tenant: whose executions the ids are; without it the tenant is the one that this process submitted
            the id to, or the one that is bound.
    """

    persistent = True
    supports_autoexpire = True

    def __init__(self, kernel: Kernel, on_revoked: OnRevoked, tenant: str | None = None) -> None:
        super().__init__(app=kernel.app, serializer="json")
        self._kernel = kernel
        self._on_revoked = on_revoked
        self._tenant = tenant

    def _tenant_of(self, task_id: str) -> str:
        tenant = self._tenant or self._kernel.locations.find(task_id) or bound_tenant()
        if tenant is None:
            raise TenantNotBound(f"the result of execution {task_id}")
        return tenant

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        tenant = self._tenant_of(task_id)
        with self._kernel.rows(tenant) as cursor:
            found = queries.outcome(cursor, tenant, task_id)
        if found is None:
            return {
                "task_id": task_id,
                "status": states.PENDING,
                "result": None,
                "traceback": None,
                "children": [],
            }
        state, failures, result, error, settled_at = found
        status = states.RETRY if state is State.PENDING and failures else _CELERY_STATES[state]
        meta: dict[str, Any] = {
            "task_id": task_id, "status": status, "result": None, "traceback": None, "children": [],
            "date_done": settled_at,
        }  # fmt: skip
        if state is State.SUCCEEDED:
            meta["result"] = None if result is None else load_json(result)
        elif status in states.EXCEPTION_STATES:
            error = _CANCELLED_ERROR if state is State.CANCELLED else error
            meta["result"], meta["traceback"] = error, (error or {}).get("traceback")
        converted: dict[str, Any] = self.meta_from_decoded(meta)
        return converted

    def wait_for(
        self, task_id: str, timeout: float | None = None, interval: float = LONGEST_NAP, no_ack: bool = True,
        on_interval: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Wait until the execution is settled; look soon at first, then less often.

        Raises:
            celery.exceptions.TimeoutError: ``timeout`` seconds are over.
        """
        self._ensure_not_eager()
        deadline = None if timeout is None else time.monotonic() + timeout
        nap = FIRST_NAP
        while True:
            meta: dict[str, Any] = self.get_task_meta(task_id)
            if meta["status"] in states.READY_STATES:
                return meta
            if on_interval:
                on_interval()
            left = nap if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise WaitedTooLong(f"execution {task_id} was not settled within {timeout} s")
            time.sleep(min(nap, left))
            nap = min(nap * 1.5, max(interval, FIRST_NAP), LONGEST_NAP)

    def cancel(self, task_id: str) -> None:
        """End the execution if it has not ended."""
        tenant = self._tenant_of(task_id)
        with self._kernel.rows(tenant) as cursor:
            queries.cancel(cursor, tenant, task_id, reason="revoked")

    def _forget(self, task_id: str) -> None:
        """Do nothing: the row is the record of what was done, and not a copy of its result to be freed."""

    def mark_as_done(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the attempt settled its row before Celery came here."""

    def mark_as_retry(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, for the same reason."""

    def mark_as_started(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the claim said so."""

    def mark_as_failure(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: failures are settled by `Settler`, lost workers by the reaper."""

    def mark_as_revoked(
        self, task_id: str, reason: str = "", request: Any = None, store_result: bool = True, state: str = ""
    ) -> None:
        """Cancel the row of a task that was revoked, or that expired before anybody ran it."""
        self._on_revoked(task_id, reason or "revoked", request)

    def after_failure(self, request: Any, error: BaseException, traceback: str | None) -> None:
        """Let everything that waits for a failed execution know: chord, chain and errbacks, as Celery does.

        Runs inside the settling transaction, so that all of it is submitted with the settlement or not at all.
        """
        super().mark_as_failure(
            request.id, error, traceback, request=request, store_result=True, call_errbacks=True
        )

    def _call_task_errbacks(self, request: Any, exc: BaseException, traceback: Any) -> None:
        # Celery calls an errback that takes the error here and now. Its session is its own then: the failed
        # attempt's has been rolled back, and is not committed any more.
        with leave_attempt():
            super()._call_task_errbacks(request, exc, traceback)

    def store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        **_: Any,
    ) -> Any:
        """Enter an execution that will never run as failed; whatever has a row is left as it is."""
        unit = current_unit()
        if state not in states.EXCEPTION_STATES or unit is None:
            return result
        options = getattr(request, "options", None) or {}
        error = {**self.prepare_exception(result, "json"), "traceback": traceback}
        executions.submit_failed(
            unit.cursor(),
            unit.tenant,
            Submission(
                execution_id=task_id,
                task=getattr(request, "task", None) or "unknown",
                message="",
                max_recoveries=0,
                group_id=options.get("group_id") if "chord" in options else None,
                group_index=options.get("group_index") if "chord" in options else None,
            ),
            error=self.encode(error),
            reason="what it was to follow has failed",
        )
        return result

    def on_chord_part_return(self, request: Any, state: str, result: Any, **_: Any) -> None:
        """Send a chord's body with the settlement of the header's last member."""
        unit = current_unit()
        if unit is None or not request.group:
            return
        parts = chords.complete(unit.cursor(), unit.tenant, request.group)
        if parts is None:
            return
        body = self.app.signature(request.chord).clone()
        failed = next((part for part in parts if part.state is not State.SUCCEEDED), None)
        if failed is None:
            body.delay([None if part.result is None else load_json(part.result) for part in parts])
            return
        body.options.setdefault("task_id", uuid())
        cause = self.exception_to_python(load_json(failed.error)) if failed.error else None
        try:
            raise ChordError(f"Dependency {failed.execution_id} raised {cause!r}") from cause
        except ChordError as error:
            if body.subtask_type is None:
                # Celery enters it by its id alone; the row should say which task it was to be.
                self.store_result(body.options["task_id"], error, states.FAILURE, request=body)
            self.chord_error_from_stack(body, error)

    def fail_from_current_stack(self, task_id: str, exc: BaseException | None = None) -> Any:
        """Enter a chord's body as failed."""
        if exc is not None:
            self.store_result(task_id, exc, states.FAILURE)


class Backends:
    """The result backends of one app: one for each tenant, and one that finds the tenant out."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._backends: dict[str | None, DurableBackend] = {}
        self.on_revoked: OnRevoked = lambda _execution_id, _reason, _request: None

    def of(self, tenant: str | None) -> DurableBackend:
        """Return a tenant's backend; without a tenant, the one that finds out."""
        backend = self._backends.get(tenant)
        if backend is None:
            backend = self._backends[tenant] = DurableBackend(self._kernel, self._revoked, tenant)
        return backend

    def find(self, execution_id: str) -> DurableBackend | None:
        """Return the backend that has a row of this id in the tenant that is bound or known."""
        tenant = self._kernel.locations.find(execution_id) or bound_tenant()
        if tenant is None:
            return None
        with self._kernel.database.statement() as cursor:
            is_known = queries.outcome(cursor, tenant, execution_id) is not None
        return self.of(tenant) if is_known else None

    def _revoked(self, execution_id: str, reason: str, request: Any) -> None:
        self.on_revoked(execution_id, reason, request)
