"""Roles that this package makes in the cluster: each says that it is ours, so that nobody else's is ever touched."""

from __future__ import annotations

from psycopg2 import errors, sql

from cloacina_celery.errors import IsolationRefused
from cloacina_celery.store.database import Cursor


def mark(database: int, what: str) -> str:
    """Say what a role is for, as its comment has it; all databases of a cluster share their roles."""
    return f"cloacina_celery, database {database}: {what}"


def mark_of(cursor: Cursor, role: str) -> str | None:
    """Read what a role says of itself; ``None`` where there is no such role, empty where it says nothing."""
    cursor.execute(
        "SELECT coalesce(shobj_description(oid, 'pg_authid'), '') FROM pg_roles WHERE rolname = %s", (role,)
    )
    row = cursor.fetchone()
    return None if row is None else str(row[0])


def ensure(cursor: Cursor, role: str, wanted: str, tenant: str) -> None:
    """Have a role that nobody can log in as, and that is marked so.

    Raises:
        IsolationRefused: somebody else's role has the name.
    """
    found = mark_of(cursor, role)
    if found is None:
        create(cursor, role, "NOLOGIN", wanted, tenant)
    elif found != wanted:
        raise IsolationRefused(tenant, taken(role))


def create(cursor: Cursor, role: str, attributes: str, wanted: str, tenant: str) -> None:
    """Make a role, marked as ours.

    Raises:
        IsolationRefused: the name is taken.
    """
    try:
        run(cursor, f"CREATE ROLE {{role}} {attributes}", role=role)
    except errors.DuplicateObject:
        raise IsolationRefused(tenant, taken(role)) from None
    cursor.execute(sql.SQL("COMMENT ON ROLE {} IS %s").format(sql.Identifier(role)), (wanted,))


def taken(role: str) -> str:
    """Say that a role's name is in somebody else's use, and what to do."""
    return (
        f"role {role!r} exists and was not made by this package for it: rename it with "
        f'ALTER ROLE "{role}" RENAME TO ..., or drop it'
    )


def run(cursor: Cursor, statement: str, **names: str) -> None:
    """Run a statement with names in it, each quoted as an identifier."""
    cursor.execute(sql.SQL(statement).format(**{key: sql.Identifier(name) for key, name in names.items()}))


def quoted(name: str) -> str:
    """Quote any name as an identifier."""
    return '"' + name.replace('"', '""') + '"'
