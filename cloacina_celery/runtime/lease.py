"""The lease holder: a thread that shows a worker's liveness and extends the leases of what it runs."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from cloacina_celery.core.lifecycle import trust_window
from cloacina_celery.core.settings import Settings
from cloacina_celery.errors import CloacinaError, DatabaseUnavailable
from cloacina_celery.runtime.trust import Held, LeaseBoard, steady_clock
from cloacina_celery.store import executions, workers
from cloacina_celery.store.bounded import bounded_transaction
from cloacina_celery.store.database import Cursor, Database, StoreConnection, after_fork_in_child
from cloacina_celery.store.driver_errors import ConnectionTrouble, DriverError, LockNotAvailable, one_line
from cloacina_celery.telemetry import log

LIVENESS_INTERVAL = 0.5
MAX_BACKOFF = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Duties:
    """What a worker serves and has in its hands, asked anew each time.

    ``tenants`` lists those it serves, ``held`` the attempts that run, and ``reserved``, by tenant, the messages that
    were delivered to it and have not started. ``look`` has it learn, once per poll, which of its tenants are gone.
    """

    tenants: Callable[[], Sequence[str]]
    held: Callable[[], Sequence[Held]]
    reserved: Callable[[], Mapping[str, workers.Reserved]]
    look: Callable[[], object] = lambda: None


class LeaseHolder:
    """Keep a worker alive in the database's eyes, and its leases open.

    It has a thread of its own, since nothing that the reaper waits for may cost a healthy task its lease.
    What it has extended it writes on its ``board``, where the processes that run the tasks look.

    Args:
        worker_id: the worker's entry in the register.
        duties: what the worker serves and has in its hands.
        swept_for: tells how many seconds ago it last ended a sweep of its tenants, where it ever did.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        worker_id: int,
        duties: Duties,
        swept_for: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._database = database
        self._settings = settings
        self._worker_id = worker_id
        self._duties = duties
        self._swept_for = swept_for
        self.board = LeaseBoard()
        self._trusted: dict[Held, float] = {}
        self._registered = frozenset(duties.tenants())
        self._liveness: StoreConnection | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cloacina-leases", daemon=True)
        after_fork_in_child(self._close_inherited_liveness)

    def start(self) -> None:
        """Take the liveness lock and start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; the worker counts as alive until `close`."""
        if self._thread.is_alive():
            self._stopping.set()
            self._thread.join(timeout=10)

    def close(self) -> None:
        """Give the liveness lock back."""
        self._drop_liveness()

    def _run(self) -> None:
        # Longer than it is trusted it need not wait: on a new connection it may yet come in time.
        with self._database.waits_limited_to(trust_window(self._settings.lease_ttl)):
            self._beat()

    def _beat(self) -> None:
        next_heartbeat = backoff = 0.0
        while not self._stopping.is_set():
            try:
                self._show_liveness()
                now = time.monotonic()
                if now >= next_heartbeat:
                    self._extend_leases()
                    next_heartbeat = now + self._settings.heartbeat_interval
                backoff = 0.0
                self._stopping.wait(LIVENESS_INTERVAL)
            except (DriverError, CloacinaError) as error:
                backoff = min(max(backoff * 2, 0.1), MAX_BACKOFF)
                log("keeper.trouble", error=one_line(error))
                self._stopping.wait(backoff * random.uniform(0.5, 1.0))
            except Exception as error:  # noqa: BLE001  # without this thread every lease of the worker runs out
                log("keeper.trouble", error=repr(error))
                self._stopping.wait(MAX_BACKOFF)

    def _show_liveness(self) -> None:
        if self._settings.liveness == "lease":
            with self._database.statement() as cursor:
                self._heartbeat(cursor)
            return
        try:
            if self._liveness is None:
                self._liveness = self._database.dedicated_connection()
                with self._database.limited(self._liveness), self._liveness.cursor() as cursor:
                    workers.hold_lock(cursor, self._worker_id)
            with self._database.limited(self._liveness), self._liveness.cursor() as cursor:
                self._heartbeat(cursor)
                self._register_tenants(cursor)
        except LockNotAvailable as error:
            # Any role may take any advisory lock, so a tenant's code may sit on ours, or our last connection is not
            # gone yet. That must cost no task its lease: until the lock is free, the heartbeat speaks for us.
            self._drop_liveness()
            log("liveness.taken", error=one_line(error))
            with self._database.statement() as cursor:
                self._heartbeat(cursor)
        except ConnectionTrouble as error:
            self._drop_liveness()
            log("liveness.lost", error=one_line(error))
            raise DatabaseUnavailable("the liveness connection broke") from error

    def _heartbeat(self, cursor: Cursor) -> None:
        workers.heartbeat(cursor, self._worker_id, self._duties.reserved(), swept_for=self._swept_for())

    def _register_tenants(self, cursor: Cursor) -> None:
        # Queues come and go at run time (celery control add_consumer); whoever buries this worker must know.
        now = frozenset(self._duties.tenants())
        if not now <= self._registered:
            workers.set_tenants(cursor, self._worker_id, sorted(now | self._registered))
            self._registered |= now

    def _extend_leases(self) -> None:
        by_tenant: dict[str, list[tuple[str, int]]] = {}
        all_held = frozenset(self._duties.held())
        for tenant, execution_id, attempt in all_held:
            by_tenant.setdefault(tenant, []).append((execution_id, attempt))
        self._trusted = {held: until for held, until in self._trusted.items() if held in all_held}
        for tenant, held in by_tenant.items():
            asked_at = steady_clock()
            try:
                with bounded_transaction(self._database) as cursor:
                    extended = executions.heartbeat(cursor, tenant, held, lease_ttl=self._settings.lease_ttl)
                until = asked_at + trust_window(self._settings.lease_ttl)
                self._trusted.update({(tenant, i, n): until for i, n in held if i in extended})
                self.board.write(self._trusted.items())
            except DriverError as error:
                # One tenant's dropped or locked schema must not cost the others their leases.
                log("heartbeat.failed", tenant=tenant, error=one_line(error))

    def _drop_liveness(self) -> None:
        if self._liveness is not None:
            connection, self._liveness = self._liveness, None
            with suppress(DriverError):
                connection.close()

    def _close_inherited_liveness(self) -> None:
        # A child that outlived its parent would keep the parent's lock through this descriptor.
        if self._liveness is not None and not self._liveness.closed:
            os.close(self._liveness.fileno())
        self._liveness = None
