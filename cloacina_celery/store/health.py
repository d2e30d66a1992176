"""What the database says of itself and of our rights in it, for the doctor."""

from __future__ import annotations

from dataclasses import dataclass

from cloacina_celery.core.tenant import quote
from cloacina_celery.store.database import Cursor

OLDEST_SERVER = 140000
"""The oldest Postgres that is supported, as ``server_version_num`` has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A Postgres, its clock in seconds since 1970, and what our login may do in its database."""

    version: int
    version_name: str
    clock: float
    login: str
    database: str
    may_create_schemas: bool


def server(cursor: Cursor) -> Server:
    """Ask the server who it is, what time it is and what we may do."""
    cursor.execute(
        "SELECT current_setting('server_version_num')::int, current_setting('server_version'),"
        " extract(epoch FROM clock_timestamp())::float8, current_user::text, current_database()::text,"
        " has_database_privilege(current_database(), 'CREATE')"
    )
    row = cursor.fetchone()
    assert row is not None
    version, version_name, clock, login, database, may_create = row
    return Server(
        version=version, version_name=version_name, clock=clock, login=login, database=database,
        may_create_schemas=may_create,
    )  # fmt: skip


def closed_tenants(cursor: Cursor, names: list[str]) -> list[str]:
    """List those of these tenants in which our login may not read and write our tables, or which have none."""
    cursor.execute(
        # Of several privileges in one call Postgres asks for any, not for all.
        "SELECT name FROM unnest(%s::text[], %s::text[]) AS t (name, schema) WHERE NOT coalesce("
        " has_schema_privilege(to_regnamespace(schema)::oid, 'USAGE') AND (SELECT bool_and(has_table_privilege("
        "to_regclass(schema || '.cloacina_executions')::oid, p))"
        " FROM unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) AS p), false) ORDER BY name",
        (names, [quote(name) for name in names]),
    )
    return [name for (name,) in cursor.fetchall()]
