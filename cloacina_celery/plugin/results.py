"""Results that answer from the execution's row, without any other result backend."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from celery import states
from celery.backends.base import Backend, SyncBackendMixin
from celery.exceptions import ChordError
from celery.exceptions import TimeoutError as WaitedTooLong
from celery.result import AsyncResult, ResultSet
from kombu.utils.uuid import uuid

from cloacina_celery.core.lifecycle import State
from cloacina_celery.errors import InvalidPayload, TenantNotBound
from cloacina_celery.plugin.envelope import load_json
from cloacina_celery.runtime.context import bound_tenant, current_unit, leave_attempt
from cloacina_celery.store import chords, executions, queries
from cloacina_celery.store.executions import Submission

if TYPE_CHECKING:
    from cloacina_celery.plugin.app import Cloacina

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

    def __init__(self, app: Any, *, cloacina: Cloacina, tenant: str | None = None) -> None:
        super().__init__(app=app, serializer="json")
        self._cloacina = cloacina
        self._tenant = tenant

    def _tenant_of(self, task_id: str) -> str:
        tenant = self._tenant or self._cloacina.locate(task_id) or bound_tenant()
        if tenant is None:
            raise TenantNotBound(f"the result of execution {task_id}")
        return tenant

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        tenant = self._tenant_of(task_id)
        with self._cloacina.rows(tenant) as cursor:
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
        with self._cloacina.rows(tenant) as cursor:
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
        self._cloacina.on_revoked(task_id, reason or "revoked", request)

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
            self.chord_error_from_stack(body, error)

    def fail_from_current_stack(self, task_id: str, exc: BaseException | None = None) -> Any:
        """Enter a chord's body as failed."""
        if exc is not None:
            self.store_result(task_id, exc, states.FAILURE)


class AppBackend:
    """The app's own result backend, with durable tasks' ids and chords answered from their rows.

    Everything about other tasks goes to the backend that the app is configured with.
    """

    def __init__(self, app: Any, url: str | None = None) -> None:
        from celery.app import backends

        self._cloacina: Cloacina = app.cloacina
        backend, found_url = backends.by_url(app.conf.result_backend, app.loader)
        self._original = backend(app=app, url=found_url)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def _durable_for(self, task_id: str) -> DurableBackend | None:
        tenant = self._cloacina.locate(task_id) or bound_tenant()
        if tenant is None:
            return None
        with self._cloacina.database.statement() as cursor:
            known = queries.outcome(cursor, tenant, task_id) is not None
        return self._cloacina.backend_for(tenant) if known else None

    def get_task_meta(self, task_id: str, cache: bool = True) -> Any:
        """Answer from the row where there is one."""
        return (self._durable_for(task_id) or self._original).get_task_meta(task_id, cache=cache)

    def get_state(self, task_id: str) -> Any:
        """Answer from the row where there is one."""
        return self.get_task_meta(task_id)["status"]

    def wait_for_pending(self, result: Any, *args: Any, **kwargs: Any) -> Any:
        """Wait on the row where there is one."""
        return (self._durable_for(result.id) or self._original).wait_for_pending(result, *args, **kwargs)

    def on_task_call(self, producer: Any, task_id: str) -> Any:
        """Keep a durable submission independent of the other backend."""
        from cloacina_celery.plugin.amqp import was_created_durable

        return None if was_created_durable(task_id) else self._original.on_task_call(producer, task_id)

    def apply_chord(self, header_result_args: Any, body: Any, **kwargs: Any) -> Any:
        """Let a chord of durable tasks be counted by their rows."""
        group_id, results = header_result_args[0], header_result_args[1]
        plain = [result for result in _leaves(results) if not isinstance(result, DurableResult)]
        if plain and any(_is_durable(result) for result in results):
            raise InvalidPayload(
                f"{len(plain)} of the {len(list(_leaves(results)))} tasks in a chord's header are plain and the "
                "others durable; the rows cannot count what has none: make all of them durable, or none"
            )
        if results and not plain:
            self._cloacina.expect_chord(group_id)
            return None
        return self._original.apply_chord(header_result_args, body, **kwargs)

    def ensure_chords_allowed(self) -> None:
        """Allow them: those of durable tasks need no backend, for others it is asked when they start."""

    def iter_native(self, result: Any, **kwargs: Any) -> Any:
        """Wait for each result where it is kept, if some of a group's are in rows."""
        if not any(_is_durable(one) for one in result.results):
            return self._original.iter_native(result, **kwargs)
        return self._iter_each(result.results, kwargs.get("timeout"))

    @staticmethod
    def _iter_each(results: Any, timeout: float | None) -> Any:
        for one in results:
            if isinstance(one, ResultSet):
                yield one.id, one.results
                continue
            one.get(timeout=timeout, propagate=False, disable_sync_subtasks=False)
            yield one.id, one._get_task_meta()

    def set_chord_size(self, group_id: str, size: int) -> Any:
        """Enter the size of a durable chord with the submission of its last member."""
        if self._cloacina.is_expected_chord(group_id):
            self._cloacina.set_chord_size(group_id, size)
            return None
        return self._original.set_chord_size(group_id, size)


def _is_durable(result: Any) -> bool:
    return isinstance(result, DurableResult) or any(
        _is_durable(child) for child in getattr(result, "results", ())
    )


def _leaves(results: Any) -> Iterator[Any]:
    for result in results:
        if isinstance(result, ResultSet):
            yield from _leaves(result.results)
        else:
            yield result
