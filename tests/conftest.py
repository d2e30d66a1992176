"""The fixtures of all tests: servers, a fresh database and an empty broker for each test, and real processes.

Servers are those that CLOACINA_DATABASE_URL, CLOACINA_BROKER_URL and CLOACINA_TEST_AMQP_URL name, else the
package's own embedded ones. All of it works under pytest-xdist, also for several runs at once on the same
servers.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery
from pytest_celery import CeleryTestWorker, CeleryWorkerCluster

from tests.support import ROOT, brokers, databases
from tests.support.modules import imported_anew
from tests.support.nodes import WorkerContainer
from tests.support.processes import SHOP, Processes

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path
    from types import ModuleType

    from psycopg2 import extensions

    from cloacina_celery.chaos.proxy import Proxy
    from cloacina_celery.devservers import DevServers

GIVEN = dict(os.environ)
"""The environment that pytest was started with; a test's own is cleaned by `clean_environment`."""

EMBEDDED_DIRECTORY = ROOT / ".cloacina-test"
DEFAULT_AMQP_URL = "amqp://guest:guest@127.0.0.1:5672//"

STARTED = pytest.StashKey[Processes]()


# --- servers, once per session ---


@pytest.fixture(scope="session")
def xdist_worker() -> str:
    """The name of this xdist worker, or `main` where pytest runs in one process."""
    return GIVEN.get("PYTEST_XDIST_WORKER", "main")


