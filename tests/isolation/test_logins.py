"""Tenants' own logins: issued once, replaced while in use, revoked, and gone with their tenant."""

from __future__ import annotations

import base64
import hashlib
import hmac
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from cloacina_celery.core.tenancy import Verb
from cloacina_celery.errors import IsolationRefused, SettingsError, UnknownTenant
from cloacina_celery.store import audit, catalog, logins, moves, removal, tenancy
from cloacina_celery.store.database import Database
from cloacina_celery.store.sessions import TenantSession
from tests.isolation.stages import drop_login, login_of
from tests.support.databases import connect
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg2 import extensions

    from tests.support.databases import Databases

TENANT = "tenant_acme"
HOSTILE = 'x"; DROP SCHEMA tenant_acme CASCADE; --'


@pytest.fixture
def database(session_databases: Databases, database_server: str, database_url: str) -> Iterator[Database]:
    """The app's view of a database, as a login that may create roles, with one tenant."""
    server = connect(database_server)
    with ExitStack() as stack:
        url = stack.enter_context(login_of(server, database_url, "CREATEROLE NOINHERIT"))
        made = Database(url)
        stack.callback(made.dispose)
        catalog.create(made, TENANT)
        yield made
        for name in catalog.names(made):
            for login in _logins(made, name):
                logins.revoke(made, name, login, by="test")
    session_databases.drop_now(database_url)
    drop_login(server, url)
    server.close()


@pytest.fixture
def new_login(database: Database) -> Callable[..., logins.Credentials]:
    """A function that issues a login of the tenant."""

    def issue(tenant: str = TENANT, **options: object) -> logins.Credentials:
        chosen = {"username": None, "password": None, "overlap": None, **options}
        return logins.issue(database, tenant, by="ops", **chosen)  # type: ignore[arg-type]  # each test's own

    return issue


def _logins(database: Database, tenant: str = TENANT) -> list[str]:
    with database.statement() as cursor:
        return [login.username for login in logins.of_tenant(cursor, tenant)]


def _who(url: str) -> tuple[str, str | None]:
    database = Database(url)
    try:
        with database.statement() as cursor:
            return logins.own_tenant(cursor)
    finally:
        database.dispose()


def _verifies(verifier: str, password: str) -> bool:
    """Check a password as Postgres does (RFC 5802)."""
    _, iterations, keys = verifier.split("$")
    count, salt = iterations.split(":")
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), base64.b64decode(salt), int(count))
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    return base64.b64encode(stored).decode() == keys.split(":")[0]


def test_a_password_is_long_and_returned_once_and_stands_nowhere_else(
    database: Database,
    new_login: Callable[..., logins.Credentials],
    observer: extensions.connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    made, other = new_login(), new_login()
    assert len(made.password) >= 32
    assert made.password != other.password
    assert make_url(made.database_url).password == made.password
    assert made.password not in repr(made) + caplog.text
    with observer.cursor() as cursor:
        cursor.execute("SELECT rolpassword FROM pg_authid WHERE rolname = %s", (made.username,))
        ((verifier,),) = cursor.fetchall()
        cursor.execute("SELECT string_agg(l::text, ' ') FROM cloacina.logins l")
        ((kept,),) = cursor.fetchall()
    assert verifier.startswith("SCRAM-SHA-256$")
    assert _verifies(verifier, made.password)
    assert not _verifies(verifier, other.password)
    entries = audit.history(database, TENANT)
    assert [(entry.verb, entry.step, entry.operator) for entry in entries[-2:]] == [
        ("login", "issued", "ops")
    ] * 2
    assert made.password not in kept + repr(entries)
    assert _who(made.database_url) == (made.username, TENANT)


def test_no_name_or_password_becomes_sql(
    database: Database, new_login: Callable[..., logins.Credentials], observer: extensions.connection
) -> None:
    made = new_login(username=HOSTILE, password=f"'; DROP SCHEMA {TENANT} CASCADE; -- \\ %s {{}} $$ é")
    assert _who(made.database_url) == (HOSTILE, TENANT)
    with observer.cursor() as cursor:
        cursor.execute("SELECT rolpassword FROM pg_authid WHERE rolname = %s", (HOSTILE,))
        ((verifier,),) = cursor.fetchall()
    assert _verifies(verifier, made.password)
    assert new_login(overlap=60).username in _logins(database)
    assert logins.revoke(database, TENANT, HOSTILE, by="ops")
    assert catalog.exists(database, TENANT)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"username": ""}, "1 to 63 bytes"),
        ({"username": "é" * 32}, "63 bytes"),
        ({"username": "pg_mine"}, "keeps 'pg_...' for itself"),
        ({"username": "a\0b"}, "1 to 63 bytes"),
        ({"password": ""}, "at least one character"),
        ({"password": "a\0b"}, "none of them NUL"),
    ],
)
def test_what_cannot_be_a_name_or_a_password_is_refused_and_nothing_made(
    database: Database, new_login: Callable[..., logins.Credentials], options: dict[str, str], says: str
) -> None:
    with pytest.raises(SettingsError, match=says):
        new_login(**options)
    assert _logins(database) == []


