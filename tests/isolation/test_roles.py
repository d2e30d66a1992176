"""Tenants' roles: how one comes to be, what it owns, and that nothing is half-made where it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from cloacina_celery.core.tenancy import Verb
from cloacina_celery.core.tenant import role_of
from cloacina_celery.errors import IsolationRefused, UnknownTenant
from cloacina_celery.store import (
    catalog,
    executions,
    fleet,
    migrate,
    moves,
    queries,
    removal,
    roles,
    settlements,
    tenancy,
)
from cloacina_celery.store.database import Database
from cloacina_celery.store.sessions import TenantSession, driver_cursor
from tests.isolation.stages import drop_login, login_of
from tests.store.rows import EXECUTION_ID, Rival, claim, read, submission
from tests.support.databases import connect
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.databases import Databases

TENANT = "tenant_acme"

OLD_THINGS = """
    CREATE TYPE colour AS ENUM ('red');
    CREATE DOMAIN amount AS int CHECK (VALUE > 0);
    CREATE TYPE pair AS (a int, b int);
    CREATE TYPE span AS RANGE (subtype = float8);
    CREATE TABLE orders (id serial PRIMARY KEY, other int GENERATED ALWAYS AS IDENTITY, colour colour, amount amount);
    CREATE INDEX ON orders (colour);
    CREATE SEQUENCE numbers;
    CREATE VIEW red AS SELECT * FROM orders WHERE colour = 'red';
    CREATE MATERIALIZED VIEW totals AS SELECT sum(amount) FROM orders;
    CREATE TABLE parts (id int) PARTITION BY RANGE (id);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (1) TO (9);
    CREATE FUNCTION twice(x int, "Odd Name" text DEFAULT 'a''b') RETURNS int LANGUAGE sql AS 'SELECT 2 * x';
    CREATE PROCEDURE nothing() LANGUAGE sql AS 'SELECT 1';
    CREATE AGGREGATE total(int) (SFUNC = int4pl, STYPE = int, INITCOND = 0);
    CREATE OPERATOR @+ (LEFTARG = int, RIGHTARG = int, FUNCTION = int4pl);
    CREATE STATISTICS counted ON id, other FROM orders;
    CREATE COLLATION plain FROM "C";
    CREATE TABLE "Quoted ""Name" (id int);
    INSERT INTO orders (colour, amount) VALUES ('red', 5);
"""


@pytest.fixture
def make(session_databases: Databases, database_server: str) -> Iterator[Callable[..., Database]]:
    """A function that makes the package's view of a fresh database, as a login of the given attributes."""
    server = connect(database_server)
    with session_databases.fresh() as url:
        made: list[Database] = []
        logins: list[str] = []

        def new(
            attributes: str = "CREATEROLE NOINHERIT", level: str = "auto", login: str | None = None
        ) -> Database:
            if login is None:
                with login_of(server, url, attributes) as login:
                    logins.append(login)
            made.append(Database(login, isolation=level))
            return made[-1]

        try:
            yield new
        finally:
            for database in made:
                database.dispose()
            session_databases.drop_now(url)
            for login in logins:
                drop_login(server, login)
    server.close()


def ask(database: Database, query: str) -> list[tuple[object, ...]]:
    with database.statement() as cursor:
        cursor.execute(query)
        return list(cursor.fetchall()) if cursor.description else []


def drop(database: Database, name: str) -> None:
    """Drop a tenant whose queue is gone."""
    removal.remove(database, name, by="test", with_work=True)
    assert removal.confirm(database, name, Verb.DROP, by="test", detail="its queue")


def role(database: Database, tenant: str = TENANT) -> str | None:
    with database.statement() as cursor:
        return roles.roles(cursor)[tenant]


def has_role(database: Database, tenant: str) -> bool:
    """Tell whether the server has the tenant's role of this database: other tests' databases are on it too."""
    with database.statement() as cursor:
        name = role_of(tenant, roles.powers(cursor).database)
    return bool(ask(database, f"SELECT 1 FROM pg_roles WHERE rolname = '{name}'"))


def foreign_objects(database: Database) -> list[tuple[object, ...]]:
    """Return what in the tenant's schema is neither ours nor the tenant's role's."""
    return ask(
        database,
        f"SELECT relname FROM pg_class WHERE relnamespace = '{TENANT}'::regnamespace AND relkind NOT IN ('i', 'c')"
        f" AND relname NOT LIKE 'cloacina%' AND relowner <> '\"{role(database)}\"'::regrole",
    )


