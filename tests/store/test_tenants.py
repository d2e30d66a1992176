"""The catalog: who exists, what is adopted, and what a drop leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import ProgrammingError

from cloacina_celery.core.tenancy import Verb
from cloacina_celery.errors import InvalidTenantName, SchemaMismatch, UnknownTenant
from cloacina_celery.plugin.memory import BusyMarks
from cloacina_celery.store import busy, catalog, migrate, removal, settlements
from cloacina_celery.store.database import Database
from tests.store.rows import Rival, read, run
from tests.support.waiting import LOCKS, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg2 import extensions

    from cloacina_celery.store.database import Cursor
    from tests.support.databases import Databases


@pytest.fixture
def database_url(session_databases: Databases) -> Iterator[str]:
    """The URL of a database of this test's own: these tests count all tenants there are."""
    with session_databases.fresh() as url:
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """The package's view of it."""
    made = Database(database_url)
    yield made
    made.dispose()


def drop(database: Database, name: str) -> None:
    removal.remove(database, name, by="test", with_work=True)
    removal.confirm(database, name, Verb.DROP, by="test", detail="")


def execute(conn: extensions.connection, statements: str) -> list[tuple[object, ...]]:
    with conn.cursor() as cursor:
        cursor.execute(statements)
        return cursor.fetchall() if cursor.description else []


@pytest.mark.parametrize("name", ["bad-name", "", "pg_x", "public", "cloacina", "a" * 64])
def test_a_name_that_breaks_the_rule_creates_nothing_at_all(
    database: Database, observer: extensions.connection, name: str
) -> None:
    with pytest.raises(InvalidTenantName):
        catalog.create(database, name)
    assert execute(observer, "SELECT 1 FROM pg_namespace WHERE nspname = 'cloacina'") == []


@pytest.mark.parametrize("name", ["Tenant_Acme", "_", "42", "A" * 63, "select"])
def test_an_unusual_name_is_quoted_everywhere(database: Database, name: str) -> None:
    assert catalog.create(database, name)
    with database.statement() as cursor:
        run(cursor, name)
        assert read(cursor, name).attempt == 1
    drop(database, name)
    assert catalog.names(database) == []


def test_a_second_tenant_that_differs_only_in_case_is_refused(database: Database) -> None:
    catalog.create(database, "tenant_acme")
    with pytest.raises(InvalidTenantName, match="tenant 'tenant_acme' exists and differs only in case"):
        catalog.create(database, "Tenant_ACME")
    assert catalog.names(database) == ["tenant_acme"]


def test_an_existing_schema_is_adopted_with_what_is_in_it(
    database: Database, observer: extensions.connection
) -> None:
    execute(observer, "CREATE SCHEMA tenant_acme; CREATE TABLE tenant_acme.orders AS SELECT 42 AS id")
    assert catalog.create(database, "tenant_acme")
    assert execute(observer, "SELECT id FROM tenant_acme.orders") == [(42,)]


def test_a_schema_of_a_newer_version_is_not_adopted_and_no_tenant_is_entered(
    database: Database, observer: extensions.connection
) -> None:
    catalog.create(database, "tenant_acme")
    execute(
        observer, "DELETE FROM cloacina.tenants; UPDATE tenant_acme.cloacina_version SET version_num = 'z9'"
    )
    with pytest.raises(SchemaMismatch):
        catalog.create(database, "tenant_acme")
    assert catalog.names(database) == []


def test_a_drop_removes_the_tenant_with_its_schema_and_leaves_the_others(
    database: Database, observer: extensions.connection
) -> None:
    for name in ("tenant_a", "tenant_b"):
        catalog.create(database, name)
    execute(observer, "CREATE TABLE tenant_a.orders (id int)")
    drop(database, "tenant_a")
    assert catalog.names(database) == ["tenant_b"]
    assert execute(observer, "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'tenant%'") == [
        ("tenant_b",)
    ]
    drop(database, "tenant_a")
    assert catalog.create(database, "tenant_a")


def test_a_drop_of_what_never_was_is_refused_and_drops_nobodys_schema(
    database: Database, observer: extensions.connection
) -> None:
    execute(observer, "CREATE SCHEMA somebody_elses")
    with pytest.raises(UnknownTenant):
        drop(database, "somebody_elses")
    with pytest.raises(InvalidTenantName):
        drop(database, "cloacina")
    assert execute(observer, "SELECT 1 FROM pg_namespace WHERE nspname = 'somebody_elses'") == [(1,)]


