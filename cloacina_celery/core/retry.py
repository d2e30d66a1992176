"""Retry policies: when a failed attempt is tried again, and after how long."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from cloacina_celery.errors import SettingsError

Backoff = Literal["fixed", "linear", "exponential"]
Jitter = bool | Literal["full"]
Seconds = float | int | timedelta

JITTER_SPREAD = 0.25
MAX_RETRY_AFTER = timedelta(days=7).total_seconds()
"""A ``Retry-After`` beyond a week is more likely a unit mistaken than a wish; it is cut to this."""

MAX_DELAY = timedelta(days=3650).total_seconds()
"""Longer delays are refused where they are written: in the row they would overflow Postgres' instants."""

_BACKOFFS: tuple[str, ...] = ("fixed", "linear", "exponential")


def class_name(cls: type[BaseException]) -> str:
    """Name an exception class the way a stored policy does: module and qualified name."""
    return f"{cls.__module__}.{cls.__qualname__}"


def lineage(cls: type[BaseException]) -> tuple[str, ...]:
    """Name a class and all its bases, so that a policy stored as names matches subclasses too."""
    return tuple(class_name(base) for base in cls.__mro__ if issubclass(base, BaseException))


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Say how often and when a failed attempt is tried again.

    Args:
        max_attempts: runs in all that may end in a failure, the first included. Runs that were lost with
            their worker or given back by a shutdown are counted by ``max_recoveries``, not here.
        initial_delay: seconds (or a timedelta) before the second run.
        backoff: ``fixed``, ``linear`` (delay x n) or ``exponential`` (delay x multiplier^(n-1)).
        multiplier: the base of the exponential backoff.
        max_delay: the cap in seconds (or a timedelta); jitter does not exceed it.
        jitter: ``True`` spreads the delay by a quarter to either side, ``"full"`` over everything from
            zero to the delay (as Celery's ``retry_jitter``), ``False`` not at all.
        retry_on: exception classes that are tried again; a subclass counts as its base.
        give_up_on: exception classes that are not, even if ``retry_on`` lists a base of theirs.

    Raises:
        SettingsError: a value that cannot be meant.
    """

    max_attempts: int = 3
    initial_delay: Seconds = 1.0
    backoff: Backoff = "exponential"
    multiplier: float = 2.0
    max_delay: Seconds = 60.0
    jitter: Jitter = True
    retry_on: tuple[type[BaseException] | str, ...] = (Exception,)
    give_up_on: tuple[type[BaseException] | str, ...] = ()
    _retry_names: frozenset[str] = field(init=False, repr=False, compare=False, default=frozenset())
    _give_up_names: frozenset[str] = field(init=False, repr=False, compare=False, default=frozenset())

    def __post_init__(self) -> None:
        put = object.__setattr__
        if type(self.max_attempts) is not int:
            raise SettingsError(f"RetryPolicy.max_attempts is a whole number, not {self.max_attempts!r}")
        if self.max_attempts < 1:
            raise SettingsError(
                f"RetryPolicy.max_attempts counts every run, so at least 1, not {self.max_attempts}"
            )
        put(self, "initial_delay", _seconds("initial_delay", self.initial_delay))
        put(self, "max_delay", _seconds("max_delay", self.max_delay))
        if self.initial_delay > self.max_delay:  # type: ignore[operator]  # both are seconds by now
            raise SettingsError(
                f"RetryPolicy.initial_delay ({self.initial_delay} s) is longer than max_delay ({self.max_delay} s), "
                "which would cut it: raise max_delay"
            )
        if self.backoff not in _BACKOFFS:
            raise SettingsError(f"RetryPolicy.backoff is one of {', '.join(_BACKOFFS)}, not {self.backoff!r}")
        if self.jitter not in (True, False, "full"):
            raise SettingsError(f"RetryPolicy.jitter is True, False or 'full', not {self.jitter!r}")
        if type(self.multiplier) not in (int, float) or not 1 <= self.multiplier < float("inf"):
            raise SettingsError(f"RetryPolicy.multiplier is a number of at least 1, not {self.multiplier!r}")
        put(self, "_retry_names", _names("retry_on", self.retry_on))
        put(self, "_give_up_names", _names("give_up_on", self.give_up_on))

    def retries_error(self, error: tuple[str, ...]) -> bool:
        """Tell whether an exception of this lineage (see `lineage`) is tried again at all."""
        names = set(error)
        return bool(names & self._retry_names) and not names & self._give_up_names

    def delay(self, failures: int, random: float) -> float:
        """Compute the seconds to wait after the nth failure; ``random`` is drawn from [0, 1) by the caller."""
        initial, cap = float(self.initial_delay), float(self.max_delay)  # type: ignore[arg-type]  # seconds since __post_init__
        match self.backoff:
            case "fixed":
                delay = initial
            case "linear":
                delay = initial * failures
            case "exponential":
                try:
                    delay = initial * float(self.multiplier) ** (failures - 1)
                except OverflowError:  # beyond any cap, unless there is nothing to multiply
                    delay = cap if initial else 0.0
        delay = min(delay, cap)
        if self.jitter == "full":
            delay *= random
        elif self.jitter:
            delay *= 1 - JITTER_SPREAD + 2 * JITTER_SPREAD * random
        return min(delay, cap)

    def to_stored(self) -> dict[str, Any]:
        """Return the JSON form that an execution's row keeps, so that a deploy cannot change the promise."""
        return {
            "max_attempts": self.max_attempts,
            "initial_delay": self.initial_delay,
            "backoff": self.backoff,
            "multiplier": self.multiplier,
            "max_delay": self.max_delay,
            "jitter": self.jitter,
            "retry_on": sorted(self._retry_names),
            "give_up_on": sorted(self._give_up_names),
        }

    @classmethod
    def from_stored(cls, stored: dict[str, Any]) -> RetryPolicy:
        """Read what `to_stored` wrote."""
        return cls(
            **{**stored, "retry_on": tuple(stored["retry_on"]), "give_up_on": tuple(stored["give_up_on"])}
        )


def _seconds(name: str, value: Seconds) -> float:
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if type(value) not in (int, float) or not 0 <= value <= MAX_DELAY:
        raise SettingsError(
            f"RetryPolicy.{name} is a number of seconds (or a timedelta) from 0 to ten years, not {value!r}"
        )
    return float(value)


def _names(name: str, classes: object) -> frozenset[str]:
    if isinstance(classes, (type, str)):
        raise SettingsError(f"RetryPolicy.{name} is a tuple of exception classes: write ({classes!r},)")
    if not isinstance(classes, (tuple, list, set, frozenset)):
        raise SettingsError(f"RetryPolicy.{name} is a tuple of exception classes, not {classes!r}")
    names = set()
    for cls in classes:
        if isinstance(cls, str):
            names.add(cls)
        elif isinstance(cls, type) and issubclass(cls, BaseException):
            names.add(class_name(cls))
        else:
            raise SettingsError(f"RetryPolicy.{name} lists exception classes; {cls!r} is none")
    return frozenset(names)
