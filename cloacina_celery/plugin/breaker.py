"""The circuit breaker: a broker that has just refused is left alone, so that it costs the callers next to nothing."""

from __future__ import annotations

import threading
import time

from cloacina_celery.store.database import after_fork_in_child

MIN_PAUSE = 1.0
"""Seconds for which a broker that refused is not tried again, at the least."""

PAUSE_FACTOR = 3.0
"""A refusal that took long is followed by a pause so many times as long: waiting stays a small part of the time."""


class Breaker:
    """Say when to try the broker: always, until it refuses; then not for a while, and then one caller at a time.

    The three states, and the one who tries for all, are those of Nygard's circuit breaker ("Release It!").
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_suspect = False
        self._opened_at = 0.0
        self._open_until = 0.0
        self.refusals = 0
        after_fork_in_child(self._forget_after_fork)

    def _forget_after_fork(self) -> None:
        # It may have been held by a thread that does not exist here.
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether a try would be turned away now."""
        return self._is_suspect and time.monotonic() < self._open_until

    def admits(self, *, patience: float) -> bool:
        """Tell a caller whether to try; of those who come after a pause, one, whose try may take ``patience`` s."""
        with self._lock:
            if not self._is_suspect:
                return True
            now = time.monotonic()
            if now < self._open_until:
                return False
            self._open_until = now + patience
            return True

    def refused(self, *, after: float) -> float:
        """Open after a try that took ``after`` seconds and failed; return the pause in seconds."""
        pause = max(MIN_PAUSE, PAUSE_FACTOR * after)
        with self._lock:
            now = time.monotonic()
            if not self._is_suspect:
                self._is_suspect, self._opened_at = True, now
            self._open_until = now + pause
            self.refusals += 1
        return pause

    def accepted(self) -> float | None:
        """Close after a try that succeeded; return how many seconds it was open, ``None`` if it was not."""
        with self._lock:
            if not self._is_suspect:
                return None
            self._is_suspect = False
            return time.monotonic() - self._opened_at
