"""The checker: reads a history and finds what must not be in it. Pure, so that it is tested on made-up histories."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta

from cloacina_celery.chaos.faults import Done
from cloacina_celery.chaos.history import Event, History, Row
from cloacina_celery.chaos.measure import Recovery, lost_messages, lost_runs
from cloacina_celery.chaos.plan import HOLDS_GIL, WITH_CALLBACK
from cloacina_celery.core.lifecycle import TERMINAL_STATES
from cloacina_celery.core.replay import Recorded, replay

LOST = "lost"
EFFECTS = "effects missing or doubled"
TWICE = "settled twice"
RAN_TWICE = "attempts run twice or unclaimed"
FOREIGN = "rows in a foreign tenant"
STUCK = "stuck"
BUDGET = "attempts nobody can account for"
NEEDLESS = "rung again without a cause"
UNSTRUCK = "runs lost without a cause"
CALLBACKS = "callbacks lost"
FAILED = "failed though nobody ordered it"
UNFIT = "history the model does not allow"
PROCESSES = "processes that ended badly"

FINDINGS = (
    LOST,
    EFFECTS,
    TWICE,
    RAN_TWICE,
    FOREIGN,
    STUCK,
    BUDGET,
    NEEDLESS,
    UNSTRUCK,
    CALLBACKS,
    FAILED,
    UNFIT,
    PROCESSES,
)
"""What is counted, in the order in which it is printed; each has to be 0."""

FORGOTTEN = timedelta(seconds=2)
"""How long before a crash of Postgres a claim may be whose commit it forgets: three rounds of its WAL writer, which
take 0.6 s, on a machine that is busy."""

AFTERMATH = timedelta(seconds=6)
"""How long after its beginning a fault of the database may keep a worker from its heartbeat."""

LEASE_RAN_OUT = "the lease ran out"
"""How the reaper's reason begins for a run whose worker sent no heartbeat."""

