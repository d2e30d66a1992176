"""The driver of a chaos run: submits the plan, strikes faults, and waits for the end."""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from random import Random
from typing import Any

import psycopg2
from kombu import Connection
from psycopg2 import extensions
from rich.console import Console

from cloacina_celery.chaos import queues
from cloacina_celery.chaos.deck import FAULTS
from cloacina_celery.chaos.faults import Done, Fault
from cloacina_celery.chaos.fleet import Fleet, Member
from cloacina_celery.chaos.ground import Ground
from cloacina_celery.chaos.plan import Job, Plan
from cloacina_celery.chaos.submit import Submissions, Unknown
from cloacina_celery.errors import TransitionRefused

TICK = 0.01
PATIENCE = 90.0
"""Seconds without any execution's end after which what is left counts as stuck."""

SUBMIT_UNTIL = 0.9
"""The share of a run in which new work is submitted."""

TABLES = """
    CREATE TABLE "{0}".chaos_effects (
        execution_id text NOT NULL, attempt integer NOT NULL, tenant text NOT NULL,
        at timestamptz NOT NULL DEFAULT clock_timestamp());
    CREATE TABLE "{0}".chaos_orders (execution_id text PRIMARY KEY)
"""


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything that faults and the driver act on."""

    app: Any
    """The Celery app of the run, in this process."""
    ground: Ground
    plan: Plan
    fleet: Fleet
    submissions: Submissions
    random: Random
    broker: Connection
    """Straight to the broker, past its proxy."""
    application: str
    """The name that the run's own connections have in Postgres."""
    plain_queue: str
    console: Console
    faults: list[Done] = field(default_factory=list)
    callbacks: list[str] = field(default_factory=list)
    """Executions whose plain callback was sent, once for each message."""
    calm_until: datetime | None = None
    """When the first fault struck: before that, nothing has an excuse."""
    _observer: extensions.connection | None = None
    _actions: list[tuple[float, int, Callable[[], object]]] = field(default_factory=list)
    _timers: list[threading.Timer] = field(default_factory=list)
    _numbers: Any = field(default_factory=count)

    @property
    def cloacina(self) -> Any:
        """The app's plugin."""
        return self.app.cloacina

    @property
    def lease_ttl(self) -> float:
        """Seconds of a lease."""
        return float(self.cloacina.settings.lease_ttl)

    # What faults ask

    def query(self, sql: str, params: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Run a query beside the package: who judges it must not ask by the code that is on trial."""
        if self._observer is None:
            self._observer = self.ground.connect()
        with self._observer.cursor() as cursor:
            cursor.execute(sql, params)
            return list(cursor.fetchall())

    def reconnect(self) -> None:
        """Look through a new connection from now on."""
        self._observer = None

    def now(self) -> datetime:
        """Return the database's clock."""
        at: datetime = self.query("SELECT clock_timestamp()")[0][0]
        return at

    def any_worker(self) -> Member | None:
        """Draw a worker that is up and not frozen, rather one that runs something than one that idles."""
        able = [one for one in self.fleet.workers if not one.is_frozen and one.is_ready]
        holding = self.holding_pids()
        busy = [one for one in able if one.pid in holding]
        return self.random.choice(busy or able) if able else None

    def holding_pids(self) -> set[int]:
        """Return the main processes of the workers that hold running executions."""
        running = " UNION ".join(
            f"SELECT worker_id FROM \"{tenant}\".cloacina_executions WHERE state = 'running'"
            for tenant in self.plan.tenants
        )
        names = self.query(f"SELECT name FROM cloacina.workers WHERE id IN ({running})")
        return {int(name.rpartition(" pid ")[2]) for (name,) in names}

    def later(self, seconds: float, action: Callable[[], object]) -> None:
        """Have the driver do something in so many seconds."""
        heapq.heappush(self._actions, (time.monotonic() + seconds, next(self._numbers), action))

    def soon(self, seconds: float, action: Callable[[], object]) -> None:
        """Have something done in so many seconds, by a thread: the driver itself may be waiting for it."""
        timer = threading.Timer(seconds, action)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def cancel(self, job: Job, cancel: Callable[[Any], object]) -> None:
        """Cancel a job's execution, however often the database has to be asked."""
        try:
            with suppress(TransitionRefused):  # it was done, and the answer lost
                cancel(job.steps[0].id)
        except Unknown:
            self.later(0.2, lambda: self.cancel(job, cancel))

    def collect_callbacks(self) -> None:
        """Take what was sent of plain callbacks."""
        self.callbacks += [one.noted_id for one in queues.take_all(self.broker, self.plain_queue)]

    def burst(self, number: int) -> str:
        """Submit many of one tenant's next jobs at once; return the tenant."""
        tenant = self.random.choice(self.plan.tenants)
        for _ in range(number):
            job = self.plan.take(tenant, ("plain", "retried", "chain"))
            if job is None:
                break
            self.submit(job)
        return tenant

    def count_connections(self) -> int:
        """Count the package's connections to this database."""
        (number,) = self.query(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s",
            (self.application,),
        )[0]
        return int(number)

    def cut_connections(self, share: float) -> None:
        """Terminate a share of the package's backends in this database."""
        self.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = %s AND random() < %s",
            (self.application, share),
        )

    def claimed_before(self, limit: int = 20) -> list[tuple[str, str, int, str]]:
        """Read tenant, id, attempt and message of some executions that were claimed, the busiest first."""
        return [
            (tenant, *row)
            for tenant in self.random.sample(self.plan.tenants, min(3, len(self.plan.tenants)))
            for row in self.query(
                f'SELECT id, attempt, message FROM "{tenant}".cloacina_executions WHERE attempt > 0'
                " ORDER BY (state = 'running') DESC, attempt DESC, random() LIMIT %s",
                (limit,),
            )
        ]

    def hold_lock(self, tenant: str, seconds: float) -> None:
        """Lock a tenant's executions for so long, from a thread of its own."""
        with suppress(psycopg2.Error):
            connection = self.ground.connect()
            with connection.cursor() as cursor:
                cursor.execute(
                    f"BEGIN; SET lock_timeout = '3s'; LOCK TABLE \"{tenant}\".cloacina_executions; SELECT pg_sleep(%s)",
                    (seconds,),
                )
            connection.close()

    def submit(self, job: Job) -> None:
        """Submit a job, however often the database has to be asked."""
        self.submissions.submit(job)

    # The run

    def prepare(self) -> None:
        """Make the tenants and their tables."""
        for tenant in self.plan.tenants:
            self.cloacina.tenants.create(tenant)
            connection = self.ground.connect_as_package()
            with connection.cursor() as cursor:
                cursor.execute(TABLES.format(tenant))
            connection.close()

    def play(
        self, *, seconds: float, every: float, calm: float, faults: tuple[str, ...] | None = None
    ) -> None:
        """Submit the plan over the time given, with a fault each few seconds after a calm beginning.

        Args:
            every: mean seconds between two faults.
            calm: seconds before the first one.
            faults: the kinds to draw from; all that are possible unless given.
        """
        begin = time.monotonic()
        pace = seconds * SUBMIT_UNTIL / max(len(self.plan.waiting), 1)
        next_job, next_fault = begin, begin + calm
        deck: list[Fault] = []
        while (now := time.monotonic()) < begin + seconds or self.plan.waiting:
            self._act()
            self.fleet.mend()
            if now >= next_fault and now < begin + seconds:
                if self.calm_until is None:
                    self.calm_until = self.now()
                deck = self._strike(deck or self._deck(faults))
                next_fault = time.monotonic() + every * self.random.uniform(0.5, 1.5)
            while next_job <= time.monotonic() and (job := self.plan.take()) is not None:
                self.submit(job)
                next_job = max(next_job + pace, time.monotonic() - 1.0)
            time.sleep(TICK)

    def _deck(self, wanted: tuple[str, ...] | None) -> list[Fault]:
        """Shuffle the faults like cards, each as often as it weighs: a short run sees many kinds too."""
        deck = [
            fault
            for fault in FAULTS
            for _ in range(fault.weight)
            if (wanted is None or fault.kind in wanted) and fault.needs <= self.ground.abilities
        ]
        self.random.shuffle(deck)
        return deck

    def _strike(self, deck: list[Fault]) -> list[Fault]:
        while deck:
            fault = deck.pop()
            done = fault.strike(self)
            if done is not None:
                self.faults.append(done)
                self.console.print(f"{done.at:%H:%M:%S}  {done.kind}: {done.detail}", highlight=False)
                break
        return deck

    def _act(self) -> None:
        while self._actions and self._actions[0][0] <= time.monotonic():
            heapq.heappop(self._actions)[2]()

    def settle(self) -> None:
        """Undo what is undone, and wait until every execution has ended or nothing moves any more."""
        last, moved_at = -1, time.monotonic()
        expected = len(self.plan.planned)
        while time.monotonic() < moved_at + PATIENCE:
            self._act()
            self.fleet.mend()
            states = self.states()
            ended = sum(n for state, n in states.items() if state not in ("pending", "running"))
            if ended >= expected and not self._actions and not any(one.is_alive() for one in self._timers):
                return
            if ended != last:
                last, moved_at = ended, time.monotonic()
            time.sleep(0.2)

    def states(self) -> Counter[str]:
        """Count the executions of all tenants by state."""
        found: Counter[str] = Counter()
        for tenant in self.plan.tenants:
            for state, number in self.query(
                f'SELECT state, count(*) FROM "{tenant}".cloacina_executions GROUP BY state'
            ):
                found[state] += number
        return found
