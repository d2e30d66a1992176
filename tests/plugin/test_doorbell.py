"""What a worker holds in its hands when its Redis goes away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cloacina_celery import devservers
from tests.support.modules import imported_anew
from tests.support.shop_tables import open_gate, prepare_shop, wait_for_runs

if TYPE_CHECKING:
    from pathlib import Path

    from psycopg2 import extensions

    from tests.support.processes import Processes

WAITING = 3


@pytest.mark.timeout(180)
def test_a_worker_with_messages_in_its_hands_outlives_its_broker(
    processes: Processes,
    database_url: str,
    observer: extensions.connection,
    tenant_name: str,
    tmp_path: Path,
) -> None:
    """To put them back, kombu needs the connection that has just broken, and an error there ended the worker."""
    folder = tmp_path / "servers"
    broker = {"CLOACINA_BROKER_URL": devservers.start(folder).broker_url}
    try:
        with imported_anew("tests.support.shop", {"CLOACINA_DATABASE_URL": database_url, **broker}) as shop:
            worker = processes.worker(
                queues=[tenant_name], concurrency=1, env=broker, extra=["--prefetch-multiplier=5"]
            ).wait_ready()
            prepare_shop(database_url, tenant_name)
            with shop.cloacina.tenant(tenant_name):
                blocking = shop.block.delay("gate")
                wait_for_runs(observer, tenant_name, "gate", 1)
                results = [shop.add.delay(number, 1) for number in range(WAITING)]
            for result in results:
                worker.wait_log(rf"{result.id}\] received")
            devservers.stop(folder)
            worker.wait_log(r"Connection to broker lost")
            devservers.start(folder)
            open_gate(observer, tenant_name, "gate")
            assert blocking.get(timeout=60) == 1
            assert [result.get(timeout=60) for result in results] == [1, 2, 3]
            assert worker.is_running
    finally:
        devservers.stop(folder)
