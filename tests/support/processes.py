"""Real worker, beat and command line processes: started, watched, frozen, killed, all gone at the end."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.support import ROOT
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SHOP = "tests.support.shop:app"
"""The application that processes run unless told: the durable tasks of `tests.support.shop`."""

LEASH = Path(__file__).with_name("leash.py")

START_PATIENCE = 60.0
"""Seconds a process may take to get ready: half a second alone, many when two cores start twenty at once."""

END_PATIENCE = 30.0
"""Seconds a process may take to end after a signal that it may handle."""

LOG_TAIL_LINES = 300
"""Lines of each log that a failed test's report carries: enough for the story, little enough to read."""


class LocalProcess:
    """One process of ours in a session of its own, with its log in a file."""

    def __init__(
        self, name: str, argv: Sequence[str], environment: Mapping[str, str], directory: Path
    ) -> None:
        self.name = name
        self.log_path = directory / f"{name}.log"
        with self.log_path.open("ab") as log:
            self._popen = subprocess.Popen(
                on_leash(argv),
                cwd=directory,
                env=leash_environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The main process's id; also that of its process group."""
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for the signal that ended it; None while the main process runs."""
        return self._popen.poll()

    @property
    def is_running(self) -> bool:
        """Whether the main process still runs, be it frozen."""
        return self.exit_code is None

    @property
    def log(self) -> str:
        """All that the process and its children wrote so far, on both streams."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def children(self) -> list[int]:
        """Return the ids of the living processes below the main one; for a prefork worker, its pool."""
        if not self.is_running:
            return []
        with suppress(psutil.NoSuchProcess):
            return sorted(
                child.pid for child in psutil.Process(self.pid).children(recursive=True) if is_alive(child)
            )
        return []

    def kill9(self, *, whole: bool = False) -> None:
        """Kill the main process with SIGKILL and reap it; with `whole`, its children in the same moment.

        The main process alone is what `kill -9` on a worker does; its pool dies a few milliseconds later,
        because the kernel tells it. The whole is what a machine does that loses its power.
        """
        self.send(signal.SIGKILL, whole=whole)
        self.wait_exit()

    def terminate(self) -> None:
        """Ask the main process to finish with SIGTERM: for a worker, the warm shutdown."""
        self.send(signal.SIGTERM)

    def quit(self) -> None:
        """Send the main process SIGQUIT: for a worker, the cold shutdown."""
        self.send(signal.SIGQUIT)

    def stop_signal(self) -> None:
        """Freeze the whole process group with SIGSTOP, as a machine that hangs."""
        self.send(signal.SIGSTOP, whole=True)

    def cont(self) -> None:
        """Let a frozen process group go on with SIGCONT."""
        self.send(signal.SIGCONT, whole=True)

    def send(self, signal_number: signal.Signals, *, whole: bool = False) -> None:
        """Send a signal to the main process or to its whole group; one that has ended takes none."""
        with suppress(ProcessLookupError):
            if whole:
                os.killpg(self.pid, signal_number)
            else:
                self._popen.send_signal(signal_number)

    def wait_log(self, pattern: str, timeout: float = START_PATIENCE) -> re.Match[str]:
        """Return the first match of a regular expression (multi-line) in the log, as soon as it has one.

        Raises:
            AssertionError: it did not appear in time, or the process ended without it.
        """
        expression = re.compile(pattern, re.MULTILINE)

        def match_or_end() -> re.Match[str] | int | None:
            # The code first, then the log: what was written before the end is found, although the end is
            # known.
            code = self.exit_code
            return expression.search(self.log) or code_as_end(code)

        def code_as_end(code: int | None) -> int | None:
            if code is None:
                return None
            raise AssertionError(f"{self.name} ended with exit code {code} before it logged {pattern!r}")

        found = eventually(match_or_end, timeout, f"{self.name} to log {pattern!r}")
        assert isinstance(found, re.Match)
        return found

    def wait_exit(self, timeout: float = END_PATIENCE) -> int:
        """Return the exit code once the main process has ended, negative for the signal that ended it.

        Raises:
            AssertionError: it still runs after `timeout` seconds.
        """
        eventually(lambda: not self.is_running, timeout, f"{self.name} (pid {self.pid}) to end")
        code = self.exit_code
        assert code is not None
        return code

    def end(self) -> None:
        """Kill whatever is left of the group, frozen or not, and return when nothing of it runs any more."""
        self.send(signal.SIGKILL, whole=True)
        self._popen.wait(END_PATIENCE)
        eventually(lambda: not group_members(self.pid), END_PATIENCE, f"the children of {self.name} to end")


class WorkerProcess(LocalProcess):
    """A Celery worker with a node name of its own."""

    def __init__(
        self, name: str, argv: Sequence[str], environment: Mapping[str, str], directory: Path, nodename: str
    ) -> None:
        super().__init__(name, argv, environment, directory)
        self.nodename = nodename

    def wait_ready(self, timeout: float = START_PATIENCE) -> WorkerProcess:
        """Return this worker once it consumes its queues.

        Raises:
            AssertionError: it did not get ready in time, or ended.
        """
        self.wait_log(rf"{re.escape(self.nodename)} ready\.$", timeout)
        return self


class BeatProcess(LocalProcess):
    """A Celery beat with a schedule file of its own."""

    def wait_ready(self, timeout: float = START_PATIENCE) -> BeatProcess:
        """Return this beat once it has begun to schedule.

        Raises:
            AssertionError: it did not begin in time, or ended.
        """
        self.wait_log(r"beat: Starting\.\.\.$", timeout)
        return self


class Processes:
    """Starts the processes of one test, in an environment that names the test's database and broker and
    nothing else.

    Processes live on a leash: when the thread that started one ends, the kernel kills it. So start them in
    the test's own thread; starting does not block, twenty in a row are as good as twenty in parallel.
    """

    def __init__(self, directory: Path, settings: Mapping[str, str]) -> None:
        self._directory = directory
        self._settings = dict(settings)
        self._started: list[LocalProcess] = []
        self._numbers = count(1)

    def worker(
        self,
        app: str = SHOP,
        *,
        queues: Sequence[str] = (),
        concurrency: int = 2,
        pool: str = "prefork",
        env: Mapping[str, str | None] | None = None,
        extra: Sequence[str] = (),
    ) -> WorkerProcess:
        """Start `celery -A app worker -Q queues` and return at once; `.wait_ready()` waits for it.

        No queues means no `-Q`. A value None in `env` takes that variable away. `extra` goes to the end of
        the command.
        """
        name = f"worker{next(self._numbers)}"
        nodename = f"{name}@{secrets.token_hex(6)}"
        argv = [
            *celery(app),
            "worker",
            "--loglevel=INFO",
            f"--hostname={nodename}",
            f"--concurrency={concurrency}",
            f"--pool={pool}",
            *(["-Q", ",".join(queues)] if queues else []),
            *extra,
        ]
        worker = WorkerProcess(name, argv, self.environment(env), self._directory, nodename)
        self._started.append(worker)
        return worker

    def beat(
        self, app: str = SHOP, *, env: Mapping[str, str | None] | None = None, extra: Sequence[str] = ()
    ) -> BeatProcess:
        """Start `celery -A app beat` and return at once; `.wait_ready()` waits for it."""
        name = f"beat{next(self._numbers)}"
        argv = [
            *celery(app),
            "beat",
            "--loglevel=INFO",
            f"--schedule={self._directory / name}.schedule",
            # Without one of its own, a second beat refuses to start, and two beats are what some tests are
            # about.
            f"--pidfile={self._directory / name}.pid",
            *extra,
        ]
        beat = BeatProcess(name, argv, self.environment(env), self._directory)
        self._started.append(beat)
        return beat

    def start(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str | None] | None = None
    ) -> LocalProcess:
        """Start any other program, given by its path, and return at once."""
        process = LocalProcess(f"{name}{next(self._numbers)}", argv, self.environment(env), self._directory)
        self._started.append(process)
        return process

    def cli(
        self,
        *args: str,
        app: str = SHOP,
        env: Mapping[str, str | None] | None = None,
        timeout: float = START_PATIENCE,
    ) -> subprocess.CompletedProcess[str]:
        """Run `celery -A app args...` to its end and return exit code, stdout and stderr, each as it was.

        Raises:
            subprocess.TimeoutExpired: it ran for longer than `timeout` seconds, and was killed.
        """
        return subprocess.run(
            on_leash([*celery(app), *args]),
            cwd=self._directory,
            env=leash_environment(self.environment(env)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def environment(self, changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
        """Return the environment of processes: ours without the settings in it, plus the test's settings."""
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("CLOACINA_", "CELERY_"))
        }
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        merged: dict[str, str | None] = {
            **inherited,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            **self._settings,
            **(changes or {}),
        }
        return {key: value for key, value in merged.items() if value is not None}

    def log_tails(self) -> Iterator[tuple[str, str]]:
        """Yield a title and the end of its log for each process that was started."""
        for process in self._started:
            state = "running" if process.is_running else f"exit code {process.exit_code}"
            lines = process.log.splitlines()
            left_out = len(lines) - LOG_TAIL_LINES
            if left_out > 0:
                lines[:left_out] = [f"[{left_out} earlier lines are in {process.log_path}]"]
            yield f"log of {process.name} (pid {process.pid}, {state})", "\n".join(lines)

    def end_all(self) -> None:
        """End every process that was started, however it was left."""
        for process in self._started:
            process.send(signal.SIGKILL, whole=True)
        for process in self._started:
            process.end()


def celery(app: str) -> list[str]:
    """Return the beginning of a `celery -A app` command line, run by this Python."""
    return [sys.executable, "-m", "celery", "-A", app]


def on_leash(argv: Sequence[str]) -> list[str]:
    """Return a command that becomes `argv`, and dies with the thread that starts it."""
    # -S and -E keep the detour at ten milliseconds: the leash needs no site-packages.
    return [sys.executable, "-S", "-E", str(LEASH), *argv]


def leash_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a command on the leash, which says who holds it."""
    return {**environment, "LEASH_HOLDER": str(os.getpid())}


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still runs: a dead one that nobody reaped yet does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def group_members(group: int) -> list[int]:
    """Return the living processes of a process group, also those whose parent is gone."""
    members = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and is_alive(process):
                members.append(process.pid)
    return members
