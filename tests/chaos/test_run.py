"""A short chaos run over every kind of fault that servers of somebody else's allow."""

from __future__ import annotations

import pytest

from tests.chaos.runs import Chaos, count


@pytest.mark.timeout(240)
def test_a_short_run_loses_and_doubles_nothing(chaos: Chaos) -> None:
    done = chaos.run(
        *("--quick", "--seconds", "18", "--executions", "200", "--tenants", "3", "--workers", "2"),
        *("--every", "1.5", "--calm", "1"),
    )
    assert done.returncode == 0
    assert count(done.stdout, "faults") >= 5
    assert count(done.stdout, "executions") >= 200
