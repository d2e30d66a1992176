"""The real core keeps its promises in every state of small worlds, and each broken one is told of in a story."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.model.broken import VARIANTS, Variant
from tests.model.explore import explore
from tests.model.world import begin
from tests.model.worlds import SMALL
from tests.support import ROOT

if TYPE_CHECKING:
    from tests.model.world import World


@pytest.mark.parametrize("world", SMALL.values(), ids=SMALL.keys())
def test_every_state_keeps_the_invariants_and_leads_to_an_end(world: World) -> None:
    found = explore(world)
    print(f"FIGURE {found.states:,} states, {found.depth} steps deep")
    assert found.counterexample is None
    assert found.stuck is None
    assert found.states > 100


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_broken_core_is_found_out_by_the_shortest_way(variant: Variant) -> None:
    found = explore(begin(executions=1, workers=2, reapers=2, budget=variant.budget), variant.rules)
    assert found.counterexample is not None
    print(found.counterexample)
    assert variant.found in found.counterexample.violation
    assert len(found.counterexample.story) == variant.length


def test_the_story_in_the_docs_is_the_one_that_is_found() -> None:
    variant = VARIANTS["the fence asks for the state alone"]
    found = explore(begin(executions=1, workers=2, reapers=2, budget=variant.budget), variant.rules)
    assert str(found.counterexample) in (ROOT / "docs" / "model.md").read_text(encoding="utf-8")


def test_a_world_that_forgets_lost_messages_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    # The test of the other test: without the reaper's ring for what is stranded, a lost message is lost work.
    monkeypatch.setattr("tests.model.steps._is_stranded", lambda *_: False)
    found = explore(SMALL["doubled and lost messages"])
    assert found.stuck is not None
    assert found.stuck.story == ("the broker loses the message for attempt 1 of execution A",)
