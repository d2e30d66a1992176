"""The same system in containers: here only that Compose understands its file, as a Docker engine is rare."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.support import ROOT


def compose() -> list[str]:
    """Return the command of whichever Compose is installed."""
    if shutil.which("docker"):
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        if plugin.returncode == 0:
            return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    pytest.skip("neither `docker compose` nor `docker-compose` is installed here")


def test_compose_understands_its_file() -> None:
    described = subprocess.run(
        [
            *compose(),
            "--file",
            str(ROOT / "docker-compose.yml"),
            "--profile",
            "orders",
            "config",
            "--services",
        ],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (described.returncode, described.stderr) == (0, "")
    assert set(described.stdout.split()) == {
        "beat",
        "orders",
        "postgres",
        "redis",
        "worker-acme",
        "worker-globex",
    }
