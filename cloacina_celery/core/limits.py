"""What a tenant may use: how many tasks at once, how many starts a second, or nothing, and its weight."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite

from cloacina_celery.core.settings import MAX_INTEGER
from cloacina_celery.errors import SettingsError

_RATE = re.compile(r"(?P<number>\d+(\.\d+)?)(/(?P<unit>[smh]))?", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600}

MAX_WEIGHT = 100
"""For so many tasks of the heaviest tenant at the most the next one waits for its turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """One tenant's limits; ``None`` is none.

    Args:
        max_concurrent_tasks: attempts that run at once, on all workers together.
        max_rate: starts per second in the long run; a second's worth, and at least one, may come at once.
        is_paused: nothing starts.
        weight: turns that it gets for each of a tenant of weight 1, where both have work waiting on a worker. It
            holds nothing back.

    Raises:
        SettingsError: one is out of range.
    """

    max_concurrent_tasks: int | None = None
    max_rate: float | None = None
    is_paused: bool = False
    weight: int = 1

    def __post_init__(self) -> None:
        _check_count(self.max_concurrent_tasks)
        _check_rate(self.max_rate)
        _check_weight(self.weight)
        if not isinstance(self.is_paused, bool):
            raise SettingsError(f"paused is True or False, not {self.is_paused!r}")

    @property
    def is_limited(self) -> bool:
        """Whether anything is held back; a weight alone holds back nothing."""
        return self.is_paused or self.max_concurrent_tasks is not None or self.max_rate is not None


def parse_rate(text: str) -> float:
    """Read ``10/s``, ``600/m`` or ``5/h``, as Celery writes rates, as starts per second; a bare number is per second.

    Raises:
        SettingsError: it is none of these.
    """
    match = _RATE.fullmatch(text)
    if match is None or float(match["number"]) <= 0:
        raise SettingsError(f"a rate is written 10/s, 600/m or 5/h, not {text!r}")
    return float(match["number"]) / _SECONDS[match["unit"] or "s"]


def _check_count(value: object) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_INTEGER:
        raise SettingsError(
            f"max_concurrent_tasks is a whole number of at least 1, or None for no limit, not {value!r}; "
            "to have nothing start, pause the tenant"
        )


def _check_rate(value: object) -> None:
    if value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not isfinite(value) or value <= 0:
        raise SettingsError(
            f"a rate is a number of starts per second greater than 0, or None for no limit, not {value!r}; "
            "to have nothing start, pause the tenant"
        )


def _check_weight(value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_WEIGHT:
        raise SettingsError(f"a weight is a whole number from 1 to {MAX_WEIGHT}, not {value!r}")
