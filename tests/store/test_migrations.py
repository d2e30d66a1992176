"""The first start creates, every later one only looks, and a crash in between leaves nothing half-made."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from alembic.script import ScriptDirectory

from cloacina_celery.errors import SchemaMismatch, UnknownTenant
from cloacina_celery.store import catalog, executions, fleet, migrate, settlements
from cloacina_celery.store.database import Database
from tests.store.rows import EXECUTION_ID, claim, read, submission
from tests.support import ROOT
from tests.support.waiting import LOCKS, eventually, wait_for_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from psycopg2 import extensions

    from cloacina_celery.store.database import Cursor
    from tests.support.databases import Databases

NO_DDL = """
CREATE FUNCTION public.refuse_ddl() RETURNS event_trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'DDL at a later start: %', tg_tag; END $$;
CREATE EVENT TRIGGER refuse_ddl ON ddl_command_start EXECUTE FUNCTION public.refuse_ddl();
"""
"""Postgres itself refuses any DDL from here on: what works now uses none."""

STOP_AT_FIRST_INDEX = """
CREATE FUNCTION public.wait_in_the_middle() RETURNS event_trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_advisory_xact_lock(4711); END $$;
CREATE EVENT TRIGGER in_the_middle ON ddl_command_start WHEN TAG IN ('CREATE INDEX')
    EXECUTE FUNCTION public.wait_in_the_middle();
"""

TWENTY = """
import os, sys, traceback
from cloacina_celery.store import catalog
from cloacina_celery.store.database import Database

url, names = sys.argv[1], sys.argv[2].split(",")
gate, opener = os.pipe()
children = []
for number in range(20):
    child = os.fork()
    if child == 0:
        os.close(opener)
        os.read(gate, 1)
        try:
            name = names[number % len(names)]
            os.write(1, f"{name} {catalog.create(Database(url), name)}\\n".encode())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
os.close(opener)
raise SystemExit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""
"""Twenty real processes that stand at one gate and then create at once."""


@pytest.fixture
def database_url(session_databases: Databases) -> Iterator[str]:
    """The URL of an empty database: here it is the first start that counts."""
    with session_databases.fresh() as url:
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """The package's view of the empty database."""
    made = Database(database_url)
    yield made
    made.dispose()


def execute(conn: extensions.connection, statements: str) -> None:
    with conn.cursor() as cursor:
        cursor.execute(statements)


def relations(conn: extensions.connection) -> set[str]:
    """Name everything that is nobody's but ours."""
    with conn.cursor() as cursor:
        cursor.execute(
            "SELECT n.nspname || coalesce('.' || c.relname, '') FROM pg_namespace n"
            " LEFT JOIN pg_class c ON c.relnamespace = n.oid"
            " WHERE n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'public')"
        )
        return {row[0] for row in cursor.fetchall()}


def set_revision(conn: extensions.connection, schema: str, revision: str) -> None:
    execute(conn, f"UPDATE {schema}.cloacina_version SET version_num = '{revision}'")


@pytest.mark.parametrize("branch", ["catalog", "tenant"])
def test_the_head_that_we_look_for_is_the_head_of_the_migrations(branch: migrate.Branch) -> None:
    directory = ROOT / "cloacina_celery" / "store" / "migrations" / branch
    script = ScriptDirectory(str(directory))
    assert script.get_heads() == [migrate.head_of(branch)]
    assert migrate.known_revisions(branch)[-1] == migrate.head_of(branch)


def test_the_first_start_creates_and_the_next_one_finds(
    database: Database, observer: extensions.connection, tenant_name: str
) -> None:
    assert catalog.names(database) == []
    assert catalog.create(database, tenant_name)
    made = relations(observer)
    assert {
        f"{tenant_name}.cloacina_executions",
        f"{tenant_name}.cloacina_events",
        "cloacina.tenants",
    } <= made
    assert not catalog.create(database, tenant_name)
    assert relations(observer) == made
    assert catalog.names(database) == [tenant_name]
    assert catalog.revisions(database) == [(tenant_name, migrate.TENANT_HEAD)]


def test_nothing_is_created_in_public_or_left_on_a_pooled_connection(
    database: Database, observer: extensions.connection, tenant_name: str
) -> None:
    catalog.create(database, tenant_name)
    with observer.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace")
        assert cursor.fetchone() == (0,)
    with database.statement() as lent:
        lent.execute("SHOW search_path")
        assert lent.fetchone() == ("",)


def test_the_next_start_runs_no_ddl_at_all(
    database_url: str, database: Database, observer: extensions.connection, tenant_name: str
) -> None:
    catalog.create(database, tenant_name)
    execute(observer, NO_DDL)
    later = Database(database_url)
    migrate.ensure_catalog(later)
    assert not catalog.create(later, tenant_name)
    fleet.migrate_tenant(later, tenant_name)
    later.dispose()
    with pytest.raises(Exception, match="DDL at a later start: CREATE SCHEMA"):
        catalog.create(database, "tenant_another")


