"""What has ended long ago is deleted, in batches, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloacina_celery.core.settings import Settings
from cloacina_celery.runtime.reaper import Reaper
from cloacina_celery.store import queries, retention, settlements, tenancy
from tests.store.rows import ERROR, run, submit

if TYPE_CHECKING:
    from cloacina_celery.store.database import Cursor, Database

DAY = 86_400.0


def end(cursor: Cursor, tenant: str, name: str, *, days_ago: float, failed: bool = False) -> None:
    run(cursor, tenant, name)
    if failed:
        assert settlements.end_failed(cursor, tenant, name, 1, error=ERROR, reason="test")
    else:
        assert settlements.succeed(cursor, tenant, name, 1, "null")
    cursor.execute(
        f"UPDATE {tenant}.cloacina_executions SET settled_at = now() - make_interval(days => %s) WHERE id = %s",
        (days_ago, name),
    )


def left(cursor: Cursor, tenant: str) -> set[str]:
    return {execution.id for execution in queries.list_(cursor, tenant)}


def prune(
    cursor: Cursor, tenant: str, *, succeeded: float = 7 * DAY, failed: float = 30 * DAY, limit: int = 9
) -> int:
    return retention.prune(cursor, tenant, succeeded_after=succeeded, failed_after=failed, limit=limit)


def test_each_outcome_is_kept_for_its_own_time(cursor: Cursor, tenant: str) -> None:
    end(cursor, tenant, "old-success", days_ago=8)
    end(cursor, tenant, "new-success", days_ago=6)
    end(cursor, tenant, "old-failure", days_ago=31, failed=True)
    end(cursor, tenant, "new-failure", days_ago=8, failed=True)
    assert prune(cursor, tenant) == 2
    assert left(cursor, tenant) == {"new-success", "new-failure"}


def test_what_has_not_ended_is_never_deleted(cursor: Cursor, tenant: str) -> None:
    submit(cursor, tenant, "pending")
    run(cursor, tenant, "running")
    cursor.execute(f"UPDATE {tenant}.cloacina_executions SET submitted_at = now() - interval '1 year'")
    assert prune(cursor, tenant) == 0
    assert left(cursor, tenant) == {"pending", "running"}


def test_events_go_with_their_execution(cursor: Cursor, tenant: str) -> None:
    end(cursor, tenant, "old", days_ago=8)
    end(cursor, tenant, "new", days_ago=1)
    prune(cursor, tenant)
    assert queries.history(cursor, tenant, "old") == []
    assert len(queries.history(cursor, tenant, "new")) == 3


def test_a_batch_takes_the_oldest_and_no_more_than_its_limit(cursor: Cursor, tenant: str) -> None:
    for days in (10, 12, 11):
        end(cursor, tenant, f"e-{days}", days_ago=days)
    assert prune(cursor, tenant, limit=2) == 2
    assert left(cursor, tenant) == {"e-10"}


def test_zero_keeps_for_ever(cursor: Cursor, tenant: str) -> None:
    end(cursor, tenant, "success", days_ago=4000)
    end(cursor, tenant, "failure", days_ago=4000, failed=True)
    assert prune(cursor, tenant, succeeded=0, failed=0) == 0
    assert prune(cursor, tenant, succeeded=0) == 1
    assert left(cursor, tenant) == {"success"}


def test_a_sweep_of_all_tenants_deletes_what_is_old(database: Database, cursor: Cursor, tenant: str) -> None:
    end(cursor, tenant, "old", days_ago=8)
    reaper = Reaper(
        database, Settings(), publish=lambda _: None, send_letters=lambda _: [], can_publish=lambda _: True,
        queue_depth=lambda _: 0, on_abandoned=lambda *_: None,
    )  # fmt: skip
    reaper.sweep_all()
    assert left(cursor, tenant) == set()


def test_a_tenants_own_times_go_before_the_settings_and_null_is_the_setting(
    database: Database, cursor: Cursor, tenant: str, other_tenant: str
) -> None:
    for name in (tenant, other_tenant):
        end(cursor, name, "success", days_ago=2)
        end(cursor, name, "failure", days_ago=40, failed=True)
    tenancy.set_retention(database, tenant, {"retain_succeeded": DAY, "retain_failed": 0}, by="test")
    reaper = Reaper(
        database, Settings(), publish=lambda _: None, send_letters=lambda _: [], can_publish=lambda: True,
        queue_depth=lambda _: 0, on_abandoned=lambda *_: None,
    )  # fmt: skip
    reaper.sweep_all()
    assert left(cursor, tenant) == {"failure"}
    assert left(cursor, other_tenant) == {"success"}
