"""Every world that small beginnings lead to keeps the invariants; each broken variant leads to one that does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.model.explore import explore
from tests.model.variants import BROKEN
from tests.model.world import SOUND, Left, begin
from tests.support import ROOT

WORLDS = {
    "a zombie and two reapers": begin(left=Left(crashes=1)),
    "a doubled message, a zombie and two reapers": begin(left=Left(crashes=1, doubles=1)),
    "lost answers, a shutdown and a crash": begin(
        workers=1, reapers=1, left=Left(crashes=1, cuts=1, stops=1)
    ),
    "a person cancels and requeues": begin(workers=1, reapers=1, left=Left(cuts=1, cancels=1, requeues=1)),
    "a person cancels what two workers want": begin(reapers=1, left=Left(cuts=1, cancels=1)),
    "a shutdown beside another worker": begin(reapers=1, left=Left(stops=1)),
    "a row that waits for room": begin(left=Left(crashes=1, defers=1)),
    "two executions": begin(executions=2, workers=1, reapers=1),
}
DOUBLED = begin(left=Left(doubles=1, cuts=1, stops=1))
LENGTHS = {
    "a settlement without a fence": 10,
    "a settlement that asks for the state alone": 13,
    "a claim that does not ask for the attempt": 6,
    "a claim that does not ask for the state": 6,
    "a release of whatever runs": 11,
}


@pytest.mark.parametrize("name", WORLDS)
def test_no_reachable_world_breaks_an_invariant_or_is_stuck(name: str) -> None:
    found = explore(WORLDS[name], SOUND)
    print(f"{name}: {found.states} states, depth {found.depth}")
    assert not found.broken, found.told()
    assert found.states > 1000


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_core_is_found_out_by_a_shortest_story(name: str) -> None:
    found = explore(DOUBLED, BROKEN[name])
    print(f"{name}:\n{found.told()}")
    assert found.broken
    assert len(found.story) == LENGTHS.get(name, len(found.story))


def test_the_fence_alone_is_enough_where_a_sweep_takes_no_lock() -> None:
    found = explore(begin(left=Left(doubles=1)), replace(SOUND, sweep_locks=False))
    assert not found.broken, found.told()


def test_the_story_in_the_docs_is_the_one_that_is_found() -> None:
    found = explore(DOUBLED, BROKEN["a settlement without a fence"])
    assert found.told() in (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