def test_twenty_processes_that_create_the_same_two_tenants_at_once_create_each_once(
    database: Database, database_url: str, new_tenant_name: Callable[[], str], observer: extensions.connection
) -> None:
    names = [new_tenant_name(), new_tenant_name()]
    run = subprocess.run(
        [sys.executable, "-c", TWENTY, database_url, ",".join(names)],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    answers = Counter(run.stdout.splitlines())
    assert answers == {
        f"{name} {is_new}": number for name in names for is_new, number in [(True, 1), (False, 9)]
    }
    assert catalog.names(database) == sorted(names)
    execute(observer, NO_DDL)
    again = subprocess.run(
        [sys.executable, "-c", TWENTY, database_url, ",".join(names)],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert Counter(again.stdout.splitlines()) == {f"{name} False": 10 for name in names}


CREATE = """
import sys
from cloacina_celery.store import catalog
from cloacina_celery.store.database import Database

print("going", flush=True)
catalog.create(Database(sys.argv[1]), sys.argv[2])
"""


def test_a_crash_in_the_middle_leaves_nothing_and_the_next_start_does_all_of_it(
    database: Database, database_url: str, observer: extensions.connection, tenant_name: str, tmp_path: Path
) -> None:
    migrate.ensure_catalog(database)
    before = relations(observer)
    execute(observer, STOP_AT_FIRST_INDEX)
    execute(observer, "SELECT pg_advisory_lock(4711)")
    creating = subprocess.Popen(
        [sys.executable, "-c", CREATE, database_url, tenant_name], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    with creating:
        (backend,) = wait_for_row(
            observer,
            f"SELECT pid FROM {LOCKS} WHERE locktype = 'advisory' AND objid = 4711 AND NOT granted",
            why="the migration to stand in the middle",
        )
        creating.kill()
    execute(observer, "SELECT pg_advisory_unlock(4711)")
    execute(observer, "DROP EVENT TRIGGER in_the_middle")

    def is_gone() -> object:
        with observer.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", (backend,))
            row = cursor.fetchone()
            return row is not None and row[0] == 0

    eventually(is_gone, why="the dead process's backend to notice")
    assert relations(observer) == before
    assert catalog.names(database) == []
    assert catalog.create(database, tenant_name)
    assert catalog.revisions(database) == [(tenant_name, migrate.TENANT_HEAD)]


def test_a_schema_of_an_older_version_is_refused_with_the_command_that_migrates_it(
    database: Database, observer: extensions.connection, tenant_name: str
) -> None:
    catalog.create(database, tenant_name)
    execute(observer, f"DELETE FROM {tenant_name}.cloacina_version")
    with pytest.raises(SchemaMismatch) as refusal:
        catalog.create(database, tenant_name)
    assert (refusal.value.schema, refusal.value.found) == (tenant_name, None)
    assert str(refusal.value) == (
        f"schema '{tenant_name}' is at revision none, this version of cloacina_celery works with "
        f"{migrate.TENANT_HEAD}: run `celery -A <app> cloacina schema migrate {tenant_name}`"
    )


@pytest.mark.parametrize("schema", ["tenant", "cloacina"])
def test_a_schema_of_a_newer_version_is_refused_with_the_advice_to_upgrade(
    database: Database, observer: extensions.connection, tenant_name: str, schema: str
) -> None:
    catalog.create(database, tenant_name)
    name = tenant_name if schema == "tenant" else schema
    set_revision(observer, name, "z9999")
    for start in (
        lambda: catalog.create(database, tenant_name),
        lambda: fleet.migrate_tenant(database, tenant_name),
    ):
        with pytest.raises(SchemaMismatch, match="upgrade cloacina_celery in this process") as refusal:
            start()
        assert (refusal.value.schema, refusal.value.found) == (name, "z9999")
    assert (name, "z9999") in [*catalog.revisions(database), ("cloacina", "z9999")]


def test_migrating_a_tenant_that_nobody_created_is_refused(database: Database) -> None:
    with pytest.raises(UnknownTenant, match="'tenant_missing'"):
        fleet.migrate_tenant(database, "tenant_missing")


def test_data_persists_when_everything_starts_anew(database_url: str, tenant_name: str) -> None:
    first = Database(database_url)
    catalog.create(first, tenant_name)
    with first.statement() as cursor:
        assert executions.submit(cursor, tenant_name, submission())
        assert claim(cursor, tenant_name)
        assert settlements.succeed(cursor, tenant_name, EXECUTION_ID, 1, "7")
    first.dispose()
    second = Database(database_url)
    catalog.create(second, tenant_name)
    fleet.migrate_tenant(second, tenant_name)
    with second.statement() as cursor:
        assert read(cursor, tenant_name).result == "7"
    second.dispose()


@pytest.mark.parametrize("schema", ["cloacina", "tenant"])
def test_a_newer_revision_that_only_adds_is_worked_with(
    database: Database, tenant_name: str, cursor: Cursor, schema: str
) -> None:
    branch = "catalog" if schema == "cloacina" else "tenant"
    ours = migrate.head_of("catalog" if schema == "cloacina" else "tenant")
    catalog.create(database, tenant_name)
    at = schema if schema == "cloacina" else tenant_name
    cursor.execute(f"UPDATE {at}.cloacina_version SET version_num = 'x9999'")
    try:
        cursor.execute("INSERT INTO cloacina.revisions VALUES (%s, 'x9999', %s)", (branch, ours))
        assert catalog.create(database, tenant_name) is False
        fleet.migrate_tenant(database, tenant_name)
        cursor.execute(f"SELECT version_num FROM {at}.cloacina_version")
        assert cursor.fetchone() == ("x9999",)
        assert executions.submit(cursor, tenant_name, submission()) is not None

        cursor.execute("UPDATE cloacina.revisions SET works_from = 'x9998' WHERE revision = 'x9999'")
        with pytest.raises(SchemaMismatch, match="upgrade cloacina_celery in this process"):
            catalog.create(database, tenant_name)
    finally:
        cursor.execute(f"UPDATE {at}.cloacina_version SET version_num = %s", (ours,))


def test_a_catalog_tells_older_versions_from_which_one_they_work_with_it(
    database: Database, tenant_name: str, cursor: Cursor
) -> None:
    catalog.create(database, tenant_name)
    cursor.execute("SELECT branch, revision FROM cloacina.revisions")
    known = {("catalog", r) for r in migrate.known_revisions("catalog")}
    assert set(cursor.fetchall()) == known | {("tenant", r) for r in migrate.known_revisions("tenant")}
