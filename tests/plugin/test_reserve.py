"""When a worker takes messages for slots that are not free yet."""

from __future__ import annotations

import pytest

from cloacina_celery.plugin.doorbell import MEMORY, Reserve


@pytest.mark.parametrize("is_allowed", [True, False])
def test_a_message_is_taken_for_a_free_slot(*, is_allowed: bool) -> None:
    assert Reserve(slots=lambda: 2, taken=lambda: 1, is_allowed=is_allowed).has_place()


def test_none_is_taken_ahead_before_it_is_known_how_long_tasks_take() -> None:
    reserve = Reserve(slots=lambda: 2, taken=lambda: 2, is_allowed=True)
    for _ in range(2 * MEMORY - 1):
        reserve.note()
    assert not reserve.has_place()


def test_messages_are_taken_ahead_while_they_go_through_quickly() -> None:
    reserve = Reserve(slots=lambda: 2, taken=lambda: 2, is_allowed=True)
    for _ in range(2 * MEMORY):
        reserve.note()
    assert reserve.has_place()


def test_none_is_taken_ahead_where_celery_was_told_not_to() -> None:
    reserve = Reserve(slots=lambda: 2, taken=lambda: 2, is_allowed=False)
    for _ in range(2 * MEMORY):
        reserve.note()
    assert not reserve.has_place()
