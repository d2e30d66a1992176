"""The reaper: finds orphaned, due and stranded executions, tenant by tenant, and sends them out again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from cloacina_celery.core.settings import Settings
from cloacina_celery.runtime.attention import Attention
from cloacina_celery.runtime.departures import Departures
from cloacina_celery.runtime.housekeeping import Housekeeping
from cloacina_celery.runtime.looks import Troubled
from cloacina_celery.runtime.orphans import OnAbandoned, Orphans
from cloacina_celery.runtime.stranded import LostMessages, Publish, QueueDepth
from cloacina_celery.runtime.watch import Watch
from cloacina_celery.store import catalog, outbox, recovery, ringing
from cloacina_celery.store.bounded import bounded_transaction
from cloacina_celery.store.database import Database
from cloacina_celery.store.outbox import Letter
from cloacina_celery.store.recovery import Glance
from cloacina_celery.telemetry import log

SendLetters = Callable[[Sequence[Letter]], list[int]]
CanPublish = Callable[[str], bool]


class Reaper:
    """Move rows on whose worker is gone or whose message is missing. Any number of reapers do as well as one.

    Args:
        database: where the tenants are.
        settings: batch sizes and thresholds.
        publish: sends messages; it must not raise for a broker that is down.
        send_letters: sends plain messages, and returns the ids of those that the broker took; it must not raise either.
        can_publish: tells whether the broker may take a tenant's messages; while not, its due rows are left alone.
        queue_depth: counts the messages waiting in a tenant's queue; ``None`` where that is not known.
        on_abandoned: told, inside the transaction, of an execution whose recovery budget is spent; what it does is
            undone if it raises, and the execution is abandoned all the same.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        publish: Publish,
        send_letters: SendLetters,
        can_publish: CanPublish,
        queue_depth: QueueDepth,
        on_abandoned: OnAbandoned,
    ) -> None:
        self._database = database
        self._settings = settings
        self._publish = publish
        self._send_letters = send_letters
        self._can_publish = can_publish
        self._attention = Attention(database)
        self._watch = Watch(database, settings)
        self._lost = LostMessages(database, settings, publish=publish, queue_depth=queue_depth)
        self._orphans = Orphans(database, settings, publish=publish, on_abandoned=on_abandoned)
        self._troubled = Troubled(database, self._watch)
        self._departures = Departures(
            database,
            settings,
            publish=publish,
            orphans=self._orphans,
            lost=self._lost,
            troubled=self._troubled,
        )
        self._housekeeping = Housekeeping(database, settings, self._troubled)

    def sweep(self, tenants: Sequence[str], *, check_stranded: bool = True) -> int:
        """Look at the tenants and move on what needs it; return how many executions were touched.

        One tenant's missing table, locked schema or bad row is logged and does not stop the others.
        """
        touched = 0
        wanted = [tenant for tenant in tenants if not self._troubled.includes(tenant)]
        see = partial(recovery.glance, stranded_after=self._settings.stranded_after)
        for seen in self._troubled.look(wanted, see):
            try:
                touched += self._serve(seen, check_stranded=check_stranded)
                self._watch.reached()
            except Exception as error:  # noqa: BLE001  # nothing in one tenant's rows may stop the others
                self._troubled.note(seen.tenant, error)
        return touched

    def attend(self, tenants: Sequence[str]) -> list[str]:
        """Choose those of the tenants that a sweep has to look at now: who may have work, and some of the others."""
        return self._attention.choose(tenants)

    def sweep_all(self, *, everything: bool = True) -> int:
        """Sweep the catalog's tenants, and the workers' register; delete what has ended long ago.

        Args:
            everything: look at each tenant; else at those that `attend` chooses.
        """
        tenants = catalog.tenants(self._database)
        if not tenants:
            return 0  # perhaps there is no catalog yet
        names = [tenant.name for tenant in tenants]
        chosen = names if everything else self.attend(names)
        touched = self.recover_dead_workers() + self.sweep(chosen)
        self._housekeeping.tidy(tenants, chosen=chosen)
        return touched

    def recover_dead_workers(self) -> int:
        """Recover what workers held that are gone without having said so, as far as this view can be trusted."""
        return self._departures.bury(self._watch.look())

    def note_answer(self, error: Exception | None = None) -> None:
        """Note that the database was asked for something else and answered, or what it raised.

        Whether it was out of reach says how much a reaper may conclude from other workers' silence.
        """
        self._watch.note_answer(error)

    def recover_attempt(self, tenant: str, execution_id: str, attempt: int, *, reason: str) -> int:
        """Recover one attempt that is known to be lost."""
        return self._orphans.recover(
            tenant, lambda cursor: recovery.lock_attempt(cursor, tenant, execution_id, attempt), reason=reason
        )

    def release_worker(self, tenants: Sequence[str], worker_id: int, *, reason: str) -> int:
        """Give back what a worker still holds at the end of its shutdown.

        Raises:
            DatabaseUnavailable: the database went away.
            Exception: a tenant could not be looked at; what the worker holds there is recovered after it.
        """
        return self._departures.release(tenants, worker_id, reason=reason)

    def _serve(self, seen: Glance, *, check_stranded: bool) -> int:
        touched = 0
        if seen.is_expired:
            touched += self._orphans.recover(
                seen.tenant,
                lambda cursor: recovery.lock_expired(
                    cursor,
                    seen.tenant,
                    limit=self._settings.sweep_batch,
                    of_known=self._watch.judges_leases,
                ),
                reason="the lease ran out: its worker was frozen, cut off or hung",
            )
        if seen.is_due and self._can_publish(seen.tenant):
            with bounded_transaction(self._database) as cursor:
                rings = ringing.ring_due(cursor, seen.tenant, limit=self._settings.sweep_batch)
            self._publish(rings)
            if rings:
                log("sweep.rung", tenant=seen.tenant, count=len(rings))
            touched += len(rings)
        if seen.has_letters and self._can_publish(seen.tenant):
            touched += self._send_left_letters(seen.tenant)
        if (
            seen.is_stranded
            and check_stranded
            and self._can_publish(seen.tenant)
            and self._lost.is_time(seen.tenant)
        ):
            touched += self._lost.ring(seen.tenant, stranded_after=self._settings.stranded_after)
        return touched

    def _send_left_letters(self, tenant: str) -> int:
        with bounded_transaction(self._database) as cursor:
            letters = outbox.lock(
                cursor, tenant, limit=self._settings.sweep_batch, older_than=self._settings.stranded_after
            )
            # Locked until they are sent: another reaper sends others. A death in between sends some twice.
            sent = self._send_letters(letters)
            outbox.remove(cursor, tenant, sent)
        if sent:
            log("sweep.letters", tenant=tenant, count=len(sent))
        return len(sent)
