"""How long lost runs and lost messages took to be made good, read out of a history."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime

from cloacina_celery.chaos.faults import Done
from cloacina_celery.chaos.history import Event, History
from cloacina_celery.core.lifecycle import Recover, after_loss

RUN, MESSAGE = "run", "message"


@dataclass(frozen=True, slots=True, order=True)
class Recovery:
    """How many seconds a lost run or message cost: until the next claim, beyond a delay that was wanted."""

    seconds: float
    execution_id: str
    cause: str
    what: str
    """What was lost: a run or a message."""


def lost_runs(history: History, events: dict[str, list[Event]]) -> list[Recovery]:
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


def lost_messages(history: History, events: dict[str, list[Event]]) -> list[Recovery]:
    """Measure from the last loss of a message before a claim to that claim, of executions that then still waited.

    A message that is lost again before anybody claims is one recovery: it was rung for once more in between.
    """
    losses: dict[str, list[Done]] = defaultdict(list)
    for fault in sorted(history.faults, key=lambda fault: fault.at):
        for id_ in set(fault.lost_ids):
            before = [event for event in events[id_] if event.at <= fault.at]
            if before and before[-1].kind in ("submitted", "recovered", "released", "rung_again"):
                losses[id_].append(fault)
    found = []
    for id_, own in losses.items():
        since: datetime | None = None
        for event in events[id_]:
            if event.kind != "claimed":
                continue
            open_losses = [fault for fault in own if fault.at < event.at and (not since or fault.at >= since)]
            if open_losses:
                last = open_losses[-1]
                found.append(Recovery((event.at - last.at).total_seconds(), id_, last.kind, MESSAGE))
            since = event.at
    return found


def percentile(ordered: list[float], percent: int) -> float:
    """Return the value below which so many percent lie; 0 of nothing."""
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else 0.0