def test_the_legacy_tenant_lives_in_public_beside_what_was_there_and_leaves_only_itself(
    database: Database, observer: extensions.connection
) -> None:
    execute(observer, "CREATE TABLE public.orders AS SELECT 42 AS id")
    assert catalog.create(database, "public", legacy=True)
    assert [(t.name, t.is_legacy) for t in catalog.tenants(database)] == [("public", True)]
    with database.statement() as cursor:
        run(cursor, "public")
    drop(database, "public")
    assert catalog.names(database) == []
    tables = execute(observer, "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace")
    assert tables == [("orders",)]
    assert execute(observer, "SELECT id FROM public.orders") == [(42,)]
    assert catalog.create(database, "public", legacy=True)


def test_a_schema_that_is_there_is_adopted_also_by_a_role_that_may_create_none(
    database: Database, database_url: str, observer: extensions.connection, tenant_name: str
) -> None:
    migrate.ensure_catalog(database)
    role = f"role_of_{tenant_name}"
    execute(
        observer,
        f"CREATE ROLE {role}; CREATE SCHEMA {tenant_name} AUTHORIZATION {role};"
        f"GRANT USAGE ON SCHEMA cloacina TO {role};"
        f"GRANT ALL ON ALL TABLES IN SCHEMA cloacina TO {role}",
    )
    url = make_url(database_url).update_query_dict({"options": f"-c role={role}"})
    limited = Database(url.render_as_string(hide_password=False))
    try:
        assert catalog.create(limited, tenant_name)
        with pytest.raises(ProgrammingError, match="permission denied for database"):
            catalog.create(limited, "tenant_of_its_own")
    finally:
        limited.dispose()
        execute(observer, f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


def test_a_tenant_is_created_once_though_the_second_looked_before_the_first_had_committed(
    database: Database, observer: extensions.connection
) -> None:
    migrate.ensure_catalog(database)
    with database.engine.begin() as connection:
        migrate.lock(connection)
        rivals = [Rival(database, lambda _: catalog.create(database, "tenant_acme")) for _ in range(3)]
        waiting = f"SELECT count(*) FROM {LOCKS} WHERE locktype = 'advisory' AND NOT granted"
        eventually(lambda: execute(observer, waiting) == [(3,)], why="all three to stand at the lock")
    assert sorted(rival.answer() for rival in rivals) == [False, False, True]


def test_a_dropped_tenants_executions_are_gone_when_it_is_created_again(
    database: Database, observer: extensions.connection
) -> None:
    catalog.create(database, "tenant_acme")
    with database.statement() as cursor:
        run_prepared(cursor, epoch=1)
    drop(database, "tenant_acme")
    catalog.create(database, "tenant_acme")
    with database.statement() as cursor:
        # The same pooled connection still knows its statements, which mean the new tables now.
        run_prepared(cursor, epoch=2)
    assert execute(observer, "SELECT count(*) FROM tenant_acme.cloacina_executions") == [(1,)]


def run_prepared(cursor: Cursor, *, epoch: int) -> None:
    from cloacina_celery.store import executions
    from tests.store.rows import EXECUTION_ID, LEASE, submission

    assert executions.submit(cursor, "tenant_acme", submission(), prepare=True)
    assert executions.claim(
        cursor,
        "tenant_acme",
        EXECUTION_ID,
        attempt=1,
        worker_id=1,
        lease_ttl=LEASE,
        policy=None,
        epoch=epoch,
        prepare=True,
    )
    assert settlements.succeed(cursor, "tenant_acme", EXECUTION_ID, 1, None, prepare=True)


def test_a_tenant_that_begins_anew_is_marked_as_one_that_may_have_work(
    database: Database, tenant: str
) -> None:
    marks = BusyMarks(lambda name: mark(database, name))
    marks.ensure(tenant)
    removal.remove(database, tenant, by="test")
    removal.confirm(database, tenant, Verb.DROP, by="test", detail="")
    assert catalog.create(database, tenant)
    # The process that has marked the removed one does not do so again for a minute.
    marks.ensure(tenant)
    with database.statement() as cursor:
        assert tenant in busy.marked(cursor)


def mark(database: Database, name: str) -> None:
    with database.statement() as cursor:
        busy.mark(cursor, name)
