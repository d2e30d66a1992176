"""Two tenants, one of them hostile, in a database whose login is no superuser."""

from __future__ import annotations

import secrets
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from psycopg2 import errors, sql
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from cloacina_celery.store import catalog, executions, logins
from cloacina_celery.store.database import Database
from cloacina_celery.store.sessions import TenantSession
from tests.store.rows import submission
from tests.support.databases import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg2 import extensions

    from tests.support.databases import Databases

LEVELS = ("schema", "role", "login")
ON_ONE_LOGIN = LEVELS[:2]
"""Those of which a pooler needs to know no more than the app's login."""
ATTACKER, VICTIM = "tenant_attacker", "tenant_victim"
SECRET = "the victim's"
VICTIMS_EXECUTION = "victims-execution"

REFUSALS = (
    errors.InsufficientPrivilege,
    errors.UndefinedTable,
    errors.UndefinedFunction,
    errors.WrongObjectType,
)
"""How Postgres says no. Any other error is the test's own and no proof of anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One database at one level, and a superuser's connection to arrange and to look.

    ``database`` is the app's, whose login owns it; ``own`` are those of tenants that have a login of their own.
    """

    level: str
    url: str
    database: Database
    own: dict[str, Database] = field(default_factory=dict)
    observer: extensions.connection

    @contextmanager
    def session(self, tenant: str = ATTACKER) -> Iterator[Callable[..., list[Any]]]:
        """Lend a tenant's session as a function that runs one statement and returns its rows; it commits at the end."""
        with TenantSession(self.own.get(tenant, self.database), tenant) as session:

            def run(statement: str, **params: Any) -> list[Any]:
                found = session.execute(text(statement), params)
                return [tuple(row) for row in found] if found.returns_rows else []

            yield run
            session.commit()

    def gets_through(self, *statements: str) -> bool:
        """Run statements as the attacker, and take them back; tell whether all went through, or one was refused."""
        try:
            with TenantSession(self.own.get(ATTACKER, self.database), ATTACKER) as session:
                for statement in statements:
                    session.execute(text(statement))
        except DBAPIError as error:
            if isinstance(error.orig, REFUSALS):
                return False
            raise
        return True

    def finds(self, *statements: str) -> bool:
        """Run statements as the attacker; tell whether the last one found any row."""
        return bool(self._last_rows(*statements))

    def reads_secret(self, *statements: str) -> bool:
        """Run statements as the attacker; tell whether the last one's first value is the victim's secret."""
        return [row[0] for row in self._last_rows(*statements)] == [SECRET]

    def _last_rows(self, *statements: str) -> list[Any]:
        try:
            with self.session() as run:
                rows: list[Any] = []
                for statement in statements:
                    rows = run(statement)
        except DBAPIError as error:
            if isinstance(error.orig, REFUSALS):
                return []
            raise
        return rows

    def look(self, query: str) -> list[Any]:
        """Run a statement with a superuser's eyes."""
        with self.observer.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall() if cursor.description else []

    def role(self, tenant: str) -> str:
        """Return the quoted name of a tenant's role, or of the login where the tenant has none."""
        (role,) = self.look(
            f"SELECT coalesce(role, current_user) FROM cloacina.tenants WHERE name = '{tenant}'"
        )[0]
        return f'"{role}"'


@contextmanager
def login_of(server: extensions.connection, url: str, attributes: str) -> Iterator[str]:
    """Make a login that owns the database of ``url``, and yield the URL with it."""
    name, password = f"login_{secrets.token_hex(4)}", secrets.token_hex(8)
    with server.cursor() as cursor:
        cursor.execute(
            sql.SQL("CREATE ROLE {} LOGIN PASSWORD %s " + attributes).format(sql.Identifier(name)),
            (password,),
        )
        cursor.execute(
            sql.SQL("ALTER DATABASE {} OWNER TO {}").format(
                sql.Identifier(make_url(url).database or ""), sql.Identifier(name)
            )
        )
    yield make_url(url).set(username=name, password=password).render_as_string(hide_password=False)


@contextmanager
def own_database(database: Database, tenant: str) -> Iterator[Database]:
    """Yield the package's view of a database as a tenant's own login; the login goes with the tenant."""
    made = logins.issue(database, tenant, username=None, password=None, overlap=None, by="test")
    own = Database(made.database_url, isolation="login", prepared_statements=False)
    try:
        yield own
    finally:
        own.dispose()
        logins.revoke(database, tenant, made.username, by="test")


def empty_path(server: extensions.connection, url: str) -> None:
    """Have each connection of a login begin without a search_path, also where a pooler drops our option."""
    with server.cursor() as cursor:
        name = sql.Identifier(make_url(url).username or "")
        cursor.execute(sql.SQL("ALTER ROLE {} SET search_path = ''").format(name))


def drop_login(server: extensions.connection, url: str) -> None:
    """Drop a login whose database is gone."""
    with server.cursor() as cursor:
        cursor.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(make_url(url).username or "")))


@contextmanager
def stage(
    databases: Databases,
    server_url: str,
    level: str,
    through: Callable[[str], AbstractContextManager[str]] = nullcontext,
) -> Iterator[Stage]:
    """Set a stage: both tenants, the victim's secret in its own table, and one execution of the victim's.

    Args:
        through: runs a pooler before a database, and yields the URL that goes through it.
    """
    server = connect(server_url)
    try:
        with databases.fresh() as url:
            observer = connect(url)
            with login_of(server, url, "CREATEROLE NOINHERIT") as login_url, ExitStack() as stack:
                if through is not nullcontext:
                    empty_path(server, login_url)
                through_url = stack.enter_context(through(login_url))
                database = Database(through_url, isolation=level, prepared_statements=False)
                try:
                    made = Stage(level=level, url=through_url, database=database, observer=observer)
                    for tenant in (ATTACKER, VICTIM):
                        assert catalog.create(database, tenant)
                        if level == "login":
                            made.own[tenant] = stack.enter_context(own_database(database, tenant))
                    with made.session(VICTIM) as run:
                        run("CREATE TABLE secrets (secret text)")
                        run("INSERT INTO secrets VALUES (:secret)", secret=SECRET)
                    with database.statement() as cursor:
                        executions.submit(cursor, VICTIM, submission(execution_id=VICTIMS_EXECUTION))
                    yield made
                finally:
                    database.dispose()
                    observer.close()
        drop_login(server, login_url)
    finally:
        server.close()
