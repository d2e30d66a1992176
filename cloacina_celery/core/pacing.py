"""Pacing: how soon each of many recovered executions may start, so that a mass death causes no storm.

The rule is the generic cell rate algorithm (GCRA, ITU-T I.371): one instant per tenant, kept by the database,
says until when the recoveries granted so far are spread. It needs no clean-up and no second table, and any
number of reapers share it.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_LEAD = 3600.0
"""Seconds: the furthest that a granted pace may lie ahead. A clock that was set back costs no more than this."""

_EPSILON = 1e-9


def delays(*, lead: float, rate: float, draws: Sequence[float]) -> list[float]:
    """Compute the seconds that each of a number of executions waits, in order.

    Each has a slot of ``1 / rate`` seconds and starts at random within it, so that tenants whose workers died
    together do not go on in step. Whose slot has begun starts at once: with a lead of ``-burst / rate`` these
    are ``burst`` executions. In no second more than ``rate + burst + 1`` of one tenant start.

    Args:
        lead: seconds until the first one's slot begins; negative as far as slots are left from before.
        rate: executions a second.
        draws: one number from [0, 1) for each execution, drawn by the caller.
    """
    waits = []
    for number, draw in enumerate(draws):
        begins = lead + number / rate
        waits.append(0.0 if begins < -_EPSILON else begins + draw / rate)
    return waits
