"""The base class of durable tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import Task
from celery.exceptions import Ignore

from cloacina_celery.core.retry import RetryPolicy
from cloacina_celery.errors import InvalidPayload, SettingsError
from cloacina_celery.plugin.envelope import KEY_HEADER
from cloacina_celery.plugin.results import DurableResult
from cloacina_celery.plugin.submitter import id_for_key
from cloacina_celery.runtime.context import bind_tenant, bound_tenant, current_attempt

if TYPE_CHECKING:
    from cloacina_celery.plugin.parts import Parts
    from cloacina_celery.plugin.results import DurableBackend


UNLIMITED = 2**31 - 1


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
        return self.parts.settler.run(self, lambda: run(*args, **kwargs))

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
            initial_delay=max(1.0, backoff) if backoff else countdown,
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
            task_id = id_for_key(tenant, key)
            options["headers"] = {**(options.get("headers") or {}), KEY_HEADER: key}
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

    def on_replace(self, sig: Any) -> Any:
        """Keep the replacement for the settlement, so that it is submitted with it or not at all."""
        attempt = current_attempt()
        if attempt is None or self.request.is_eager:
            return super().on_replace(sig)
        attempt.replacement = sig
        raise Ignore("Replaced by new task")
