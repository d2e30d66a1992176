"""The protocol as pure values: a row, the moves that change it, and the guard that each move has to pass.

The guards are the store's own: `store.guards` makes the ``WHERE`` of its statements from them. So a fence that is
taken out here is taken out of the database too, and the model that explores every order of moves explores the
protocol that runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import assert_never

from cloacina_celery.core.lifecycle import State


class Number(Enum):
    """How the attempt that a move names is to compare with the row's."""

    SAME = "same"
    """The row's own: the move is its holder's."""
    NEXT = "next"
    """One more: the move begins it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What of an execution's row the protocol reads and writes; instants are seconds on the database's clock."""

    state: State = State.PENDING
    attempt: int = 0
    failures: int = 0
    recoveries: int = 0
    releases: int = 0
    replacements: int = 0
    """Counted by events only: a row that was replaced keeps its attempt and has no column for it."""
    run_at: float = 0.0
    rung_at: float | None = None
    worker: int | None = None
    lease_expires_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What a row must be for a move to change it."""

    states: tuple[State, ...]
    attempt: Number | None = None
    is_held_by: bool = False
    """Whether the row must be the worker's that makes the move."""
    is_due: bool = False
    is_expired: bool = False
    is_rung: bool | None = None

    def admits(self, row: Row, *, now: float, attempt: int | None = None, worker: int | None = None) -> bool:
        """Tell whether the row lets the move pass."""
        if row.state not in self.states:
            return False
        if self.attempt is Number.SAME and row.attempt != attempt:
            return False
        if self.attempt is Number.NEXT and (attempt is None or row.attempt != attempt - 1):
            return False
        if self.is_held_by and row.worker != worker:
            return False
        if self.is_due and row.run_at > now:
            return False
        if self.is_expired and (row.lease_expires_at is None or row.lease_expires_at >= now):
            return False
        return self.is_rung is None or (row.rung_at is not None) is self.is_rung


@dataclass(frozen=True, slots=True)
class Claim:
    """Begin an attempt."""

    attempt: int
    worker: int
    lease_ttl: float


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Extend an attempt's lease."""

    attempt: int
    lease_ttl: float


@dataclass(frozen=True, slots=True)
class Succeed:
    """Settle an attempt that returned."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Retry:
    """Settle an attempt that raised and is to be tried again after ``delay`` seconds."""

    attempt: int
    delay: float


@dataclass(frozen=True, slots=True)
class Fail:
    """Settle an attempt that raised for the last time."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Replace:
    """Settle an attempt whose replacement takes the row over."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Release:
    """Give one attempt back."""

    attempt: int


@dataclass(frozen=True, slots=True)
class ReleaseAll:
    """Give back whatever a worker holds that is shutting down."""

    worker: int


@dataclass(frozen=True, slots=True)
class Recover:
    """Move an attempt on that was lost with its worker, to run again after ``delay`` seconds."""

    attempt: int
    delay: float


@dataclass(frozen=True, slots=True)
class Abandon:
    """End an execution whose recovery budget is spent."""

    attempt: int


@dataclass(frozen=True, slots=True)
class EndCancelled:
    """Settle an attempt that asked to be forgotten."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """End an execution by request."""


@dataclass(frozen=True, slots=True)
class Requeue:
    """Begin an ended execution anew, with fresh budgets."""


@dataclass(frozen=True, slots=True)
class RingDue:
    """Ring for a row that is due and that nobody has rung for."""


@dataclass(frozen=True, slots=True)
class RingAgain:
    """Ring for a row once more whose message may be lost; its attempt's number stays."""


@dataclass(frozen=True, slots=True)
class Unring:
    """Note that the message for an attempt did not leave."""

    attempt: int


Move = (
    Claim | Heartbeat | Succeed | Retry | Fail | Replace | Release | ReleaseAll | Recover | Abandon
    | EndCancelled | Cancel | Requeue | RingDue | RingAgain | Unring
)  # fmt: skip

