"""Breadth-first through every world that can be reached: the shortest way to a broken invariant, or none."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.model.steps import steps
from tests.model.world import broken_invariant, is_over

if TYPE_CHECKING:
    from tests.model.world import Rules, World


@dataclass(frozen=True, kw_only=True)
class Explored:
    """What was found: how many worlds, how deep, and the story of the first that must not be."""

    states: int
    depth: int
    broken: str = ""
    story: list[str] = field(default_factory=list)

    def told(self) -> str:
        """Tell the story, a step a line."""
        lines = [f"{n:>3}. {line}" for n, line in enumerate(self.story, 1)]
        return "\n".join([*lines, f"  => {self.broken}"])


def explore(first: World, rules: Rules) -> Explored:
    """Visit every reachable world once; stop at the first in which an invariant is broken or that is stuck.

    Stuck is a world from which no way leads to all executions terminal without a person or another fault.
    """
    number: dict[World, int] = {first: 0}
    came: list[tuple[int, str]] = [(-1, "")]
    depths = [0]
    back: list[list[int]] = [[]]
    over: list[int] = []
    queue: deque[World] = deque([first])
    while queue:
        world = queue.popleft()
        here = number[world]
        if is_over(world):
            over.append(here)
        for told, after, by in steps(world, rules):
            there = number.get(after)
            if there is None:
                there = number[after] = len(came)
                came.append((here, told))
                depths.append(depths[here] + 1)
                back.append([])
                broken = broken_invariant(after, rules)
                if broken:
                    return Explored(
                        states=len(came), depth=depths[-1], broken=broken, story=_story(came, there)
                    )
                queue.append(after)
            if by in ("system", "time"):
                back[there].append(here)
    saved = set(over)
    open_ = list(over)
    while open_:
        for before in back[open_.pop()]:
            if before not in saved:
                saved.add(before)
                open_.append(before)
    for n in range(len(came)):  # in the order of their depth
        if n not in saved:
            return Explored(
                states=len(came), depth=depths[n], broken="nothing ends it any more", story=_story(came, n)
            )
    return Explored(states=len(came), depth=depths[-1])


def _story(came: list[tuple[int, str]], n: int) -> list[str]:
    told = []
    while n:
        n, line = came[n]
        told.append(line)
    return told[::-1]
