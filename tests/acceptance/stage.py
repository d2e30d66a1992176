"""What an acceptance test acts on: an app, its tenant, the processes around them, and what the rows say."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.support import shop_tables
from tests.support.waiting import PATIENCE, database_time, eventually

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from types import ModuleType

    from psycopg2 import extensions

    from cloacina_celery.store.queries import Event, Execution
    from tests.support.processes import BeatProcess, Processes, WorkerProcess
    from tests.support.shop_tables import Note, Run

BAZAAR = "tests.acceptance.bazaar:app"


@dataclass(kw_only=True)
class Stage:
    """One tenant of the bazaar."""

    bazaar: ModuleType
    tenant: str
    observer: extensions.connection
    processes: Processes

    def worker(self, *, tenants: Sequence[str] = (), **options: Any) -> WorkerProcess:
        """Start a worker of the tenant and return it once it is ready."""
        return self.start_worker(tenants=tenants, **options).wait_ready()

    def start_worker(self, *, tenants: Sequence[str] = (), **options: Any) -> WorkerProcess:
        """Start a worker of the tenant and return at once."""
        return self.processes.worker(BAZAAR, queues=list(tenants) or [self.tenant], **options)

    def beat(self, **options: Any) -> BeatProcess:
        """Start beat and return it once it is ready."""
        return self.processes.beat(BAZAAR, **options).wait_ready()

    def send(self, task: str, *args: Any, **kwargs: Any) -> Any:
        """Submit `bazaar.<task>` for the tenant and return its result object."""
        return getattr(self.bazaar, task).apply_async(args, kwargs, tenant=self.tenant)

    def row(self, result: Any, tenant: str | None = None) -> Execution:
        """Return the execution's row."""
        found: Execution = self.bazaar.cloacina.executions(tenant or self.tenant).get(str(result))
        return found

    def events(self, result: Any, tenant: str | None = None) -> list[Event]:
        """Return the execution's history."""
        found: list[Event] = self.bazaar.cloacina.executions(tenant or self.tenant).history(str(result))
        return found

    def kinds(self, result: Any) -> list[str]:
        """Return the kinds of the execution's events in order."""
        return [event.kind for event in self.events(result)]

    def wait_for_state(self, result: Any, state: str, timeout: float = PATIENCE) -> Execution:
        """Return the row once it is in this state."""
        eventually(
            lambda: self.row(result).state == state,
            timeout,
            f"{result} to be {state}; it is {self.row(result)} with {self.events(result)}",
        )
        return self.row(result)

    def runs(self, key: str) -> list[Run]:
        """Return the starts with this key."""
        return shop_tables.runs(self.observer, self.tenant, key)

    def wait_for_runs(self, key: str, number: int, timeout: float = PATIENCE) -> list[Run]:
        """Return the starts with this key as soon as there are so many."""
        return shop_tables.wait_for_runs(self.observer, self.tenant, key, number, timeout)

    def open_gate(self, key: str) -> None:
        """Let the tasks at this gate go on."""
        shop_tables.open_gate(self.observer, self.tenant, key)

    def notes(self, key: str) -> list[Note]:
        """Return the committed effects with these words."""
        return [note for note in shop_tables.notes(self.observer, self.tenant) if note.text == key]

    def now(self) -> datetime:
        """Return the database's clock."""
        return database_time(self.observer)

    def kill_child(self, run: Run) -> datetime:
        """Kill the pool's child that made this run, and return when."""
        at = self.now()
        os.kill(run.pid, signal.SIGKILL)
        return at


def report(what: str, began: datetime, run: Run) -> float:
    """Print and return the seconds from an instant to a start of a task, both on the database's clock."""
    seconds = (run.started_at - began).total_seconds()
    print(f"FIGURE {what}: {seconds:.2f} s")
    return seconds