@pytest.fixture(scope="session")
def embedded_servers() -> Iterator[DevServers]:
    """The package's own development servers, shared by all pytest processes, stopped by the last one."""
    # Here and not above: where the package cannot be imported, its own tests shall say so, and not this file.
    from cloacina_celery import devservers

    EMBEDDED_DIRECTORY.mkdir(exist_ok=True)
    with (EMBEDDED_DIRECTORY / "users.lock").open("w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        yield devservers.start(EMBEDDED_DIRECTORY)
        # Whoever else still uses them holds the lock as well; whoever comes now waits until they are down.
        with suppress(BlockingIOError):
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            devservers.stop(EMBEDDED_DIRECTORY)


@pytest.fixture(scope="session")
def database_server(request: pytest.FixtureRequest) -> str:
    """The URL of a Postgres on which we may create databases."""
    return GIVEN.get("CLOACINA_DATABASE_URL") or embedded(request).database_url


@pytest.fixture(scope="session")
def redis_url(request: pytest.FixtureRequest) -> str:
    """The URL of a Redis server; tests use the emptied database of `broker_url`, not this one's."""
    given = GIVEN.get("CLOACINA_BROKER_URL", "")
    return given if given.startswith("redis") else embedded(request).broker_url


def embedded(request: pytest.FixtureRequest) -> DevServers:
    """Start the embedded servers, asked for only where the environment names none."""
    servers: DevServers = request.getfixturevalue("embedded_servers")
    return servers


@pytest.fixture(scope="session")
def amqp_server() -> str:
    """The URL of a RabbitMQ.

    Its tests are skipped where none answers, and fail where the environment promised one.
    """
    promised = GIVEN.get("CLOACINA_TEST_AMQP_URL")
    url = promised or DEFAULT_AMQP_URL
    if not brokers.broker_answers(url):
        reason = f"no RabbitMQ answered at {brokers.without_password(url)}"
        if promised:
            pytest.fail(f"{reason}, which CLOACINA_TEST_AMQP_URL names")
        pytest.skip(reason)
    return url


@pytest.fixture(scope="session")
def session_databases(database_server: str, xdist_worker: str) -> Iterator[databases.Databases]:
    """The maker of this process's databases."""
    maker = databases.Databases(database_server, xdist_worker)
    yield maker
    maker.close()


@pytest.fixture(scope="session")
def claimed_redis_url(redis_url: str) -> Iterator[str]:
    """The URL of a Redis database that this process has to itself."""
    with brokers.claimed_redis(redis_url) as url:
        yield url


# --- what one test gets ---


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the settings away with which pytest was started, so that no test passes by them."""
    for name in GIVEN:
        if name.startswith(("CLOACINA_", "CELERY_")):
            monkeypatch.delenv(name, raising=False)


@pytest.fixture
def database_url(session_databases: databases.Databases) -> Iterator[str]:
    """The `postgresql+psycopg2://` URL of a fresh database, dropped at the end whoever is still in it."""
    with session_databases.fresh() as url:
        yield url


@pytest.fixture
def observer(database_url: str) -> Iterator[extensions.connection]:
    """A psycopg2 connection in autocommit mode to the test's database: to look, and to wait with."""
    conn = databases.connect(database_url)
    yield conn
    conn.close()


@pytest.fixture
def proxied_database(database_url: str) -> Iterator[Proxy]:
    """A proxy before the server of this test's database: `.url(database_url)` leads through it."""
    from cloacina_celery.chaos.proxy import Proxy

    with Proxy.in_front_of(database_url) as proxy:
        yield proxy


@pytest.fixture
def broker_url(request: pytest.FixtureRequest) -> str:
    """The URL of a broker: an emptied Redis database, or what the test asks for.

    To run a test on several: `@brokers.EACH_KIND`, or `@pytest.mark.parametrize("broker_url", ["redis",
    "rabbitmq"], indirect=True)`.
    """
    match getattr(request, "param", "redis"):
        case "redis":
            url: str = request.getfixturevalue("claimed_redis_url")
            brokers.empty_redis(url)
        case "rabbitmq" | "rabbitmq-quorum":
            url = request.getfixturevalue("amqp_url")
        case other:
            raise ValueError(f"no broker of the name {other!r}: one of {', '.join(brokers.KINDS)}")
    return url


@pytest.fixture
def broker_environment(
    request: pytest.FixtureRequest, broker_url: str, new_tenant_name: Callable[[], str]
) -> dict[str, str]:
    """What an app of the tests is to read from its environment to use this test's broker."""
    callspec = getattr(request.node, "callspec", None)
    kind = "redis" if callspec is None else callspec.params.get("broker_url", "redis")
    environment = {"CLOACINA_BROKER_URL": broker_url}
    if kind != "redis":
        # RabbitMQ is shared with other tests, so each has its control and default queue to itself.
        environment["CLOACINA_TEST_CONTROL_QUEUE"] = new_tenant_name()
        environment["CLOACINA_TEST_DEFAULT_QUEUE"] = new_tenant_name()
    if kind == "rabbitmq-quorum":
        environment["CLOACINA_TEST_QUEUE_TYPE"] = "quorum"
    return environment


@pytest.fixture
def tenant_names() -> list[str]:
    """All the names that `new_tenant_name` gave to this test."""
    return []


@pytest.fixture
def new_tenant_name(tenant_names: list[str]) -> Callable[[], str]:
    """A function that returns a valid tenant name which no other test has, each time another one."""

    def new() -> str:
        tenant_names.append(f"tenant_x{secrets.token_hex(4)}")
        return tenant_names[-1]

    return new


@pytest.fixture
def tenant_name(new_tenant_name: Callable[[], str]) -> str:
    """A valid tenant name that no other test has, such as `tenant_x7f3a29c1`."""
    return new_tenant_name()


@pytest.fixture
def amqp_url(amqp_server: str, tenant_names: list[str]) -> Iterator[str]:
    """The URL of a RabbitMQ, shared with other tests: what keeps them apart is the tenants' names, as queues.

    The queues of this test's tenants are deleted at the end.
    """
    yield amqp_server
    brokers.delete_queues(amqp_server, tenant_names)


@pytest.fixture
def processes(
    request: pytest.FixtureRequest, tmp_path: Path, database_url: str, broker_environment: dict[str, str]
) -> Iterator[Processes]:
    """A factory of worker, beat and command line processes on this test's database and broker.

    All end with the test, and where it fails, its report carries their logs.
    """
    directory = tmp_path / "processes"
    directory.mkdir()
    started = Processes(directory, {"CLOACINA_DATABASE_URL": database_url, **broker_environment})
    request.node.stash[STARTED] = started
    yield started
    started.end_all()


@pytest.fixture
def import_app(
    database_url: str, broker_environment: dict[str, str]
) -> Iterator[Callable[[str], ModuleType]]:
    """A function that imports an app module anew, on this test's database and broker."""
    with ExitStack() as stack:
        settings = {"CLOACINA_DATABASE_URL": database_url, **broker_environment}
        yield lambda name: stack.enter_context(imported_anew(name, settings))


@pytest.fixture
def shop(import_app: Callable[[str], ModuleType]) -> ModuleType:
    """The module `tests.support.shop` in this process: `.app`, `.cloacina` and the tasks."""
    return import_app("tests.support.shop")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach the logs of a failed test's processes to its report."""
    report = yield
    if report.failed and (started := item.stash.get(STARTED, None)):
        report.sections.extend(started.log_tails())
    return report


# --- pytest-celery's whole systems, with local processes as nodes ---


@pytest.fixture
def cluster_app() -> str:
    """The app that the cluster's worker runs and the test sends with; override it for another one."""
    return SHOP


@pytest.fixture
def celery_setup_app(import_app: Callable[[str], ModuleType], cluster_app: str) -> Celery:
    """The same app as the worker's, in this process."""
    app = import_app(cluster_app.partition(":")[0]).app
    assert isinstance(app, Celery)
    return app


@pytest.fixture
def celery_broker_cluster() -> None:
    """No broker nodes: the broker is a server that runs already."""


@pytest.fixture
def celery_broker_cluster_config(broker_url: str) -> dict[str, list[str]]:
    """Where the broker is, seen from workers and from the test alike."""
    return {"urls": [broker_url], "host_urls": [broker_url]}


@pytest.fixture
def celery_backend_cluster() -> None:
    """No backend nodes: results come from the rows."""


@pytest.fixture
def celery_backend_cluster_config() -> None:
    """No backend configuration: the app brings its own."""


@pytest.fixture
def celery_worker_cluster(
    processes: Processes,
    celery_setup_app: Celery,
    cluster_app: str,
    tenant_name: str,
    celery_worker_cluster_config: dict[str, Any],
) -> Iterator[CeleryWorkerCluster]:
    """One worker process on the queue of `tenant_name`, ready when the test begins."""
    container = WorkerContainer(
        lambda: processes.worker(cluster_app, queues=[tenant_name]),
        queue=tenant_name,
        config=celery_worker_cluster_config,
    )
    cluster = CeleryWorkerCluster(CeleryTestWorker(container, celery_setup_app))
    cluster.ready()
    yield cluster
    container.teardown()
