"""The keeper: a worker process's background thread for liveness, leases, and its tenants' recovery."""

from __future__ import annotations

import os
import queue
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from cloacina_celery.core.settings import Settings
from cloacina_celery.errors import CloacinaError, DatabaseUnavailable
from cloacina_celery.runtime.reaper import Reaper
from cloacina_celery.store import executions, workers
from cloacina_celery.store.bounded import bounded_transaction
from cloacina_celery.store.database import ConnectionTrouble, Database, DriverError, StoreConnection
from cloacina_celery.telemetry import log

Held = tuple[str, str, int]
"""A running attempt: tenant, execution id, attempt."""

LIVENESS_INTERVAL = 0.5
MAX_BACKOFF = 5.0


class Keeper:
    """Keep a worker's promises while its tasks run: it is alive, it holds its leases, its orphans go on.

    It runs in the worker's main process, outside the tasks' GIL under prefork, so that a task that computes
    for an hour loses no lease.

    Args:
        held: lists the attempts that run in this worker right now.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        reaper: Reaper,
        *,
        name: str,
        tenants: Callable[[], Sequence[str]],
        held: Callable[[], Sequence[Held]],
    ) -> None:
        self._database = database
        self._settings = settings
        self._reaper = reaper
        self._tenants = tenants
        self._held = held
        self._inbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._liveness: StoreConnection | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._wants_sweep = False
        self.name = name
        with database.statement() as cursor:
            self.worker_id = workers.register(cursor, name=name, tenants=list(tenants()))
        os.register_at_fork(after_in_child=self._close_inherited_liveness)

    def start(self) -> None:
        """Take the liveness lock and start the thread."""
        self._thread = threading.Thread(target=self._run, name="cloacina-keeper", daemon=True)
        self._thread.start()
        log("worker.registered", worker_id=self.worker_id, tenants=", ".join(self._tenants()))

    def ask(self, work: Callable[[], object]) -> None:
        """Have the thread do ``work`` next; it is tried again until the database takes it."""
        self._inbox.put(work)

    def sweep_all_soon(self) -> None:
        """Have every tenant of the catalog swept, once for however many times it was asked."""
        if not self._wants_sweep:
            self._wants_sweep = True
            self.ask(self._sweep_all)

    def _sweep_all(self) -> None:
        self._wants_sweep = False
        self._reaper.sweep_all()

    def stop(self, *, reason: str) -> None:
        """Finish the inbox, give back what is still held, and sign off. The tasks must have ended before."""
        if self._thread is not None:
            self._stopping = True
            self._inbox.put(None)
            self._thread.join(timeout=10)
        try:
            released = self._reaper.release_worker(self._tenants(), self.worker_id, reason=reason)
            with self._database.statement() as cursor:
                workers.stop(cursor, self.worker_id, reason=reason)
            log("worker.stopped", worker_id=self.worker_id, released=released)
        except (DriverError, CloacinaError) as error:
            # The lock goes with this process, and the others recover what could not be given back.
            log("keeper.trouble", error=error)
        self._drop_liveness()

    def _run(self) -> None:
        settings = self._settings
        next_liveness = next_heartbeat = next_poll = 0.0
        backoff = 0.0
        is_first = True
        while not self._stopping:
            try:
                now = time.monotonic()
                if now >= next_liveness:
                    self._show_liveness()
                    next_liveness = now + LIVENESS_INTERVAL
                if now >= next_heartbeat:
                    self._extend_leases()
                    next_heartbeat = now + settings.heartbeat_interval
                if settings.enable_recovery and now >= next_poll:
                    self._reaper.recover_dead_workers()
                    self._reaper.sweep(self._tenants(), check_stranded=not is_first)
                    is_first = False
                    next_poll = now + settings.poll_interval * random.uniform(0.8, 1.2)
                backoff = 0.0
                self._work_inbox(until=min(next_liveness, next_heartbeat, next_poll or next_liveness))
            except (DriverError, CloacinaError) as error:
                backoff = min(max(backoff * 2, 0.2), MAX_BACKOFF)
                log("keeper.trouble", error=" ".join(str(error).split()))
                time.sleep(backoff * random.uniform(0.5, 1.0))
            except Exception as error:  # noqa: BLE001  # it must outlive a task's callbacks
                log("keeper.trouble", error=repr(error))
                time.sleep(1.0)
        self._work_inbox(until=0.0)

    def _work_inbox(self, *, until: float) -> None:
        while True:
            try:
                work = (
                    self._inbox.get(timeout=max(until - time.monotonic(), 0.0))
                    if until
                    else self._inbox.get_nowait()
                )
            except queue.Empty:
                return
            if work is None:
                if until:
                    return
                continue
            try:
                work()
            except DatabaseUnavailable:
                self._inbox.put(work)
                raise

    def _show_liveness(self) -> None:
        if self._settings.liveness == "lease":
            with self._database.statement() as cursor:
                workers.heartbeat(cursor, self.worker_id)
            return
        try:
            if self._liveness is None:
                self._liveness = self._database.dedicated_connection()
                with self._liveness.cursor() as cursor:
                    workers.hold_lock(cursor, self.worker_id)
            else:
                with self._liveness.cursor() as cursor:
                    workers.heartbeat(cursor, self.worker_id)
        except ConnectionTrouble as error:
            self._drop_liveness()
            log("liveness.lost", error=" ".join(str(error).split()))
            raise DatabaseUnavailable(f"liveness: {error}") from error

    def _extend_leases(self) -> None:
        by_tenant: dict[str, list[tuple[str, int]]] = {}
        for tenant, execution_id, attempt in self._held():
            by_tenant.setdefault(tenant, []).append((execution_id, attempt))
        for tenant, held in by_tenant.items():
            with bounded_transaction(self._database) as cursor:
                executions.heartbeat(cursor, tenant, held, lease_ttl=self._settings.lease_ttl)

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


def worker_name(hostname: str) -> str:
    """Name a worker so that a person finds the process: node name, host and pid."""
    return f"{hostname} on {socket.gethostname()} pid {os.getpid()}"
