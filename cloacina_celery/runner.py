"""An embedded worker and reaper: runs one tenant's tasks in threads of this process."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from celery import Celery, current_app
from celery.app.trace import trace_task
from kombu import Connection
from kombu.mixins import ConsumerMixin

from cloacina_celery.core.tenant import LEGACY_TENANT
from cloacina_celery.errors import SettingsError
from cloacina_celery.plugin.app import Cloacina
from cloacina_celery.plugin.control import SWEEP_TASK
from cloacina_celery.plugin.envelope import ATTEMPT_HEADER
from cloacina_celery.plugin.limits import LOOK_INTERVAL
from cloacina_celery.runtime.context import enter_worker
from cloacina_celery.runtime.keeper import Keeper, worker_name
from cloacina_celery.runtime.lease import Duties
from cloacina_celery.runtime.patrol import Patrol
from cloacina_celery.runtime.trust import Held
from cloacina_celery.store.address import normalise_url
from cloacina_celery.telemetry import logger

SLOT_PATIENCE = 0.5
"""Seconds after which a consumer that waits for a free thread looks whether it shall stop."""


class Runner:
    """Run a tenant's durable tasks in this process until `shutdown`; without a tenant, those of ``public``.

    A thread cannot be killed: time limits do not apply here, and a task that takes the process down takes the
    runner with it. The next runner or worker of the tenant recovers it.

    Args:
        database_url: the database of all tenants.
        schema: the tenant; ``public`` is the schema of an existing single-tenant deployment.
        app: the Celery app with the tasks; by default the current app. It gets the plugin if it has none.
        max_concurrent_tasks: threads.
        enable_recovery: whether this runner sweeps its tenant.

    Raises:
        SettingsError: the app's plugin works on another database.
        InvalidTenantName, SchemaMismatch: the tenant cannot be served.
    """

    def __init__(
        self,
        database_url: str,
        schema: str = LEGACY_TENANT,
        *,
        app: Celery | None = None,
        max_concurrent_tasks: int = 4,
        enable_recovery: bool = True,
    ) -> None:
        threads: object = max_concurrent_tasks
        if not isinstance(threads, int) or threads < 1:
            raise SettingsError(
                f"max_concurrent_tasks is a whole number of at least 1, not {max_concurrent_tasks!r}"
            )
        self.app: Celery = app if app is not None else current_app._get_current_object()
        self.tenant = schema
        self.cloacina = _plugin_of(self.app, database_url)
        self.cloacina.tenants.open(schema, legacy=schema == LEGACY_TENANT)
        self.app.finalize()
        self.app.loader.import_default_modules()
        settings = dataclasses.replace(self.cloacina.settings, enable_recovery=enable_recovery)
        self._running: dict[str, Held] = {}
        tenants = self.cloacina.parts.kernel.tenants
        self._keeper = Keeper(
            self.cloacina.database,
            settings,
            self.cloacina.parts.recovery.reaper(),
            name=worker_name(f"runner@{schema}"),
            duties=Duties(
                tenants=lambda: [schema] if tenants.knows(schema) else [],
                held=lambda: list(self._running.values()),
                reserved=dict,  # a message that a runner takes starts at once
                look=tenants.look_again,
            ),
        )
        self.cloacina.parts.kernel.boards[self._keeper.worker_id] = self._keeper.board
        self._pool = ThreadPoolExecutor(
            max_concurrent_tasks,
            f"cloacina-{schema}",
            initializer=enter_worker,
            initargs=(self._keeper.worker_id,),
        )
        self._slots = threading.Semaphore(max_concurrent_tasks)
        self._consumer = _Consumer(self, max_concurrent_tasks)
        self._keeper.start()
        self._watch = Patrol(
            lambda: self.cloacina.parts.limiter.look([schema]),
            name=f"cloacina-limits-{schema}",
            interval=LOOK_INTERVAL,
        )
        self._watch.start()
        self._thread = threading.Thread(
            target=self._consumer.run, name=f"cloacina-consumer-{schema}", daemon=True
        )
        self._thread.start()

    @classmethod
    def with_schema(cls, database_url: str, schema: str, **options: Any) -> Self:
        """Run a tenant's tasks; the first start creates the schema, later ones find it."""
        return cls(database_url, schema, **options)

    def execute(self, task: str, *args: Any, **kwargs: Any) -> Any:
        """Submit a call of a task by its name for this runner's tenant, and return its result object."""
        found = self.app.tasks.get(task)
        if found is None:
            raise SettingsError(
                f"unknown task {task!r}: the app knows {', '.join(sorted(self._task_names()))}"
            )
        return found.apply_async(args, kwargs, tenant=self.tenant)

    def shutdown(self, *, wait: bool = True) -> None:
        """Take no more work, let what runs end, give the rest back, and sign off. A second call does nothing.

        Args:
            wait: ``False`` gives running work back at once; its attempts find their fence closed.
        """
        if self._consumer.should_stop:
            return
        self._consumer.should_stop = True
        self._thread.join()
        self._pool.shutdown(wait=wait, cancel_futures=True)
        self._watch.stop()
        self._keeper.stop(reason="the runner was shut down")
        self.cloacina.parts.kernel.boards.pop(self._keeper.worker_id, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _task_names(self) -> list[str]:
        return [name for name in self.app.tasks if not name.startswith(("celery.", "cloacina."))]

    def _take(self, message: Any) -> None:
        headers = message.headers
        if headers.get("task") == SWEEP_TASK:
            message.ack()
            self._keeper.sweep_all_soon()
            return
        try:
            call = self._call_of(message)
        except Exception as error:  # noqa: BLE001  # whatever a message that nobody should have sent may raise
            message.ack()
            logger.error("message %r for %r skipped: %s", headers.get("id"), headers.get("task"), error)
            return
        # A backlog waits in the queue and not in here, or the sweep would take its messages for lost.
        while not self._slots.acquire(timeout=SLOT_PATIENCE):
            if self._consumer.should_stop:
                return  # and the broker has its message back
        # The row outlives the message, so it may go at once; what was taken and not run is rung again.
        message.ack()
        self._pool.submit(self._run, *call)

    def _call_of(self, message: Any) -> tuple[Any, str, Any, Any, dict[str, Any]]:
        headers = message.headers
        name, execution_id = headers.get("task"), headers.get("id")
        task = self.app.tasks.get(name)
        if task is None or not isinstance(execution_id, str):
            raise SettingsError(f"unknown task {name!r}: import the module that defines it")
        args, kwargs, embed = message.payload
        request = {
            **headers, **(embed or {}), "is_eager": False, "hostname": self._keeper.name,
            "delivery_info": {**message.delivery_info, "routing_key": message.delivery_info.get("routing_key")},
        }  # fmt: skip
        return task, execution_id, args, kwargs, request

    def _run(self, task: Any, execution_id: str, args: Any, kwargs: Any, request: dict[str, Any]) -> None:
        held = (self.tenant, execution_id, request.get(ATTEMPT_HEADER, 0))
        try:
            self._running[execution_id] = held
            trace_task(task, execution_id, args, kwargs, request, app=self.app, hostname=self._keeper.name)
        finally:
            self._slots.release()
            if self._running.get(execution_id) is held:
                del self._running[execution_id]


class _Consumer(ConsumerMixin):
    """Takes messages from the tenant's queue and the control queue, and reconnects by itself."""

    def __init__(self, runner: Runner, prefetch: int) -> None:
        self._runner = runner
        self._prefetch = prefetch
        self.connection: Connection = runner.app.connection_for_read()

    def get_consumers(self, consumer_class: Any, channel: Any) -> list[Any]:
        """Return the consumer of both queues."""
        queues = self._runner.app.amqp.queues
        names = (self._runner.tenant, self._runner.cloacina.settings.control_queue)
        return [
            consumer_class(
                [queues.get(name) or queues.new_missing(name) for name in names],
                on_message=self._runner._take,
                prefetch_count=self._prefetch,
                accept=["json"],
            )
        ]


def _plugin_of(app: Celery, database_url: str) -> Cloacina:
    cloacina: Cloacina | None = getattr(app, "cloacina", None)
    if cloacina is None:
        return Cloacina(app, database_url=database_url)
    if cloacina.database.url != normalise_url(database_url):
        raise SettingsError(
            f"app {app.main!r} works on database {cloacina.database.url.render_as_string()} and the runner was given "
            f"{normalise_url(database_url).render_as_string()}: one app, one database"
        )
    return cloacina
