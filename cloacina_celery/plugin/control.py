"""How beat reaches the reaper: a control queue that every worker consumes, served without a pool slot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import bootsteps, signals
from kombu import Consumer

from cloacina_celery.core.settings import Settings
from cloacina_celery.plugin.doorbell import DoorbellStep
from cloacina_celery.plugin.prefetch import PrefetchStep
from cloacina_celery.plugin.selection import note_excluded_queues
from cloacina_celery.plugin.task import ACCUMULATE_TASK, DurableTask
from cloacina_celery.plugin.worker import KeeperStep
from cloacina_celery.telemetry import log

if TYPE_CHECKING:
    from celery import Celery

    from cloacina_celery.plugin.kernel import Kernel
    from cloacina_celery.plugin.parts import Parts

SWEEP_TASK = "cloacina.sweep"
BEAT_ENTRY = "cloacina-sweep"


class ControlStep(bootsteps.ConsumerStep):
    """Take beat's messages in the worker's main process, and on a channel of their own.

    On the tasks' channel they would wait until a slot is free for a task: a worker whose slots are all busy with
    long ones has to recover what others have lost all the same.
    """

    requires = ("celery.worker.consumer.connection:Connection",)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._kernel: Kernel = parent.app.cloacina.parts.kernel

    def get_consumers(self, channel: Any) -> list[Consumer]:
        """Return the consumer of the control queue, which a login that sees one tenant alone must not take from."""
        if self._kernel.own_tenant is not None:
            return []
        name = self._kernel.settings.control_queue
        queues = self._kernel.app.amqp.queues
        queue = queues.get(name) or queues.new_missing(name)
        return [Consumer(channel, [queue], on_message=self._take, accept=["json"])]

    def _take(self, message: Any) -> None:
        if message.headers.get("task") != SWEEP_TASK:
            log(
                "message.refused", execution_id=message.headers.get("id"), task=message.headers.get("task"),
                error="the control queue takes no tasks",
            )  # fmt: skip
        elif self._kernel.keeper is not None:
            self._kernel.keeper.sweep_all_soon()
        message.ack()


def install(app: Celery, parts: Parts) -> None:
    """Register the sweep task, its beat entry, and the worker's keeper."""

    # Lazily: registering at once would finalize an app whose module is still being read.
    @app.task(name=SWEEP_TASK, ignore_result=True, shared=False)
    def sweep() -> int:
        """Sweep all tenants here and now, where the task is called without a worker."""
        return parts.recovery.reaper().sweep_all()

    @app.task(name=ACCUMULATE_TASK, base=DurableTask, shared=False)
    def accumulate(*results: Any, index: int | None = None) -> Any:
        """Answer with a replaced group's results: Celery's task of that name, as an execution."""
        return results if index is None else results[index]

    app.steps["worker"].add(KeeperStep)
    app.steps["consumer"].update({DoorbellStep, PrefetchStep, ControlStep})
    note_excluded_queues(app, parts.kernel)

    def add_to_schedule(**_: Any) -> None:
        if parts.kernel.settings.enable_recovery:
            app.conf.beat_schedule = {BEAT_ENTRY: beat_entry(parts.kernel.settings), **app.conf.beat_schedule}

    def add_to_running_beat(sender: Any, **_: Any) -> None:
        # An app may have assigned beat_schedule anew after it was finalized.
        if (
            sender.app is app
            and parts.kernel.settings.enable_recovery
            and BEAT_ENTRY not in sender.scheduler.schedule
        ):
            sender.scheduler.add(name=BEAT_ENTRY, **beat_entry(parts.kernel.settings))

    app.on_after_finalize.connect(add_to_schedule, weak=False)
    signals.beat_init.connect(add_to_running_beat, weak=False)


def beat_entry(settings: Settings) -> dict[str, Any]:
    """Return the entry by which beat has all tenants swept."""
    return {
        "task": SWEEP_TASK,
        "schedule": settings.sweep_interval,
        # A sweep that nobody took in time is worth nothing: the next one does all of its work.
        "options": {"queue": settings.control_queue, "expires": settings.sweep_interval},
    }
