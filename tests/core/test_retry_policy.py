"""When a failed attempt runs again, and that a stored policy decides as the one it was made from."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloacina_celery import RetryPolicy, SettingsError
from cloacina_celery.core.lifecycle import after_failure
from cloacina_celery.core.retry import JITTER_SPREAD, class_name, lineage


class Declined(OSError):
    """An error of the user's own."""


class DeclinedForGood(Declined):
    """And one that derives from it."""


CLASSES: list[type[BaseException]] = [
    Exception, OSError, ConnectionError, ConnectionResetError, ValueError, UnicodeError, KeyError, Declined,
    DeclinedForGood,
]  # fmt: skip
RANDOM = st.floats(min_value=0, max_value=1, exclude_max=True)
POLICIES = st.builds(
    RetryPolicy,
    max_attempts=st.integers(min_value=1, max_value=2**31 - 1),
    initial_delay=st.floats(min_value=0, max_value=1e3),
    backoff=st.sampled_from(["fixed", "linear", "exponential"]),
    multiplier=st.floats(min_value=1, max_value=1e300),
    max_delay=st.floats(min_value=1e3, max_value=1e6),
    jitter=st.sampled_from([True, False, "full"]),
    retry_on=st.lists(st.sampled_from(CLASSES), max_size=3).map(tuple),
    give_up_on=st.lists(st.sampled_from(CLASSES), max_size=3).map(tuple),
)


@pytest.mark.parametrize(
    ("backoff", "delays"),
    [
        ("fixed", [2, 2, 2, 2, 2, 2]),
        ("linear", [2, 4, 6, 8, 10, 10]),
        ("exponential", [2, 4, 8, 10, 10, 10]),
    ],
)
def test_delays_grow_as_the_backoff_says_up_to_the_cap(backoff: Any, delays: list[float]) -> None:
    policy = RetryPolicy(initial_delay=2, backoff=backoff, max_delay=10, jitter=False)
    assert [policy.delay(n, 0.9) for n in range(1, 7)] == delays


def test_a_first_delay_that_the_cap_would_cut_is_an_error_that_says_so() -> None:
    with pytest.raises(SettingsError, match=r"initial_delay.*120.*max_delay.*60.*raise max_delay"):
        RetryPolicy(initial_delay=120)


def test_the_multiplier_is_the_base_of_the_exponential_backoff() -> None:
    policy = RetryPolicy(initial_delay=1, multiplier=3, max_delay=1000, jitter=False)
    assert [policy.delay(n, 0) for n in (1, 2, 3, 4)] == [1, 3, 9, 27]


def test_durations_are_seconds_or_timedeltas() -> None:
    given_as = RetryPolicy(
        initial_delay=timedelta(milliseconds=1500), max_delay=timedelta(minutes=2), jitter=False
    )
    assert [given_as.delay(n, 0) for n in (1, 2)] == [1.5, 3.0]
    assert given_as.max_delay == 120.0


@pytest.mark.parametrize(
    ("jitter", "lowest", "highest"), [(False, 8.0, 8.0), (True, 6.0, 10.0), ("full", 0.0, 8.0)]
)
def test_jitter_spreads_the_delay_over_exactly_what_it_promises(
    jitter: Any, lowest: float, highest: float
) -> None:
    policy = RetryPolicy(initial_delay=8, backoff="fixed", max_delay=100, jitter=jitter)
    assert policy.delay(1, 0.0) == lowest
    assert policy.delay(1, 1 - 1e-12) == pytest.approx(highest)


@given(POLICIES, st.integers(min_value=1, max_value=10_000), RANDOM)
def test_no_delay_is_negative_or_beyond_the_cap(policy: RetryPolicy, failures: int, random: float) -> None:
    assert 0 <= policy.delay(failures, random) <= policy.max_delay  # type: ignore[operator]  # seconds by now


