"""A world: the committed rows, what each process has in its hands, the messages, and what has happened so far.

Now is always 0: what passes is moved instead, by steps of their own, in any order. So a clock that runs fast,
slowly, forwards or backwards is in there, and the number of worlds stays finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cloacina_celery.core.lifecycle import TERMINAL_STATES, State
from cloacina_celery.core.protocol import MOVES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cloacina_celery.core.protocol import Move, Row

LEASE, STRANDED, LONG_AGO = 30.0, 10.0, -100.0


class Message(NamedTuple):
    """A doorbell: the execution and the attempt that it rings for."""

    execution: int
    attempt: int


class Worker(NamedTuple):
    """A worker process with one slot."""

    id: int
    phase: str = "idle"
    message: Message | None = None
    attempt: int = 0
    outcome: str = ""
    written: Row | None = None


class Reaper(NamedTuple):
    """A reaper in the middle of what it does."""

    phase: str = "idle"
    execution: int = 0
    seen: Row | None = None
    written: Row | None = None
    move: str = ""


class Past(NamedTuple):
    """What has happened to one execution, and is in no row."""

    started: tuple[int, ...] = ()
    claimed: tuple[int, ...] = ()
    ended: tuple[int, ...] = ()
    effects: tuple[int, ...] = ()
    settled: int = 0
    requeues: int = 0
    wrong: str = ""
    """What a step did that no state shows."""


class Left(NamedTuple):
    """How much of each may still happen: what makes a world small."""

    crashes: int = 0
    doubles: int = 0
    cuts: int = 0
    defers: int = 0
    stops: int = 0
    cancels: int = 0
    requeues: int = 0


class World(NamedTuple):
    """Everything; two equal ones have the same future."""

    rows: tuple[Row | None, ...]
    locks: tuple[str, ...]
    workers: tuple[Worker, ...]
    reapers: tuple[Reaper, ...]
    messages: tuple[Message, ...]
    past: tuple[Past, ...]
    left: Left


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the processes go by: the core's moves, or broken ones."""

    moves: Mapping[str, Move]
    sweep_locks: bool = True
    max_attempts: int = 2
    max_recoveries: int = 1


SOUND = Rules(moves=MOVES)


def begin(*, executions: int = 1, workers: int = 2, reapers: int = 2, left: Left | None = None) -> World:
    """Return the world in which nothing has happened."""
    return World(
        rows=(None,) * executions, locks=("",) * executions,
        workers=tuple(Worker(n) for n in range(workers)), reapers=(Reaper(),) * reapers,
        messages=(), past=(Past(),) * executions, left=left or Left(),
    )  # fmt: skip


def is_over(world: World) -> bool:
    """Tell whether every execution is terminal."""
    return all(row is not None and row.state in TERMINAL_STATES for row in world.rows)


def broken_invariant(world: World, rules: Rules) -> str:
    """Name what must not be, in words; empty in a sound world. The numbers are those of docs/protocol.md."""
    for row, past in zip(world.rows, world.past, strict=True):
        if row is None:
            continue
        if past.wrong:
            return past.wrong
        if past.settled > 1 + past.requeues:
            return "it was settled twice"
        for what, numbers in (("claimed", past.claimed), ("run", past.started), ("ended", past.ended)):
            if len(set(numbers)) != len(numbers):
                return f"attempt {numbers[-1]} was {what} twice"
        if row.attempt and row.attempt not in past.claimed:
            return f"the row has attempt {row.attempt}, which nobody claimed"
        wanted = (row.attempt,) if row.state is State.SUCCEEDED else ()
        if past.effects != wanted:
            return f"effects of attempts {list(past.effects)} are kept and should be those of {list(wanted)}"
        if not past.requeues and row.attempt > 1 + row.failures + row.recoveries + row.releases:
            return f"nothing accounts for attempt {row.attempt}"
        if row.recoveries > row.max_recoveries or row.failures > rules.max_attempts:
            return "a budget is overspent"
        if (row.state is State.RUNNING) != (row.lease_expires_at is not None):
            return "a lease is open, and nothing runs" if row.lease_expires_at else "it runs without a lease"
    return ""
