"""Run ``python -m cloacina_celery.chaos`` to its end, as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

from tests.support import ROOT
from tests.support.processes import leash_environment, on_leash

PATIENCE = 200.0
"""Seconds for a whole run: ten times what one takes alone, as others may use the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chaos:
    """Chaos runs on the servers of a test."""

    database_url: str
    broker_url: str

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run with these arguments, and print what was printed for the report of a test that fails."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("CLOACINA_")}
        environment |= {"CLOACINA_DATABASE_URL": self.database_url, "CLOACINA_BROKER_URL": self.broker_url}
        done = subprocess.run(
            on_leash([sys.executable, "-m", "cloacina_celery.chaos", *arguments]),
            cwd=ROOT,
            env=leash_environment(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        print(done.stdout, done.stderr)
        return done


def count(output: str, title: str) -> int:
    """Read a number out of a run's table."""
    rows = [line.strip("│ ").split("│") for line in output.splitlines() if line.startswith("│")]
    found = {row[0].strip(): row[1].strip() for row in rows}
    return int(found[title].replace(",", ""))
