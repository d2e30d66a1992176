"""The protocol as values: each move of a row has a guard, which the SQL is rendered from, and a change.

`store.guards` turns a guard into the ``WHERE`` of the move's statement, and `Guard.admits` asks the same of a
row in memory. So there is one fence: what is taken out of it here is gone from the SQL and from the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from math import inf

from cloacina_celery.core.lifecycle import State


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An execution's row, as far as a move looks at it or changes it; instants are seconds on the database's clock."""

    state: State = State.PENDING
    attempt: int = 0
    failures: int = 0
    recoveries: int = 0
    releases: int = 0
    max_recoveries: int = 3
    run_at: float = 0.0
    rung_at: float | None = None
    lease_expires_at: float | None = None
    worker: int | None = None
    has_message: bool = True
    """False for a row that was entered as failed with what it was to follow: it has nothing to run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a move is asked with: the database's instant, and those of the values that the move needs."""

    now: float
    attempt: int = 0
    worker: int | None = None
    lease_ttl: float = 0.0
    delay: float = 0.0
    not_before: float | None = None
    """The turn that a recovery was given among many."""
    is_rung: bool = True
    """Whether the message of a new row leaves right after the commit, if it is due."""
    stranded_after: float = 0.0
    max_recoveries: int = 3


class Attempt(StrEnum):
    """How the attempt that is asked for must stand to the one in the row."""

    SAME = "same"
    """The one that runs: the fence."""
    NEXT = "next"
    """One more than the last that was claimed: what a message rings for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What must hold of a row before a move; a condition that is not named is not asked for."""

    states: tuple[State, ...] = ()
    one: bool = True
    """It names the row by its id; else it looks for rows."""
    attempt: Attempt | None = None
    is_due: bool = False
    is_unrung: bool = False
    is_expired: bool = False
    is_stranded: bool = False
    is_parked: bool = False
    is_waiting: bool = False
    of_worker: bool = False
    has_message: bool | None = None

    def admits(self, row: Row, ask: Ask) -> bool:
        """Tell whether the move may be made of this row."""
        wanted = {Attempt.SAME: ask.attempt, Attempt.NEXT: ask.attempt - 1}
        return (
            (not self.states or row.state in self.states)
            and (self.attempt is None or row.attempt == wanted[self.attempt])
            and (not self.is_due or row.run_at <= ask.now)
            and (not self.is_unrung or row.rung_at is None)
            and (not self.is_expired or (row.lease_expires_at is not None and row.lease_expires_at < ask.now))
            and (
                not self.is_stranded
                or (row.rung_at is not None and row.rung_at < ask.now - ask.stranded_after)
            )
            and (not self.is_parked or row.run_at == inf)
            and (not self.is_waiting or row.rung_at == inf)
            and (not self.of_worker or (row.worker is not None and row.worker == ask.worker))
            and (self.has_message is None or row.has_message == self.has_message)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One move: its event (``None`` writes none), when it may be made, and what it makes of the row."""

    event: str | None
    guard: Guard
    change: Callable[[Row, Ask], Row]

    def apply(self, row: Row, ask: Ask) -> Row | None:
        """Return the row after the move; ``None`` where the guard refuses, and nothing is changed."""
        return self.change(row, ask) if self.guard.admits(row, ask) else None


FENCE = Guard(states=(State.RUNNING,), attempt=Attempt.SAME)
"""Of each write of a worker: the row still runs the attempt that the worker claimed."""

PARKED = Guard(one=False, states=(State.PENDING,), is_parked=True)
"""A row that waits for its replacement takes the submission of its id."""
NEVER_RAN = Guard(one=False, states=(State.FAILED,), has_message=False)
"""So does one that was entered as failed with what it was to follow."""

CLAIMABLE = Guard(states=(State.PENDING,), attempt=Attempt.NEXT, is_due=True)
"""Of what a message may come to: the row is pending and due, and the message rings for its next attempt."""

WAITING = Guard(one=False, states=(State.PENDING,), is_waiting=True)
"""A row whose message found no room within its tenant's limits."""

EXPIRED = Guard(states=(State.RUNNING,), one=False, is_expired=True)
OF_WORKER = Guard(states=(State.RUNNING,), one=False, of_worker=True)
"""The reaper's looks for orphans; it locks what it finds, and writes through the fence."""


def submitted(ask: Ask) -> Row:
    """Make a new row: born rung if it is due and its message leaves right after the commit."""
    rung_at = ask.now if ask.delay <= 0 and ask.is_rung else None
    return Row(run_at=ask.now + ask.delay, rung_at=rung_at, max_recoveries=ask.max_recoveries)


def _take_over(row: Row, ask: Ask) -> Row:
    new = submitted(ask)
    return replace(
        row, state=State.PENDING, run_at=new.run_at, rung_at=new.rung_at, max_recoveries=new.max_recoveries,
        has_message=True,
    )  # fmt: skip


def _claim(row: Row, ask: Ask) -> Row:
    return replace(
        row, state=State.RUNNING, attempt=row.attempt + 1, worker=ask.worker,
        lease_expires_at=ask.now + ask.lease_ttl,
    )  # fmt: skip


def _extend(row: Row, ask: Ask) -> Row:
    return replace(row, lease_expires_at=ask.now + ask.lease_ttl)


def _ended(state: State, *, failed: int = 0) -> Callable[[Row, Ask], Row]:
    return lambda row, _: replace(row, state=state, lease_expires_at=None, failures=row.failures + failed)


def _retry(row: Row, ask: Ask) -> Row:
    return replace(
        row, state=State.PENDING, failures=row.failures + 1, lease_expires_at=None, run_at=ask.now + ask.delay,
        rung_at=None,
    )  # fmt: skip


def _park(row: Row, _: Ask) -> Row:
    return replace(row, state=State.PENDING, lease_expires_at=None, run_at=inf, rung_at=None)


def _release_attempt(row: Row, ask: Ask) -> Row:
    return replace(
        row,
        state=State.PENDING,
        releases=row.releases + 1,
        lease_expires_at=None,
        run_at=ask.now,
        rung_at=None,
    )


def _release(row: Row, ask: Ask) -> Row:
    return replace(_release_attempt(row, ask), rung_at=ask.now)


def _recover(row: Row, ask: Ask) -> Row:
    run_at = ask.now + ask.delay
    return replace(
        row, state=State.PENDING, recoveries=row.recoveries + 1, lease_expires_at=None,
        run_at=run_at if ask.not_before is None else max(run_at, ask.not_before),
        rung_at=ask.now if ask.delay == 0 and ask.not_before is None else None,
    )  # fmt: skip


def _requeue(row: Row, ask: Ask) -> Row:
    return replace(row, state=State.PENDING, failures=0, recoveries=0, run_at=ask.now, rung_at=ask.now)


def _ring(row: Row, ask: Ask) -> Row:
    return replace(row, rung_at=ask.now)


MOVES = {
    "take over": Move(event="submitted", guard=PARKED, change=_take_over),
    "take over failed": Move(event="submitted", guard=NEVER_RAN, change=_take_over),
    "ring": Move(
        event=None,
        guard=Guard(states=(State.PENDING,), one=False, is_unrung=True, is_due=True),
        change=_ring,
    ),
    "ring again": Move(
        event="rung_again",
        guard=Guard(states=(State.PENDING,), one=False, is_stranded=True),
        change=_ring,
    ),
    "unring": Move(
        event=None,
        guard=Guard(states=(State.PENDING,), attempt=Attempt.NEXT),
        change=lambda row, _: replace(row, rung_at=None),
    ),
    "claim": Move(event="claimed", guard=CLAIMABLE, change=_claim),
    "defer": Move(event="deferred", guard=CLAIMABLE, change=lambda row, _: replace(row, rung_at=inf)),
    "ring waiting": Move(event=None, guard=WAITING, change=_ring),
    "free waiting": Move(event=None, guard=WAITING, change=lambda row, _: replace(row, rung_at=None)),
    # By whoever claimed it, and got no answer.
    "find claim": Move(event=None, guard=FENCE, change=_extend),
    "heartbeat": Move(event=None, guard=FENCE, change=_extend),
    "succeed": Move(event="succeeded", guard=FENCE, change=_ended(State.SUCCEEDED)),
    "retry": Move(event="retry_scheduled", guard=FENCE, change=_retry),
    "fail": Move(event="failed", guard=FENCE, change=_ended(State.FAILED, failed=1)),
    "replace": Move(event="replaced", guard=FENCE, change=_park),
    "release": Move(event="released", guard=FENCE, change=_release_attempt),
    "release all": Move(event="released", guard=OF_WORKER, change=_release),
    # All that runs in a tenant that was suspended.
    "give back": Move(
        event="released", guard=Guard(states=(State.RUNNING,), one=False), change=_release_attempt
    ),
    "recover": Move(event="recovered", guard=FENCE, change=_recover),
    "abandon": Move(event="abandoned", guard=FENCE, change=_ended(State.ABANDONED)),
    "end cancelled": Move(event="cancelled", guard=FENCE, change=_ended(State.CANCELLED)),
    "cancel": Move(
        event="cancelled",
        guard=Guard(states=(State.PENDING, State.RUNNING)),
        change=_ended(State.CANCELLED),
    ),
    "requeue": Move(
        event="requeued",
        guard=Guard(states=(State.FAILED, State.ABANDONED, State.CANCELLED), has_message=True),
        change=_requeue,
    ),
}
"""Every move that is made of a row which is there; a new one is `submitted`."""
