"""The processes of a chaos run: workers and beats that are killed, frozen and replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

import psutil

LEAVE_PATIENCE = 45.0
"""Seconds that a worker may take for a shutdown that was asked for.

A pool's child may take thirty of them by itself: so long it waits for its main process to read its last results
(billiard's ``GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT``), and now and then one that ended its task while the main
process stopped waits in vain.
"""

STACKS_TAKE = 0.5
"""Seconds given to the processes to write: nothing says that they have, and a stuck one may not."""

KILLED = -signal.SIGKILL
UNAVAILABLE = 69
"""The exit code of a worker that could not start because the database did not answer; it wants to be started again."""


class Member:
    """One process in a session of its own, with its log in a file."""

    def __init__(self, name: str, argv: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.nodename = ""
        """What a worker is called in Celery's remote control."""
        self.log = log
        self.is_frozen = False
        self.leaves_until: float | None = None
        with log.open("ab") as stream:
            self._popen = subprocess.Popen(
                argv, env=dict(environment), stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """The main process."""
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; `None` while it runs."""
        return self._popen.poll()

    @property
    def is_ready(self) -> bool:
        """Whether a worker has said that it consumes."""
        return " ready." in self.log.read_text(errors="replace")

    def children(self) -> list[int]:
        """Return the living processes of the pool."""
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.pid).children(recursive=True)
            return sorted(one.pid for one in found if one.is_running())
        return []

    def send(self, number: signal.Signals, *, whole: bool = False) -> None:
        """Send a signal to the main process or to the whole group, unless it is gone."""
        with suppress(ProcessLookupError):
            if whole:
                os.killpg(self.pid, number)
            elif self.exit_code is None:
                os.kill(self.pid, number)

    def leave(self, number: signal.Signals) -> None:
        """Ask it to shut down."""
        self.leaves_until = time.monotonic() + LEAVE_PATIENCE
        self.send(number)

    def dump_stacks(self) -> None:
        """Have each process write what it is doing to the log (see `cloacina_celery.chaos.tasks`)."""
        for pid in [self.pid, *self.children()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)
        time.sleep(STACKS_TAKE)

    def end(self) -> None:
        """Kill whatever is left of it."""
        self.send(signal.SIGKILL, whole=True)
        self._popen.wait()


class Fleet:
    """Keep so many workers and two beats running, whatever happens to them."""

    def __init__(
        self,
        app: str,
        tenants: Sequence[str],
        workers: int,
        *,
        mark: str,
        environment: Mapping[str, str],
        folder: Path,
    ) -> None:
        self._app = app
        self._mark = mark
        self._tenants = tenants
        self._wanted = workers
        self._environment = dict(environment)
        self._folder = folder
        self._numbers = count(1)
        self.workers: list[Member] = []
        self.beats: list[Member] = []
        self.leaving: list[Member] = []
        self.ended_badly: list[str] = []
        """Processes that ended without having been told to, or did not although they were."""

    def start(self) -> None:
        """Start all; `wait_ready` waits for them."""
        while len(self.workers) < self._wanted:
            self.add_worker()
        while len(self.beats) < 2:
            self.add_beat()

    def add_worker(self, *options: str) -> Member:
        """Start one worker of all tenants."""
        name = f"worker{next(self._numbers)}"
        nodename = f"{name}@{self._mark}"
        arguments = ["worker", "-Q", ",".join(self._tenants), "-P", "prefork", "-c", "2", "-n", nodename]
        quiet = ["-l", "INFO", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        worker = self._start(name, [*arguments, *quiet, *options])
        worker.nodename = nodename
        self.workers.append(worker)
        return worker

    def add_beat(self) -> Member:
        """Start one beat."""
        name = f"beat{next(self._numbers)}"
        place = self._folder / name
        self.beats.append(
            self._start(
                name,
                [
                    "beat",
                    "-S",
                    "celery.beat:PersistentScheduler",
                    "-s",
                    f"{place}.schedule",
                    "--pidfile",
                    f"{place}.pid",
                    "-l",
                    "INFO",
                ],
            )
        )
        return self.beats[-1]

    def _start(self, name: str, arguments: Sequence[str]) -> Member:
        argv = [sys.executable, "-m", "celery", "-A", self._app, *arguments]
        return Member(name, argv, self._environment, self._folder / f"{name}.log")

    def wait_ready(self, patience: float = 60.0) -> None:
        """Wait for every worker.

        Raises:
            TimeoutError: one is not ready in time.
        """
        deadline = time.monotonic() + patience
        for worker in self.workers:
            while not worker.is_ready:
                if time.monotonic() > deadline or worker.exit_code is not None:
                    raise TimeoutError(f"{worker.name} did not get ready: see {worker.log}")
                time.sleep(0.05)

    def send_away(self, worker: Member, number: signal.Signals) -> None:
        """Shut a worker down and start its replacement at once, as a deploy does."""
        self.workers.remove(worker)
        self.leaving.append(worker)
        worker.leave(number)

    def mend(self) -> None:
        """Note who has ended, and replace them."""
        self._note_ends()
        self.start()

    def shut_down(self) -> None:
        """Shut all down warmly, and wait for the end."""
        for group in (self.workers, self.beats):
            for member in group:
                member.send(signal.SIGCONT, whole=True)
                member.leave(signal.SIGTERM)
            self.leaving += group
            group.clear()
        while self.leaving:
            self._note_ends()
            time.sleep(0.05)

    def _note_ends(self) -> None:
        for group in (self.workers, self.beats, self.leaving):
            for member in list(group):
                code = member.exit_code
                is_late = member.leaves_until is not None and time.monotonic() > member.leaves_until
                if code is None and not is_late:
                    continue
                if code is None:
                    member.dump_stacks()
                    self.ended_badly.append(
                        f"{member.name} did not end {LEAVE_PATIENCE:.0f} s after it was told"
                    )
                elif member.leaves_until is None and code not in (KILLED, UNAVAILABLE):
                    self.ended_badly.append(f"{member.name} ended by itself, with exit code {code}")
                group.remove(member)
                member.end()

    def kill_all(self) -> None:
        """Kill whatever is left."""
        for member in [*self.workers, *self.beats, *self.leaving]:
            member.end()
