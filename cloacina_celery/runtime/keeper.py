"""The keeper: what a worker process does in the background besides running tasks."""

from __future__ import annotations

import os
import queue
import random
import socket
import threading
import time
from collections.abc import Callable

from cloacina_celery.core.settings import Settings
from cloacina_celery.errors import CloacinaError, DatabaseUnavailable
from cloacina_celery.runtime.lease import Duties, LeaseHolder
from cloacina_celery.runtime.reaper import Reaper
from cloacina_celery.runtime.trust import LeaseBoard
from cloacina_celery.store import workers
from cloacina_celery.store.database import Database
from cloacina_celery.store.driver_errors import DriverError, LockNotAvailable, in_words, one_line
from cloacina_celery.telemetry import log

MAX_BACKOFF = 5.0
LONGEST_WAIT = 60.0
"""Seconds after which the keeper gives a connection up that does not answer: twice what a statement may take."""
SHUTDOWN_WAIT = 10.0
"""Seconds for which a shutdown waits for a database that does not answer; the others recover what it held."""
PAUSE_AFTER_MISTAKE = 1.0
"""Seconds after something that nobody foresaw, so that a mistake does not spin."""

LOCKED_PAUSE = 0.5
"""Seconds after which work on a tenant that somebody had locked is tried again."""


class Keeper:
    """Keep a worker's promises: it is alive, it holds its leases, and orphans of its tenants go on.

    It runs in the worker's main process, outside the tasks' GIL under prefork, so that a task that computes
    for an hour loses no lease.

    Args:
        name: says where a person finds the process.
        duties: what the worker serves and has in its hands.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        reaper: Reaper,
        *,
        name: str,
        duties: Duties,
    ) -> None:
        self._database = database
        self._settings = settings
        self._reaper = reaper
        self._tenants = duties.tenants
        self._look = duties.look
        self._inbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="cloacina-keeper", daemon=True)
        self._locked: list[tuple[float, Callable[[], object]]] = []
        self._stopping = False
        self._wants_sweep = False
        self.name = name
        # Kept for the log: to ask the database once more would end a worker whose database goes away at its start.
        self._registered_for = list(duties.tenants())
        with database.statement() as cursor:
            self.worker_id = workers.register(cursor, name=name, tenants=self._registered_for)
        self._swept_at: float | None = None
        self._leases = LeaseHolder(
            database, settings, worker_id=self.worker_id, duties=duties, swept_for=self._swept_for
        )

    @property
    def board(self) -> LeaseBoard:
        """Until when the worker's attempts are trusted, for the processes that run them."""
        return self._leases.board

    def start(self) -> None:
        """Take the liveness lock and start both threads."""
        self._leases.start()
        self._thread.start()
        log("worker.registered", worker_id=self.worker_id, tenants=", ".join(self._registered_for))

    def ask(self, work: Callable[[], object]) -> None:
        """Have the keeper's thread do ``work`` next; it is tried again until the database takes it."""
        self._inbox.put(work)

    def sweep_all_soon(self) -> None:
        """Have every tenant of the catalog swept, once for however many times it was asked."""
        if not self._wants_sweep:
            self._wants_sweep = True
            self.ask(self._sweep_all)

    def stop(self, *, reason: str) -> None:
        """Finish what was asked, give back what is still held, and sign off. The tasks must have ended before."""
        if self._thread.is_alive():
            self._stopping = True
            self._inbox.put(None)
            self._thread.join(timeout=10)
        self._leases.stop()
        try:
            with self._database.waits_limited_to(SHUTDOWN_WAIT):
                released = self._reaper.release_worker(self._tenants(), self.worker_id, reason=reason)
                with self._database.statement() as cursor:
                    workers.stop(cursor, self.worker_id, reason=reason)
            log("worker.stopped", worker_id=self.worker_id, released=released)
        except Exception as error:  # noqa: BLE001  # it must not keep the process from ending
            # The lock goes with this process, and the others recover what could not be given back.
            log("keeper.trouble", error=in_words(error))
        self._leases.close()

    def _swept_for(self) -> float | None:
        return None if self._swept_at is None else time.monotonic() - self._swept_at

    def _sweep_all(self) -> None:
        self._wants_sweep = False
        self._reaper.sweep_all(everything=False)

    def _run(self) -> None:
        with self._database.waits_limited_to(LONGEST_WAIT):
            self._keep()

    def _keep(self) -> None:
        next_poll = backoff = 0.0
        is_first = True
        while not self._stopping:
            try:
                self._look()
                if self._settings.enable_recovery and time.monotonic() >= next_poll:
                    self._reaper.recover_dead_workers()
                    # At its start a worker has not looked into its queues yet; what waits there is not stranded.
                    self._reaper.sweep(self._reaper.attend(self._tenants()), check_stranded=not is_first)
                    is_first = False
                    self._swept_at = time.monotonic()
                interval = self._settings.poll_interval * random.uniform(0.8, 1.2)
                next_poll = time.monotonic() + interval
                backoff = 0.0
                self._work_inbox(timeout=interval)
            except (DriverError, CloacinaError) as error:
                self._reaper.note_answer(error)
                backoff = min(max(backoff * 2, 0.2), MAX_BACKOFF)
                log("keeper.trouble", error=one_line(error))
                time.sleep(backoff * random.uniform(0.5, 1.0))
            except Exception as error:  # noqa: BLE001  # it must outlive a task's callbacks
                log("keeper.trouble", error=repr(error))
                time.sleep(PAUSE_AFTER_MISTAKE)
        self._work_inbox(timeout=0.0)

    def _ask_again_for_locked(self) -> None:
        now = time.monotonic()
        waiting, self._locked = self._locked, []
        for due, work in waiting:
            if due <= now:
                self._inbox.put(work)
            else:
                self._locked.append((due, work))

    def _work_inbox(self, *, timeout: float) -> None:
        """Do what is asked until nothing has been for ``timeout`` seconds in all."""
        deadline = time.monotonic() + timeout
        self._ask_again_for_locked()
        while True:
            try:
                work = self._inbox.get(timeout=max(deadline - time.monotonic(), 0.0))
            except queue.Empty:
                return
            if work is None:
                deadline = 0.0
                continue
            try:
                work()
                self._reaper.note_answer()
            except DatabaseUnavailable:
                self._inbox.put(work)
                raise
            except LockNotAvailable as error:
                self._reaper.note_answer(error)
                # One tenant is locked: the others must not wait for it, and its work must not be forgotten.
                log("keeper.trouble", error=one_line(error))
                self._locked.append((time.monotonic() + LOCKED_PAUSE, work))


def worker_name(hostname: str) -> str:
    """Name a worker so that a person finds the process: node name, host and pid."""
    return f"{hostname} on {socket.gethostname()} pid {os.getpid()}"