def test_what_a_tenants_session_makes_is_its_roles_and_what_is_ours_is_the_logins(
    make: Callable[..., Database],
) -> None:
    database = make()
    assert catalog.create(database, TENANT)
    with TenantSession(database, TENANT) as session:
        session.execute(text("CREATE TABLE orders (id serial)"))
        session.execute(text("INSERT INTO orders DEFAULT VALUES"))
        session.commit()
    owners = dict(
        ask(
            database,
            f"SELECT relname, relowner::regrole::text FROM pg_class WHERE relnamespace = '{TENANT}'::regnamespace",
        )
    )
    login = database.url.username
    assert owners["orders"] == owners["orders_id_seq"] == role(database)
    assert {owner for name, owner in owners.items() if str(name).startswith("cloacina")} == {login}


def test_an_execution_lives_its_whole_life_in_a_tenants_session_and_in_ours(
    make: Callable[..., Database],
) -> None:
    database = make()
    catalog.create(database, TENANT)
    with TenantSession(database, TENANT) as session:
        assert executions.submit(driver_cursor(session), TENANT, submission())
        session.commit()
    with database.statement() as cursor:
        assert claim(cursor, TENANT)
    with TenantSession(database, TENANT) as session:
        assert settlements.succeed(driver_cursor(session), TENANT, EXECUTION_ID, 1, "7")
        session.commit()
    with database.statement() as cursor:
        assert read(cursor, TENANT).result == "7"
        assert [event.kind for event in queries.history(cursor, TENANT, EXECUTION_ID)] == [
            "submitted", "claimed", "succeeded",
        ]  # fmt: skip


def test_a_table_that_the_login_makes_by_hand_is_of_use_to_the_tenant_and_carries_no_trap(
    make: Callable[..., Database],
) -> None:
    database = make()
    catalog.create(database, TENANT)
    ask(database, f"CREATE TABLE {TENANT}.orders (id serial)")
    with TenantSession(database, TENANT) as session:
        session.execute(text("INSERT INTO orders DEFAULT VALUES"))
        assert session.execute(text("SELECT has_table_privilege('orders', 'TRIGGER')")).scalar_one() is False


def test_a_migrations_new_table_is_of_use_to_the_tenant_and_no_more(make: Callable[..., Database]) -> None:
    database = make()
    catalog.create(database, TENANT)
    ask(database, f"CREATE TABLE {TENANT}.cloacina_later (id int)")
    fleet.migrate_tenant(database, TENANT)
    rights = {
        right: ask(
            database, f"SELECT has_table_privilege('{role(database)}', '{TENANT}.cloacina_later', '{right}')"
        )
        for right in ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "TRIGGER", "REFERENCES")
    }
    assert [right for right, answer in rights.items() if answer == [(True,)]] == [
        "SELECT",
        "INSERT",
        "UPDATE",
        "DELETE",
    ]
    assert ask(
        database, f"SELECT has_table_privilege('{role(database)}', '{TENANT}.cloacina_version', 'UPDATE')"
    ) == [(False,)]


def test_a_tenant_from_before_is_given_its_role_with_all_that_is_its_own(
    make: Callable[..., Database],
) -> None:
    database = make(level="schema")
    catalog.create(database, TENANT)
    assert role(database) is None
    with TenantSession(database, TENANT) as session:
        session.execute(text(OLD_THINGS.replace(":", r"\:")))
        session.commit()
    for _ in range(2):
        assert catalog.isolate(database, TENANT) == []
        assert role(database) is not None
        assert foreign_objects(database) == []
    with TenantSession(database, TENANT) as session:
        assert session.execute(text("SELECT current_user")).scalar_one() == role(database)
        assert session.execute(text("SELECT amount FROM red")).scalar_one() == 5
        for statement in (
            "INSERT INTO orders (amount) VALUES (twice(3))", "ALTER TABLE orders ADD COLUMN note text",
            "REFRESH MATERIALIZED VIEW totals", "DROP FUNCTION twice", "DROP OPERATOR @+ (int, int)",
            "ALTER TYPE colour ADD VALUE 'blue'", "DROP AGGREGATE total(int)", "DROP TYPE span", "DROP TYPE pair",
            "DROP STATISTICS counted", "DROP COLLATION plain", "DROP PROCEDURE nothing",
            "ALTER DOMAIN amount DROP CONSTRAINT amount_check", "DROP TABLE parts",
        ):  # fmt: skip
            session.execute(text(statement))


