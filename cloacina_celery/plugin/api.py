"""What operators and programs ask of executions; the CLI prints the same."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING

from cloacina_celery.core.lifecycle import State
from cloacina_celery.core.settings import MAX_INTEGER
from cloacina_celery.errors import ExecutionNotFound, InvalidPayload, TransitionRefused
from cloacina_celery.store import queries
from cloacina_celery.store.queries import Event, Execution

if TYPE_CHECKING:
    from cloacina_celery.plugin.parts import Parts


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
