"""The demo that the README promises."""

from __future__ import annotations

import re
import sys

import pytest

from tests.support.processes import Processes

TIMEOUT = 200.0


@pytest.mark.timeout(TIMEOUT + 40)
def test_the_demo_ends_with_the_files_totals_although_a_worker_is_killed(processes: Processes) -> None:
    demo = processes.start("demo", [sys.executable, "-m", "examples.flights"])

    assert demo.wait_exit(TIMEOUT) == 0
    assert "kill -9" in demo.log
    for tenant, flights in {"tenant_ua": "58,665", "tenant_b6": "54,635", "all": "336,776"}.items():
        assert re.search(rf"^ {tenant} .* {flights} +{flights} ", demo.log, re.MULTILINE)
    assert "Every total is exactly the file's" in demo.log
