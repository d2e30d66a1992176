"""The whole system in pytest-celery's frame: a worker that is killed and restarted, and nothing is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.shop_tables import notes, open_gate, prepare_shop, wait_for_runs

if TYPE_CHECKING:
    from psycopg2 import extensions
    from pytest_celery import CeleryTestSetup


def test_a_system_that_is_killed_and_restarted_finishes_its_work_once(
    celery_setup: CeleryTestSetup, tenant_name: str, database_url: str, observer: extensions.connection
) -> None:
    app = celery_setup.app
    prepare_shop(database_url, tenant_name)
    with app.cloacina.tenant(tenant_name):
        done = [app.tasks["shop.add"].delay(n, n) for n in range(10)]
        caught = app.tasks["shop.note_and_block"].delay("once", "gate")
    assert [result.get(timeout=30) for result in done] == [2 * n for n in range(10)]
    wait_for_runs(observer, tenant_name, "gate", 1)
    celery_setup.worker.kill()
    celery_setup.worker.restart()
    celery_setup.worker.assert_log_exists("recover.done")
    wait_for_runs(observer, tenant_name, "gate", 2)
    open_gate(observer, tenant_name, "gate")
    assert caught.get(timeout=30) is None
    assert [(note.text, note.attempt) for note in notes(observer, tenant_name)] == [("once", 2)]
