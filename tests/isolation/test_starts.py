"""What a worker's start says and refuses about isolation, the command that brings tenants there, and liveness."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from cloacina_celery.core.settings import Settings
from cloacina_celery.errors import IsolationRefused
from cloacina_celery.plugin import isolation
from cloacina_celery.runtime.lease import Duties, LeaseHolder
from cloacina_celery.store import catalog, workers
from cloacina_celery.store.database import Database
from tests.isolation.stages import drop_login, login_of
from tests.store.rows import EXECUTION_ID, run
from tests.support.databases import connect
from tests.support.waiting import wait_for_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg2 import extensions

    from tests.support.databases import Databases
    from tests.support.processes import Processes

TENANT = "tenant_acme"


@pytest.fixture
def as_login(
    session_databases: Databases, database_server: str, database_url: str
) -> Iterator[Callable[..., Database]]:
    """A function that makes the package's view of the test's database, as a login of the given attributes."""
    server = connect(database_server)
    logins: list[str] = []
    with ExitStack() as stack:

        def new(attributes: str, level: str = "auto") -> Database:
            logins.append(stack.enter_context(login_of(server, database_url, attributes)))
            database = Database(logins[-1], isolation=level)
            stack.callback(database.dispose)
            return database

        yield new
    session_databases.drop_now(database_url)
    for login in logins:
        drop_login(server, login)
    server.close()


def said(caplog: pytest.LogCaptureFixture, database: Database, *tenants: str) -> list[str]:
    """Return the events of a start."""
    caplog.clear()
    isolation.check(database, tenants)
    return [record.cloacina_event for record in caplog.records]  # type: ignore[attr-defined]  # telemetry adds it


def test_a_login_as_it_should_be_hears_nothing(
    as_login: Callable[..., Database], caplog: pytest.LogCaptureFixture
) -> None:
    database = as_login("CREATEROLE NOINHERIT")
    catalog.create(database, TENANT)
    assert said(caplog, database, TENANT, "an_ordinary_queue") == []


def test_a_login_that_may_create_no_roles_hears_that_it_falls_back_and_why(
    as_login: Callable[..., Database], caplog: pytest.LogCaptureFixture
) -> None:
    database = as_login("NOCREATEROLE NOINHERIT")
    catalog.create(database, TENANT)
    assert said(caplog, database, TENANT) == ["isolation.fallback"]
    assert f"login {database.url.username} may not create roles" in caplog.text
    database.isolation = "schema"
    assert said(caplog, database, TENANT) == []
    database.isolation = "role"
    with pytest.raises(IsolationRefused, match=f"run `celery -A <app> cloacina tenant isolate {TENANT}`"):
        isolation.check(database, [TENANT])


def test_a_superuser_hears_that_reset_role_opens_everything(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(database_url)
    catalog.create(database, TENANT)
    assert said(caplog, database, TENANT) == ["isolation.superuser"]
    database.dispose()


def test_a_public_that_is_a_tenant_and_open_to_everybody_is_named(
    as_login: Callable[..., Database], observer: extensions.connection, caplog: pytest.LogCaptureFixture
) -> None:
    database = as_login("CREATEROLE NOINHERIT")
    catalog.create(database, "public", legacy=True)
    with observer.cursor() as cursor:
        cursor.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    assert said(caplog, database, "public") == []
    with observer.cursor() as cursor:
        cursor.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
    # A login that has no tenant's role and may make them: the legacy tenant has none, and that is as it should be.
    assert said(caplog, database, "public") == ["isolation.public"]


def test_the_command_isolates_the_tenants_that_a_start_has_named(
    as_login: Callable[..., Database], processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    database = as_login("CREATEROLE NOINHERIT", level="schema")
    for name in (TENANT, "tenant_other"):
        catalog.create(database, name)
    database.isolation = "auto"
    assert said(caplog, database, TENANT, "tenant_other") == ["isolation.left", "isolation.left"]
    url = database.url.render_as_string(hide_password=False)
    done = processes.cli("cloacina", "tenant", "isolate", env={"CLOACINA_DATABASE_URL": url})
    assert done.returncode == 0, done.stderr
    assert said(caplog, database, TENANT, "tenant_other") == []
    wrong = processes.cli(
        "cloacina", "tenant", "isolate", "tenant_none", TENANT, env={"CLOACINA_DATABASE_URL": url}
    )
    assert wrong.returncode == 1
    assert "1 of 2 tenants not isolated" in wrong.stderr
    assert "unknown tenant 'tenant_none'" in wrong.stdout


def test_whoever_sits_on_a_workers_liveness_lock_costs_it_no_lease(
    database_url: str, observer: extensions.connection, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(database_url)
    catalog.create(database, TENANT)
    with database.statement() as cursor:
        worker_id = workers.register(cursor, name="guessed", tenants=[TENANT])
        run(cursor, TENANT, worker_id=worker_id)
    with observer.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s, %s)", (workers.LOCK_CLASS, worker_id))
        cursor.execute(f"UPDATE {TENANT}.cloacina_executions SET lease_expires_at = '-infinity'")
    leases = LeaseHolder(
        database,
        Settings(database_url=database_url, heartbeat_interval=0.1),
        worker_id=worker_id,
        duties=Duties(tenants=lambda: [TENANT], held=lambda: [(TENANT, EXECUTION_ID, 1)], reserved=dict),
    )
    leases.start()
    wait_for_row(
        observer,
        f"SELECT 1 FROM {TENANT}.cloacina_executions WHERE lease_expires_at > now()",
        why="the heartbeat",
    )
    assert "liveness.taken" in caplog.text
    with observer.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_unlock_all()")
    wait_for_row(
        observer,
        f"SELECT 1 FROM cloacina.workers WHERE id = {worker_id} AND has_lock",
        why="the lock, once it is free",
    )
    leases.stop()
    leases.close()
    database.dispose()
