"""Pacing: no second has more starts of a tenant than rate and burst, however many are lost and whoever asks."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloacina_celery.core.pacing import delays

fractions = st.floats(min_value=0, max_value=1, exclude_max=True)


def test_a_burst_starts_at_once_and_the_rest_one_slot_after_the_other() -> None:
    waits = delays(lead=-0.3, rate=10, draws=[0.5] * 6)
    assert waits == pytest.approx([0, 0, 0, 0.05, 0.15, 0.25])
    assert waits[:3] == [0.0] * 3


def test_who_comes_after_others_waits_behind_them() -> None:
    assert delays(lead=2.0, rate=10, draws=[0.0, 0.0]) == pytest.approx([2.0, 2.1])


def test_the_draw_moves_a_start_within_its_own_slot_only() -> None:
    assert delays(lead=0.0, rate=4, draws=[0.0, 0.99]) == pytest.approx([0.0, 0.4975])


@given(
    rate=st.floats(min_value=0.1, max_value=200),
    burst=st.integers(min_value=1, max_value=60),
    batches=st.lists(
        st.tuples(st.floats(min_value=0, max_value=3), st.integers(min_value=1, max_value=120)), max_size=6
    ),
    seed=st.integers(),
)
def test_no_second_has_more_starts_than_rate_and_burst(
    rate: float, burst: int, batches: list[tuple[float, int]], seed: int
) -> None:
    """Whatever the reapers come with and when: the instant that they share is all they need to know."""
    draw = random.Random(seed).random
    now, until, starts = 0.0, float("-inf"), []
    for pause, number in batches:
        now += pause
        begins = max(until, now - burst / rate)
        until = begins + number / rate
        starts += [
            now + wait for wait in delays(lead=begins - now, rate=rate, draws=[draw() for _ in range(number)])
        ]
    starts.sort()
    for first, begin in enumerate(starts):
        within = sum(1 for at in starts[first:] if at < begin + 1.0)
        assert within <= rate + burst + 2
