"""A recorded history fits the protocol or is told, in words, where it does not."""

from __future__ import annotations

import pytest

from cloacina_celery.core.replay import Recorded, replay


def history(*events: tuple[str, int]) -> list[Recorded]:
    """Events of worker 7, a second apart."""
    unheld = ("submitted", "requeued", "rung_again", "deferred")
    return [
        Recorded(kind=kind, attempt=attempt, worker=None if kind in unheld else 7, at=float(n))
        for n, (kind, attempt) in enumerate(events)
    ]


@pytest.mark.parametrize(
    "events",
    [
        [("submitted", 0)],
        [("submitted", 0), ("claimed", 1), ("succeeded", 1)],
        [("submitted", 0), ("deferred", 0), ("claimed", 1), ("released", 1), ("deferred", 1), ("claimed", 2)],
        [
            ("submitted", 0),
            ("rung_again", 0),
            ("claimed", 1),
            ("recovered", 1),
            ("claimed", 2),
            ("failed", 2),
        ],
        [
            ("submitted", 0),
            ("claimed", 1),
            ("replaced", 1),
            ("submitted", 1),
            ("claimed", 2),
            ("succeeded", 2),
        ],
        [
            ("submitted", 0),
            ("claimed", 1),
            ("abandoned", 1),
            ("requeued", 1),
            ("claimed", 2),
            ("released", 2),
        ],
        [("submitted", 0), ("claimed", 1), ("retry_scheduled", 1), ("cancelled", 1)],
    ],
)
def test_what_the_protocol_does_fits(events: list[tuple[str, int]]) -> None:
    found = replay(history(*events))
    assert [line for line in found if "worker" not in line] == []


@pytest.mark.parametrize(
    ("events", "told"),
    [
        ([("claimed", 1)], "begins with claimed as attempt 1, and not with its submission"),
        ([("submitted", 0), ("claimed", 2)], "claimed as attempt 2, but the row was pending with attempt 0"),
        (
            [("submitted", 0), ("claimed", 1), ("recovered", 1), ("succeeded", 1)],
            "succeeded as attempt 1, but the row was pending with attempt 1",
        ),
        (
            [("submitted", 0), ("claimed", 1), ("succeeded", 1), ("failed", 1)],
            "failed as attempt 1, but the row was succeeded with attempt 1",
        ),
        (
            [("submitted", 0), ("rung_again", 1)],
            "rung_again as attempt 1, but the row was pending with attempt 0",
        ),
        ([("submitted", 0), ("flew", 0)], "flew as attempt 0, but the row was pending with attempt 0"),
    ],
)
def test_what_it_does_not_do_is_told(events: list[tuple[str, int]], told: str) -> None:
    assert told in replay(history(*events))


def test_a_settlement_by_a_worker_that_had_not_claimed_it_is_told() -> None:
    events = history(("submitted", 0), ("claimed", 1))
    stranger = Recorded(kind="succeeded", attempt=1, worker=8, at=9.0)
    assert replay([*events, stranger]) == ["succeeded as attempt 1 of worker 8, but worker 7 had claimed it"]
