"""One database per module of tests, and a tenant of its own for each test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cloacina_celery.store import catalog
from cloacina_celery.store.database import Database
from tests.support.databases import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg2 import extensions

    from cloacina_celery.store.database import Cursor
    from tests.support.databases import Databases


@pytest.fixture(scope="module")
def database_url(session_databases: Databases) -> Iterator[str]:
    """The URL of a database that the tests of one module share; what keeps them apart is their tenants."""
    with session_databases.fresh() as url:
        yield url


@pytest.fixture(scope="module")
def database(database_url: str) -> Iterator[Database]:
    """The package's own view of the module's database."""
    made = Database(database_url)
    yield made
    made.dispose()


@pytest.fixture(scope="module")
def shared_observer(database_url: str) -> Iterator[extensions.connection]:
    """A connection for preparations that a whole module shares."""
    conn = connect(database_url)
    yield conn
    conn.close()


@pytest.fixture
def tenant(database: Database, tenant_name: str) -> str:
    """A tenant of this test's own, with its tables."""
    assert catalog.create(database, tenant_name)
    return tenant_name


@pytest.fixture
def other_tenant(database: Database, new_tenant_name: Callable[[], str]) -> str:
    """A second tenant of this test's own."""
    name = new_tenant_name()
    assert catalog.create(database, name)
    return name


@pytest.fixture
def cursor(database: Database) -> Iterator[Cursor]:
    """A cursor on which every statement commits by itself."""
    with database.statement() as lent:
        yield lent
