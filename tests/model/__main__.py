"""Explore the larger worlds, and tell the story of each broken core: ``make model``."""

from __future__ import annotations

import sys
import time

from rich.console import Console

from tests.model.broken import VARIANTS
from tests.model.explore import explore
from tests.model.world import begin
from tests.model.worlds import LARGE, SMALL


def main() -> int:
    """Print states, depth and time of each world, then the counterexamples; 0 if the sound core has none."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    is_sound = True
    for name, world in (SMALL | LARGE).items():
        began = time.monotonic()
        found = explore(world)
        seconds = time.monotonic() - began
        console.print(f"{found.states:9,} states, {found.depth:2} steps deep, {seconds:6.1f} s: {name}")
        for trouble in (found.counterexample, found.stuck):
            if trouble is not None:
                is_sound = False
                console.print(f"{trouble}", style="red")
    for name, variant in VARIANTS.items():
        world = begin(executions=1, workers=2, reapers=2, budget=variant.budget)
        console.print(f"\nbroken: {name}\n{explore(world, variant.rules).counterexample}")
    return 0 if is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
