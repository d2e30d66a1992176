"""Broken builds make a short run fail, each with what it breaks; the sound build passes the same faults."""

from __future__ import annotations

import pytest

from cloacina_celery.chaos.checker import NEEDLESS, RAN_TWICE, TWICE
from tests.chaos.runs import Chaos, count

SMALL = ("--quick", "--tenants", "2", "--every", "2")
RUNS = 5
FROZEN = ("--fault", "freeze past the lease", "--kind", "long", "--seconds", "8", "--executions", "9")
REPEATED = ("--fault", "messages repeated", "--kind", "plain", "--seconds", "5", "--executions", "150")
IN_TRANSACTIONS = ("--kind", "in a transaction", "--seconds", "5", "--executions", "30", "--calm", "1000")


@pytest.mark.timeout(480)
@pytest.mark.parametrize(
    ("mutant", "arguments", "found"),
    [
        pytest.param("fence_off", (*FROZEN, "--workers", "2"), TWICE, id="fence off in settle"),
        pytest.param("claim_not_atomic", (*REPEATED, "--workers", "2"), RAN_TWICE, id="claim not atomic"),
        pytest.param("sweep_without_lock", (*FROZEN, "--workers", "3"), TWICE, id="sweep without lock"),
        pytest.param(
            "publish_before_commit",
            (*IN_TRANSACTIONS, "--workers", "1"),
            NEEDLESS,
            id="publish before commit",
        ),
    ],
)
def test_a_broken_build_is_found_out(
    chaos: Chaos, mutant: str, arguments: tuple[str, ...], found: str
) -> None:
    # A race is not run into each time, not even a widened one; a broken build is one that some run gives away.
    for _ in range(RUNS):
        done = chaos.run(*SMALL, *arguments, "--app", f"tests.chaos.mutants.{mutant}:app")
        if count(done.stdout, found):
            break
    assert done.returncode == 1
    assert count(done.stdout, found) > 0


@pytest.mark.timeout(240)
def test_the_sound_build_passes_with_the_same_races_widened(chaos: Chaos) -> None:
    done = chaos.run(
        *SMALL, "--fault", "freeze past the lease", "--fault", "messages repeated", "--kind", "long", "--kind",
        "plain", "--kind", "in a transaction", "--seconds", "12", "--executions", "150", "--workers", "3",
        "--calm", "4", "--app", "tests.chaos.mutants.widened:app",
    )  # fmt: skip
    assert done.returncode == 0
    assert count(done.stdout, "faults") > 0
