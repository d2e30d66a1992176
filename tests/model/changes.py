"""What a step is, and the changes of a world that steps are made of."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from cloacina_celery.core.lifecycle import TERMINAL_STATES, State

if TYPE_CHECKING:
    from cloacina_celery.core.protocol import Row
    from tests.model.world import Message, Past, World


class Step(NamedTuple):
    """One step, told in the glossary's words; ``by`` is what takes it."""

    told: str
    world: World
    by: str = "system"


ENDS = ("succeed", "fail", "retry", "release", "release all", "recover", "abandon", "cancel")
SETTLES = ("succeed", "fail", "abandon", "cancel")


def put(items: tuple[object, ...], n: int, item: object) -> tuple[object, ...]:
    """Put an item in the place of another."""
    return (*items[:n], item, *items[n + 1 :])


def rung(world: World, message: Message) -> World:
    """Let a message be in the queue."""
    return world._replace(messages=tuple(sorted((*world.messages, message))))


def with_row(world: World, e: int, row: Row, move: str, attempt: int = 0, wrong: str = "") -> World:
    """Commit a move: the row, and what it adds to the past."""
    past: Past = world.past[e]
    if move == "claim":
        past = past._replace(claimed=(*past.claimed, row.attempt))
    was = world.rows[e]
    assert was is not None
    if move in ENDS and not (move == "cancel" and was.state is State.PENDING):
        past = past._replace(ended=(*past.ended, attempt or row.attempt))
    if move in SETTLES:
        past = past._replace(settled=past.settled + 1)
    if move == "succeed":
        past = past._replace(effects=(*past.effects, attempt))
    if move == "requeue":
        past = past._replace(requeues=past.requeues + 1)
    if wrong:
        past = past._replace(wrong=wrong)
    if row.state in TERMINAL_STATES:
        row = replace(row, run_at=0.0, rung_at=None)  # nobody looks at them any more
    return world._replace(rows=put(world.rows, e, row), past=put(world.past, e, past))


def name_of(world: World, e: int) -> str:
    """Name an execution as the stories do."""
    return "the execution" if len(world.rows) == 1 else f"execution {e + 1}"
