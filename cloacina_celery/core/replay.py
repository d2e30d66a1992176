"""Replay: does a recorded history fit the protocol? Pure, for whoever reads events back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cloacina_celery.core.lifecycle import TERMINAL_STATES, State
from cloacina_celery.core.protocol import MOVES, Ask, Attempt, Row, submitted


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One event of an execution, as it was written with its move; ``at`` is in seconds on the database's clock."""

    kind: str
    attempt: int
    worker: int | None
    at: float


# An event says which move it was; where two write the same event, the row tells which of them may have been it.
_MOVES_OF = {
    kind: [move for move in MOVES.values() if move.event == kind]
    for kind in {move.event for move in MOVES.values()} - {None}
}


def replay(events: Iterable[Recorded]) -> list[str]:
    """Return, in words, what of one execution's events, in their order, the protocol does not allow.

    When a row was due, rung or expired is in no event, so those conditions are taken as met; nor are the budgets in
    any, so they are not judged. An event that does not fit is taken as true, so that what comes after it is judged
    by what it says.
    """
    row: Row | None = None
    wrong: list[str] = []
    for event in events:
        if row is None:
            row = _first(event)
            if event.kind not in ("submitted", "failed") or event.attempt:
                wrong.append(f"begins with {_told(event)}, and not with its submission")
            continue
        after = _after(row, event)
        if after is None:
            wrong.append(f"{_told(event)}, but the row was {row.state} with attempt {row.attempt}")
            after = _forced(row, event)
        elif (
            event.kind not in ("claimed", "submitted", "requeued", "rung_again", "deferred")
            and event.worker != row.worker
        ):
            wrong.append(f"{_told(event)} of worker {event.worker}, but worker {row.worker} had claimed it")
        row = after
    return wrong


def _first(event: Recorded) -> Row:
    row = submitted(Ask(now=event.at))
    if event.kind == "failed":
        return replace(row, state=State.FAILED, has_message=event.attempt > 0)
    return row if event.kind == "submitted" else _forced(row, event)


def _after(row: Row, event: Recorded) -> Row | None:
    for move in _MOVES_OF.get(event.kind, []):
        guard = replace(
            move.guard, is_due=False, is_unrung=False, is_expired=False, is_stranded=False, of_worker=False
        )
        if event.kind == "requeued":
            guard = replace(guard, has_message=None)  # no event tells whether it has one
        # What rings for the next attempt and does not claim it is recorded with the last one.
        is_ahead = guard.attempt is Attempt.NEXT and event.kind != "claimed"
        ask = Ask(now=event.at, attempt=event.attempt + is_ahead, worker=event.worker)
        after = replace(move, guard=guard).apply(row, ask)
        if after is not None and after.attempt == event.attempt:
            return after
    return None


def _forced(row: Row, event: Recorded) -> Row:
    if event.kind in TERMINAL_STATES:
        state = State(event.kind)
    else:
        state = State.RUNNING if event.kind == "claimed" else State.PENDING
    return replace(row, state=state, attempt=event.attempt, worker=event.worker)


def _told(event: Recorded) -> str:
    return f"{event.kind} as attempt {event.attempt}"
