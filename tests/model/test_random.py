"""Larger worlds at random: more executions, workers and faults than can be gone through one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.model.steps import steps
from tests.model.world import SOUND, Left, begin, broken_invariant

if TYPE_CHECKING:
    from cloacina_celery.core.protocol import Row

EXAMPLES, STEPS = 100, 100


class LargeWorld(RuleBasedStateMachine):
    """Four executions, three workers and three reapers; each step is drawn from all that can be taken.

    The database's clock jumps between them, forwards and back.
    """

    def __init__(self) -> None:
        super().__init__()
        left = Left(crashes=6, doubles=6, cuts=6, stops=3, cancels=2, requeues=2)
        self.world = begin(executions=4, workers=3, reapers=3, left=left)

    @rule(n=st.integers(min_value=0, max_value=10**6))
    def take_a_step(self, n: int) -> None:
        """Take one of the steps; a world in which there is none is at its end."""
        there = list(steps(self.world, SOUND))
        if there:
            self.world = there[n % len(there)].world

    @rule(seconds=st.floats(min_value=-600, max_value=600))
    def move_the_clock(self, seconds: float) -> None:
        """Have the database's clock jump: now is 0 all the time, so each instant in a row moves the other way."""
        rows = [row and _moved(row, seconds) for row in self.world.rows]
        self.world = self.world._replace(rows=tuple(rows))

    @invariant()
    def nothing_is_broken(self) -> None:
        """Hold the same invariants as in the small worlds."""
        assert not broken_invariant(self.world, SOUND)


def _moved(row: Row, seconds: float) -> Row:
    def move(at: float | None) -> float | None:
        return None if at is None else at - seconds

    # What never comes, such as a parked row's time, does not come sooner by a clock that jumps.
    return replace(
        row,
        run_at=row.run_at - seconds,
        rung_at=move(row.rung_at),
        lease_expires_at=move(row.lease_expires_at),
    )


TestLargeWorld = LargeWorld.TestCase
TestLargeWorld.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


def test_a_run_takes_ten_thousand_steps() -> None:
    assert EXAMPLES * STEPS >= 10_000
