"""When a broker that refused is tried again, and by whom."""

from __future__ import annotations

import pytest

from cloacina_celery.plugin import breaker
from cloacina_celery.plugin.breaker import Breaker


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(breaker, "time", clock)
    return clock


def test_a_broker_that_never_refused_is_tried_by_all(clock: Clock) -> None:
    breaker = Breaker()
    assert not breaker.is_open
    assert all(breaker.admits(patience=1.0) for _ in range(3))
    assert breaker.accepted() is None


@pytest.mark.parametrize(
    ("took", "pause"), [(0.0, 1.0), (0.3, 1.0), (1.0, 3.0), (2.0, 6.0)], ids=lambda value: f"{value:g} s"
)
def test_it_is_left_alone_for_as_long_as_the_refusal_was_slow(
    clock: Clock, took: float, pause: float
) -> None:
    breaker = Breaker()
    assert breaker.refused(after=took) == pause
    clock.now += pause - 0.01
    assert breaker.is_open
    assert not breaker.admits(patience=1.0)
    clock.now += 0.02
    assert not breaker.is_open
    assert breaker.admits(patience=1.0)


def test_after_the_pause_one_tries_for_all(clock: Clock) -> None:
    breaker = Breaker()
    breaker.refused(after=0.0)
    clock.now += 1.5
    assert [breaker.admits(patience=1.0) for _ in range(3)] == [True, False, False]
    # Whoever tried has not come back: somebody else may.
    clock.now += 1.1
    assert [breaker.admits(patience=1.0) for _ in range(2)] == [True, False]


def test_it_is_open_again_after_a_second_refusal_and_closed_after_a_success(clock: Clock) -> None:
    breaker = Breaker()
    breaker.refused(after=0.0)
    clock.now += 1.5
    assert breaker.admits(patience=1.0)
    breaker.refused(after=0.0)
    assert breaker.is_open
    clock.now += 1.5
    assert breaker.admits(patience=1.0)
    assert breaker.accepted() == 3.0
    assert all(breaker.admits(patience=1.0) for _ in range(3))
