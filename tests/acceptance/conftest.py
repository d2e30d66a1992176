"""Fixtures of the acceptance suite: a stage of one's own where a test kills, and a standing one where none does."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.acceptance.stage import Stage
from tests.conftest import STARTED
from tests.support import brokers, databases
from tests.support.modules import imported_anew
from tests.support.processes import Processes
from tests.support.shop_tables import prepare_shop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from psycopg2 import extensions

    from cloacina_celery.chaos.proxy import Proxy


@pytest.fixture
def stage(
    import_app: Callable[[str], ModuleType],
    database_url: str,
    tenant_name: str,
    observer: extensions.connection,
    processes: Processes,
) -> Stage:
    """A fresh database with one tenant of the bazaar, and no process yet."""
    bazaar = import_app("tests.acceptance.bazaar")
    bazaar.cloacina.tenants.create(tenant_name)
    prepare_shop(database_url, tenant_name)
    return Stage(bazaar=bazaar, tenant=tenant_name, observer=observer, processes=processes)


@pytest.fixture(scope="module")
def standing_stage(
    session_databases: databases.Databases, claimed_redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    """One tenant and one worker for all tests of a module: for those that kill nothing."""
    with ExitStack() as stack:
        database_url = stack.enter_context(session_databases.fresh())
        brokers.empty_redis(claimed_redis_url)
        settings = {"CLOACINA_DATABASE_URL": database_url, "CLOACINA_BROKER_URL": claimed_redis_url}
        bazaar = stack.enter_context(imported_anew("tests.acceptance.bazaar", settings))
        observer = databases.connect(database_url)
        stack.callback(observer.close)
        processes = Processes(tmp_path_factory.mktemp("standing"), settings)
        stack.callback(processes.end_all)
        tenant = "tenant_standing"
        bazaar.cloacina.tenants.create(tenant)
        prepare_shop(database_url, tenant)
        stage = Stage(bazaar=bazaar, tenant=tenant, observer=observer, processes=processes)
        stage.worker(tenants=[tenant, "celery"])
        yield stage


@pytest.fixture
def standing(standing_stage: Stage, request: pytest.FixtureRequest) -> Stage:
    """The module's standing stage; its logs go into the report of a test that fails."""
    request.node.stash[STARTED] = standing_stage.processes
    return standing_stage


@pytest.fixture
def proxied(proxied_database: Proxy, database_url: str) -> dict[str, str]:
    """The environment of a worker that reaches the database through the proxy only, but for its tasks' records."""
    return {"CLOACINA_DATABASE_URL": proxied_database.url(database_url), "BAZAAR_OUTSIDE_URL": database_url}


@pytest.fixture
def observer_of(database_url: str) -> Iterator[Callable[[], extensions.connection]]:
    """A function that opens one more connection to the test's database."""
    with ExitStack() as stack:

        def connect() -> extensions.connection:
            connection = databases.connect(database_url)
            stack.callback(connection.close)
            return connection

        yield connect
