"""Behind PgBouncer in transaction mode: the canary, and the life of an execution, through it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from cloacina_celery.errors import SettingsError
from cloacina_celery.store.database import Database
from cloacina_celery.store.sessions import TenantSession
from tests.docs.markdown import blocks
from tests.isolation import stages
from tests.isolation.attacks import ATTACKS, OPEN
from tests.support import ROOT, brokers, pgbouncer
from tests.support.databases import connect
from tests.support.modules import imported_anew
from tests.support.processes import Processes
from tests.support.waiting import wait_for_row

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from psycopg2 import extensions

    from tests.isolation.attacks import Attack
    from tests.isolation.stages import Stage
    from tests.support.databases import Databases
    from tests.support.processes import WorkerProcess

pytestmark = pytest.mark.skipif(pgbouncer.binary() is None, reason="no pgbouncer is on this machine")

APP = "tests.isolation.pooled_app"


@pytest.fixture(scope="module", params=stages.ON_ONE_LOGIN)
def stage(
    request: pytest.FixtureRequest, session_databases: Databases, database_server: str
) -> Iterator[stages.Stage]:
    """Both tenants at one level, on connections that PgBouncer lends for a transaction each."""
    with stages.stage(session_databases, database_server, request.param, pgbouncer.pooled) as made:
        yield made


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_a_pooler_makes_no_level_weaker(stage: Stage, attack: Attack) -> None:
    assert attack.gets_through(stage) is (attack.verdict(stage.level) == OPEN)


def test_what_a_task_leaves_on_a_servers_connection_is_gone_before_the_next_tenant_has_it(
    stage: Stage,
) -> None:
    with ExitStack() as stack:
        attacker = stack.enter_context(TenantSession(stage.database, stages.ATTACKER))
        mine = attacker.execute(text("SELECT pg_backend_pid()")).scalar_one()
        attacker.execute(text("CREATE TEMP TABLE secrets AS SELECT 'caught' AS secret"))
        attacker.execute(text("SET work_mem = '77MB'"))
        # Behind SQLAlchemy's back: PgBouncer lends the connection on, and our own pool has cleaned up nothing yet.
        attacker.connection().connection.dbapi_connection.commit()  # type: ignore[union-attr]  # it is open
        for _ in range(30):
            run = stack.enter_context(stage.session(stages.VICTIM))
            if run("SELECT pg_backend_pid()") == [(mine,)]:
                break
        else:
            raise AssertionError("not the same connection: this shows nothing")
        assert run("SELECT secret FROM secrets") == [(stages.SECRET,)]
        assert run("SHOW work_mem") != [("77MB",)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shop:
    """An app behind PgBouncer, one tenant of it, and real workers."""

    app: ModuleType
    tenant: str
    processes: Processes
    observer: extensions.connection
    workers: list[WorkerProcess] = field(default_factory=list)

    def send(self, name: str, *args: Any) -> Any:
        """Submit a call for the tenant."""
        return getattr(self.app, name).apply_async(args, tenant=self.tenant)

    def effects(self, key: str) -> list[int]:
        """Return the attempts whose effect was kept."""
        with self.observer.cursor() as cursor:
            cursor.execute(f"SELECT attempt FROM {self.tenant}.effects WHERE key = %s", (key,))
            return [row[0] for row in cursor.fetchall()]

    def start_worker(self) -> None:
        """Start a worker of the tenant and wait until it is ready."""
        self.workers.append(self.processes.worker(f"{APP}:app", queues=[self.tenant]).wait_ready())


@pytest.fixture(scope="module")
def shop(
    session_databases: Databases,
    database_server: str,
    claimed_redis_url: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Shop]:
    """The app, with the pooler between it and the database, on a login that is no superuser."""
    server = connect(database_server)
    with session_databases.fresh() as url, ExitStack() as stack:
        brokers.empty_redis(claimed_redis_url)
        observer = connect(url)
        stack.callback(observer.close)
        login_url = stack.enter_context(stages.login_of(server, url, "CREATEROLE NOINHERIT"))
        stages.empty_path(server, login_url)
        through = stack.enter_context(pgbouncer.pooled(login_url))
        settings = {"CLOACINA_DATABASE_URL": through, "CLOACINA_BROKER_URL": claimed_redis_url}
        app = stack.enter_context(imported_anew(APP, settings))
        stack.callback(lambda: app.cloacina.database.dispose())
        processes = Processes(tmp_path_factory.mktemp("processes"), settings)
        stack.callback(processes.end_all)
        app.cloacina.tenants.create("tenant_pooled")
        with app.cloacina.session("tenant_pooled") as session:
            session.execute(text("CREATE TABLE effects (key text, attempt int)"))
        yield Shop(app=app, tenant="tenant_pooled", processes=processes, observer=observer)
    stages.drop_login(server, login_url)
    server.close()


@pytest.fixture(scope="module")
def served(shop: Shop) -> Shop:
    """The same with a worker."""
    shop.start_worker()
    return shop


def test_a_task_is_its_tenant_and_its_role_before_and_after_a_commit(served: Shop) -> None:
    path, role, *again = served.send("where").get(timeout=30)
    assert again == [path, role]
    assert path == f'"{served.tenant}"'
    assert role.startswith(f"cloacina_{served.tenant}_")


def test_a_failed_attempt_is_tried_again_and_its_effects_are_not_kept(served: Shop) -> None:
    assert served.send("second_time", "retried").get(timeout=30) == 2
    assert served.effects("retried") == [2]


def test_a_chain_goes_on_and_a_key_is_one_execution(served: Shop) -> None:
    task = served.app.then
    with served.app.cloacina.tenant(served.tenant):
        assert (task.s(1) | task.s() | task.s()).apply_async().get(timeout=30) == 4
        first, second = (task.apply_async((1,), idempotency_key="once") for _ in range(2))
    assert first.id == second.id
    assert first.get(timeout=30) == 2


def test_what_is_sent_in_a_transaction_that_rolls_back_is_never_sent(served: Shop) -> None:
    cloacina = served.app.cloacina
    with cloacina.session(served.tenant) as session:
        undone = served.app.then.delay(1)
        session.rollback()
        kept = served.app.then.delay(2)
    assert kept.get(timeout=30) == 3
    assert [one.id for one in cloacina.executions(served.tenant).list() if one.id == undone.id] == []


def test_what_a_killed_worker_ran_is_recovered_by_its_lease(served: Shop) -> None:
    result = served.send("until_killed", "killed")
    wait_for_row(
        served.observer,
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'SELECT pg_sleep%%'"
        " AND state = 'active'",
        why="the task to be in the middle",
    )
    served.workers[-1].kill9(whole=True)
    served.start_worker()
    assert result.get(timeout=60) == 2
    assert served.effects("killed") == [2]


def test_a_login_whose_connections_have_a_path_of_their_own_is_refused_with_what_mends_it(
    session_databases: Databases, database_server: str
) -> None:
    server = connect(database_server)
    with session_databases.fresh() as url, ExitStack() as stack:
        login_url = stack.enter_context(stages.login_of(server, url, "NOINHERIT"))
        database = Database(stack.enter_context(pgbouncer.pooled(login_url)))
        for lend in (database.statement, database.transaction):
            with pytest.raises(SettingsError, match=r"IN DATABASE .* SET search_path = ''"), lend():
                pass
        with pytest.raises(SettingsError, match="begin with search_path"):
            database.dedicated_connection()
        database.dispose()
    stages.drop_login(server, login_url)
    server.close()


def test_the_documents_settings_of_pgbouncer_are_those_of_this_test() -> None:
    (ini,) = (block for block in blocks(ROOT / "docs" / "operating.md") if block.language == "ini")
    told = dict(line.split(" = ", 1) for line in ini.code.splitlines() if " = " in line)
    assert told == pgbouncer.SETTINGS
