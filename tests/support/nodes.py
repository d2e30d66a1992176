"""pytest-celery's nodes, as local processes where it has Docker containers.

pytest-celery's clusters, nodes and `celery_setup` ask little of a container: name, id, status, logs, and the
verbs of its life. This gives them those on a worker process, so a whole-system test reads as pytest-celery
means it to, and needs no Docker engine. `tests/conftest.py` puts it in place of the three cluster fixtures
and their configurations.
"""

from __future__ import annotations

import signal as signals
from typing import TYPE_CHECKING, Any

import celery
from pytest_celery import CeleryTestContainer

from tests.support.processes import START_PATIENCE, WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Callable


class WorkerContainer(CeleryTestContainer):  # type: ignore[misc] # untyped base
    """A worker process that pytest-celery takes for a container; a restart starts another process."""

    def __init__(self, start: Callable[[], WorkerProcess], *, queue: str, config: dict[str, Any]) -> None:
        # The base class's own __init__ wants a Docker container and builds maps of its network: nothing of
        # that here.
        self._start = start
        self._queue = queue
        self._config = config
        self._lives = [start()]

    @property
    def process(self) -> WorkerProcess:
        """The process of the present life."""
        return self._lives[-1]

    @property
    def name(self) -> str:
        """The process's name in reports."""
        return self.process.name

    @property
    def id(self) -> str:
        """What stands after the @ of the node name, where pytest-celery expects a container's id."""
        return self.process.nodename.partition("@")[2]

    @property
    def status(self) -> str:
        """`running` or `exited`, in Docker's words."""
        return "running" if self.process.is_running else "exited"

    @property
    def celeryconfig(self) -> dict[str, Any]:
        """The broker's and the backend's URLs."""
        return self._config

    def worker_name(self) -> str:
        """What stands before the @ of the node name."""
        return self.process.nodename.partition("@")[0]

    def worker_queue(self) -> str:
        """The queues that the worker consumes, with commas between."""
        return self._queue

    def version(self) -> str:
        """Celery's version: the worker runs on the same Python as the test."""
        return str(celery.__version__)

    def log_level(self) -> str:
        """The level that workers log at here."""
        return "INFO"

    def logs(self) -> str:
        """The logs of all lives, as a restarted container keeps its own."""
        return "".join(life.log for life in self._lives)

    def ready(self) -> bool:
        """Wait until the worker consumes its queues."""
        self.process.wait_ready()
        return True

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Send the main process a signal, by name or number."""
        number = signals.Signals[signal] if isinstance(signal, str) else signals.Signals(signal)
        self.process.send(number)
        if number == signals.SIGKILL:
            # pytest-celery looks at the status next; and a kill that nobody can refuse is worth waiting for.
            self.process.wait_exit()

    def restart(self, timeout: float = START_PATIENCE) -> None:
        """End the process, politely if it still runs, and start its next life."""
        self.process.terminate()
        self.process.wait_exit(timeout)
        self._lives.append(self._start())
        self.process.wait_ready(timeout)

    def reload(self) -> None:
        """Do nothing: `status` is always fresh here."""

    def teardown(self) -> None:
        """End the process, whatever state it is in."""
        self.process.end()