FENCE = Guard(states=(State.RUNNING,), attempt=Number.SAME)
"""The fence: a worker's write changes the row only while its own attempt runs."""

CLAIM = Guard(states=(State.PENDING,), attempt=Number.NEXT, is_due=True)
CANCEL = Guard(states=(State.PENDING, State.RUNNING))
REQUEUE = Guard(states=(State.FAILED, State.ABANDONED, State.CANCELLED))
RING_DUE = Guard(states=(State.PENDING,), is_due=True, is_rung=False)
RING_AGAIN = Guard(states=(State.PENDING,), is_rung=True)
UNRING = Guard(states=(State.PENDING,), attempt=Number.NEXT)
RELEASE_ALL = Guard(states=(State.RUNNING,), is_held_by=True)
ORPHANED = Guard(states=(State.RUNNING,), is_expired=True)
"""Not a move's: how a reaper finds rows whose lease ran out. What it then does to them is fenced."""
HELD = Guard(states=(State.RUNNING,), is_held_by=True)
"""Likewise, the rows of a worker that is dead."""

GUARDS: Mapping[type[Move], Guard] = MappingProxyType({
    Claim: CLAIM,
    Heartbeat: FENCE,
    Succeed: FENCE,
    Retry: FENCE,
    Fail: FENCE,
    Replace: FENCE,
    Release: FENCE,
    ReleaseAll: RELEASE_ALL,
    Recover: FENCE,
    Abandon: FENCE,
    EndCancelled: FENCE,
    Cancel: CANCEL,
    Requeue: REQUEUE,
    RingDue: RING_DUE,
    RingAgain: RING_AGAIN,
    Unring: UNRING,
})  # fmt: skip


def after(row: Row, move: Move, *, now: float, guards: Mapping[type[Move], Guard] = GUARDS) -> Row | None:
    """Return the row after a move; ``None`` where its guard refuses and nothing is changed."""
    admits = guards[type(move)].admits(
        row, now=now, attempt=getattr(move, "attempt", None), worker=getattr(move, "worker", None)
    )
    return _changed(row, move, now) if admits else None


def _changed(row: Row, move: Move, now: float) -> Row:
    match move:
        case Claim(worker=worker, lease_ttl=ttl):
            return replace(
                row, state=State.RUNNING, attempt=row.attempt + 1, worker=worker, lease_expires_at=now + ttl
            )
        case Heartbeat(lease_ttl=ttl):
            return replace(row, lease_expires_at=now + ttl)
        case Succeed():
            return _ended(row, State.SUCCEEDED)
        case Fail():
            return replace(_ended(row, State.FAILED), failures=row.failures + 1)
        case Abandon():
            return _ended(row, State.ABANDONED)
        case EndCancelled() | Cancel():
            return _ended(row, State.CANCELLED)
        case Retry(delay=delay):
            return replace(_pending(row, now + delay), failures=row.failures + 1)
        case Replace():
            return replace(_pending(row, float("inf")), replacements=row.replacements + 1)
        case Release():
            return replace(_pending(row, now), releases=row.releases + 1)
        case ReleaseAll():
            return replace(_pending(row, now), releases=row.releases + 1, rung_at=now)
        case Recover(delay=delay):
            rung_at = now if delay == 0 else None
            return replace(_pending(row, now + delay), recoveries=row.recoveries + 1, rung_at=rung_at)
        case Requeue():
            return replace(
                row,
                state=State.PENDING,
                failures=0,
                recoveries=0,
                run_at=now,
                rung_at=now,
                lease_expires_at=None,
            )
        case RingDue() | RingAgain():
            return replace(row, rung_at=now)
        case Unring():
            return replace(row, rung_at=None)
        case _:
            assert_never(move)


def _ended(row: Row, state: State) -> Row:
    return replace(row, state=state, lease_expires_at=None)


def _pending(row: Row, run_at: float) -> Row:
    return replace(row, state=State.PENDING, run_at=run_at, rung_at=None, lease_expires_at=None)
