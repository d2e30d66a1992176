"""Broken variants of the core, each with one thing taken away."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cloacina_celery.core.protocol import MOVES, Guard
from tests.model.world import Rules

if TYPE_CHECKING:
    from cloacina_celery.core.protocol import Ask, Move, Row


def _without(*moves: str, **conditions: Any) -> dict[str, Move]:
    """Take conditions out of moves' guards."""
    changed = {name: replace(MOVES[name], guard=replace(MOVES[name].guard, **conditions)) for name in moves}
    return {**MOVES, **changed}


def _bumped(row: Row, ask: Ask) -> Row:
    return replace(MOVES["ring again"].change(row, ask), attempt=row.attempt + 1)


BROKEN = {
    "a settlement without a fence": Rules(
        moves=_without("succeed", "fail", "retry", attempt=None, states=())
    ),
    "a settlement that asks for the state alone": Rules(
        moves=_without("succeed", "fail", "retry", attempt=None)
    ),
    "a claim that does not ask for the attempt": Rules(moves=_without("claim", attempt=None)),
    "a claim that does not ask for the state": Rules(moves=_without("claim", attempt=None, states=())),
    "a release of whatever runs": Rules(moves=_without("release all", of_worker=False)),
    "a release that does not ask for the attempt": Rules(moves=_without("release", attempt=None)),
    "a second ring with a new attempt": Rules(
        moves={**MOVES, "ring again": replace(MOVES["ring again"], change=_bumped)}
    ),
    "a sweep that neither locks nor looks again": Rules(
        moves={**MOVES, **{name: replace(MOVES[name], guard=Guard()) for name in ("recover", "abandon")}},
        sweep_locks=False,
    ),
    "a recovery that forgets to count": Rules(
        moves={**MOVES, "recover": replace(
            MOVES["recover"],
            change=lambda row, ask: replace(MOVES["recover"].change(row, ask), recoveries=row.recoveries),
        )}
    ),
}  # fmt: skip
