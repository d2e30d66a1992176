"""A whole system under pytest-celery, with local processes as its nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_celery import CeleryTestSetup


@pytest.fixture
def cluster_app() -> str:
    return "tests.support.plain_app:app"


def test_a_cluster_of_processes_survives_a_kill_and_a_restart(
    celery_setup: CeleryTestSetup, tenant_name: str
) -> None:
    assert celery_setup.ready(control=True)
    worker = celery_setup.worker
    assert worker.worker_queue == tenant_name
    add = celery_setup.app.tasks["plain.add"]
    assert add.apply_async((2, 3), queue=worker.worker_queue).get(timeout=30) == 5

    worker.kill()
    assert worker.container.status == "exited"
    worker.restart()
    assert worker.container.status == "running"
    assert add.apply_async((3, 4), queue=worker.worker_queue).get(timeout=30) == 7
    worker.assert_log_exists("Task plain.add")
    assert celery_setup.app.control.inspect(destination=[worker.hostname()]).ping()
