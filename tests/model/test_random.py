"""Larger worlds at random: any order of steps, any misfortune, and the end is always reached and always right."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.model.steps import steps
from tests.model.world import SOUND, Budget, World, begin, is_over, violations

EXAMPLES, STEPS = 125, 80
"""Ten thousand steps a run."""

LOTS = Budget(
    crashes=30, lost_messages=30, doubled_messages=30, expiries=30, lost_answers=30, cancels=2, shutdowns=20
)
PATIENCE = 5_000
"""Steps within which whatever was left must have ended; each is the first that is possible, so no luck is needed."""


class Worlds(RuleBasedStateMachine):
    """Four executions, three workers and two reapers, with the clock moved at will."""

    world: World

    @initialize()
    def start(self) -> None:
        """Submit."""
        self.world = begin(executions=4, workers=3, reapers=2, budget=LOTS)

    @rule(draw=st.randoms(use_true_random=False))
    def go_on(self, draw: object) -> None:
        """Let anything happen that can."""
        possible = list(steps(self.world, SOUND))
        if possible:
            _told, self.world, wrong = draw.choice(possible)  # type: ignore[attr-defined]  # a random.Random
            assert not wrong

    @invariant()
    def keeps_its_promises(self) -> None:
        """No state breaks an invariant."""
        if hasattr(self, "world"):
            assert list(violations(self.world)) == []

    def teardown(self) -> None:
        """With no more misfortune, everything comes to its end."""
        if not hasattr(self, "world"):
            return
        world = self.world._replace(budget=Budget())
        for number in range(PATIENCE):
            if is_over(world):
                return
            possible = list(steps(world, SOUND))
            # In turns, so that nobody is passed over for ever.
            _told, world, wrong = possible[number % len(possible)]
            assert not wrong
            assert list(violations(world)) == []
        raise AssertionError(f"not over after {PATIENCE} steps: {world}")


TestWorlds = Worlds.TestCase
TestWorlds.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, derandomize=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
