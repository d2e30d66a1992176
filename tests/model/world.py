"""A small world around the real core: workers, reapers, a broker that loses and doubles, and crashes anywhere.

Every step is one that the system really makes by itself: a statement, a transaction's commit, a message taken or
sent. Between any two of them another process may act, or this one may crash. The rows are moved by
`cloacina_celery.core.protocol` alone.

The clock is an abstraction. It always shows 1. What lies in the future is 2 and what is past is 0 or 1, and that
a lease runs out, or that a delay is over, is a step like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from cloacina_celery.core.lifecycle import TERMINAL_STATES, State
from cloacina_celery.core.protocol import GUARDS, Guard, Move, Row
from cloacina_celery.core.retry import RetryPolicy

NOW, PAST, FUTURE = 1.0, 0.0, 2.0
POLICY = RetryPolicy(max_attempts=2, initial_delay=1, jitter=False)
MAX_RECOVERIES = 1

Message = tuple[int, int]
"""Which execution a message rings for, and which attempt."""


class Worker(NamedTuple):
    """A worker with one slot; it forgets everything when it crashes, and is another worker then."""

    id: int
    phase: str = "idle"  # idle, has a message, runs, settles
    execution: int = 0
    attempt: int = 0
    outcome: str = ""


class Reaper(NamedTuple):
    """A sweep: it looks, decides and writes, and publishes, in this order."""

    phase: str = "idle"  # idle, looked, publishes
    execution: int = 0
    attempt: int = 0


class Budget(NamedTuple):
    """How much may still go wrong, so that a world is finite."""

    crashes: int = 0
    lost_messages: int = 0
    doubled_messages: int = 0
    expiries: int = 0
    lost_answers: int = 0
    cancels: int = 0
    shutdowns: int = 0


class World(NamedTuple):
    """One state of everything."""

    rows: tuple[Row, ...]
    holders: tuple[str, ...]  # who holds each row's lock; "" is nobody
    messages: tuple[Message, ...]
    workers: tuple[Worker, ...]
    reapers: tuple[Reaper, ...]
    budget: Budget
    effects: tuple[tuple[int, int], ...] = ()  # execution and attempt of what was committed
    settled: tuple[tuple[int, int], ...] = ()  # execution and attempt of each end
    runs: tuple[tuple[int, int], ...] = ()  # execution and attempt of each start of user code


Step = tuple[str, World, str]
"""What happens in words, the world after it, and what is wrong with the step itself, if anything."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rules:
    """The protocol that a world runs; the broken ones differ in one point."""

    guards: Mapping[type[Move], Guard] = field(default_factory=lambda: GUARDS)
    reaper_locks: bool = True
    ring_again_bumps: bool = False
    claim_is_atomic: bool = True


SOUND = Rules()


def begin(*, executions: int, workers: int, reapers: int, budget: Budget) -> World:
    """Return the world right after so many submissions, each committed and rung for."""
    return World(
        rows=tuple(Row(run_at=NOW, rung_at=NOW) for _ in range(executions)),
        holders=("",) * executions,
        messages=tuple((number, 1) for number in range(executions)),
        workers=tuple(Worker(id=number) for number in range(workers)),
        reapers=(Reaper(),) * reapers,
        budget=budget,
    )


def is_over(world: World) -> bool:
    """Whether every execution has ended."""
    return all(row.state in TERMINAL_STATES for row in world.rows)


def violations(world: World) -> Iterator[str]:
    """Say which invariant a state breaks."""
    for number, row in enumerate(world.rows):
        name = name_of(number)
        ends = [attempt for execution, attempt in world.settled if execution == number]
        effects = [attempt for execution, attempt in world.effects if execution == number]
        if len(ends) > 1:
            yield f"{name} was settled twice, by attempts {ends[0]} and {ends[1]}"
        if row.state is State.SUCCEEDED and effects != ends:
            yield f"{name} has succeeded by attempt {ends}, and the committed effects are those of {effects}"
        if row.state is not State.SUCCEEDED and effects:
            yield f"{name} is {row.state}, and effects of attempts {effects} are committed"
        if ends and row.state not in TERMINAL_STATES:
            yield f"{name} had ended and is {row.state} again"
        explained = row.failures + row.recoveries + row.releases
        if row.attempt > 1 + explained:
            what = f"{explained} failures, recoveries and releases do not explain"
            yield f"{name} is at attempt {row.attempt}, which {what}"
        if row.recoveries > MAX_RECOVERIES:
            yield f"{name} was recovered {row.recoveries} times of at most {MAX_RECOVERIES}"
        if (row.state is State.RUNNING) is not (row.lease_expires_at is not None):
            yield f"{name} is {row.state} with the lease {row.lease_expires_at}"
    for execution, attempt in set(world.runs):
        if world.runs.count((execution, attempt)) > 1:
            yield f"the code of attempt {attempt} of {name_of(execution)} was started twice"


# Small changes


def name_of(execution: int) -> str:
    """Name an execution as the stories do."""
    return f"execution {chr(ord('A') + execution)}"


def with_row(world: World, execution: int, row: Row) -> World:
    """Put a row in."""
    rows = list(world.rows)
    rows[execution] = row
    return world._replace(rows=tuple(rows))


def held_by(world: World, execution: int, who: str) -> World:
    """Give a row's lock to somebody, or to nobody."""
    holders = list(world.holders)
    holders[execution] = who
    return world._replace(holders=tuple(holders))


def with_worker(world: World, number: int, **changes: object) -> World:
    """Change a worker's fields."""
    workers = list(world.workers)
    workers[number] = workers[number]._replace(**changes)  # type: ignore[arg-type]  # its own fields
    return world._replace(workers=tuple(workers))


def rested(world: World, number: int) -> World:
    """Have a worker forget what it had in its hands."""
    return with_worker(world, number, phase="idle", execution=0, attempt=0, outcome="")


def with_crashed(world: World, number: int) -> World:
    """End a worker with all it had in its hands; the one that is started in its place has another id."""
    worker = world.workers[number]
    if worker.phase == "settles":
        world = held_by(world, worker.execution, "")
    workers = list(world.workers)
    workers[number] = Worker(id=max(w.id for w in workers) + 1)
    return world._replace(workers=tuple(workers))


def with_reaper(world: World, number: int, reaper: Reaper) -> World:
    """Put a reaper in."""
    reapers = list(world.reapers)
    reapers[number] = reaper
    return world._replace(reapers=tuple(reapers))


def without_message(world: World, message: Message) -> World:
    """Take a message out, once."""
    messages = list(world.messages)
    messages.remove(message)
    return world._replace(messages=tuple(messages))


def with_message(messages: tuple[Message, ...], message: Message) -> tuple[Message, ...]:
    """Put a message in."""
    return tuple(sorted((*messages, message)))


def spent(world: World, **costs: int) -> World:
    """Use up some of the budget."""
    left = {name: getattr(world.budget, name) - cost for name, cost in costs.items()}
    return world._replace(budget=world.budget._replace(**left))
