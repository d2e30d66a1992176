"""What can be a limit, and how a rate is written."""

from __future__ import annotations

import pytest

from cloacina_celery.core.limits import Limits, parse_rate
from cloacina_celery.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "rate"), [("10/s", 10.0), ("600/m", 10.0), ("36/h", 0.01), ("0.5", 0.5), ("2.5/s", 2.5)]
)
def test_rates_are_written_as_celery_writes_them(text: str, rate: float) -> None:
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "fast", "10/d", "-1/s", "0/s", "1e3/s", "10/s/s"])
def test_what_is_no_rate_is_an_error_that_shows_one(text: str) -> None:
    with pytest.raises(SettingsError, match="10/s, 600/m or 5/h"):
        parse_rate(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_concurrent_tasks": 0},
        {"max_concurrent_tasks": -1},
        {"max_concurrent_tasks": True},
        {"max_concurrent_tasks": 1.5},
        {"max_concurrent_tasks": 2**31},
        {"max_rate": 0},
        {"max_rate": -1.0},
        {"max_rate": float("inf")},
        {"max_rate": float("nan")},
        {"max_rate": "10/s"},
        {"is_paused": "yes"},
        {"is_paused": 1},
        {"weight": 0},
        {"weight": -1},
        {"weight": 101},
        {"weight": 1.5},
        {"weight": True},
        {"weight": None},
    ],
)
def test_a_limit_out_of_range_is_an_error(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        Limits(**wrong)  # type: ignore[arg-type]


def test_a_tenant_is_limited_by_any_of_its_limits() -> None:
    assert not Limits().is_limited
    assert Limits(max_concurrent_tasks=1).is_limited
    assert Limits(max_rate=1).is_limited
    assert Limits(is_paused=True).is_limited


def test_a_weight_holds_nothing_back() -> None:
    assert not Limits(weight=100).is_limited