def test_a_schema_that_is_adopted_is_handed_over_too_but_not_what_others_own_in_it(
    make: Callable[..., Database], session_databases: Databases
) -> None:
    database = make()
    ask(database, f"CREATE SCHEMA {TENANT}; CREATE TABLE {TENANT}.orders AS SELECT 42 AS id")
    admin = connect(session_databases.url_of(str(database.url.database)))
    with admin.cursor() as cursor:
        cursor.execute(f"CREATE TABLE {TENANT}.others AS SELECT 1 AS id")
        cursor.execute("SELECT current_user")
        (superuser,) = cursor.fetchone() or ("",)
    admin.close()
    assert catalog.create(database, TENANT)
    with TenantSession(database, TENANT) as session:
        assert session.execute(text("SELECT id FROM orders")).scalar_one() == 42
    assert catalog.isolate(database, TENANT) == [f"table {TENANT}.others of {superuser}"]


def test_a_hand_over_does_not_wait_for_ever_for_a_table_in_use_and_leaves_all_as_it_was(
    make: Callable[..., Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "HAND_OVER_LOCK_TIMEOUT_MS", 100)
    database = make(level="schema")
    catalog.create(database, TENANT)
    ask(database, f"CREATE TABLE {TENANT}.orders (id int)")
    with database.transaction() as cursor:
        cursor.execute(f"LOCK TABLE {TENANT}.orders IN ACCESS SHARE MODE")
        with pytest.raises(IsolationRefused, match="a table of it is in use"):
            catalog.isolate(database, TENANT)
    assert role(database) is None
    assert not has_role(database, TENANT)
    catalog.isolate(database, TENANT)


def test_a_login_that_may_create_no_role_makes_tenants_that_search_path_keeps_apart(
    make: Callable[..., Database],
) -> None:
    database = make("NOCREATEROLE")
    assert catalog.create(database, TENANT)
    assert role(database) is None
    with pytest.raises(IsolationRefused, match=r"may not create its role: ALTER ROLE .* CREATEROLE"):
        catalog.isolate(database, TENANT)


def test_a_role_that_was_asked_for_by_name_is_not_left_out_and_nothing_is_half_made(
    make: Callable[..., Database],
) -> None:
    database = make("NOCREATEROLE", level="role")
    with pytest.raises(IsolationRefused, match="may not create its role"):
        catalog.create(database, TENANT)
    assert catalog.names(database) == []
    assert ask(database, f"SELECT to_regnamespace('{TENANT}')::text") == [(None,)]


def test_a_role_of_that_name_that_is_not_ours_is_refused_and_not_taken(make: Callable[..., Database]) -> None:
    database = make()
    migrate.ensure_catalog(database)
    with database.statement() as cursor:
        taken = role_of(TENANT, roles.powers(cursor).database)
    ask(database, f"CREATE ROLE {taken} LOGIN")
    try:
        with pytest.raises(IsolationRefused, match=f"role '{taken}' exists and was not made by this package"):
            catalog.create(database, TENANT)
        assert catalog.names(database) == []
    finally:
        ask(database, f"DROP ROLE {taken}")
    assert catalog.create(database, TENANT)


def test_a_drop_takes_the_role_with_all_that_it_owns_also_outside_of_the_schema(
    make: Callable[..., Database],
) -> None:
    database = make()
    catalog.create(database, TENANT)
    with TenantSession(database, TENANT) as session:
        session.execute(text("CREATE TABLE orders (id int)"))
        session.execute(text("SELECT lo_create(0)"))
        session.commit()
    name = role(database)
    drop(database, TENANT)
    assert ask(database, f"SELECT 1 FROM pg_roles WHERE rolname = '{name}'") == []
    assert ask(database, "SELECT count(*) FROM pg_largeobject_metadata") == [(0,)]
    assert catalog.create(database, TENANT)
    assert role(database) == name


def test_a_session_whose_role_is_gone_is_refused_with_what_mends_it_and_never_runs_without(
    make: Callable[..., Database],
) -> None:
    database = make()
    catalog.create(database, TENANT)
    ask(database, f"UPDATE cloacina.tenants SET role = 'cloacina_of_another_cluster' WHERE name = '{TENANT}'")
    with TenantSession(database, TENANT) as session, pytest.raises(IsolationRefused) as refusal:
        session.execute(text("SELECT 1"))
    assert 'role "cloacina_of_another_cluster" does not exist' in str(refusal.value)
    assert f"cloacina tenant isolate {TENANT}` with a login that may" in str(refusal.value)
    catalog.isolate(database, TENANT)
    with TenantSession(database, TENANT) as session:
        assert session.execute(text("SELECT current_user")).scalar_one() == role(database)


def test_a_session_of_a_login_that_is_no_member_is_refused(make: Callable[..., Database]) -> None:
    database = make()
    catalog.create(database, TENANT)
    other = make("NOCREATEROLE")
    with TenantSession(other, TENANT) as session, pytest.raises(IsolationRefused, match="permission denied"):
        session.execute(text("SELECT 1"))


@pytest.mark.parametrize("name", ["a" * 63, "Tenant_X", "_", "42", "select"])
def test_an_unusual_name_has_a_role_of_at_most_63_bytes_that_no_other_has(
    make: Callable[..., Database], name: str
) -> None:
    database = make()
    assert catalog.create(database, name)
    found = role(database, name)
    assert found is not None
    assert len(found) <= 63
    assert role_of(name, 1) != role_of(name, 2)
    assert role_of("a" * 63, 1) != role_of("a" * 62, 1)
    with TenantSession(database, name) as session:
        assert session.execute(text("SELECT current_user")).scalar_one() == found
    drop(database, name)


def test_a_tenant_that_moves_takes_its_role_along(make: Callable[..., Database]) -> None:
    database = make()
    catalog.create(database, TENANT)
    with TenantSession(database, TENANT) as session:
        session.execute(text("CREATE TABLE orders (id int)"))
        session.commit()
    with database.transaction() as cursor:
        cursor.execute(f"ALTER SCHEMA {TENANT} RENAME TO tenant_new")
        cursor.execute("INSERT INTO cloacina.tenants (name) VALUES ('tenant_new')")
        roles.rename(cursor, TENANT, "tenant_new")
    assert role(database) is None
    with TenantSession(database, "tenant_new") as session:
        assert session.execute(text("SELECT current_user")).scalar_one() == role(database, "tenant_new")
        session.execute(text("ALTER TABLE orders ADD COLUMN note text"))
        session.commit()
    drop(database, "tenant_new")
    assert not has_role(database, "tenant_new")


def test_a_move_by_a_login_that_may_not_rename_the_role_is_refused_and_nothing_has_moved(
    make: Callable[..., Database], database_server: str
) -> None:
    database = make()
    catalog.create(database, TENANT)
    tenancy.suspend(database, TENANT, by="test")
    server, login = connect(database_server), database.url.username
    with server.cursor() as cursor:
        cursor.execute(f"ALTER ROLE {login} NOCREATEROLE")
        with pytest.raises(
            IsolationRefused, match=f'may not rename its role: ALTER ROLE "{login}" CREATEROLE'
        ):
            moves.move(database, TENANT, "tenant_new", Verb.RENAME, by="test", rewrite=str)
        assert catalog.names(database) == [TENANT]
        assert role(database) is not None
        # What it says is what mends it.
        cursor.execute(f"ALTER ROLE {login} CREATEROLE")
    server.close()
    assert moves.move(database, TENANT, "tenant_new", Verb.RENAME, by="test", rewrite=str)
    drop(database, "tenant_new")


def test_public_and_a_tenant_that_is_not_there_are_refused_a_role(make: Callable[..., Database]) -> None:
    database = make()
    catalog.create(database, "public", legacy=True)
    assert role(database, "public") is None
    with pytest.raises(IsolationRefused, match="shares 'public' with others"):
        catalog.isolate(database, "public")
    with pytest.raises(UnknownTenant):
        catalog.isolate(database, "tenant_missing")


def test_who_waits_for_the_migration_lock_says_for_whom(
    make: Callable[..., Database], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(migrate, "LOCK_PATIENCE", 1)
    database = make()
    migrate.ensure_catalog(database)
    holder = database.dedicated_connection()
    with holder.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s), pg_backend_pid()", (migrate.MIGRATION_LOCK,))
        (_, pid) = cursor.fetchone() or (None, 0)
    rival = Rival(database, lambda _: catalog.create(database, TENANT))
    eventually(lambda: f"(backend {pid})" in caplog.text, why="the one that waits to say so")
    holder.close()
    assert rival.answer() is True
    assert ask(database, "SHOW lock_timeout") == [("0",)]
