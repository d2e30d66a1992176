"""Connections that have no tenant, know when they broke, and read any URL that Postgres has."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from psycopg2 import OperationalError, errors
from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from cloacina_celery.errors import DatabaseUnavailable, SettingsError
from cloacina_celery.store import queries, recovery
from cloacina_celery.store.address import normalise_url
from cloacina_celery.store.database import APPLICATION_NAME, Database
from cloacina_celery.store.driver_errors import DriverError, lost_connection
from cloacina_celery.store.sessions import TenantSession
from tests.support.waiting import LOCKS, eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg2 import extensions

    from cloacina_celery.chaos.proxy import Proxy
    from cloacina_celery.store.database import Cursor


def kill(observer: extensions.connection, lent: Cursor) -> None:
    """End the backend behind a cursor."""
    with observer.cursor() as killer:
        killer.execute("SELECT pg_terminate_backend(%s, 5000)", (lent.connection.info.backend_pid,))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:word@host:5432/shop",
        "postgresql+psycopg2://user:word@host:5432/shop",
        "postgres://user:word@host:5432/shop",
    ],
)
def test_every_plain_url_means_psycopg2(url: str) -> None:
    found = normalise_url(url).render_as_string(hide_password=False)
    assert found == "postgresql+psycopg2://user:word@host:5432/shop"


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("", "is not a URL: write postgresql://"),
        ("shop", "is not a URL"),
        ("mysql://host/shop", "uses 'mysql'; tenants live in Postgres"),
        ("sqlite://", "uses 'sqlite'"),
        ("postgresql+asyncpg://host/shop", r"uses 'postgresql\+asyncpg'"),
        ("postgresql+psycopg://host/shop", r"uses 'postgresql\+psycopg'"),
        ("postgresql://host:port/shop", "is not a URL"),
    ],
)
def test_a_url_that_cannot_be_used_is_an_error_that_shows_a_right_one(url: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint) as error:
        normalise_url(url)
    assert "postgresql://" in str(error.value)


def test_a_wrong_url_keeps_its_password_to_itself() -> None:
    with pytest.raises(SettingsError) as error:
        normalise_url("postgresql://user:hunter2@host:port/shop")
    assert "hunter2" not in str(error.value)


def test_a_connection_has_no_schema_of_its_own(cursor: Cursor, tenant: str) -> None:
    cursor.execute("SHOW search_path")
    assert cursor.fetchone() == ("",)
    with pytest.raises(errors.UndefinedTable):
        cursor.execute("SELECT 1 FROM cloacina_executions")


def test_a_broken_connection_says_so_once_and_the_next_one_works(
    database: Database, observer: extensions.connection
) -> None:
    with (  # noqa: PT012  # where in the block it is raised is what the statements after it say
        pytest.raises(DatabaseUnavailable, match="the database connection broke"),
        database.statement() as lent,
    ):
        kill(observer, lent)
        lent.execute("SELECT 1")
    with database.statement() as lent:
        lent.execute("SELECT 1")


def test_a_connection_that_broke_while_nobody_used_it_is_noticed_before_it_is_lent(
    database: Database, observer: extensions.connection, tenant: str
) -> None:
    with database.statement() as lent:
        pid = lent.connection.info.backend_pid
    with observer.cursor() as killer:
        killer.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
    with database.statement() as lent:
        lent.execute("SELECT 1")
        assert lent.connection.info.backend_pid != pid
        pid = lent.connection.info.backend_pid
    with observer.cursor() as killer:
        killer.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
    with TenantSession(database, tenant) as session:
        assert session.execute(text("SELECT pg_backend_pid()")).scalar_one() != pid


def test_a_connection_that_breaks_before_its_commit_has_committed_nothing(
    database: Database, observer: extensions.connection, tenant: str
) -> None:
    with pytest.raises(DatabaseUnavailable), database.transaction() as lent:  # noqa: PT012  # see above
        lent.execute(f"INSERT INTO {tenant}.cloacina_chords (group_id, size) VALUES ('g', 1)")
        kill(observer, lent)
    with database.statement() as lent:
        lent.execute(f"SELECT count(*) FROM {tenant}.cloacina_chords")
        assert lent.fetchone() == (0,)


@pytest.mark.parametrize(
    ("code", "is_away"),
    [
        ("53300", True),  # too many connections
        ("53100", True),  # no disk left
        ("57P03", True),  # starting up
        ("25006", True),  # a standby that has not been promoted
        ("22012", False),  # a statement's own mistake
        ("55P03", False),  # a lock that was not to be had
    ],
)
def test_a_server_that_cannot_take_a_statement_now_is_unavailable_and_a_wrong_statement_is_not(
    database: Database, code: str, is_away: bool
) -> None:
    expected = DatabaseUnavailable if is_away else DriverError
    with pytest.raises(expected, match="not now"), database.statement() as lent:
        lent.execute(f"DO $$ BEGIN RAISE EXCEPTION 'not now' USING ERRCODE = '{code}'; END $$")
    with database.statement() as lent:
        lent.execute("SELECT 1")


def test_a_server_that_only_reads_is_unavailable_until_it_writes(database: Database, tenant: str) -> None:
    with (  # noqa: PT012  # as above: which of the two is raised is what the match says
        pytest.raises(DatabaseUnavailable, match=r"does not take the statement now: .* read-only"),
        database.transaction() as lent,
    ):
        lent.execute("SET TRANSACTION READ ONLY")
        lent.execute(f"INSERT INTO {tenant}.cloacina_chords (group_id, size) VALUES ('g', 1)")


def test_what_an_error_came_from_is_told_by_whose_connection_broke(
    database: Database, database_url: str, tenant: str
) -> None:
    # A tenant's role may not end a superuser's connection, not even its own.
    cut = text("SELECT pg_terminate_backend(pg_backend_pid()) FROM set_config('role', 'none', true)")
    with TenantSession(database, tenant) as session:
        with pytest.raises(DBAPIError) as ours:
            session.execute(cut)
        assert session.is_cut
        session.rollback()
        assert not session.is_cut
    with (
        create_engine(database_url, poolclass=NullPool).connect() as connection,
        pytest.raises(DBAPIError) as theirs,
    ):
        connection.execute(cut)
    with (
        pytest.raises(DBAPIError) as never_made,
        TenantSession(Database("postgresql://nobody@127.0.0.1:1/shop"), tenant) as session,
    ):
        session.execute(cut)
    for error in (ours.value, never_made.value):
        assert lost_connection(error)
        assert lost_connection(_raised_while_handling(error))
    assert lost_connection(theirs.value) is None
    assert lost_connection(_raised_while_handling(theirs.value)) is None
    assert lost_connection(ValueError()) is None


def _raised_while_handling(error: Exception) -> Exception:
    try:
        try:
            raise error
        except DBAPIError:
            raise ValueError("what now?") from None
    except ValueError as other:
        return other


def test_a_connection_that_no_network_answers_is_given_up_in_ten_seconds_and_not_in_fifteen_minutes(
    database: Database,
) -> None:
    with database.statement() as lent, socket.socket(fileno=os.dup(lent.connection.fileno())) as wire:
        assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
        assert wire.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 4


def test_a_thread_that_must_not_hang_gives_up_a_server_that_is_frozen(
    proxied_database: Proxy, database_url: str
) -> None:
    database = Database(proxied_database.url(database_url))
    with database.statement() as lent:
        lent.execute("SELECT 1")
    dedicated = database.dedicated_connection()
    proxied_database.hang()
    began = time.monotonic()
    with database.waits_limited_to(0.5):
        with (
            pytest.raises(DatabaseUnavailable, match="connection broke"),
            database.statement() as lent,
        ):
            lent.execute("SELECT 1")
        with (
            pytest.raises(OperationalError),
            database.limited(dedicated),
            dedicated.cursor() as cursor,
        ):
            cursor.execute("SELECT 1")
    assert 0.9 <= time.monotonic() - began < 5
    proxied_database.forward()
    with database.waits_limited_to(0.5), database.statement() as lent:
        lent.execute("SELECT 1")
    database.dispose()


@pytest.mark.parametrize("way", ["statement", "transaction", "dedicated"])
def test_a_server_that_does_not_answer_is_unavailable_and_not_a_drivers_error(way: str) -> None:
    nowhere = Database("postgresql://nobody@127.0.0.1:1/shop")
    ways = {"statement": nowhere.statement, "transaction": nowhere.transaction}
    with (
        pytest.raises(DatabaseUnavailable, match="no connection to the database"),
        ways[way]() if way in ways else nowhere.dedicated_connection(),
    ):
        pass


def test_options_in_the_url_reach_every_connection_and_do_not_get_in_the_way(database_url: str) -> None:
    query = {"connect_timeout": "3", "application_name": "shop", "options": "-c statement_timeout=12345"}
    url = make_url(database_url).update_query_dict(query)
    database = Database(url.render_as_string(hide_password=False))
    dedicated = database.dedicated_connection()
    with database.statement() as pooled, dedicated.cursor() as alone:
        for cursor in (pooled, alone):
            cursor.execute(
                "SELECT current_setting('search_path'), current_setting('application_name'),"
                " current_setting('statement_timeout')"
            )
            assert cursor.fetchone() == ("", "shop", "12345ms")
    dedicated.close()
    database.dispose()


def role_of_tenant(observer: extensions.connection, tenant: str) -> str:
    with observer.cursor() as cursor:
        cursor.execute("SELECT role FROM cloacina.tenants WHERE name = %s", (tenant,))
        (role,) = cursor.fetchone() or ("none",)
        return str(role)


def pid_of(database: Database) -> int:
    with database.statement() as lent:
        return int(lent.connection.info.backend_pid)


def look(database: Database, tenants: list[str]) -> None:
    with database.statement() as lent:
        recovery.glance(lent, tenants, stranded_after=10)


def work(database: Database, tenants: list[str]) -> None:
    for name in tenants:
        with database.transaction() as lent:
            queries.outcome(lent, name, "nobody")


def open_sessions(database: Database, tenants: list[str]) -> None:
    for name in tenants:
        with TenantSession(database, name) as session:
            session.execute(text("SELECT 1"))


@pytest.mark.parametrize("meet", [look, work, open_sessions])
def test_a_connection_is_kept_for_few_tenants_and_closed_when_it_comes_back_from_many(
    database_url: str, tenant: str, other_tenant: str, monkeypatch: pytest.MonkeyPatch,
    meet: Callable[[Database, list[str]], None], shared_observer: extensions.connection,
) -> None:  # fmt: skip
    monkeypatch.setattr("cloacina_celery.store.database.MAX_MET", 1)
    own = Database(database_url)
    pid = pid_of(own)
    for _ in range(3):
        meet(own, [tenant])
    assert pid_of(own) == pid
    meet(own, [tenant, other_tenant])
    assert pid_of(own) != pid
    with shared_observer.cursor() as cursor:

        def is_gone() -> bool:
            cursor.execute("SELECT FROM pg_stat_activity WHERE pid = %s", (pid,))
            return cursor.fetchone() is None

        eventually(is_gone, why="the backend to end")
    own.dispose()


def test_a_transaction_may_meet_as_many_tenants_as_it_likes(
    database_url: str, tenant: str, other_tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloacina_celery.store.database.MAX_MET", 1)
    own = Database(database_url)
    with own.transaction() as lent:
        pid = lent.connection.info.backend_pid
        for name in (tenant, other_tenant, tenant):
            queries.outcome(lent, name, "nobody")
            lent.execute("SELECT pg_backend_pid()")
            assert lent.fetchone() == (pid,)
    own.dispose()


LEFTOVERS = [
    "CREATE TEMP TABLE orders AS SELECT 'the first tenant''s' AS whose",
    "SET search_path = public",
    "SET statement_timeout = '77s'",
    "SELECT nextval('numbers')",
    "SELECT pg_advisory_lock(4712)",
    "SET SESSION ROLE pg_monitor",
    "DECLARE mine CURSOR WITH HOLD FOR SELECT 1",
    "LISTEN news",
    "SELECT nonsense",
]


@pytest.mark.parametrize("ends", ["commit", "rollback", "close"])
def test_nothing_of_one_tenants_session_is_left_to_the_next_user_of_its_connection(
    database: Database, tenant: str, other_tenant: str, observer: extensions.connection, ends: str
) -> None:
    with TenantSession(database, tenant) as session:
        session.execute(text("CREATE SEQUENCE numbers"))
        session.commit()
        first = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        for statement in LEFTOVERS:
            with suppress(ProgrammingError), session.begin_nested():
                session.execute(text(statement))
        getattr(session, ends)()
    with TenantSession(database, other_tenant) as session:
        assert session.execute(text("SELECT pg_backend_pid()")).scalar_one() == first, (
            "not the same connection"
        )
        role = role_of_tenant(observer, other_tenant)
        for setting, value in [
            ("search_path", f'"{other_tenant}"'), ("statement_timeout", "0"), ("role", role),
        ]:  # fmt: skip
            assert session.execute(text(f"SHOW {setting}")).scalar_one() == value
        assert session.execute(text("SELECT to_regclass('orders')")).scalar_one() is None
        assert session.execute(text("SELECT count(*) FROM pg_cursors WHERE name = 'mine'")).scalar_one() == 0
        assert session.execute(text("SELECT count(*) FROM pg_listening_channels()")).scalar_one() == 0
        with pytest.raises(DBAPIError, match="lastval is not yet defined"):
            session.execute(text("SELECT lastval()"))
    with observer.cursor() as cursor:
        cursor.execute(f"SELECT count(*) FROM {LOCKS} WHERE locktype = 'advisory' AND objid = 4712")
        assert cursor.fetchone() == (0,)
    with database.statement() as lent:
        assert lent.connection.info.backend_pid == first
        lent.execute(
            "SELECT current_setting('search_path'), current_setting('role'), current_user = session_user"
        )
        assert lent.fetchone() == ("", "none", True)


def test_a_connection_is_known_by_the_packages_name(cursor: Cursor) -> None:
    cursor.execute("SHOW application_name")
    assert cursor.fetchone() == (APPLICATION_NAME,)


def test_a_forked_child_opens_connections_of_its_own_and_leaves_the_parents_alone(database: Database) -> None:
    with database.statement() as lent:
        parents = lent.connection.info.backend_pid
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with database.statement() as lent:
                os.write(writer, str(lent.connection.info.backend_pid).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(reader, 100)) != parents
    os.close(reader)
    os.close(writer)
    with database.statement() as lent:
        lent.execute("SELECT pg_backend_pid()")
        assert lent.fetchone() == (parents,)
