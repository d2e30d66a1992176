"""Real workers on their tenants' own logins: they do all that a worker does, and nothing for anybody else."""

from __future__ import annotations

import json
import os
import signal
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.engine import make_url

from tests.isolation.stages import drop_login, login_of
from tests.support.databases import connect
from tests.support.modules import imported_anew
from tests.support.waiting import eventually, never

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import ModuleType

    from psycopg2 import extensions

    from cloacina_celery.store.logins import Credentials
    from tests.support.databases import Databases
    from tests.support.processes import Processes, WorkerProcess

APP = "tests.isolation.own_app:app"
TENANT, OTHER = "tenant_acme", "tenant_other"


@dataclass(frozen=True, slots=True, kw_only=True)
class House:
    """Two tenants at the level of logins, as the app's owner sees them."""

    own: ModuleType
    observer: extensions.connection
    processes: Processes

    def login(self, tenant: str = TENANT, **options: Any) -> Credentials:
        """Issue a login of the tenant."""
        made: Credentials = self.own.cloacina.tenants.issue_login(tenant, **options)
        return made

    def worker(self, url: str, *queues: str, **env: str | None) -> WorkerProcess:
        """Start a worker that connects by this URL, and by nothing else."""
        return self.processes.worker(
            APP, queues=queues or [TENANT], env={"CLOACINA_DATABASE_URL": url or None, **env}
        )

    def write(self, key: int, tenant: str = TENANT) -> Any:
        """Submit a task that writes a line."""
        return self.own.write.apply_async((key,), tenant=tenant)

    def look(self, query: str) -> list[Any]:
        """Run a statement with a superuser's eyes."""
        with self.observer.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall()


@pytest.fixture
def house(
    session_databases: Databases,
    database_server: str,
    database_url: str,
    claimed_redis_url: str,
    observer: extensions.connection,
    processes: Processes,
) -> Iterator[House]:
    """Two tenants with a table each, an app on a login that owns them, and no worker yet."""
    server = connect(database_server)
    with ExitStack() as stack:
        url = stack.enter_context(login_of(server, database_url, "CREATEROLE NOINHERIT"))
        settings = {"CLOACINA_DATABASE_URL": url, "CLOACINA_BROKER_URL": claimed_redis_url}
        own = stack.enter_context(imported_anew("tests.isolation.own_app", settings))
        stack.callback(lambda: own.cloacina.database.dispose())
        for tenant in (TENANT, OTHER):
            own.cloacina.tenants.create(tenant)
            with own.cloacina.session(tenant) as session:
                session.execute(own.text("CREATE TABLE lines (key int PRIMARY KEY)"))
        yield House(own=own, observer=observer, processes=processes)
        processes.end_all()
        for tenant in (TENANT, OTHER):
            for login in own.cloacina.tenants.logins(tenant):
                own.cloacina.tenants.revoke_login(tenant, login.username)
    session_databases.drop_now(database_url)
    drop_login(server, url)
    server.close()


def test_a_worker_on_its_tenants_login_runs_and_recovers_and_knows_nobody_else(house: House) -> None:
    made, foreign = house.login(), house.login(OTHER)
    worker = house.worker(made.database_url).wait_ready()
    house.worker(foreign.database_url, OTHER).wait_ready()
    assert house.write(1).get(timeout=15) == made.username
    assert house.write(2, OTHER).get(timeout=15) == foreign.username
    # Its death is found by another worker of its tenant, on a login of its own.
    second = house.login()
    results = [house.write(key) for key in range(10, 60)]
    eventually(lambda: house.look(f"SELECT 1 FROM {TENANT}.lines WHERE key >= 10"), why="the first lines")
    rescuer = house.worker(second.database_url).wait_ready()
    worker.kill9(whole=True)
    assert {result.get(timeout=30) for result in results} <= {made.username, second.username}
    assert house.look(f"SELECT count(*) FROM {TENANT}.lines") == [(51,)]
    rescuer.wait_log("worker.dead: worker")
    assert house.look(f"SELECT DISTINCT tenants FROM cloacina.workers WHERE login = '{made.username}'") == [
        ([TENANT],)
    ]
    rescuer.terminate()
    assert rescuer.wait_exit() == 0
    assert "ermission denied" not in worker.log + rescuer.log


