"""Bring a schema to the revision this package works with, or say why it cannot be worked with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from sqlalchemy import Connection, text

from cloacina_celery.core.tenant import CATALOG_SCHEMA, quote
from cloacina_celery.errors import SchemaMismatch
from cloacina_celery.store.database import Cursor, Database, note_met
from cloacina_celery.store.driver_errors import LockNotAvailable
from cloacina_celery.store.savepoints import savepoint
from cloacina_celery.telemetry import log

CATALOG_HEAD = "c0011"
TENANT_HEAD = "t0003"
VERSION_TABLE = "cloacina_version"
MIGRATION_LOCK = 0x636C6F61  # "cloa": one migration at a time per database, however many workers start
LOCK_PATIENCE = 10
"""Seconds after which who waits for that lock says so, again and again."""

_HOLDER = """
    SELECT a.usename, a.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid)
    WHERE l.locktype = 'advisory' AND l.classid = 0 AND l.objid = %s AND l.objsubid = 1 AND l.granted
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""

REVISIONS_AT_ONCE = 100

Branch = Literal["catalog", "tenant"]

# When it is imported, Alembic names each of its plugins in the log of whoever starts a worker.
logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)


def head_of(branch: Branch) -> str:
    """Name the revision that this version of the package works with."""
    return CATALOG_HEAD if branch == "catalog" else TENANT_HEAD


def known_revisions(branch: Branch) -> list[str]:
    """List the revisions this version knows, oldest first."""
    script = _script(branch)
    return [revision.revision for revision in reversed(list(script.walk_revisions()))]


def revision_of(cursor: Cursor, schema: str) -> str | None:
    """Read a schema's revision; ``None`` where it has none of our tables. Two look-ups, no DDL."""
    quoted = f'"{schema}"' if schema == CATALOG_SCHEMA else quote(schema)
    cursor.execute("SELECT to_regclass(%s)", (f"{quoted}.{VERSION_TABLE}",))
    if cursor.fetchone() == (None,):
        return None
    cursor.execute(f"SELECT version_num FROM {quoted}.{VERSION_TABLE}")
    row = cursor.fetchone()
    return str(row[0]) if row else None


def revisions_of(cursor: Cursor, schemas: Sequence[str]) -> dict[str, str]:
    """Read the revisions of many schemas, two statements for each hundred; those without our tables are left out."""
    found: dict[str, str] = {}
    for start in range(0, len(schemas), REVISIONS_AT_ONCE):
        batch = list(schemas[start : start + REVISIONS_AT_ONCE])
        cursor.execute(
            "SELECT s.name FROM unnest(%s::text[]) AS s (name) "
            "WHERE to_regclass(quote_ident(s.name) || %s) IS NOT NULL",
            (batch, f".{VERSION_TABLE}"),
        )
        ours = [name for (name,) in cursor.fetchall()]
        if ours:
            note_met(cursor, *ours)
            cursor.execute(
                " UNION ALL ".join(
                    f"SELECT %s, version_num FROM {quote(name)}.{VERSION_TABLE}" for name in ours
                ),
                ours,
            )
            found.update(cursor.fetchall())
    return found


def check(cursor: Cursor, schema: str, branch: Branch) -> None:
    """Do nothing if the schema is at the revision we work with, or at a newer one that we can work with as well.

    Raises:
        SchemaMismatch: it is older, newer or has none; the message holds the command that mends it.
    """
    found = revision_of(cursor, schema)
    if works_with(cursor, found, branch):
        return
    if found is None or found in known_revisions(branch):
        target = "" if branch == "catalog" else f" {schema}"
        command = f"run `celery -A <app> cloacina schema migrate{target}`"
    else:
        command = "it was migrated by a newer version: upgrade cloacina_celery in this process"
    raise SchemaMismatch(schema, found, head_of(branch), command)


def works_with(cursor: Cursor, found: str | None, branch: Branch) -> bool:
    """Tell whether this version works with a schema at that revision."""
    return found == head_of(branch) or _is_expanded(cursor, branch, found)


def _is_expanded(cursor: Cursor, branch: Branch, found: str | None) -> bool:
    """Tell whether a newer version has only added what we need not know of, as far as it has said so."""
    known = known_revisions(branch)
    if found is None or found in known:
        return False
    cursor.execute("SELECT to_regclass('cloacina.revisions')")
    if cursor.fetchone() == (None,):
        return False
    cursor.execute(
        "SELECT works_from FROM cloacina.revisions WHERE branch = %s AND revision = %s", (branch, found)
    )
    row = cursor.fetchone()
    return row is not None and row[0] in known


