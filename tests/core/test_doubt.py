"""Doubt: when a reaper believes what it sees, fact by fact."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloacina_celery.core.doubt import Look, Outlook, Promises, after_look

PROMISES = Promises(grace=2.0, heartbeat_interval=5.0, lease_ttl=15.0)
CATCH_UP = 7.5
EPOCH = 1_700_000_000.0


def look(at: float, **facts: Any) -> Look:
    """A look that took a hundredth of a second, on a database whose clock goes as ours."""
    plain = {"asked_at": at - 0.01, "answered_at": at, "database_at": EPOCH + at, "known": 4, "silent": 0}
    return Look(**{**plain, **facts})


def watch(*looks: Look) -> Outlook:
    outlook = None
    for one in looks:
        outlook = after_look(outlook, one, PROMISES)
    assert outlook is not None
    return outlook


def steady(until: float, since: float = 0.0) -> list[Look]:
    return [look(since + n * 0.5) for n in range(int((until - since) * 2) + 1)]


def reason(outlook: Outlook) -> str:
    return outlook.pause.reason if outlook.pause else ""


def test_a_reaper_that_has_just_started_believes_locks_at_once_and_leases_when_it_has_watched() -> None:
    assert watch(look(0)).judges_locks
    assert not watch(look(0)).judges_leases(PROMISES)
    assert not watch(*steady(CATCH_UP - 0.5)).judges_leases(PROMISES)
    assert watch(*steady(CATCH_UP)).judges_leases(PROMISES)


def test_a_database_that_was_away_leaves_the_others_time_to_come_back() -> None:
    away = [*steady(10), look(70, has_failed=True)]
    outlook = watch(*away)
    assert reason(outlook) == "the database was out of reach for 60.0 s"
    assert not outlook.judges_locks
    assert not outlook.judges_leases(PROMISES)
    assert not watch(*away, *steady(77, 70.5)).judges_locks
    back = watch(*away, *steady(77.5, 70.5))
    assert back.judges_locks
    assert back.judges_leases(PROMISES)


def test_a_connection_that_broke_for_a_moment_is_no_doubt() -> None:
    assert watch(*steady(10), look(10.9, has_failed=True)).judges_locks


def test_a_database_that_goes_away_again_and_again_is_never_beyond_doubt() -> None:
    flapping = [look(20 + 10 * n, has_failed=True) for n in range(6)]
    for number in range(1, 7):
        assert not watch(*steady(10), *flapping[:number]).judges_locks


def test_a_look_that_comes_later_than_a_lease_can_stand_is_no_ground_to_judge() -> None:
    assert watch(*steady(10), look(14.9)).judges_locks
    outlook = watch(*steady(10), look(15.1))
    assert reason(outlook) == "this look came 5.1 s after the one before"
    assert not outlook.judges_locks


def test_work_that_takes_long_is_not_taken_for_a_standstill() -> None:
    assert watch(*steady(10), look(40, reached_at=38)).judges_locks


def test_a_reaper_that_is_late_each_time_judges_once_after_each_pause() -> None:
    outlook = watch(*steady(10))
    judged = []
    for at in range(20, 80, 8):
        outlook = after_look(outlook, look(at), PROMISES)
        judged.append(outlook.judges_locks)
    assert judged == [False, True] * 4


@pytest.mark.parametrize("jump", [3600.0, 2.1, -2.1, -3600.0])
def test_a_clock_that_jumps_says_nothing_until_leases_were_extended_on_it(jump: float) -> None:
    outlook = watch(*steady(10), look(10.5, database_at=EPOCH + 10.5 + jump))
    assert reason(outlook) == f"the database's clock jumped by {jump:+.1f} s"
    after = [look(11 + n / 2, database_at=EPOCH + 11 + n / 2 + jump) for n in range(15)]
    for one in after[:-1]:
        outlook = after_look(outlook, one, PROMISES)
        assert not outlook.judges_leases(PROMISES)
    assert after_look(outlook, after[-1], PROMISES).judges_leases(PROMISES)


def test_a_clock_that_drifts_or_an_answer_that_is_slow_is_no_jump() -> None:
    assert watch(*steady(10), look(10.5, database_at=EPOCH + 12.4)).judges_locks
    slow = look(14.0, asked_at=10.5, database_at=EPOCH + 10.6)
    assert watch(*steady(10), slow).judges_locks
    assert watch(*steady(10), slow, look(14.5)).judges_locks


@pytest.mark.parametrize(
    ("known", "silent", "is_doubted"),
    [
        (2, 2, False),
        (4, 4, False),
        (10, 5, False),
        (9, 5, True),
        (50, 25, False),
        (50, 26, True),
        (51, 50, True),
    ],
)
def test_many_workers_silent_at_once_are_doubted_and_a_few_are_not(
    known: int, silent: int, is_doubted: bool
) -> None:
    assert watch(*steady(10), look(10.5, known=known, silent=silent)).judges_locks is not is_doubted
    assert watch(look(0, known=known, silent=silent)).judges_locks is not is_doubted


def test_a_crowd_that_is_still_silent_after_a_lease_is_judged_and_doubted_once() -> None:
    crowd = [look(10.5 + n / 2, known=51, silent=50) for n in range(31)]
    for number in range(1, 31):
        assert reason(watch(*steady(10), *crowd[:number])) == "50 of 51 workers fell silent at the same time"
    outlook = watch(*steady(10), *crowd)
    assert outlook.judges_locks
    # Not all of them could be recovered at once: that is no new crowd.
    assert after_look(outlook, look(26.0, known=51, silent=40), PROMISES).judges_locks
    # They are back, and fall silent again: it is one.
    back = after_look(outlook, look(26.0, known=51), PROMISES)
    assert not after_look(back, look(26.5, known=51, silent=50), PROMISES).judges_locks


@given(
    st.lists(
        st.tuples(
            st.floats(min_value=0.02, max_value=100),
            st.booleans(),
            st.floats(min_value=-50, max_value=50),
            st.integers(min_value=0, max_value=20),
        ),
        max_size=30,
    )
)
def test_whatever_happened_quiet_looks_end_every_doubt(
    past: list[tuple[float, bool, float, int]],
) -> None:
    at, shift, outlook = 0.0, 0.0, None
    for passed, has_failed, jump, silent in past:
        at, shift = at + passed, shift + jump
        outlook = after_look(
            outlook,
            look(at, database_at=EPOCH + at + shift, has_failed=has_failed, known=20, silent=silent),
            PROMISES,
        )
    for _ in range(32):
        at += 0.5
        outlook = after_look(outlook, look(at, database_at=EPOCH + at + shift, known=20), PROMISES)
    if past:
        assert outlook is not None
        assert outlook.judges_locks
        assert outlook.judges_leases(PROMISES)
