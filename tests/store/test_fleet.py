"""Migrating many tenants: one query where there is nothing to do, a canary first, and whoever fails alone."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event

from cloacina_celery.core.tenancy import TenantState
from cloacina_celery.store import catalog, fleet, migrate, removal, tenancy
from cloacina_celery.store.database import Database
from tests.support.waiting import LOCKS, wait_for_row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg2 import extensions

TENANTS = [f"tenant_{n:02}" for n in range(12)]
OLD = "t0001"


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A database whose tenants are all one revision behind, as after an upgrade of the package."""
    made = Database(database_url)
    for name in TENANTS:
        catalog.create(made, name)
    with made.statement() as cursor:
        for name in TENANTS:
            take_back(cursor, name)
    yield made
    for name in TENANTS:
        with made.transaction() as cursor:
            # Without the tombstones that a removal leaves: the next test begins with the same names.
            removal.drop_schema(cursor, name)
            cursor.execute("DELETE FROM cloacina.tenants WHERE name = %s", (name,))
    made.dispose()


def take_back(cursor: extensions.cursor, tenant: str) -> None:
    """Bring a schema to the revision before the last one."""
    cursor.execute(
        f"DROP TABLE {tenant}.cloacina_outbox, {tenant}.cloacina_pace; "
        f"DROP INDEX {tenant}.cloacina_executions_waiting; "
        f"UPDATE {tenant}.cloacina_version SET version_num = '{OLD}'"
    )
    cursor.execute("UPDATE cloacina.tenants SET revision = %s WHERE name = %s", (OLD, tenant))


def revisions(database: Database) -> set[str | None]:
    return {revision for _, revision in catalog.revisions(database)}


@pytest.mark.parametrize("jobs", [1, 2])
def test_all_are_migrated_and_then_one_query_finds_nothing_to_do(database: Database, jobs: int) -> None:
    assert fleet.stale(database) == TENANTS
    done = list(fleet.migrate_all(database, TENANTS, jobs=jobs))
    assert {one.tenant: one.error for one in done} == dict.fromkeys(TENANTS)
    assert revisions(database) == {migrate.TENANT_HEAD}
    statements: list[str] = []
    event.listen(database.engine, "checkout", lambda *_: statements.append("a connection was used"))
    assert fleet.stale(database) == []
    assert len(statements) == 1


def test_the_canary_goes_first_and_where_it_fails_nobody_else_is_touched(database: Database) -> None:
    with database.statement() as cursor:
        cursor.execute("CREATE TABLE tenant_07.cloacina_outbox (of_somebody_else text)")
    (only,) = fleet.migrate_all(database, TENANTS, jobs=2, canary="tenant_07")
    assert only.tenant == "tenant_07"
    assert "already exists" in (only.error or "")
    assert revisions(database) == {OLD}


def test_one_that_fails_stops_nobody_and_the_next_run_does_the_rest(database: Database) -> None:
    with database.statement() as cursor:
        cursor.execute("CREATE TABLE tenant_07.cloacina_outbox (of_somebody_else text)")
    failed = [one for one in fleet.migrate_all(database, TENANTS, jobs=2) if one.error]
    assert [one.tenant for one in failed] == ["tenant_07"]
    assert fleet.stale(database) == ["tenant_07"]
    with database.statement() as cursor:
        cursor.execute("DROP TABLE tenant_07.cloacina_outbox")
    assert [one.error for one in fleet.migrate_all(database, fleet.stale(database), jobs=1)] == [None]
    assert fleet.stale(database) == []


def test_a_tenant_whose_tables_somebody_holds_is_tried_again_until_they_let_go(
    database: Database, observer: extensions.connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "LOCK_TIMEOUT", "100ms")
    with observer.cursor() as cursor:
        cursor.execute("BEGIN; LOCK TABLE tenant_03.cloacina_version")

    def let_go(_seconds: float) -> None:
        with observer.cursor() as cursor:
            cursor.execute("ROLLBACK")

    # What waits between two tries is where the other transaction ends.
    monkeypatch.setattr(fleet.time, "sleep", let_go)
    assert [one.error for one in fleet.migrate_all(database, ["tenant_03"], jobs=1)] == [None]


def test_one_whose_tables_are_held_for_too_long_is_told_and_left_as_it_was(
    database: Database, observer: extensions.connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "LOCK_TIMEOUT", "10ms")
    monkeypatch.setattr(fleet, "PAUSE", 0.01)
    with observer.cursor() as cursor:
        cursor.execute("BEGIN; LOCK TABLE tenant_03.cloacina_version")
    done = {one.tenant: one.error for one in fleet.migrate_all(database, TENANTS, jobs=1)}
    assert "lock timeout" in (done.pop("tenant_03") or "")
    assert set(done.values()) == {None}
    with observer.cursor() as cursor:
        cursor.execute("ROLLBACK")
    assert fleet.stale(database) == ["tenant_03"]


def test_a_ledger_that_does_not_know_is_filled_by_looking(database: Database) -> None:
    list(fleet.migrate_all(database, TENANTS, jobs=1))
    with database.statement() as cursor:
        cursor.execute("UPDATE cloacina.tenants SET revision = NULL")
    assert fleet.stale(database) == TENANTS
    assert all(one.error is None for one in fleet.migrate_all(database, TENANTS, jobs=1))
    assert fleet.stale(database) == []


def test_a_tenant_is_not_dropped_while_it_is_migrated(
    database: Database, observer: extensions.connection, database_url: str, request: pytest.FixtureRequest
) -> None:
    holder = database.engine.connect()
    request.addfinalizer(holder.close)
    holder.begin()
    migrate.lock_tenant(holder, "tenant_03")
    dropping = threading.Thread(target=lambda: removal.remove(Database(database_url), "tenant_03", by="test"))
    dropping.start()
    wait_for_row(
        observer,
        f"SELECT 1 FROM {LOCKS} WHERE locktype = 'advisory' AND NOT granted",
        why="the drop to wait for the migration",
    )
    assert catalog.exists(database, "tenant_03")
    migrate.upgrade(holder, "tenant_03", "tenant")
    holder.commit()
    dropping.join()
    assert not catalog.exists(database, "tenant_03")


@pytest.mark.parametrize("is_renamed", [False, True], ids=["dropped", "renamed"])
def test_a_migration_that_waited_for_a_drop_or_a_rename_does_not_bring_the_schema_back(
    database: Database, observer: extensions.connection, request: pytest.FixtureRequest, *, is_renamed: bool
) -> None:
    holder = database.engine.connect()
    request.addfinalizer(holder.close)
    holder.begin()
    migrate.lock(holder)
    done: list[fleet.Migrated] = []
    migrating = threading.Thread(
        target=lambda: done.extend(fleet.migrate_all(database, ["tenant_03"], jobs=1)), daemon=True
    )
    migrating.start()
    wait_for_row(
        observer,
        f"SELECT 1 FROM {LOCKS} WHERE locktype = 'advisory' AND NOT granted",
        why="the migration to wait for the verb",
    )
    cursor = holder.connection.cursor()
    tenant = catalog.lock(cursor, "tenant_03")
    removal.drop_schema(cursor, "tenant_03")
    moved_to = "tenant_99" if is_renamed else None
    tenancy.move_to(cursor, tenant, TenantState.REMOVED, by="test", moved_to=moved_to)
    holder.commit()
    migrating.join(30)
    (only,) = done
    assert ("was moved to 'tenant_99'" if is_renamed else "was removed") in (only.error or "")
    with database.statement() as looking:
        assert removal.is_gone(looking, "tenant_03")
