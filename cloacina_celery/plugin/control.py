"""How beat reaches the reaper: a control queue that every worker consumes, served without a pool slot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import Task, signals

from cloacina_celery.core.settings import Settings
from cloacina_celery.plugin.doorbell import DoorbellStep
from cloacina_celery.plugin.selection import note_excluded_queues
from cloacina_celery.plugin.task import ACCUMULATE_TASK, DurableTask
from cloacina_celery.plugin.worker import KeeperStep
from cloacina_celery.telemetry import logger

if TYPE_CHECKING:
    from celery import Celery

    from cloacina_celery.plugin.parts import Parts

SWEEP_TASK = "cloacina.sweep"
BEAT_ENTRY = "cloacina-sweep"


class SweepTask(Task):
    """Ask the worker's keeper to sweep all tenants.

    The worker's main process takes the message itself: a worker whose slots are all busy still recovers.
    """

    abstract = True
    ignore_result = True

    def start_strategy(self, app: Any, consumer: Any, **kwargs: Any) -> Any:
        """Return the handler of this task's messages."""

        def handle(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **_: Any) -> None:
            keeper = app.cloacina.parts.kernel.keeper
            if keeper is not None:
                keeper.sweep_all_soon()
            ack(logger, consumer.connection_errors)

        return handle


def install(app: Celery, parts: Parts) -> None:
    """Register the sweep task, its beat entry, and the worker's keeper."""

    # Lazily: registering at once would finalize an app whose module is still being read.
    @app.task(name=SWEEP_TASK, base=SweepTask, shared=False)
    def sweep() -> int:
        """Sweep all tenants here and now, where the task is called without a worker."""
        return parts.recovery.reaper().sweep_all()

    @app.task(name=ACCUMULATE_TASK, base=DurableTask, shared=False)
    def accumulate(*results: Any, index: int | None = None) -> Any:
        """Answer with a replaced group's results: Celery's task of that name, as an execution."""
        return results if index is None else results[index]

    app.steps["worker"].add(KeeperStep)
    app.steps["consumer"].add(DoorbellStep)
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
