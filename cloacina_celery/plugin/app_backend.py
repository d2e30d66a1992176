"""The app's result backend: its own, with durable tasks answered from their rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.app import backends

from cloacina_celery.plugin.results import DurableResult

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

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def get_task_meta(self, task_id: str, cache: bool = True) -> Any:
        """Answer from the row where there is one."""
        return (self._backends.find(task_id) or self._original).get_task_meta(task_id, cache=cache)

    def get_state(self, task_id: str) -> Any:
        """Answer from the row where there is one."""
        return self.get_task_meta(task_id)["status"]

    def wait_for_pending(self, result: Any, *args: Any, **kwargs: Any) -> Any:
        """Wait on the row where there is one."""
        return (self._backends.find(result.id) or self._original).wait_for_pending(result, *args, **kwargs)

    def on_task_call(self, producer: Any, task_id: str) -> Any:
        """Keep a durable submission independent of the other backend."""
        if self._kernel.last_message.is_durable(task_id):
            return None
        return self._original.on_task_call(producer, task_id)

    def apply_chord(self, header_result_args: Any, body: Any, **kwargs: Any) -> Any:
        """Let a chord of durable tasks be counted by their rows."""
        group_id, results = header_result_args[0], header_result_args[1]
        if any(_is_durable(result) for result in results):
            self._kernel.chord_sizes.expect(group_id)
            return None
        return self._original.apply_chord(header_result_args, body, **kwargs)

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