def test_a_name_that_is_taken_is_left_as_it_was(
    database: Database, new_login: Callable[..., logins.Credentials]
) -> None:
    owner = database.url.username
    assert owner is not None
    with pytest.raises(IsolationRefused, match=f"role '{owner}' exists and was not made by this package"):
        new_login(username=owner)
    with pytest.raises(IsolationRefused, match="is no login of it"):
        logins.revoke(database, TENANT, owner, by="ops")
    assert not logins.revoke(database, TENANT, "nobody_at_all", by="ops")
    with pytest.raises(UnknownTenant):
        new_login("tenant_none")


def test_a_tenant_without_a_role_can_have_no_login(
    database: Database, new_login: Callable[..., logins.Credentials]
) -> None:
    database.isolation = "schema"
    catalog.create(database, "tenant_plain")
    with pytest.raises(IsolationRefused, match="run `celery -A <app> cloacina tenant isolate tenant_plain`"):
        new_login("tenant_plain")


def test_old_and_new_are_valid_for_the_overlap_and_then_the_old_one_goes(
    database: Database, new_login: Callable[..., logins.Credentials], observer: extensions.connection
) -> None:
    old = new_login()
    new = new_login(overlap=3600)
    assert _who(old.database_url)[1] == _who(new.database_url)[1] == TENANT
    with observer.cursor() as cursor:
        cursor.execute(
            "SELECT r.rolvaliduntil BETWEEN now() + '59 min' AND now() + '1 h', l.valid_until = r.rolvaliduntil"
            " FROM pg_roles r JOIN cloacina.logins l ON l.username = r.rolname WHERE r.rolname = %s",
            (old.username,),
        )
        assert cursor.fetchall() == [(True, True)]
        cursor.execute("SELECT rolvaliduntil FROM pg_roles WHERE rolname = %s", (new.username,))
        assert cursor.fetchall() == [(None,)]
        cursor.execute(
            "UPDATE cloacina.logins SET valid_until = now() - interval '1 s' WHERE username = %s",
            (old.username,),
        )
    third = new_login(overlap=60)
    assert _logins(database) == [new.username, third.username]
    with observer.cursor() as cursor:
        cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (old.username,))
        assert cursor.fetchall() == []


def test_a_revoked_login_loses_its_connections_and_leaves_what_it_made_to_its_tenant(
    database: Database, new_login: Callable[..., logins.Credentials], observer: extensions.connection
) -> None:
    made = new_login()
    own = Database(made.database_url)
    with TenantSession(own, TENANT) as session:
        session.execute(text("RESET ROLE"))
        session.execute(text("CREATE TABLE made (key int)"))
        session.commit()
    connection = own.dedicated_connection()
    backend = connection.info.backend_pid
    assert logins.revoke(database, TENANT, made.username, by="ops")

    def is_gone() -> bool:
        with observer.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", (backend,))
            return cursor.fetchone() is None

    eventually(is_gone, why="the connection to end")
    connection.close()
    own.dispose()
    assert _logins(database) == []
    with TenantSession(database, TENANT) as session:
        session.execute(text("ALTER TABLE made ADD COLUMN note text"))
    assert not logins.revoke(database, TENANT, made.username, by="ops")


def test_a_login_that_is_not_ours_to_end_stays_whole_and_the_mend_is_named(
    database: Database, new_login: Callable[..., logins.Credentials], observer: extensions.connection
) -> None:
    made = new_login()
    with observer.cursor() as cursor:
        cursor.execute(f'REVOKE "{made.username}" FROM "{database.url.username}" CASCADE')
    with pytest.raises(IsolationRefused, match=f'GRANT "{made.username}" TO "{database.url.username}"'):
        logins.revoke(database, TENANT, made.username, by="ops")
    with pytest.raises(IsolationRefused, match="may not end its login"):
        removal.remove_now(database, TENANT, by="ops")
    assert catalog.exists(database, TENANT)
    assert _logins(database) == [made.username]
    with observer.cursor() as cursor:
        cursor.execute(f'GRANT "{made.username}" TO "{database.url.username}" WITH ADMIN OPTION')
    assert logins.revoke(database, TENANT, made.username, by="ops")


def test_an_interrupted_revocation_is_ended_by_doing_it_again(
    database: Database, new_login: Callable[..., logins.Credentials], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = new_login()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(logins, "_drop", die)
        with pytest.raises(KeyboardInterrupt):
            logins.revoke(database, TENANT, made.username, by="ops")
    assert _logins(database) == [made.username]
    assert logins.revoke(database, TENANT, made.username, by="ops")
    assert _logins(database) == []


def test_logins_move_with_their_tenant_and_go_with_it(
    database: Database, new_login: Callable[..., logins.Credentials], observer: extensions.connection
) -> None:
    made = new_login()
    tenancy.suspend(database, TENANT, by="ops", refuse_submits=False)
    moves.move(database, TENANT, "tenant_new", Verb.RENAME, by="ops", rewrite=str)
    assert _who(made.database_url) == (made.username, "tenant_new")
    removal.remove_now(database, "tenant_new", by="ops")
    with observer.cursor() as cursor:
        cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (made.username,))
        assert cursor.fetchall() == []
        cursor.execute("SELECT 1 FROM cloacina.logins")
        assert cursor.fetchall() == []
