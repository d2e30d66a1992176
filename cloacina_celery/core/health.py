"""What the doctor finds, and when a number that it read is a reason to act."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

CLOCKS_APART = 2.0
"""Seconds between this process's clock and the database's that nobody need mend: an ``eta`` is off by as much."""

SWEPT_LONG_AGO = 60.0
"""Seconds without a sweep of a worker whose heartbeat goes on, after which its sweeps hang."""

DUE_FOR_LONG = 60.0
"""Seconds after which an execution that is due and does not start means that somebody should look."""


class Grade(StrEnum):
    """How bad a finding is: ``wrong`` keeps work from being done, ``mind`` will sooner or later or on a bad day."""

    OK = "ok"
    MIND = "mind"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at: what it is, what was found, and what to do about it if anything."""

    what: str
    grade: Grade
    found: str
    do: str = ""
