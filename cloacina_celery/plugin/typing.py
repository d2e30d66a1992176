"""What type checkers know of a durable task: its arguments and its result; not there at run time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, ParamSpec, Protocol, TypeVar

from sqlalchemy.orm import Session, scoped_session

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)


class Result(Protocol[R_co]):
    """Celery's ``AsyncResult`` of a call whose function returns ``R``."""

    id: str
    task_id: str
    parent: Any

    @property
    def state(self) -> str:
        """One of Celery's states, read from the row."""

    @property
    def status(self) -> str:
        """The same as ``state``."""

    @property
    def result(self) -> Any:
        """What the task returned or raised, as far as it has."""

    @property
    def info(self) -> Any:
        """The same as ``result``."""

    @property
    def traceback(self) -> str | None:
        """The traceback of the last error."""

    @property
    def date_done(self) -> datetime | None:
        """When the execution was settled."""

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float = ...,
        disable_sync_subtasks: bool = True,
        **options: Any,
    ) -> R_co:
        """Wait for the execution to settle; return what it returned, or raise what it raised."""

    def ready(self) -> bool:
        """Tell whether the execution is settled."""

    def successful(self) -> bool:
        """Tell whether it succeeded."""

    def failed(self) -> bool:
        """Tell whether it failed."""

    def revoke(self, *args: Any, **kwargs: Any) -> None:
        """Cancel it."""

    def forget(self) -> None:
        """Do as Celery's."""


class TypedTask(Protocol[P, R_co]):
    """A durable task made from a function of the parameters ``P`` that returns ``R``."""

    name: str
    app: Any
    request: Any

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call the function here and now."""

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> Result[R_co]:
        """Submit a call with these arguments."""

    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        task_id: str | None = None,
        *,
        tenant: str | None = None,
        idempotency_key: str | None = None,
        session: Session | scoped_session[Any] | None = None,
        countdown: float | None = None,
        eta: datetime | str | None = None,
        expires: float | datetime | str | None = None,
        link: Any = None,
        link_error: Any = None,
        queue: str | None = None,
        priority: int | None = None,
        headers: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Result[R_co]:
        """Submit a call with options; Celery's others pass as well."""

    def s(self, *args: Any, **kwargs: Any) -> Any:
        """Return a signature; a chain puts a result before these arguments, so types end here."""

    def si(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Return an immutable signature: all the arguments there will be."""

    def signature(self, args: Iterable[Any] | None = None, *starargs: Any, **starkwargs: Any) -> Any:
        """Return a signature with options."""

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Run the function here and now, and return Celery's ``EagerResult``."""

    def AsyncResult(self, task_id: str, **kwargs: Any) -> Result[R_co]:  # noqa: N802  # Celery's name
        """Return the result object of an execution by its id."""
