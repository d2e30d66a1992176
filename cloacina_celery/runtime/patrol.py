"""A thread that looks again and again, and outlives whatever goes wrong in one look."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cloacina_celery.errors import CloacinaError
from cloacina_celery.store.driver_errors import DriverError, one_line
from cloacina_celery.telemetry import log


class Patrol:
    """Call ``look`` each ``interval`` seconds in a thread of its own, from `start` to `stop`."""

    def __init__(self, look: Callable[[], object], *, name: str, interval: float) -> None:
        self._look = look
        self._interval = interval
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the look that is going on."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stopping.wait(self._interval):
            try:
                self._look()
            except (DriverError, CloacinaError) as error:
                log("keeper.trouble", error=one_line(error))
            except Exception as error:  # noqa: BLE001  # the next look may well succeed
                log("keeper.trouble", error=repr(error))
