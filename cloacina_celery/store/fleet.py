"""Migrating all tenants: a canary first, then several at a time; what fails is told and left for the next run."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from cloacina_celery.errors import CloacinaError
from cloacina_celery.store import catalog, migrate, roles
from cloacina_celery.store.database import Database
from cloacina_celery.store.driver_errors import DriverError, LockNotAvailable, one_line

LOCK_TIMEOUT = "2s"
"""How long a migration waits for somebody's transaction; the tenant's work queues up behind it meanwhile."""

TRIES = 6
PAUSE = 0.25
"""Seconds before the second try, doubled for each further one, and jittered."""

ALONE = 8
"""So few schemas are migrated in this process: starting others would take longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrated:
    """What became of one tenant's migration."""

    tenant: str
    error: str | None


def stale(database: Database) -> list[str]:
    """List the tenants that the ledger does not know to be at our revision, in one query."""
    with database.statement() as cursor:
        cursor.execute(
            "SELECT name FROM cloacina.tenants WHERE revision IS DISTINCT FROM %s AND state <> 'removed' ORDER BY name",
            (migrate.TENANT_HEAD,),
        )
        return [name for (name,) in cursor.fetchall()]


def migrate_tenant(database: Database, name: str) -> None:
    """Run the pending migrations of the catalog and of one tenant, each in one transaction.

    Raises:
        UnknownTenant: the catalog does not know it, or knows that it was removed.
        SchemaMismatch: one of them is newer than this version of the package.
        DBAPIError, DriverError: the database refused; somebody may have held a lock on its tables all the time.
    """
    migrate.migrate_catalog(database)
    _upgrade(database, name)


def _upgrade(database: Database, name: str) -> None:
    for attempt in range(1, TRIES + 1):
        try:
            with database.engine.begin() as connection:
                connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
                migrate.lock_tenant(connection, name)
                cursor = connection.connection.cursor()
                # Only now: whoever dropped or renamed it meanwhile held the lock, and we would make its schema again.
                catalog.require(cursor, name)
                migrate.upgrade(connection, name, "tenant")
                roles.grant_again(cursor, name)
            return
        except (DBAPIError, LockNotAvailable) as error:
            if not isinstance(getattr(error, "orig", error), LockNotAvailable) or attempt == TRIES:
                raise
        time.sleep(PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))


def migrate_all(
    database: Database, names: Sequence[str], *, jobs: int, canary: str | None = None
) -> Iterator[Migrated]:
    """Migrate tenants, and tell of each as it is done; the order is the canary's first and then nobody's.

    The catalog must have been migrated before. Where the canary fails, nothing else is touched.

    Args:
        jobs: processes; Alembic's environment is one per process, so threads would not do.
        canary: the tenant that goes first; by default the first of the names.
    """
    first = canary if canary is not None else next(iter(names), None)
    if first is None:
        return
    outcome = _migrate(database, first)
    yield outcome
    if outcome.error is not None:
        return
    rest = [name for name in names if name != first]
    if jobs <= 1 or len(rest) <= ALONE:
        for name in rest:
            yield _migrate(database, name)
        return
    url = database.url.render_as_string(hide_password=False)
    with ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_open, initargs=(url,)
    ) as pool:
        for done in as_completed([pool.submit(_migrate_here, name) for name in rest]):
            yield done.result()


_here: list[Database] = []
"""The database of a process that migrates for another one."""


def _open(url: str) -> None:
    _here.append(Database(url, pool_size=1))


def _migrate_here(name: str) -> Migrated:
    return _migrate(_here[0], name)


def _migrate(database: Database, name: str) -> Migrated:
    try:
        _upgrade(database, name)
    except (CloacinaError, DBAPIError, DriverError) as error:
        return Migrated(tenant=name, error=one_line(error))
    return Migrated(tenant=name, error=None)
