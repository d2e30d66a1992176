"""What a worker's structured logs carry."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.acceptance.stage import Stage


def test_a_tasks_own_lines_carry_tenant_execution_and_attempt(stage: Stage) -> None:
    worker = stage.processes.worker("tests.acceptance.logged:app", queues=[stage.tenant])
    sent = stage.bazaar.app.send_task("logged.speak", tenant=stage.tenant)
    worker.wait_log(f"line of tenant={stage.tenant} execution={sent.id} attempt=1: .*spoken")
    # Lines of nobody's have the fields too, or the format would fail.
    worker.wait_log("line of tenant=None execution=None attempt=None: ")
