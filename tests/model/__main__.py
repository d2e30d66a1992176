"""``make model``: explore the larger worlds, and tell the story of each broken variant."""

from __future__ import annotations

import sys
import time

from tests.model.explore import explore
from tests.model.test_exhaustive import DOUBLED, WORLDS
from tests.model.variants import BROKEN
from tests.model.world import SOUND, Left, begin

LARGE = {
    "a zombie that is doubled, cancelled and cut off": begin(
        reapers=1, left=Left(crashes=1, doubles=1, cuts=1, cancels=1)
    ),
    "two executions and a crash": begin(executions=2, workers=1, reapers=1, left=Left(crashes=1)),
}


def main() -> int:
    """Print what each world has, and return 1 if the sound core breaks or a broken one does not."""
    bad = 0
    for name, world in {**WORLDS, **LARGE}.items():
        began = time.monotonic()
        found = explore(world, SOUND)
        seconds = time.monotonic() - began
        print(f"{name}: {found.states} states, depth {found.depth}, {seconds:.0f} s", flush=True)
        if found.broken:
            bad = 1
            print(found.told())
    for name, rules in BROKEN.items():
        found = explore(DOUBLED, rules)
        print(f"\n{name}, after {found.states} states:\n{found.told()}", flush=True)
        bad = bad or int(not found.broken)
    return bad


if __name__ == "__main__":
    sys.exit(main())
