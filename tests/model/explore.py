"""Breadth first through every state that a world can reach, and the shortest way to a broken one as a story."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.model.steps import steps
from tests.model.world import SOUND, Rules, World, is_over, violations

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True, kw_only=True)
class Counterexample:
    """The shortest way to a state, or by a step, that must not be."""

    story: tuple[str, ...]
    violation: str

    def __str__(self) -> str:
        """Tell it."""
        lines = [f"{number:3}. {told}" for number, told in enumerate(self.story, 1)]
        return "\n".join([*lines, f"     So {self.violation}."])


@dataclass(frozen=True, slots=True, kw_only=True)
class Explored:
    """What was found."""

    states: int
    depth: int
    counterexample: Counterexample | None
    stuck: Counterexample | None
    """A state from which no end can be reached any more, and the shortest way there."""


def explore(first: World, rules: Rules = SOUND) -> Explored:
    """Visit every reachable state, or stop at the first broken one.

    With none broken, see also whether from each of them an end of all executions can be reached without help: a
    state from which it cannot would be one in which work is lost.
    """
    origin: dict[World, tuple[World | None, str, int]] = {first: (None, "", 0)}
    before: dict[World, list[World]] = {}
    waiting = deque([first])
    depth = 0
    while waiting:
        world = waiting.popleft()
        at = origin[world][2]
        depth = max(depth, at)
        for violation in violations(world):
            return Explored(
                states=len(origin), depth=depth, stuck=None,
                counterexample=Counterexample(story=_story(origin, world), violation=violation),
            )  # fmt: skip
        for told, following, wrong in steps(world, rules):
            if wrong:
                story = (*_story(origin, world), told)
                return Explored(
                    states=len(origin), depth=at + 1, stuck=None,
                    counterexample=Counterexample(story=story, violation=wrong),
                )  # fmt: skip
            if following not in origin:
                origin[following] = (world, told, at + 1)
                waiting.append(following)
            before.setdefault(following, []).append(world)
    lost = origin.keys() - _reaching_back(before, (world for world in origin if is_over(world)))
    stuck = None
    if lost:
        nearest = min(lost, key=lambda world: origin[world][2])
        stuck = Counterexample(
            story=_story(origin, nearest), violation="nothing that can happen leads to an end"
        )
    return Explored(states=len(origin), depth=depth, counterexample=None, stuck=stuck)


def _reaching_back(before: dict[World, list[World]], ends: Iterable[World]) -> set[World]:
    found = set(ends)
    waiting = deque(found)
    while waiting:
        for earlier in before.get(waiting.popleft(), ()):
            if earlier not in found:
                found.add(earlier)
                waiting.append(earlier)
    return found


def _story(origin: dict[World, tuple[World | None, str, int]], world: World) -> tuple[str, ...]:
    told: list[str] = []
    at: World | None = world
    while at is not None:
        at, step, _ = origin[at]
        if step:
            told.append(step)
    return tuple(reversed(told))
