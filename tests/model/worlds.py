"""The worlds that are explored: small ones by the suite, larger ones by ``make model``."""

from __future__ import annotations

from tests.model.world import Budget, World, begin


def _of(budget: Budget, *, executions: int = 1, workers: int = 2, reapers: int = 2) -> World:
    return begin(executions=executions, workers=workers, reapers=reapers, budget=budget)


SMALL: dict[str, World] = {
    "two crashes": _of(Budget(crashes=2)),
    "a crash and a lease that runs out": _of(Budget(crashes=1, expiries=1)),
    "a zombie, a cancellation and a lost answer": _of(Budget(expiries=1, cancels=1, lost_answers=1)),
    "a shutdown, a crash and a lost message": _of(Budget(shutdowns=1, crashes=1, lost_messages=1), reapers=1),
    "doubled and lost messages": _of(Budget(lost_messages=2, doubled_messages=2), reapers=1),
    "two leases that run out, one message doubled": _of(Budget(expiries=2, doubled_messages=1), reapers=1),
    "two executions, a crash": _of(Budget(crashes=1), executions=2, reapers=1),
}

LARGE: dict[str, World] = {
    "a crash, a zombie, a lost and a doubled message": _of(
        Budget(crashes=1, expiries=1, lost_messages=1, doubled_messages=1)
    ),
    "three crashes": _of(Budget(crashes=3)),
    "a crash, a shutdown, a zombie, a cancellation, a lost answer": _of(
        Budget(crashes=1, expiries=1, cancels=1, shutdowns=1, lost_answers=1), reapers=1
    ),
    "two executions, a crash and a zombie": _of(Budget(crashes=1, expiries=1), executions=2, reapers=1),
}