ENDS = frozenset({*TERMINAL_STATES, "retry_scheduled", "recovered", "released", "replaced"})
"""Events that end an attempt; each attempt has one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that must not be, about one execution."""

    kind: str
    execution_id: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the history says."""

    executions: int
    attempts: int
    states: Counter[str]
    recoveries: int
    unordered_failures: int
    """Failures that no order had asked for."""
    repeated_by_crash: int
    """Runs of an attempt whose claim a crash of Postgres had forgotten (decision 0007)."""
    recovered: list[Recovery]
    """The quickest first."""
    findings: list[Finding]

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def count(self, kind: str) -> int:
        """Count the executions of which something of a kind was found."""
        return len({finding.execution_id for finding in self.findings if finding.kind == kind})


def check(history: History) -> Verdict:
    """Judge a history."""
    by_execution: dict[str, list[Event]] = defaultdict(list)
    for event in history.events:
        by_execution[event.execution_id].append(event)
    ran_twice, repeated = _runs(history, by_execution)
    return Verdict(
        executions=len(history.rows),
        attempts=sum(event.kind == "claimed" for event in history.events),
        states=Counter(row.state for row in history.rows),
        recoveries=sum(event.kind == "recovered" for event in history.events),
        unordered_failures=sum(_unordered(history, row) for row in history.rows),
        repeated_by_crash=repeated,
        recovered=sorted([*lost_runs(history, by_execution), *lost_messages(history, by_execution)]),
        findings=[
            *_lost_and_stuck(history),
            *_effects(history, by_execution),
            *_settlements(by_execution),
            *ran_twice,
            *_strangers(history),
            *_budgets(history.rows),
            *_needless(history),
            *_unstruck(history, by_execution),
            *_callbacks(history),
            *_failed(history),
            *_unfit(by_execution),
            *(Finding(kind=PROCESSES, execution_id=what, what=what) for what in history.ended_badly),
        ],
    )


def _lost_and_stuck(history: History) -> list[Finding]:
    found = []
    rows = {row.id: row for row in history.rows}
    for id_, planned in history.planned.items():
        row = rows.get(id_)
        if row is None:
            found.append(Finding(kind=LOST, execution_id=id_, what="was submitted and has no row"))
        elif row.state not in TERMINAL_STATES:
            found.append(Finding(kind=STUCK, execution_id=id_, what=f"is still {row.state}"))
        elif row.state != planned.expected:
            what = f"ended as {row.state} and should be {planned.expected}"
            found.append(Finding(kind=LOST, execution_id=id_, what=what))
    for tenant, id_ in history.orders:
        if id_ not in rows:
            what = f"was not submitted, though {tenant} committed its order"
            found.append(Finding(kind=LOST, execution_id=id_, what=what))
    ghosts = {id_ for id_, _ in history.ghosts}
    traces = {row.id for row in history.rows} | {id_ for _, id_ in history.orders}
    traces |= {line.execution_id for line in history.lines}
    return found + [
        Finding(kind=LOST, execution_id=id_, what="is there, and was rolled back") for id_ in ghosts & traces
    ]


def _effects(history: History, events: dict[str, list[Event]]) -> list[Finding]:
    found = []
    attempts: dict[str, list[int]] = defaultdict(list)
    for effect in history.effects:
        attempts[effect.execution_id].append(effect.attempt)
    for row in history.rows:
        settled_by = [event.attempt for event in events[row.id] if event.kind == "succeeded"]
        wanted = settled_by[:1] if row.state == "succeeded" else []
        if attempts[row.id] != wanted:
            what = f"has effects of attempts {attempts[row.id]} and should have those of {wanted}"
            found.append(Finding(kind=EFFECTS, execution_id=row.id, what=what))
    return found


def _settlements(events: dict[str, list[Event]]) -> list[Finding]:
    found = []
    for id_, history in events.items():
        settled: Event | None = None
        ended: dict[int, Event] = {}
        for event in history:
            if settled is not None and event.kind != "requeued":
                what = f"was {event.kind} after it had {settled.kind}"
                found.append(Finding(kind=TWICE, execution_id=id_, what=what))
            if event.kind in ENDS and event.attempt in ended:
                what = f"attempt {event.attempt} ended as {ended[event.attempt].kind}, then as {event.kind}"
                found.append(Finding(kind=TWICE, execution_id=id_, what=what))
            if event.kind in ENDS:
                ended[event.attempt] = event
            if event.kind in TERMINAL_STATES:
                settled = event
            elif event.kind == "requeued":
                settled = None
    return found


def _runs(history: History, events: dict[str, list[Event]]) -> tuple[list[Finding], int]:
    """Find attempts that ran twice or unclaimed; count apart those whose claim a crash of Postgres took back."""
    found: list[Finding] = []
    repeated = 0
    runs: dict[tuple[str, int], list[datetime]] = defaultdict(list)
    for line in history.lines:
        runs[line.execution_id, line.attempt].append(line.at)
    claims = Counter(
        (id_, event.attempt) for id_, own in events.items() for event in own if event.kind == "claimed"
    )
    for (id_, attempt), starts in runs.items():
        starts.sort()
        # The claim that lasts is that of the last run; each one before it needs a crash of its own.
        lasting = starts[-1:] if claims[id_, attempt] else []
        forgotten = starts[: len(starts) - len(lasting)]
        crashes = [fault for fault in history.faults if fault.is_crash]
        excused = []
        for start, following in zip(forgotten, [*starts[1:], None], strict=False):
            crash = next((one for one in crashes if _forgot(one, start, following)), None)
            if crash is not None:
                # It forgets one claim of an attempt: the next one comes after it.
                crashes.remove(crash)
                excused.append(start)
        repeated += len(excused)
        if excused == forgotten:
            continue
        what = f"ran {len(starts)} times" if len(starts) > 1 else "ran without a claim"
        found.append(Finding(kind=RAN_TWICE, execution_id=id_, what=f"attempt {attempt} {what}"))
    for (id_, attempt), number in claims.items():
        # Not even a crash makes two of them: it takes the event with the claim.
        if number > 1:
            what = f"attempt {attempt} was claimed {number} times"
            found.append(Finding(kind=RAN_TWICE, execution_id=id_, what=what))
    return found, repeated


def _forgot(crash: Done, start: datetime, following: datetime | None) -> bool:
    """Tell whether Postgres crashed right after a run's start, and before the next one of the same attempt."""
    is_soon = crash.at - FORGOTTEN <= start <= (crash.until or crash.at)
    return is_soon and (following is None or crash.at <= following)


