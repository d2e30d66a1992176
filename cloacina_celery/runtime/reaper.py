"""The reaper: finds orphaned, due and stranded executions, tenant by tenant, and sends them out again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial

from cloacina_celery.core.lifecycle import Abandon, Recover
from cloacina_celery.core.settings import Settings
from cloacina_celery.errors import DatabaseUnavailable
from cloacina_celery.runtime.attention import Attention
from cloacina_celery.runtime.housekeeping import Housekeeping
from cloacina_celery.runtime.stranded import LostMessages, Publish, QueueDepth
from cloacina_celery.runtime.units import CursorUnit, settlement
from cloacina_celery.runtime.watch import Watch
from cloacina_celery.store import catalog, outbox, recovery, ringing, turns, workers
from cloacina_celery.store.bounded import LOCK_TIMEOUT_MS, LOOK_TIMEOUT_MS, bound, bounded_transaction
from cloacina_celery.store.database import Cursor, Database
from cloacina_celery.store.driver_errors import DriverError, PassingTrouble, in_words
from cloacina_celery.store.outbox import Letter
from cloacina_celery.store.recovery import Glance, Orphan, Recovered
from cloacina_celery.telemetry import log

SendLetters = Callable[[Sequence[Letter]], list[int]]
OnAbandoned = Callable[[str, Recovered], None]
CanPublish = Callable[[str], bool]

GLANCE_BATCH = 100
TROUBLED_PAUSE = 5.0
"""Seconds for which a tenant that could not be looked at is looked at alone and no more."""


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
        self._on_abandoned = on_abandoned
        self._attention = Attention(database)
        self._watch = Watch(database, settings)
        self._lost = LostMessages(database, settings, publish=publish, queue_depth=queue_depth)
        self._troubled_until: dict[str, float] = {}
        self._housekeeping = Housekeeping(
            database, settings, is_troubled=self._is_troubled, note_trouble=self._note_trouble
        )

    def sweep(self, tenants: Sequence[str], *, check_stranded: bool = True) -> int:
        """Look at the tenants and move on what needs it; return how many executions were touched.

        One tenant's missing table, locked schema or bad row is logged and does not stop the others.
        """
        touched = 0
        for start in range(0, len(tenants), GLANCE_BATCH):
            for seen in self._glance(tenants[start : start + GLANCE_BATCH]):
                try:
                    touched += self._serve(seen, check_stranded=check_stranded)
                    self._watch.reached()
                except Exception as error:  # noqa: BLE001  # nothing in one tenant's rows may stop the others
                    self._note_trouble(seen.tenant, error)
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
        names = [tenant.name for tenant in tenants]
        chosen = names if everything else self.attend(names)
        touched = self.recover_dead_workers() + self.sweep(chosen)
        self._housekeeping.tidy(tenants, chosen=chosen)
        return touched

    def recover_dead_workers(self) -> int:
        """Recover what workers held that are gone without having said so, as far as this view can be trusted."""
        dead = self._watch.look()
        recovered = sum(self._bury(worker) for worker in dead)
        # Messages that had been delivered to them and not started died with them.
        for tenant in sorted({tenant for worker in dead for tenant in worker.tenants}):
            try:
                self._lost.ring(tenant, stranded_after=self._settings.liveness_grace)
            except Exception as error:  # noqa: BLE001  # as in `sweep`
                self._note_trouble(tenant, error)
        return recovered

    def note_answer(self, error: Exception | None = None) -> None:
        """Note that the database was asked for something else and answered, or what it raised.

        Whether it was out of reach says how much a reaper may conclude from other workers' silence.
        """
        if isinstance(error, DatabaseUnavailable):
            self._watch.failed()
        else:
            self._watch.reached()

    def recover_attempt(self, tenant: str, execution_id: str, attempt: int, *, reason: str) -> int:
        """Recover one attempt that is known to be lost."""
        return self._recover(
            tenant, lambda cursor: recovery.lock_attempt(cursor, tenant, execution_id, attempt), reason=reason
        )

    def release_worker(self, tenants: Sequence[str], worker_id: int, *, reason: str) -> int:
        """Give back what a worker still holds at the end of its shutdown.

        Raises:
            DatabaseUnavailable: the database went away.
            Exception: a tenant could not be looked at; what the worker holds there is recovered after it.
        """
        released = 0
        trouble: Exception | None = None
        for tenant in tenants:
            try:
                with bounded_transaction(self._database) as cursor:
                    rings = recovery.release(cursor, tenant, worker_id, reason=reason)
                self._publish(rings)
                released += len(rings)
            except DatabaseUnavailable:
                raise
            except Exception as error:  # noqa: BLE001  # the others have their work back all the same
                self._note_trouble(tenant, error)
                trouble = error
        if trouble is not None:
            raise trouble
        return released

    def _bury(self, worker: workers.DeadWorker) -> int:
        recovered = 0
        # The row lock lets one reaper at a time bury a worker; if it dies over it, the next one goes on.
        with bounded_transaction(self._database) as cursor:
            if not workers.lock_dead(cursor, worker.worker_id):
                return 0
            log("worker.dead", worker_id=worker.worker_id, name=worker.name, reason=worker.reason)
            is_clean = True
            for tenant in worker.tenants:
                try:
                    recovered += self._recover(
                        tenant,
                        partial(
                            recovery.lock_of_worker,
                            tenant=tenant,
                            worker_id=worker.worker_id,
                            limit=self._settings.sweep_batch,
                        ),
                        reason=f"its worker died: {worker.reason}",
                        lock_timeout_ms=LOOK_TIMEOUT_MS,
                    )
                    with bounded_transaction(self._database) as look:
                        is_clean = is_clean and not recovery.holds_any(look, tenant, worker.worker_id)
                    self._watch.reached()
                except Exception as error:  # noqa: BLE001  # as in `sweep`
                    is_clean = False
                    self._note_trouble(tenant, error)
            if is_clean:
                workers.stop(cursor, worker.worker_id, reason=f"found dead: {worker.reason}")
        return recovered

    def _glance(self, tenants: Sequence[str]) -> list[Glance]:
        wanted = [tenant for tenant in tenants if not self._is_troubled(tenant)]
        if not wanted:
            return []
        stranded_after = self._settings.stranded_after
        try:
            with bounded_transaction(self._database, lock_timeout_ms=LOOK_TIMEOUT_MS) as cursor:
                return recovery.glance(cursor, wanted, stranded_after=stranded_after)
        except DriverError as error:
            if len(wanted) == 1:
                self._note_trouble(wanted[0], error)
                return []
        # Somebody in the batch cannot be looked at; the others must not wait for them.
        return [seen for tenant in wanted for seen in self._glance([tenant])]

    def _serve(self, seen: Glance, *, check_stranded: bool) -> int:
        touched = 0
        if seen.is_expired:
            touched += self._recover(
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

    def _recover(
        self,
        tenant: str,
        lock: Callable[[Cursor], list[Orphan]],
        *,
        reason: str,
        lock_timeout_ms: int = LOCK_TIMEOUT_MS,
    ) -> int:
        with settlement(self._database, tenant) as unit:
            cursor = unit.cursor()
            bound(cursor, lock_timeout_ms=lock_timeout_ms)
            orphans = lock(cursor)
            recovered = [
                recovery.recover(cursor, tenant, orphan, reason=reason, not_before=turn)
                for orphan, turn in self._turns(tenant, orphans)
            ]
            for one in recovered:
                if isinstance(one.decision, Abandon):
                    self._follow(unit, one)
        for one in recovered:
            log(
                "recover.done", tenant=tenant, execution_id=one.execution_id, attempt=one.attempt, reason=reason,
                decision=f"abandoned: {one.decision.reason}" if isinstance(one.decision, Abandon)
                else f"runs again in its turn, at {one.not_before:%H:%M:%S.%f}" if one.not_before
                else f"runs again in {one.decision.delay:g} s" if one.decision.delay else "runs again at once",
            )  # fmt: skip
        self._publish([one.ring for one in recovered if one.ring is not None])
        return len(recovered)

    def _follow(self, unit: CursorUnit, abandoned: Recovered) -> None:
        try:
            with unit.part():
                self._on_abandoned(unit.tenant, abandoned)
        except (DatabaseUnavailable, *PassingTrouble):
            # It may well succeed the next time, together with the abandonment.
            raise
        except Exception as error:  # noqa: BLE001  # an errback is the user's, and the message may be bad
            log(
                "recover.unfollowed",
                tenant=unit.tenant,
                execution_id=abandoned.execution_id,
                error=in_words(error),
            )

    def _turns(self, tenant: str, orphans: list[Orphan]) -> list[tuple[Orphan, datetime | None]]:
        going = [orphan for orphan in orphans if isinstance(orphan.decision, Recover)]
        if not going:
            return [(orphan, None) for orphan in orphans]
        taken = turns.take(
            self._database,
            tenant,
            rate=self._settings.recovery_rate,
            burst=self._settings.recovery_burst,
            draws=[random.random() for _ in going],
        )
        turn_of = {orphan.execution_id: turn for orphan, turn in zip(going, taken, strict=True)}
        return [(orphan, turn_of.get(orphan.execution_id)) for orphan in orphans]

    def _is_troubled(self, tenant: str) -> bool:
        return time.monotonic() < self._troubled_until.get(tenant, 0.0)

    def _note_trouble(self, tenant: str, error: Exception) -> None:
        self.note_answer(error)
        self._troubled_until[tenant] = time.monotonic() + TROUBLED_PAUSE
        log("sweep.failed", tenant=tenant, error=in_words(error))