@given(POLICIES, st.integers(min_value=1, max_value=50), RANDOM)
def test_jitter_stays_within_a_quarter_of_the_plain_delay(
    policy: RetryPolicy, failures: int, random: float
) -> None:
    stored = policy.to_stored()
    plain = RetryPolicy.from_stored({**stored, "jitter": False}).delay(failures, random)
    spread = RetryPolicy.from_stored({**stored, "jitter": True}).delay(failures, random)
    full = RetryPolicy.from_stored({**stored, "jitter": "full"}).delay(failures, random)
    assert plain * (1 - JITTER_SPREAD) <= spread * (1 + 1e-9)
    assert spread <= plain * (1 + JITTER_SPREAD) * (1 + 1e-9)
    assert full <= plain


def test_a_thousandth_failure_of_a_steep_backoff_waits_for_the_cap() -> None:
    policy = RetryPolicy(initial_delay=1, multiplier=1e6, max_delay=3600, jitter=False)
    assert policy.delay(1000, 0.5) == 3600


@pytest.mark.parametrize(
    ("retry_on", "give_up_on", "error", "is_retried"),
    [
        ((Exception,), (), ValueError, True),
        ((OSError,), (), OSError, True),
        ((OSError,), (), ConnectionResetError, True),
        ((OSError,), (), DeclinedForGood, True),
        ((ConnectionError,), (), OSError, False),
        ((OSError,), (), ValueError, False),
        ((), (), OSError, False),
        ((OSError,), (Declined,), OSError, True),
        ((OSError,), (Declined,), Declined, False),
        ((OSError,), (Declined,), DeclinedForGood, False),
        ((Declined,), (OSError,), Declined, False),
        ((Exception,), (), KeyboardInterrupt, False),
        ((KeyboardInterrupt,), (), KeyboardInterrupt, True),
        (("builtins.OSError",), (), ConnectionResetError, True),
        ((class_name(Declined),), (), DeclinedForGood, True),
    ],
)
def test_exceptions_are_retried_by_class_and_a_subclass_counts_as_its_base(
    retry_on: Any, give_up_on: Any, error: type[BaseException], is_retried: bool
) -> None:
    policy = RetryPolicy(retry_on=retry_on, give_up_on=give_up_on)
    assert policy.retries_error(lineage(error)) is is_retried


@given(POLICIES, st.integers(min_value=0, max_value=100), st.sampled_from(CLASSES), RANDOM)
def test_a_stored_policy_decides_as_the_one_it_was_made_from(
    policy: RetryPolicy, failures: int, error: type[BaseException], random: float
) -> None:
    stored = RetryPolicy.from_stored(json.loads(json.dumps(policy.to_stored())))
    decide = {"failures": failures, "error": lineage(error), "random": random}
    assert after_failure(stored, **decide) == after_failure(policy, **decide)  # type: ignore[arg-type]
    assert stored.to_stored() == policy.to_stored()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_attempts", 0), ("max_attempts", -1), ("max_attempts", 2.5), ("max_attempts", True),
        ("max_attempts", "3"), ("max_attempts", None),
        ("initial_delay", -1), ("initial_delay", "1"), ("initial_delay", None), ("initial_delay", True),
        ("initial_delay", float("nan")), ("initial_delay", float("inf")), ("initial_delay", timedelta(seconds=-1)),
        ("initial_delay", 1e12), ("max_delay", timedelta.max),
        ("max_delay", -0.1), ("max_delay", float("inf")), ("max_delay", [60]),
        ("backoff", "quadratic"), ("backoff", None), ("backoff", "Fixed"), ("backoff", ["fixed"]),
        ("multiplier", 0.5), ("multiplier", "2"), ("multiplier", float("nan")), ("multiplier", float("inf")),
        ("multiplier", True), ("multiplier", None),
        ("jitter", "some"), ("jitter", None), ("jitter", 0.25), ("jitter", []),
        ("retry_on", OSError), ("retry_on", "OSError"), ("retry_on", (int,)), ("retry_on", (OSError(),)),
        ("retry_on", None), ("retry_on", 5), ("retry_on", (None,)),
        ("give_up_on", ValueError), ("give_up_on", (ValueError, 7)), ("give_up_on", None),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_meant_is_an_error_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=rf"RetryPolicy\.{field} "):
        RetryPolicy(**{field: value})


def test_a_lineage_names_a_class_and_its_bases_up_to_base_exception() -> None:
    assert lineage(Declined) == (
        class_name(Declined), "builtins.OSError", "builtins.Exception", "builtins.BaseException",
    )  # fmt: skip