def ensure_catalog(database: Database) -> None:
    """Create the catalog on the first start; later starts only look.

    Raises:
        SchemaMismatch: it exists at another revision.
    """
    with database.statement() as cursor:
        if revision_of(cursor, CATALOG_SCHEMA) is None:
            migrate_catalog(database)
        else:
            check(cursor, CATALOG_SCHEMA, "catalog")


def migrate_catalog(database: Database) -> None:
    """Bring the catalog to our revision, in one transaction."""
    with database.engine.begin() as connection:
        lock(connection)
        upgrade(connection, CATALOG_SCHEMA, "catalog")


def lock(connection: Connection) -> None:
    """Let one process at a time migrate this database; released at the transaction's end.

    It waits as long as it takes, and says whom for: any role may take any advisory lock, a tenant's code too.
    """
    cursor: Cursor = connection.connection.cursor()
    cursor.execute("SELECT current_setting('lock_timeout')")
    before = cursor.fetchone()
    while True:
        try:
            with savepoint(cursor):
                cursor.execute(f"SET LOCAL lock_timeout = '{LOCK_PATIENCE}s'")
                cursor.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
                cursor.execute("SELECT set_config('lock_timeout', %s, true)", before)
        except LockNotAvailable:
            cursor.execute(_HOLDER, (MIGRATION_LOCK,))
            holder = cursor.fetchone()
            if holder is not None:
                log("migrate.waiting", holder=f"{holder[0]} (backend {holder[1]})", seconds=LOCK_PATIENCE)
        else:
            return


def lock_tenant(connection: Connection, name: str) -> None:
    """Let one process at a time migrate this tenant, others migrate other ones, and none be created or dropped."""
    connection.execute(text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": MIGRATION_LOCK})
    connection.execute(
        text("SELECT pg_advisory_xact_lock(:key, hashtext(:name))"), {"key": MIGRATION_LOCK, "name": name}
    )


def upgrade(connection: Connection, schema: str, branch: Branch) -> None:
    """Run the pending migrations of one schema inside the caller's transaction.

    Raises:
        SchemaMismatch: the schema is newer than this version of the package.
    """
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext

    cursor: Cursor = connection.connection.cursor()
    note_met(cursor, schema)
    found = revision_of(cursor, schema)
    if found == head_of(branch):
        _enter_into_ledger(cursor, schema, branch)
        return
    if found is not None and found not in known_revisions(branch):
        check(cursor, schema, branch)
        return
    quoted = f'"{schema}"' if schema == CATALOG_SCHEMA else quote(schema)
    if connection.execute(text("SELECT to_regnamespace(:schema)"), {"schema": quoted}).scalar() is None:
        # Even with IF NOT EXISTS this needs the right to create schemas, which a role on its own schema lacks.
        connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {quoted}"))
    connection.execute(text("SELECT set_config('search_path', :path, true)"), {"path": quoted})
    script = _script(branch)
    with EnvironmentContext(
        Config(), script, fn=lambda revision, _context: script._upgrade_revs("head", revision)
    ) as environment:
        environment.configure(
            connection=connection,
            version_table=VERSION_TABLE,
            version_table_schema=schema,
            transactional_ddl=True,
        )
        environment.run_migrations()
    _tell_older_versions(cursor)
    _enter_into_ledger(cursor, schema, branch)


def _tell_older_versions(cursor: Cursor) -> None:
    """Enter for each revision from which one on our code's predecessors work with it (``works_from`` in its script)."""
    branches: tuple[Branch, ...] = ("catalog", "tenant")
    told = [
        (branch, found.revision, getattr(found.module, "works_from", found.revision))
        for branch in branches
        for found in _script(branch).walk_revisions()
    ]
    cursor.execute(
        "INSERT INTO cloacina.revisions (branch, revision, works_from)"
        " SELECT * FROM unnest(%s::text[], %s::text[], %s::text[]) ON CONFLICT DO NOTHING",
        [list(column) for column in zip(*told, strict=True)],
    )


def _enter_into_ledger(cursor: Cursor, schema: str, branch: Branch) -> None:
    if branch == "tenant":
        cursor.execute(
            "UPDATE cloacina.tenants SET revision = %(at)s WHERE name = %(name)s AND revision IS DISTINCT FROM %(at)s",
            {"at": TENANT_HEAD, "name": schema},
        )


@lru_cache
def _script(branch: Branch):  # type: ignore[no-untyped-def]  # alembic is imported only where a migration runs
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(Path(__file__).parent / "migrations" / branch))


__all__ = [
    "CATALOG_HEAD",
    "TENANT_HEAD",
    "check",
    "ensure_catalog",
    "head_of",
    "known_revisions",
    "lock",
    "lock_tenant",
    "migrate_catalog",
    "revision_of",
    "revisions_of",
    "upgrade",
    "works_with",
]
