"""The app's result backend: its own, with durable tasks answered from their rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from celery.app import backends
from celery.backends.base import DisabledBackend
from celery.exceptions import NotRegistered
from celery.result import ResultSet
from celery.states import PENDING

from cloacina_celery.errors import InvalidPayload
from cloacina_celery.plugin.results import DurableResult
from cloacina_celery.telemetry import log

if TYPE_CHECKING:
    from cloacina_celery.plugin.parts import Parts


class AppBackend:
    """The app's own result backend, with durable tasks' ids and chords answered from their rows.

    Everything about other tasks goes to the backend that the app is configured with.
    """

    def __init__(self, app: Any, url: str | None = None) -> None:
        parts: Parts = app.cloacina.parts
        self._kernel, self._backends = parts.kernel, parts.backends
        backend, found_url = backends.by_url(app.conf.result_backend, app.loader)
        self._original = backend(app=app, url=found_url)
        self._is_disabled = isinstance(self._original, DisabledBackend)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def get_task_meta(self, task_id: str, cache: bool = True) -> Any:
        """Answer from the row where there is one."""
        return self._holder_of(task_id).get_task_meta(task_id, cache=cache)

    def get_state(self, task_id: str) -> Any:
        """Answer from the row where there is one; a worker that is told to revoke asks by the id alone."""
        durable = self._backends.find(task_id)
        if durable is None and self._is_disabled:
            return PENDING
        return (durable or self._original).get_state(task_id)

    def wait_for_pending(self, result: Any, *args: Any, **kwargs: Any) -> Any:
        """Wait on the row where there is one."""
        return self._holder_of(result.id).wait_for_pending(result, *args, **kwargs)

    def mark_as_failure(self, task_id: str, exc: BaseException, *args: Any, **kwargs: Any) -> Any:
        """Say what to do about a task that this worker does not know; a durable one's row waits for one that does."""
        if isinstance(exc, NotRegistered):
            log("task.unknown", task=str(exc).strip("'"), execution_id=task_id)
        return self._original.mark_as_failure(task_id, exc, *args, **kwargs)

    def mark_as_revoked(self, task_id: str, *args: Any, **kwargs: Any) -> Any:
        """Leave a row to the worker that has its message; without a backend there is nothing else to store."""
        if not self._is_disabled:
            return self._original.mark_as_revoked(task_id, *args, **kwargs)
        return None

    def _holder_of(self, task_id: str) -> Any:
        durable = self._backends.find(task_id)
        if durable is not None:
            return durable
        if not self._is_disabled or self._kernel.messages.was_plain(task_id):
            return self._original
        # Without another backend an id can only be an execution's: its tenant answers, or must be named.
        return self._backends.of(None)

    def on_task_call(self, producer: Any, task_id: str) -> Any:
        """Keep a durable submission independent of the other backend."""
        if self._kernel.messages.is_durable(task_id):
            return None
        return self._original.on_task_call(producer, task_id)

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
            self._kernel.chord_sizes.expect(group_id)
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
        if self._kernel.chord_sizes.is_expected(group_id):
            self._kernel.chord_sizes.put(group_id, size)
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
