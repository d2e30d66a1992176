"""A deploy changes the code; it does not change what was promised to executions that exist."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.acceptance.stage import Stage


def test_the_policy_is_in_the_row_and_survives_a_deploy(stage: Stage) -> None:
    old = stage.worker(concurrency=1)
    result = stage.send("fail", "promised")
    stage.wait_for_runs("promised", 1)
    old.terminate()
    old.wait_exit()
    # The new code would give up at once; what was promised were three attempts.
    stage.worker(concurrency=1, env={"BAZAAR_MAX_ATTEMPTS": "1", "BAZAAR_INITIAL_DELAY": "60"})
    with pytest.raises(OSError, match="failure 3"):
        result.get(timeout=15)
    policy = stage.row(result).policy
    assert policy is not None
    assert policy["max_attempts"] == 3
