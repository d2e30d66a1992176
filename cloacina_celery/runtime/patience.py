"""Waiting for a database that is away: with pauses that grow and differ, and for as long as it takes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from cloacina_celery.errors import DatabaseUnavailable

T = TypeVar("T")

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0


class Backoff:
    """Pauses that double from a tenth of a second to five, each shortened at random by up to a half.

    The jitter keeps the processes that lost the same server from coming back to it in one moment.
    """

    def __init__(self) -> None:
        self._pause = FIRST_PAUSE

    def wait(self) -> None:
        """Sleep for the next pause."""
        time.sleep(self._pause * random.uniform(0.5, 1.0))
        self._pause = min(self._pause * 2, LONGEST_PAUSE)


def until_available(work: Callable[[], T], on_wait: Callable[[DatabaseUnavailable], None]) -> T:
    """Do ``work`` until the database answers, and return what it returned.

    Args:
        work: may be done again after a `DatabaseUnavailable`, whether its write was committed or not.
        on_wait: told of each vain try, to log it.
    """
    backoff = Backoff()
    while True:
        try:
            return work()
        except DatabaseUnavailable as error:
            on_wait(error)
            backoff.wait()
