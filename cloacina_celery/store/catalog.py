"""The catalog of tenants: who exists, and how one comes to be or goes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import text

from cloacina_celery.core.tenant import LEGACY_TENANT, quote, validate_tenant_name
from cloacina_celery.errors import InvalidTenantName, IsolationRefused, UnknownTenant
from cloacina_celery.store import migrate, roles
from cloacina_celery.store.bounded import bound
from cloacina_celery.store.database import Cursor, Database, LockNotAvailable, UndefinedTable

HAND_OVER_LOCK_TIMEOUT_MS = 5000
"""For how long the hand-over of a tenant's tables waits for those who use them: they wait behind it."""

_LEGACY_TABLES = (
    "cloacina_executions",
    "cloacina_events",
    "cloacina_chords",
    "cloacina_outbox",
    migrate.VERSION_TABLE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One row of the catalog."""

    name: str
    is_legacy: bool
    created_at: datetime


def names(database: Database) -> list[str]:
    """List all tenants' names; none where nothing was ever created."""
    return [tenant.name for tenant in tenants(database)]


def tenants(database: Database) -> list[Tenant]:
    """List all tenants, by name."""
    with database.statement() as cursor:
        try:
            cursor.execute("SELECT name, is_legacy, created_at FROM cloacina.tenants ORDER BY name")
        except UndefinedTable:
            return []
        return [Tenant(name=n, is_legacy=legacy, created_at=at) for n, legacy, at in cursor.fetchall()]


def exists(database: Database, name: str) -> bool:
    """Tell whether the catalog knows a tenant of exactly this name."""
    with database.statement() as cursor:
        try:
            cursor.execute("SELECT 1 FROM cloacina.tenants WHERE name = %s", (name,))
        except UndefinedTable:
            return False
        return cursor.fetchone() is not None


def create(database: Database, name: str, *, legacy: bool = False) -> bool:
    """Make the tenant exist at our revision, and tell whether it is new.

    Row, schema and tables come in one transaction: after a crash there is all of it or nothing.
    A schema of that name that is there already is adopted; what is in it stays.

    Raises:
        InvalidTenantName: the name breaks the rule, or a tenant differs from it only in case.
        SchemaMismatch: the tenant exists at another revision.
    """
    validate_tenant_name(name, allow_legacy=legacy)
    migrate.ensure_catalog(database)
    if exists(database, name):
        with database.statement() as cursor:
            migrate.check(cursor, name, "tenant")
        return False
    with database.engine.begin() as connection:
        migrate.lock(connection)
        taken = connection.execute(
            text("SELECT name FROM cloacina.tenants WHERE lower(name) = lower(:name)"), {"name": name}
        ).scalar()
        if taken is not None and taken != name:
            raise InvalidTenantName(
                name, f"tenant {taken!r} exists and differs only in case; choose another name"
            )
        if taken is not None:
            return False
        connection.execute(
            text("INSERT INTO cloacina.tenants (name, is_legacy) VALUES (:name, :legacy)"),
            {"name": name, "legacy": name == LEGACY_TENANT},
        )
        migrate.upgrade(connection, name, "tenant")
        roles.isolate_new(connection.connection.cursor(), name, database.isolation)
    return True


def isolate(database: Database, name: str) -> list[str]:
    """Give a tenant that exists its role, in one transaction; return what others own there and keep.

    Raises:
        UnknownTenant: the catalog does not know it.
        IsolationRefused: see `roles.isolate`; also where somebody holds a lock on the tenant's tables for long.
    """
    migrate.ensure_catalog(database)
    if not exists(database, name):
        raise UnknownTenant(name)
    with database.engine.begin() as connection:
        migrate.lock(connection)
        cursor: Cursor = connection.connection.cursor()
        bound(cursor, lock_timeout_ms=HAND_OVER_LOCK_TIMEOUT_MS)
        try:
            return roles.isolate(cursor, name)
        except LockNotAvailable as error:
            raise IsolationRefused(
                name, f"a table of it is in use ({' '.join(str(error).split())}): try again when it is not"
            ) from error


def drop(database: Database, name: str) -> None:
    """Remove the tenant and everything in its schema; of the legacy tenant only our own tables.

    Raises:
        UnknownTenant: the catalog does not know it.
    """
    validate_tenant_name(name, allow_legacy=True)
    if not exists(database, name):
        raise UnknownTenant(name)
    with database.engine.begin() as connection:
        migrate.lock(connection)
        connection.execute(text("DELETE FROM cloacina.tenants WHERE name = :name"), {"name": name})
        if name == LEGACY_TENANT:
            for table in _LEGACY_TABLES:
                connection.execute(text(f"DROP TABLE IF EXISTS {quote(name)}.{table}"))
        else:
            connection.execute(text(f"DROP SCHEMA IF EXISTS {quote(name)} CASCADE"))
            roles.drop(connection.connection.cursor(), name)


def revisions(database: Database) -> list[tuple[str, str | None]]:
    """List each tenant with the revision its schema is at."""
    found = []
    for tenant in names(database):
        with database.statement() as cursor:
            found.append((tenant, migrate.revision_of(cursor, tenant)))
    return found