def _strangers(history: History) -> list[Finding]:
    found = []
    homes = {id_: planned.tenant for id_, planned in history.planned.items()}
    places = (
        [(row.id, row.tenant, row.meant_for, "row") for row in history.rows]
        + [(one.execution_id, one.tenant, one.meant_for, "effect") for one in history.effects]
        + [(line.execution_id, line.tenant, None, "run") for line in history.lines]
    )
    for id_, tenant, meant_for, what in places:
        for home in {homes.get(id_, tenant), meant_for or tenant}:
            if home != tenant:
                text = f"has a {what} in {tenant} and belongs to {home}"
                found.append(Finding(kind=FOREIGN, execution_id=id_, what=text))
    return found


def _budgets(rows: list[Row]) -> list[Finding]:
    found = []
    for row in rows:
        explained = row.failures + row.recoveries + row.releases
        # A settled run that neither failed nor was given back is the last one.
        wanted = explained + (row.state in ("succeeded", "abandoned", "running"))
        if row.state in TERMINAL_STATES - {"cancelled"} and row.attempt != wanted:
            what = (
                f"has {row.attempt} attempts, {row.failures} failures, {row.recoveries} recoveries and "
                f"{row.releases} releases"
            )
            found.append(Finding(kind=BUDGET, execution_id=row.id, what=what))
    return found


def _needless(history: History) -> list[Finding]:
    return [
        Finding(
            kind=NEEDLESS, execution_id=event.execution_id, what="was rung again before any fault had struck"
        )
        for event in history.events
        if event.kind == "rung_again" and (history.calm_until is None or event.at < history.calm_until)
    ]


def _unfit(events: dict[str, list[Event]]) -> list[Finding]:
    return [
        Finding(kind=UNFIT, execution_id=id_, what=what)
        for id_, own in events.items()
        for what in replay(
            Recorded(kind=event.kind, attempt=event.attempt, worker=event.worker_id, at=event.at.timestamp())
            for event in own
        )
    ]


def _unstruck(history: History, events: dict[str, list[Event]]) -> list[Finding]:
    """Find executions that held the GIL, and lost their lease although nothing else had happened to them."""
    found = []
    for id_, planned in history.planned.items():
        if planned.kind != HOLDS_GIL:
            continue
        claimed_at: datetime | None = None
        for event in events[id_]:
            if event.kind == "claimed":
                claimed_at = event.at
            if event.kind != "recovered" or not (event.reason or "").startswith(LEASE_RAN_OUT):
                continue
            pid = history.worker_pids.get(event.worker_id or 0, 0)
            assert claimed_at is not None
            if not any(
                (pid in fault.pids or fault.is_total) and claimed_at - AFTERMATH <= fault.at <= event.at
                for fault in history.faults
            ):
                found.append(Finding(kind=UNSTRUCK, execution_id=id_, what="lost its lease under a C call"))
    return found


def _callbacks(history: History) -> list[Finding]:
    return [
        Finding(kind=CALLBACKS, execution_id=row.id, what="succeeded, and its plain callback was never sent")
        for row in history.rows
        if row.state == "succeeded"
        and row.id in history.planned
        and history.planned[row.id].kind == WITH_CALLBACK
        and row.id not in history.callbacks
    ]


def _failed(history: History) -> list[Finding]:
    return [
        Finding(kind=FAILED, execution_id=row.id, what=f"has {row.failures} failures, {number} too many")
        for row in history.rows
        if (number := _unordered(history, row))
    ]


def _unordered(history: History, row: Row) -> int:
    planned = history.planned.get(row.id)
    return max(row.failures - planned.ordered_failures, 0) if planned else 0
