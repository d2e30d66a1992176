"""Every step that can be taken in a world: by a worker, a reaper, the broker, the clock, a person, or a fault."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING

from cloacina_celery.core.lifecycle import State
from cloacina_celery.core.protocol import Ask, submitted
from tests.model.changes import Step, name_of, put, rung, with_row
from tests.model.reapers import of_reaper
from tests.model.workers import of_worker
from tests.model.world import LONG_AGO, Message, World

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.model.world import Rules


def steps(world: World, rules: Rules) -> Iterator[Step]:
    """Yield each step that can be taken now."""
    yield from _submissions(world, rules)
    yield from _time(world)
    yield from _broker(world)
    for n in range(len(world.workers)):
        yield from of_worker(world, rules, n)
    for n in range(len(world.reapers)):
        yield from of_reaper(world, rules, n)
    yield from _people(world, rules)


def _submissions(world: World, rules: Rules) -> Iterator[Step]:
    for e, row in enumerate(world.rows):
        if row is None and all(world.rows[:e]):
            new = submitted(Ask(now=0, max_recoveries=rules.max_recoveries))
            there = world._replace(rows=put(world.rows, e, new))
            yield Step(
                f"{name_of(world, e)} is submitted, and its message leaves", rung(there, Message(e, 1))
            )
            if world.left.crashes:
                left = world.left._replace(crashes=world.left.crashes - 1)
                told = f"{name_of(world, e)} is submitted, and its process dies before the message leaves"
                yield Step(told, there._replace(left=left), "fault")


def _time(world: World) -> Iterator[Step]:
    for e, row in enumerate(world.rows):
        if row is None or world.locks[e]:
            continue
        name = name_of(world, e)
        if row.state is State.RUNNING and (row.lease_expires_at or 0) > 0:
            late = replace(row, lease_expires_at=-1.0)
            told = f"the lease of attempt {row.attempt} of {name} runs out"
            yield Step(told, world._replace(rows=put(world.rows, e, late)), "time")
        if row.state is State.PENDING and row.run_at > 0:
            due = replace(row, run_at=0.0)
            yield Step(f"{name} becomes due", world._replace(rows=put(world.rows, e, due)), "time")
        if row.state is State.PENDING and row.rung_at is not None and LONG_AGO < row.rung_at < inf:
            old = replace(row, rung_at=LONG_AGO)
            told = f"the last ring of {name} is long ago"
            yield Step(told, world._replace(rows=put(world.rows, e, old)), "time")


def _broker(world: World) -> Iterator[Step]:
    for message in dict.fromkeys(world.messages):
        rest = list(world.messages)
        rest.remove(message)
        what = f"the message for attempt {message.attempt} of {name_of(world, message.execution)}"
        yield Step(f"the broker loses {what}", world._replace(messages=tuple(rest)), "fault")
        if world.left.doubles:
            left = world.left._replace(doubles=world.left.doubles - 1)
            yield Step(f"the broker doubles {what}", rung(world, message)._replace(left=left), "fault")


def _people(world: World, rules: Rules) -> Iterator[Step]:
    for e, row in enumerate(world.rows):
        if row is None or world.locks[e]:
            continue
        for move, budget in (("cancel", world.left.cancels), ("requeue", world.left.requeues)):
            after = rules.moves[move].apply(row, Ask(now=0)) if budget else None
            if after is None:
                continue
            there = with_row(world, e, after, move)._replace(
                left=world.left._replace(**{f"{move}s": budget - 1})
            )
            if move == "requeue":
                # The past that counts is the one since then.
                there = rung(there, Message(e, after.attempt + 1))
            yield Step(f"somebody {move}s {name_of(world, e)}", there, "person")
