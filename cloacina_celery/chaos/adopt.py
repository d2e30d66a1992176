"""Making a user's own app work for a verification: theirs in all, but for whom it works for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from celery import signals

from cloacina_celery.chaos import tasks
from cloacina_celery.plugin.control import BEAT_ENTRY, beat_entry
from cloacina_celery.runtime.reaper import Reaper


class GuestReaper(Reaper):
    """A reaper that looks at the run's own tenants, and leaves everybody else's to everybody else."""

    own: frozenset[str]

    def sweep_all(self, *, everything: bool = True) -> int:
        """Sweep the run's tenants."""
        own = sorted(self.own)
        return self.recover_dead_workers() + self.sweep(own if everything else self.attend(own))


def adopt(app: Any, settings: dict[str, Any], tenants: Iterable[str]) -> Any:
    """Have a user's app work for these tenants alone, in this process; return the app.

    Args:
        settings: of the plugin; they win over the app's own.
        tenants: those that this process may touch.
    """
    parts = app.cloacina.parts
    parts.kernel.override(settings)
    own, make = frozenset(tenants), parts.recovery.reaper

    def reaper() -> Reaper:
        made = make()
        made.__class__ = GuestReaper
        made.own = own
        look = made._watch.look
        made._watch.look = lambda: [worker for worker in look() if own.issuperset(worker.tenants)]
        return made  # type: ignore[no-any-return]

    parts.recovery.reaper = reaper

    def keep_one_entry(sender: Any, **_: Any) -> None:
        # The user's periodic tasks have a beat of their own, and run once.
        schedule = sender.scheduler.schedule
        for name in list(schedule):
            del schedule[name]
        sender.scheduler.add(name=BEAT_ENTRY, **beat_entry(parts.kernel.settings))

    signals.beat_init.connect(keep_one_entry, weak=False)
    tasks.join(app)
    return app
