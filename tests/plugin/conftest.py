"""The shop on a database that a module shares, two tenants per test, and the messages that really left."""

from __future__ import annotations

import json
from base64 import b64decode
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import brokers
from tests.support.databases import connect
from tests.support.modules import imported_anew
from tests.support.processes import Processes
from tests.support.shop_tables import prepare_shop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from psycopg2 import extensions
    from redis import Redis

    from tests.support.databases import Databases


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a module's tests are: a database, a broker, the shop on both, and real processes."""

    database_url: str
    broker_url: str
    shop: ModuleType
    processes: Processes
    redis: Redis
    observer: extensions.connection

    def new_tenant(self, name: str) -> str:
        """Create a tenant with the shop's tables in it."""
        assert self.shop.cloacina.tenants.create(name)
        prepare_shop(self.database_url, name)
        return name

    def messages(self, queue: str) -> list[dict[str, Any]]:
        """Return what waits in a queue, the oldest first: headers, and the body under "body"."""
        found = []
        for raw in reversed(self.redis.lrange(queue, 0, -1)):
            message = json.loads(raw)
            found.append({**message["headers"], "body": json.loads(b64decode(message["body"]))})
        return found

    def rows(self, tenant: str) -> list[tuple[str, str]]:
        """Return id and state of a tenant's executions in the order of their submission."""
        with self.observer.cursor() as cursor:
            cursor.execute(f'SELECT id, state FROM "{tenant}".cloacina_executions ORDER BY submitted_at, id')
            return [(execution_id, state) for execution_id, state in cursor.fetchall()]


@pytest.fixture(scope="module")
def place(
    session_databases: Databases, claimed_redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """The module's database and broker, with the shop in this process."""
    with ExitStack() as stack:
        database_url = stack.enter_context(session_databases.fresh())
        brokers.empty_redis(claimed_redis_url)
        settings = {"CLOACINA_DATABASE_URL": database_url, "CLOACINA_BROKER_URL": claimed_redis_url}
        shop = stack.enter_context(imported_anew("tests.support.shop", settings))
        stack.callback(lambda: shop.cloacina.database.dispose())
        observer = connect(database_url)
        stack.callback(observer.close)
        processes = Processes(tmp_path_factory.mktemp("processes"), settings)
        stack.callback(processes.end_all)
        redis = stack.enter_context(brokers.redis_client(claimed_redis_url))
        yield Place(
            database_url=database_url,
            broker_url=claimed_redis_url,
            shop=shop,
            processes=processes,
            redis=redis,
            observer=observer,
        )


@pytest.fixture
def tenant(place: Place, tenant_name: str) -> str:
    """A tenant of this test's own."""
    return place.new_tenant(tenant_name)


@pytest.fixture
def other_tenant(place: Place, new_tenant_name: Callable[[], str]) -> str:
    """A second tenant of this test's own."""
    return place.new_tenant(new_tenant_name())


@pytest.fixture
def nothing_left(place: Place, tenant: str) -> Iterator[None]:
    """Fail the test if it leaves a row or a message in its tenant."""
    yield
    assert place.rows(tenant) == []
    assert place.messages(tenant) == []
