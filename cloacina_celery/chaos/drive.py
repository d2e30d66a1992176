"""The driver of a chaos run: submits the plan, strikes faults, and waits for the end."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import psycopg2
from celery import chain
from psycopg2 import extensions
from rich.console import Console
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from cloacina_celery.chaos.faults import FAULTS, Done, Fault
from cloacina_celery.chaos.fleet import Fleet, Member
from cloacina_celery.chaos.plan import Job, Plan
from cloacina_celery.errors import DatabaseUnavailable

TICK = 0.01
PATIENCE = 90.0
"""Seconds without any execution's end after which what is left counts as stuck."""

SUBMIT_UNTIL = 0.9
"""The share of a run in which new work is submitted."""

GHOSTS = 0.3
"""The share of transactions that are rolled back once before they are committed with another execution."""

TABLES = """
    CREATE TABLE "{0}".chaos_effects (
        execution_id text NOT NULL, attempt integer NOT NULL, tenant text NOT NULL,
        at timestamptz NOT NULL DEFAULT clock_timestamp());
    CREATE TABLE "{0}".chaos_orders (execution_id text PRIMARY KEY)
"""

Unknown = (DatabaseUnavailable, DBAPIError)
"""What a submission raises whose fate is not known; the same id makes trying again safe."""


class RolledBack(Exception):
    """The driver rolls its own transaction back."""


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything that faults and the driver act on."""

    module: Any
    plan: Plan
    fleet: Fleet
    random: Random
    database_url: str
    lease_ttl: float
    console: Console
    servers_folder: Path | None = None
    faults: list[Done] = field(default_factory=list)
    ghosts: list[tuple[str, str]] = field(default_factory=list)
    unknown: int = 0
    """Submissions whose answer was lost, and that were made again."""
    calm_until: datetime | None = None
    """When the first fault struck: before that, nothing has an excuse."""
    _observer: extensions.connection | None = None
    _actions: list[tuple[float, int, Callable[[], object]]] = field(default_factory=list)
    _numbers: Any = field(default_factory=count)

    @property
    def app(self) -> Any:
        """The Celery app of the run, in this process."""
        return self.module.app

    @property
    def cloacina(self) -> Any:
        """Its plugin."""
        return self.module.cloacina

    # What faults ask

    def connect(self) -> extensions.connection:
        """Open an autocommit connection of the driver's own, which no fault cuts."""
        url = make_url(self.database_url).set(drivername="postgresql")
        connection = psycopg2.connect(url.render_as_string(hide_password=False), application_name="chaos")
        connection.autocommit = True
        return connection

    def query(self, sql: str, params: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Run a query beside the package."""
        if self._observer is None:
            self._observer = self.connect()
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

    def burst(self, number: int) -> str:
        """Submit many of one tenant's next jobs at once; return the tenant."""
        tenant = self.random.choice(self.plan.tenants)
        for _ in range(number):
            job = self.plan.take(tenant, ("plain", "retried", "chain"))
            if job is None:
                break
            self.submit(job)
        return tenant

    def cut_connections(self, share: float) -> None:
        """Terminate a share of the package's backends in this database."""
        self.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'cloacina_celery' AND random() < %s",
            (share,),
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
            connection = self.connect()
            with connection.cursor() as cursor:
                cursor.execute(
                    f"BEGIN; SET lock_timeout = '3s'; LOCK TABLE \"{tenant}\".cloacina_executions; SELECT pg_sleep(%s)",
                    (seconds,),
                )
            connection.close()

    # Submitting

    def submit(self, job: Job) -> None:
        """Submit a job, however often the database has to be asked."""
        self.plan.submitted.append(job)
        is_ghostly = job.kind == "in a transaction" and self.random.random() < GHOSTS
        while True:
            try:
                if is_ghostly:
                    self._submit_ghost(job.tenant)
                    is_ghostly = False
                self._submit(job)
                return
            except Unknown:
                self.unknown += 1
                time.sleep(0.1)

    def _submit(self, job: Job) -> None:
        module = self.module
        with module.cloacina.tenant(job.tenant):
            if job.kind == "chain":
                chain(*(module.work.si(step.order).set(task_id=step.id) for step in job.steps)).apply_async()
                return
            step = job.steps[0]
            task = module.poison if job.kind == "poison" else module.work
            if job.kind != "in a transaction":
                task.apply_async((step.order,), task_id=step.id, countdown=job.countdown)
                return
            with module.cloacina.session() as session:
                self._place_order(session, step.id)
                task.apply_async((step.order,), task_id=step.id)
                # Whoever rings before the commit is heard before there is a row.
                time.sleep(0.03)

    def _submit_ghost(self, tenant: str) -> None:
        ghost = self.plan.job("ghost", tenant).steps[0]
        self.ghosts.append((ghost.id, tenant))
        with suppress(RolledBack), self.module.cloacina.session(tenant) as session:
            self._place_order(session, ghost.id)
            self.module.work.apply_async((ghost.order,), task_id=ghost.id)
            raise RolledBack

    @staticmethod
    def _place_order(session: Any, execution_id: str) -> None:
        session.execute(
            text("INSERT INTO chaos_orders VALUES (:id) ON CONFLICT DO NOTHING"), {"id": execution_id}
        )

    # The run

    def prepare(self) -> None:
        """Make the tenants and their tables."""
        for tenant in self.plan.tenants:
            self.cloacina.tenants.create(tenant)
            connection = self.connect()
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
            if (wanted is None or fault.kind in wanted)
            and (self.servers_folder is not None or not fault.needs_own_servers)
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
            if ended >= expected and not self._actions:
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
