"""What a run left behind: rows, events, effects and the lines outside, as the checker reads them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cloacina_celery.chaos.faults import Done
from cloacina_celery.chaos.plan import Planned

if TYPE_CHECKING:
    from cloacina_celery.chaos.drive import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An execution as it stands."""

    tenant: str
    id: str
    state: str
    attempt: int
    failures: int
    recoveries: int
    releases: int
    meant_for: str | None = None
    """The tenant in the arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A transition, in the order of its tenant's events."""

    tenant: str
    execution_id: str
    at: datetime
    kind: str
    attempt: int
    worker_id: int | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """A committed row of a task's own: where it is, and whom it was meant for."""

    tenant: str
    execution_id: str
    attempt: int
    meant_for: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A start of user code, as it was written outside of the database."""

    execution_id: str
    attempt: int
    tenant: str
    pid: int
    at: datetime


@dataclass(slots=True, kw_only=True)
class History:
    """All of it."""

    planned: dict[str, Planned]
    rows: list[Row] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    orders: list[tuple[str, str]] = field(default_factory=list)
    """Tenant and id of the executions that were submitted in a transaction that committed."""
    ghosts: list[tuple[str, str]] = field(default_factory=list)
    """Id and tenant of those whose transaction was rolled back."""
    callbacks: frozenset[str] = frozenset()
    """Executions whose plain callback was sent."""
    faults: list[Done] = field(default_factory=list)
    worker_pids: dict[int, int] = field(default_factory=dict)
    ended_badly: list[str] = field(default_factory=list)
    calm_until: datetime | None = None

    @classmethod
    def read(cls, run: Run, outside: Path) -> History:
        """Read the history of a run that is over."""
        history = cls(
            planned=run.plan.planned, ghosts=run.submissions.ghosts, faults=run.faults,
            calm_until=run.calm_until, ended_badly=run.fleet.ended_badly, callbacks=frozenset(run.callbacks),
        )  # fmt: skip
        for tenant in run.plan.tenants:
            history._read_tenant(run, tenant)
        for id_, name in run.query("SELECT id, name FROM cloacina.workers"):
            pid = re.search(r"pid (\d+)$", name)
            if pid:
                history.worker_pids[id_] = int(pid[1])
        history.lines = read_lines(outside)
        return history

    def _read_tenant(self, run: Run, tenant: str) -> None:
        columns = "id, state, attempt, failures, recoveries, releases, message"
        for *values, message in run.query(f'SELECT {columns} FROM "{tenant}".cloacina_executions'):
            id_, state, attempt, failures, recoveries, releases = values
            self.rows.append(
                Row(
                    tenant=tenant,
                    id=id_,
                    state=state,
                    attempt=attempt,
                    failures=failures,
                    recoveries=recoveries,
                    releases=releases,
                    meant_for=_meant_for(message),
                )
            )
        columns = "execution_id, at, kind, attempt, worker_id, reason"
        for id_, at, kind, attempt, worker_id, reason in run.query(
            f'SELECT {columns} FROM "{tenant}".cloacina_events ORDER BY id'
        ):
            self.events.append(
                Event(tenant=tenant, execution_id=id_, at=at, kind=kind, attempt=attempt, worker_id=worker_id,
                      reason=reason)
            )  # fmt: skip
        for id_, attempt, meant_for in run.query(
            f'SELECT execution_id, attempt, tenant FROM "{tenant}".chaos_effects ORDER BY at'
        ):
            self.effects.append(Effect(tenant=tenant, execution_id=id_, attempt=attempt, meant_for=meant_for))
        self.orders += [
            (tenant, id_) for (id_,) in run.query(f'SELECT execution_id FROM "{tenant}".chaos_orders')
        ]


def read_lines(outside: Path) -> list[Line]:
    """Read the lines that the starts of user code left."""
    lines = []
    for line in outside.read_text().splitlines() if outside.exists() else []:
        id_, attempt, tenant, pid, at = line.split()
        lines.append(
            Line(
                execution_id=id_,
                attempt=int(attempt),
                tenant=tenant,
                pid=int(pid),
                at=datetime.fromtimestamp(float(at), UTC),
            )
        )
    return lines


def _meant_for(message: str) -> str | None:
    if not message:
        return None
    _headers, _properties, (args, _kwargs, _embed) = json.loads(message)
    meant_for: str = args[0]["tenant"]
    return meant_for
