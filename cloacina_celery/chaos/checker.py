"""The checker: reads a history and finds what must not be in it. Pure, so that it is tested on made-up histories."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import datetime

from cloacina_celery.chaos.faults import Done
from cloacina_celery.chaos.history import Event, History, Row
from cloacina_celery.core.lifecycle import TERMINAL_STATES, Recover, after_loss
from cloacina_celery.core.replay import Recorded, replay

LOST = "lost"
EFFECTS = "effects missing or doubled"
TWICE = "settled twice"
RAN_TWICE = "attempts run twice or unclaimed"
FOREIGN = "rows in a foreign tenant"
STUCK = "stuck"
BUDGET = "attempts nobody can account for"
NEEDLESS = "rung again without a cause"
UNFIT = "history the model does not allow"
PROCESSES = "processes that ended badly"

FINDINGS = (LOST, EFFECTS, TWICE, RAN_TWICE, FOREIGN, STUCK, BUDGET, NEEDLESS, UNFIT, PROCESSES)
"""What is counted, in the order in which it is printed; each has to be 0."""

RUN, MESSAGE = "run", "message"

ENDS = frozenset({*TERMINAL_STATES, "retry_scheduled", "recovered", "released", "replaced"})
"""Events that end an attempt; each attempt has one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that must not be, about one execution."""

    kind: str
    execution_id: str
    what: str


@dataclass(frozen=True, slots=True, order=True)
class Recovery:
    """How many seconds a lost run or message cost: until the next claim, beyond a delay that was wanted."""

    seconds: float
    execution_id: str
    cause: str
    what: str
    """What was lost: a run or a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the history says."""

    executions: int
    attempts: int
    states: Counter[str]
    recoveries: int
    failures_by_faults: int
    """Failures that nobody had ordered: a cut connection met the task's own statement, which counts as its failure."""
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
    return Verdict(
        executions=len(history.rows),
        attempts=sum(event.kind == "claimed" for event in history.events),
        states=Counter(row.state for row in history.rows),
        recoveries=sum(event.kind == "recovered" for event in history.events),
        failures_by_faults=sum(
            max(row.failures - history.planned[row.id].order.get("failures", 0), 0)
            for row in history.rows
            if row.id in history.planned
        ),
        recovered=sorted([*_lost_runs(history, by_execution), *_lost_messages(history, by_execution)]),
        findings=[
            *_lost_and_stuck(history),
            *_effects(history, by_execution),
            *_settlements(by_execution),
            *_runs(history, by_execution),
            *_strangers(history),
            *_budgets(history.rows),
            *_needless(history),
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


def _runs(history: History, events: dict[str, list[Event]]) -> list[Finding]:
    found = []
    runs = Counter((line.execution_id, line.attempt) for line in history.lines)
    claims = Counter(
        (id_, event.attempt) for id_, own in events.items() for event in own if event.kind == "claimed"
    )
    for (id_, attempt), number in runs.items():
        if number > 1:
            what = f"attempt {attempt} ran {number} times"
            found.append(Finding(kind=RAN_TWICE, execution_id=id_, what=what))
        if not claims[id_, attempt]:
            what = f"attempt {attempt} ran without a claim"
            found.append(Finding(kind=RAN_TWICE, execution_id=id_, what=what))
    for (id_, attempt), number in claims.items():
        if number > 1:
            what = f"attempt {attempt} was claimed {number} times"
            found.append(Finding(kind=RAN_TWICE, execution_id=id_, what=what))
    return found


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


def _lost_runs(history: History, events: dict[str, list[Event]]) -> list[Recovery]:
    """Measure from the fault that struck the worker of a lost run, or from the run's start, to the next claim."""
    struck: dict[int, list[Done]] = defaultdict(list)
    for fault in history.faults:
        for pid in fault.pids:
            struck[pid].append(fault)
    found = []
    for id_, own in events.items():
        recoveries, claimed_at = 0, None
        lost: tuple[datetime, float, str] | None = None
        for event in own:
            if event.kind == "claimed":
                if lost is not None:
                    since, delay, cause = lost
                    seconds = max((event.at - since).total_seconds() - delay, 0.0)
                    found.append(Recovery(seconds, id_, cause, RUN))
                lost, claimed_at = None, event.at
            elif event.kind == "recovered" and claimed_at is not None:
                pid = history.worker_pids.get(event.worker_id or 0, 0)
                causes = [fault for fault in struck[pid] if claimed_at <= fault.at <= event.at]
                decision = after_loss(recoveries=recoveries, max_recoveries=recoveries + 1)
                assert isinstance(decision, Recover)
                last = causes[-1] if causes else None
                lost = (
                    last.at if last else claimed_at,
                    decision.delay,
                    last.kind if last else "the start of the run",
                )
                recoveries += 1
    return found


def _lost_messages(history: History, events: dict[str, list[Event]]) -> list[Recovery]:
    """Measure from the loss of a message to the next claim of an execution that then still waited."""
    found = []
    for fault in history.faults:
        for id_ in set(fault.lost_ids):
            before = [event for event in events[id_] if event.at <= fault.at]
            after = [event.at for event in events[id_] if event.at > fault.at and event.kind == "claimed"]
            if before and before[-1].kind in ("submitted", "recovered", "released", "rung_again") and after:
                found.append(Recovery((after[0] - fault.at).total_seconds(), id_, fault.kind, MESSAGE))
    return found


def percentile(ordered: list[float], percent: int) -> float:
    """Return the value below which so many percent lie; 0 of nothing."""
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else 0.0