def test_a_worker_is_refused_at_its_start_where_its_login_is_somebody_elses(house: House) -> None:
    made = house.login()
    wrong = house.worker(made.database_url, TENANT, OTHER)
    assert wrong.wait_exit() == 78
    assert f"tenant '{OTHER}': login '{made.username}' is the own one of tenant '{TENANT}'" in wrong.log
    assert f"`celery -A <app> cloacina tenant login {OTHER}`" in wrong.log
    owner = str(house.own.cloacina.database.url.render_as_string(hide_password=False))
    for queues in ([TENANT], ["ordinary", "tenant_*@1/2"]):
        refused = house.worker(owner, *queues, CLOACINA_ISOLATION="login")
        assert refused.wait_exit() == 78
        assert "cloacina_isolation is 'login', and login" in refused.log
    house.worker(owner, "ordinary", CLOACINA_ISOLATION="login").wait_ready()


def test_the_messages_of_beat_are_left_to_those_who_see_all_tenants(house: House) -> None:
    house.worker(house.login().database_url).wait_ready()
    app = house.own.app
    app.send_task("cloacina.sweep", queue="cloacina_control")
    depth = house.own.cloacina.parts.publisher.queue_depth
    never(lambda: depth("cloacina_control") == 0, 2.0, "a sweep of all by who sees one")
    owner = str(house.own.cloacina.database.url.render_as_string(hide_password=False))
    house.worker(owner, OTHER).wait_ready()
    eventually(lambda: depth("cloacina_control") == 0, why="the sweep to be taken")


def test_credentials_in_a_file_are_replaced_under_a_worker_that_works(house: House, tmp_path: Path) -> None:
    url_file = tmp_path / "database-url"
    old = house.login()
    url_file.write_text(old.database_url + "\n")
    worker = house.worker("", CLOACINA_DATABASE_URL_FILE=str(url_file)).wait_ready()
    results = [house.write(key) for key in range(200)]
    eventually(lambda: house.look(f"SELECT 1 FROM {TENANT}.lines"), why="the first lines")
    new = house.login(overlap=3600)
    put = tmp_path / "next"
    put.write_text(new.database_url)
    put.replace(url_file)
    eventually(
        lambda: any(result.ready() and result.get() == new.username for result in results),
        why="the new login",
    )
    house.own.cloacina.tenants.revoke_login(TENANT, old.username)
    assert {result.get(timeout=60) for result in results} == {old.username, new.username}
    assert house.look(f"SELECT count(*) FROM {TENANT}.lines") == [(200,)]
    assert house.write(999).get(timeout=15) == new.username
    eventually(
        lambda: (
            house.look("SELECT DISTINCT usename::text FROM pg_stat_activity WHERE usename LIKE 'cloacina_%'")
            == [(new.username,)]
        ),
        why="all connections to be the new login's",
    )
    os.kill(worker.pid, signal.SIGTERM)
    assert worker.wait_exit() == 0


def test_the_commands_issue_list_and_revoke(house: House) -> None:
    owner = str(house.own.cloacina.database.url.render_as_string(hide_password=False))

    def cli(*words: str) -> Any:
        return house.processes.cli(
            "cloacina", "tenant", *words, app=APP, env={"CLOACINA_DATABASE_URL": owner}
        )

    issued = cli("login", TENANT)
    assert issued.returncode == 0, issued.stderr
    url = make_url(issued.stdout.strip())
    assert issued.stderr.strip().endswith("this URL is shown once and kept nowhere")
    assert len(str(url.password)) >= 32
    as_json = json.loads(cli("login", TENANT, "--overlap", "60", "--json").stdout)
    assert set(as_json) == {"tenant", "username", "password", "database_url"}
    listed = cli("logins", TENANT)
    assert str(url.username) in listed.stdout
    assert as_json["password"] not in listed.stdout
    assert cli("revoke", TENANT, str(url.username)).returncode == 0
    again = cli("revoke", TENANT, str(url.username))
    assert again.returncode == 1
    assert f"tenant {TENANT} has no login {str(url.username)!r}" in again.stderr
    assert [row["username"] for row in json.loads(cli("logins", TENANT, "--json").stdout)] == [
        as_json["username"]
    ]
