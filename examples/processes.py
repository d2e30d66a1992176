"""The examples' Celery processes: the real command lines, each in a session of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE = 20
"""Seconds for a clean shutdown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CeleryProcess:
    """One running `celery -A ...`."""

    name: str
    command: str
    log: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def start(
        cls, name: str, arguments: Sequence[str], *, log: Path, app: str = "cloacina_celery"
    ) -> CeleryProcess:
        """Start it; what it says goes to the log."""
        arguments = ["-A", app, *arguments]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "celery", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return cls(name=name, command=" ".join(["celery", *arguments]), log=log, process=process)

    @property
    def pid(self) -> int:
        return self.process.pid

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def freeze(self) -> None:
        """Stop it and its children in their tracks."""
        os.killpg(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on as if nothing had been."""
        os.killpg(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it by `kill -9`, and by that its children, which Celery has tied to its life."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Ask it to end, and insist after a while."""
        if self.is_alive():
            self.process.terminate()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()
