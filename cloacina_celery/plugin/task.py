"""The base class of durable tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from celery import Task, chord, group
from celery.canvas import _chain
from celery.exceptions import Ignore, InvalidTaskError

from cloacina_celery.core.retry import RetryPolicy
from cloacina_celery.errors import InvalidPayload, SettingsError
from cloacina_celery.plugin.envelope import DELAY_HEADERS, KEY_HEADER
from cloacina_celery.plugin.results import DurableResult
from cloacina_celery.plugin.submitter import id_for_key
from cloacina_celery.runtime.context import bind_tenant, bound_tenant, current_attempt
from cloacina_celery.telemetry import log, logger

if TYPE_CHECKING:
    from celery import Celery

    from cloacina_celery.plugin.parts import Parts
    from cloacina_celery.plugin.results import DurableBackend


UNLIMITED = 2**31 - 1
ACCUMULATE_TASK = "cloacina.accumulate"


class DurableTask(Task):
    """A Celery task each of whose calls is a row in the tenant's schema.

    As ``base=DurableTask`` on an existing task, Celery's own ``autoretry_for``, ``max_retries``,
    ``retry_backoff``, ``retry_jitter`` and ``self.retry()`` mean what they always meant, durably.
    """

    abstract = True
    Request = "cloacina_celery.plugin.request:DurableRequest"

    # The row outlives the worker, so the message need not: it is acknowledged when the task starts.
    acks_late = False
    reject_on_worker_lost = False
    track_started = False

    cloacina_retry: RetryPolicy | None = None
    max_recoveries: int | None = None

    @property
    def parts(self) -> Parts:
        """The plugin's parts on this task's app.

        Raises:
            SettingsError: the app has none.
        """
        plugin = getattr(self.app, "cloacina", None)
        if plugin is None:
            raise SettingsError(
                f"task {self.name} is durable but its app {self.app.main!r} has no plugin: "
                "write Cloacina(app, database_url=...) where the app is made"
            )
        parts: Parts = plugin.parts
        return parts

    @property
    def backend(self) -> DurableBackend:
        """Celery's result backend of this task: the rows."""
        return self.parts.backends.of(None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run durably when a worker calls, and as a plain function otherwise."""
        request = self.request
        attempt = current_attempt()
        if request.called_directly or (attempt is not None and attempt.id == request.id):
            return super().__call__(*args, **kwargs)
        if request.is_eager:
            return self.run(*args, **kwargs)
        # Celery's autoretry wrapper would retry by today's code; the row's policy, made from the same
        # settings at submission, decides instead.
        run: Any = getattr(self, "_orig_run", self.run)

        def body() -> Any:
            self.before_start_of_user(request.id, args, kwargs)
            return run(*args, **kwargs)

        return self.parts.settler.run(self, body)

    def start_strategy(self, app: Any, consumer: Any, **kwargs: Any) -> Any:
        """Return Celery's handler of this task's messages, which a message that nobody should have sent cannot stop."""
        handle = super().start_strategy(app, consumer, **kwargs)
        broker_trouble = (*consumer.connection_errors, *consumer.connection.channel_errors)

        def guarded(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **options: Any) -> Any:
            try:
                _check_time_limit(message.headers.get("timelimit"))
                return handle(message, body, ack, reject, callbacks, **options)
            except broker_trouble:
                raise
            except Exception as error:  # noqa: BLE001  # Celery unpacks what it is sent, whatever it is
                log(
                    "message.refused",
                    execution_id=message.headers.get("id"),
                    task=self.name,
                    error=repr(error),
                )
                if not message.acknowledged:
                    reject(logger, consumer.connection_errors)
                return None

        return guarded

    @classmethod
    def on_bound(cls, app: Any) -> None:
        """Have a ``before_start`` of the user's run inside the attempt: what it raises is settled by policy."""
        if cls.before_start is not Task.before_start:
            cls.before_start_of_user = cls.before_start  # type: ignore[method-assign]
            cls.before_start = Task.before_start

    def before_start_of_user(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Do nothing: the task has no ``before_start`` of its own."""

    @property
    def effective_retry_policy(self) -> RetryPolicy:
        """The policy that new executions are given: the task's own, or the one Celery's autoretry settings mean.

        Without either an exception is final, as Celery has it.
        """
        if self.cloacina_retry is not None:
            return self.cloacina_retry
        retry_for = tuple(getattr(self, "autoretry_for", ()))
        if not retry_for:
            return RetryPolicy(max_attempts=1)
        retry_kwargs: dict[str, Any] = getattr(self, "retry_kwargs", {})
        max_retries = retry_kwargs.get("max_retries", self.max_retries)
        backoff = float(getattr(self, "retry_backoff", False))
        countdown: Any = retry_kwargs.get("countdown", self.default_retry_delay)
        return RetryPolicy(
            max_attempts=UNLIMITED if max_retries is None else max_retries + 1,
            initial_delay=min(max(1.0, backoff), getattr(self, "retry_backoff_max", 600))
            if backoff
            else countdown,
            backoff="exponential" if backoff else "fixed",
            max_delay=getattr(self, "retry_backoff_max", 600) if backoff else countdown,
            jitter="full" if backoff and getattr(self, "retry_jitter", True) else False,
            retry_on=retry_for,
            give_up_on=tuple(getattr(self, "dont_autoretry_for", ())),
        )

    def apply_async(
        self, args: Any = None, kwargs: Any = None, task_id: str | None = None, **options: Any
    ) -> Any:
        """Submit a call, and return its result object.

        Beside Celery's own options:

        Args:
            tenant: whose schema the call belongs to; by default the bound tenant's.
            idempotency_key: one execution per key and tenant; a second call gets the first one's result object.
            session: a SQLAlchemy session of the same database whose transaction the row joins.

        Raises:
            TenantNotBound, UnknownTenant, TenantMismatch: there is no such tenant for the call.
            InvalidPayload: JSON cannot carry the arguments.
            DatabaseUnavailable: the database did not answer; with an idempotency key, calling again is safe.
        """
        if self.app.conf.task_always_eager:
            return self._apply_eagerly(args, kwargs, task_id, options)
        key = options.pop("idempotency_key", None)
        if key is not None:
            if not isinstance(key, str) or not key:
                raise InvalidPayload(f"idempotency_key is a non-empty string, not {key!r}")
            if task_id is not None:
                raise InvalidPayload("pass either task_id or idempotency_key: the key decides the id")
            tenant = self.parts.submitter.resolve_tenant(
                self.name, options.get("tenant"), options.get("queue")
            )
            task_id = id_for_key(self.parts.kernel.tenants.standing_of(tenant), key)
            options["headers"] = {**(options.get("headers") or {}), KEY_HEADER: key}
        # Past Celery, which with quorum queues would send a delayed message by another exchange, or warn that it
        # cannot; the row keeps the delay.
        for option, header in DELAY_HEADERS.items():
            if (value := options.pop(option, None)) is not None:
                options["headers"] = {**(options.get("headers") or {}), header: value}
        return super().apply_async(args, kwargs, task_id=task_id, **options)

    def _apply_eagerly(self, args: Any, kwargs: Any, task_id: str | None, options: dict[str, Any]) -> Any:
        tenant = options.pop("tenant", None) or bound_tenant()
        for option in ("idempotency_key", "session"):
            options.pop(option, None)
        if tenant is None:
            return super().apply_async(args, kwargs, task_id=task_id, **options)
        with bind_tenant(tenant):
            return super().apply_async(args, kwargs, task_id=task_id, **options)

    def AsyncResult(  # noqa: N802  # Celery's name
        self, task_id: str, **kwargs: Any
    ) -> DurableResult:
        """Return the result object of one of this task's executions."""
        parts = self.parts
        backend = parts.backends.of(parts.kernel.locations.find(task_id) or bound_tenant())
        return DurableResult(task_id, backend=backend, task_name=self.name, app=self.app, **kwargs)

    def replace(self, sig: Any) -> Any:
        """Let another call, or a canvas, take over this execution's id and answer for it."""
        # Celery collects a group's results in a plain task of its own; a row's id must go to a durable one.
        if isinstance(sig, group):
            sig |= self.app.tasks[ACCUMULATE_TASK].s(index=0)
        elif isinstance(sig, _chain) and sig.tasks and isinstance(sig.tasks[-1], group):
            sig.tasks = [*sig.tasks[:-1], sig.tasks[-1] | self.app.tasks[ACCUMULATE_TASK].s(index=0)]
        return super().replace(sig)

    def on_replace(self, sig: Any) -> Any:
        """Keep the replacement for the settlement, so that it is submitted with it or not at all."""
        attempt = current_attempt()
        if attempt is None or self.request.is_eager:
            return super().on_replace(sig)
        for call in _calls_in(sig):
            if call.options.get("task_id") == attempt.id and not is_durable(
                self.app, call.task, call.options
            ):
                raise InvalidPayload(
                    f"{self.name} cannot be replaced by {call.task}, which is not a durable task and would "
                    "never settle this execution: make it one, or call it from here"
                )
        attempt.replacement = sig
        raise Ignore("Replaced by new task")


def _check_time_limit(limits: object) -> None:
    # Celery would find out when the task has its slot already, and never give the slot back.
    if limits is None:
        return
    if (
        not isinstance(limits, (list, tuple))
        or len(limits) != 2
        or not all(limit is None or isinstance(limit, (int, float)) for limit in limits)
    ):
        raise InvalidTaskError(f"timelimit is a pair of seconds, not {limits!r}")


def is_durable(app: Celery, name: str, options: dict[str, Any]) -> bool:
    """Tell whether a message is a durable call: by its task, or, where that is elsewhere, by its tenant."""
    task = app._tasks.get(name)
    return isinstance(task, DurableTask) or (task is None and options.get("tenant") is not None)


def _calls_in(sig: Any) -> Iterator[Any]:
    # Of a chord the body has the id, of a group nobody.
    if isinstance(sig, chord):
        yield from _calls_in(sig.body)
    elif isinstance(sig, _chain):
        for step in sig.tasks:
            yield from _calls_in(step)
    else:
        yield sig
