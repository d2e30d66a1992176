"""A worker's queues follow the catalog: tenants that come are consumed, tenants that go are not, without a restart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from celery import signals

from cloacina_celery.core.shard import Selection
from cloacina_celery.store import limits, migrate
from cloacina_celery.telemetry import log

if TYPE_CHECKING:
    from celery import Celery

    from cloacina_celery.plugin.kernel import Kernel

LOOK_INTERVAL = 1.0
"""Seconds between two looks into the catalog: one statement each."""

QUEUES_AT_ONCE = 100
"""Queues that are begun with in one go: each costs the broker a round trip, and messages wait meanwhile."""

Changes: TypeAlias = tuple[list[str], list[str]]
"""Queues to begin with, and queues to end with."""
NOTHING: Changes = ([], [])


class Followed:
    """The queues of one worker, as the selection and the catalog have them.

    `look` may run in any thread; what touches the broker's channel is done by the consumer's own loop.

    Args:
        worker: Celery's worker, whose consumer need not exist yet.
        selection: what it was told to serve.
    """

    def __init__(self, kernel: Kernel, worker: Any, selection: Selection) -> None:
        self._kernel = kernel
        self._worker = worker
        self._selection = selection
        self._queues = worker.app.amqp.queues
        # What was begun with and not ended: a queue that an operator cancels by remote control stays cancelled.
        self._begun: frozenset[str] = frozenset()
        self._mismatched: frozenset[str] = frozenset()
        self._withheld: frozenset[str] = frozenset()
        self._changes = NOTHING

    @classmethod
    def of(cls, kernel: Kernel, worker: Any) -> Followed:
        """Take the selectors out of the worker's queues, where Celery has them as queues of such names.

        Raises:
            SettingsError: one is meant as a selection and can select nothing.
        """
        queues = worker.app.amqp.queues
        selection = Selection.of(list(queues.consume_from), leave_out=kernel.excluded_queues)
        for name in [name for name in queues.consume_from if name not in selection.queues]:
            queues.deselect(name)
            queues.pop(name, None)
        return cls(kernel, worker, selection)

    @property
    def selects(self) -> bool:
        """Whether tenants are served that were not named."""
        return bool(self._selection.selectors)

    def begin(self) -> None:
        """Select the queues of the tenants that exist, before the consumer starts."""
        begin, end = self._missing()
        for name in begin:
            self._queues.select_add(self._queues[name])
        for name in end:
            self._queues.deselect(name)
        self._begun = frozenset(begin)

    def tenants(self) -> Sequence[str]:
        """List the tenants that the worker serves: also one that is paused may have had a task running."""
        consumed = list(self._queues.consume_from)
        return [name for name in {*consumed, *self._withheld} if self._kernel.tenants.knows(name)]

    def look(self) -> None:
        """Compare the queues with the catalog, and have the consumer's loop do what is missing.

        What it could not do, because the broker was away, is missing at the next look too.
        """
        self._changes = self._missing()
        consumer = getattr(self._worker, "consumer", None)
        if consumer is not None and any(self._changes):
            consumer.call_soon(self._apply, consumer)

    def _missing(self) -> Changes:
        with self._kernel.database.statement() as cursor:
            seats = limits.seats(cursor)
        self._kernel.weights = {name: seat.weight for name, seat in seats.items() if seat.weight != 1}
        existing = {name: seat.is_paused for name, seat in seats.items()}
        active = {name for name, is_paused in existing.items() if not is_paused}
        consumed = {name for name in list(self._queues.consume_from) if self._kernel.tenants.knows(name)}
        selected = {name for name in existing if self._selection.has(name)}
        # A queue that was added by remote control and then withheld is begun with again as well.
        withheld = {name for name in selected | consumed | self._withheld if existing.get(name)}
        resumed = {name for name in self._withheld if name in active and name not in consumed}
        self._withheld = frozenset(withheld | resumed)
        begin = self._at_our_revision(sorted((selected & active | resumed) - self._begun))
        return begin, sorted((self._begun | consumed) - active)

    def _at_our_revision(self, names: Sequence[str]) -> list[str]:
        """Leave out, and say once, whose schema we cannot work with: it must not keep the others' worker down."""
        if not names:
            return []
        with self._kernel.database.statement() as cursor:
            found = migrate.revisions_of(cursor, names)
            ours = {at: migrate.works_with(cursor, at, "tenant") for at in {None, *found.values()}}
        mismatched = frozenset(name for name in names if not ours[found.get(name)])
        for name in sorted(mismatched - self._mismatched):
            log(
                "selection.left_out",
                tenant=name,
                found=found.get(name) or "none",
                expected=migrate.head_of("tenant"),
            )
        self._mismatched = mismatched
        matching = [name for name in names if name not in mismatched]
        # As they stand, and not just that they exist: keys are counted by a tenant's epoch and key space.
        self._kernel.tenants.learn(matching)
        return matching

    def _apply(self, consumer: Any) -> None:
        # Celery may come here late and more than once: what counts is what the last look saw.
        (begin, end), self._changes = self._changes, NOTHING
        for name in begin[:QUEUES_AT_ONCE]:
            # Made as a sender makes it; else Celery's own defaults, which may be another kind of queue. And selected
            # here: Celery 5.5 does not select what it knows already.
            queue = self._queues.select_add(self._queues[name])
            consumer.add_task_queue(queue.name)
            self._begun |= {name}
        for name in end[:QUEUES_AT_ONCE]:
            if name not in self._withheld:
                # First, since a tenant that is gone must not be swept, even if the broker does not answer.
                self._kernel.tenants.forget(name)
            self._begun -= {name}
            consumer.cancel_task_queue(name)


def note_excluded_queues(app: Celery, kernel: Kernel) -> None:
    """Have the kernel know what ``-X`` leaves out: Celery applies it to the names that it knows itself."""

    def note(instance: Any = None, options: Any = None, **_: Any) -> None:
        if instance is not None and instance.app is app:
            given = (options or {}).get("exclude_queues") or ()
            names = given.split(",") if isinstance(given, str) else given
            kernel.excluded_queues = tuple(name.strip() for name in names if name.strip())

    signals.celeryd_init.connect(note, weak=False)
