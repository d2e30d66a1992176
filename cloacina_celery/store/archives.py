"""Export and import: one tenant's schema as an archive of pg_dump, brought in by one transaction under any name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from psycopg2.extensions import make_dsn
from sqlalchemy import Connection

from cloacina_celery.core.tenancy import Verb, after
from cloacina_celery.core.tenant import LEGACY_TENANT, quote, validate_tenant_name
from cloacina_celery.core.words import counted
from cloacina_celery.errors import ArchiveRefused, InvalidTenantName
from cloacina_celery.store import audit, busy, catalog, migrate, roles, tenancy
from cloacina_celery.store.database import Cursor, Database
from cloacina_celery.store.driver_errors import DriverError, RoleRefused, one_line
from cloacina_celery.store.moves import Rewrite, require_free, rewrite_all, unring_all

KEYS = "cloacina_celery: idempotency keys are counted by "
"""Begins the comment by which a schema carries a key space that is not its name."""

ASIDE = "cloacina_aside"
_SCHEMA = re.compile(r"^\d+; \d+ \d+ SCHEMA - (\S+) ", re.MULTILINE)
_COPY = re.compile(rb"COPY .* FROM stdin;\n")
_SESSION_SET = re.compile(rb"^SET ")
_SESSION_PATH = re.compile(rb"(set_config\('search_path', '', )false")
_RESTRICTION = re.compile(rb"\\(un)?restrict ")
"""What pg_restore tells psql, and no server."""


def export(database: Database, name: str, path: Path, *, by: str, programs: Path | None = None) -> None:
    """Write the tenant's schema, as it is at one moment, to a file in pg_dump's custom format.

    The file is there whole or not at all.

    Args:
        programs: the folder of pg_dump; by default it is looked for on the PATH.

    Raises:
        ArchiveRefused: pg_dump is missing, older than the server, or fails; or the login may not read the tenant's.
        InvalidTenantName: it is ``public``, whose schema is not the tenant's alone.
        UnknownTenant: there is none of this name, or it was removed.
    """
    if name == LEGACY_TENANT:
        raise InvalidTenantName(
            name, "'public' is not a tenant's alone: `tenant adopt` moves ours out of it first"
        )
    program = _program("pg_dump", programs)
    with database.transaction() as cursor:
        tenant = catalog.lock(cursor, name)
        after(Verb.EXPORT, tenant.standing)
        if tenant.standing.key_space != name:
            cursor.execute(f"COMMENT ON SCHEMA {quote(name)} IS %s", (KEYS + tenant.standing.key_space,))
        _let_login_read(cursor, name)
    partial = path.with_name(f"{path.name}.part")
    options = ("-Fc", "--no-owner", "--no-privileges", f"--schema={quote(name)}", f"--file={partial}")
    try:
        done = subprocess.run(
            [program, *options, *_where(database)],
            env=_environment(database),
            capture_output=True,
            check=False,
        )
        if done.returncode != 0:
            raise ArchiveRefused(_said(done.stderr))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    with database.transaction() as cursor:
        audit.record(
            cursor,
            name,
            Verb.EXPORT,
            "written",
            epoch=tenant.epoch,
            by=by,
            detail=f"{path.stat().st_size} bytes",
        )


def _let_login_read(cursor: Cursor, name: str) -> None:
    """Have the tenant's role, if it has one, let the login, which may take it, read what it owns: pg_dump takes none.

    Raises:
        ArchiveRefused: the login may not take the role.
    """
    role = roles.roles(cursor)[name]
    if role is None:
        return
    cursor.execute(
        """
        SELECT format('GRANT SELECT ON %%s %%I.%%I TO %%I', CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END,
                      nspname, relname, current_user)
        FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
        WHERE n.oid = to_regnamespace(%s) AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
          AND pg_get_userbyid(relowner) = %s AND NOT has_table_privilege(c.oid, 'SELECT')
        """,
        (quote(name), role),
    )
    grants = [statement for (statement,) in cursor.fetchall()]
    if not grants:
        return
    try:
        cursor.execute("SELECT set_config('role', %s, true)", (role,))
        cursor.execute("; ".join(grants))
        cursor.execute("SELECT set_config('role', 'none', true)")
    except RoleRefused as error:
        raise ArchiveRefused(
            f"tenant {name} has tables of its own that this login may not read: "
            f'GRANT "{role}" TO the login ({one_line(error)})'
        ) from error


def schema_in(path: Path, *, programs: Path | None = None) -> str:
    """Read the name of the tenant that an archive holds.

    Raises:
        ArchiveRefused: it is no archive of one schema.
    """
    done = subprocess.run(
        [_program("pg_restore", programs), "--list", str(path)], capture_output=True, text=True, check=False
    )
    found = _SCHEMA.findall(done.stdout)
    if done.returncode != 0 or len(found) != 1:
        why = _said(done.stderr.encode()) if done.returncode else f"it holds {counted(len(found), 'schema')}"
        raise ArchiveRefused(f"{path} is not what `tenant export` wrote: {why}")
    return validate_tenant_name(found[0])


def import_(
    database: Database,
    path: Path,
    name: str,
    *,
    by: str,
    rewrite: Rewrite,
    programs: Path | None = None,
) -> None:
    """Bring an archive's tenant in, suspended, under this name; what ran when it was written waits to run again.

    Schema, rows, migrations and the catalog's row come in one transaction: after a failure nothing of it is there.

    Raises:
        ArchiveRefused: pg_restore is missing, it is no archive of a tenant, or the database refuses what is in it.
        SchemaMismatch: it is of a newer version.
        TenantStateRefused: the name is in use.
    """
    original = schema_in(path, programs=programs)
    validate_tenant_name(name)
    migrate.ensure_catalog(database)
    catalog.outlive_stale_knowledge(database, name)
    with database.engine.connect() as connection:
        try:
            with connection.begin():
                migrate.lock(connection)
                cursor = connection.connection.cursor()
                require_free(cursor, name, Verb.IMPORT)
                there = catalog.look_for_name(cursor, name)
                with _out_of_the_way(cursor, original):
                    _restore(cursor, path, programs)
                    if name != original:
                        cursor.execute(f"ALTER SCHEMA {quote(original)} RENAME TO {quote(name)}")
                key_space = _key_space(cursor, name) or original
                catalog.enter(cursor, name, Verb.IMPORT, there, by=by, key_space=key_space)
                _settle_in(connection, cursor, name, original, rewrite)
                roles.isolate_new(cursor, name, database.isolation)
        except DriverError as error:
            raise ArchiveRefused(f"{path} was not imported: {' '.join(str(error).split())}") from error
        finally:
            # The script has set what a session's next user must not find.
            connection.invalidate()


def _settle_in(connection: Connection, cursor: Cursor, name: str, original: str, rewrite: Rewrite) -> None:
    if migrate.revision_of(cursor, name) is None:
        raise ArchiveRefused(f"schema {original} in the archive is no tenant's: it has none of our tables")
    migrate.upgrade(connection, name, "tenant")
    tenancy.give_back_all(cursor, name, "it was imported")
    # Its workers are in the register of the database that it comes from.
    cursor.execute(f"UPDATE {quote(name)}.cloacina_events SET worker_id = NULL WHERE worker_id IS NOT NULL")
    cursor.execute(
        f"UPDATE {quote(name)}.cloacina_executions SET worker_id = NULL WHERE worker_id IS NOT NULL"
    )
    unring_all(cursor, name)
    rewrite_all(cursor, name, original, rewrite)
    busy.hand_over(cursor, name, name)


def _key_space(cursor: Cursor, name: str) -> str | None:
    cursor.execute("SELECT obj_description(to_regnamespace(%s), 'pg_namespace')", (quote(name),))
    (comment,) = cursor.fetchone() or (None,)
    return comment.removeprefix(KEYS) if comment is not None and comment.startswith(KEYS) else None


@contextmanager
def _out_of_the_way(cursor: Cursor, name: str) -> Iterator[None]:
    """Have a schema of this name be called otherwise in the block; nobody outside the transaction sees it."""
    cursor.execute("SELECT to_regnamespace(%s)", (quote(name),))
    is_there = cursor.fetchone() != (None,)
    if is_there:
        cursor.execute(f"ALTER SCHEMA {quote(name)} RENAME TO {ASIDE}")
    yield
    if is_there:
        cursor.execute(f"ALTER SCHEMA {ASIDE} RENAME TO {quote(name)}")


def _restore(cursor: Cursor, path: Path, programs: Path | None) -> None:
    """Run an archive's script in the cursor's transaction."""
    command = [_program("pg_restore", programs), "--no-owner", "--no-privileges", "--file=-", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            statements: list[bytes] = []
            is_preamble = True
            for line in process.stdout:
                is_preamble = is_preamble and not line.startswith(b"-- Name: ")
                if is_preamble:
                    # Behind a pooler the session outlives our connection.
                    line = _SESSION_PATH.sub(rb"\1true", _SESSION_SET.sub(b"SET LOCAL ", line))
                if _COPY.fullmatch(line):
                    _run(cursor, statements)
                    cursor.copy_expert(line.decode(), _Rows(process.stdout))
                elif not _RESTRICTION.match(line):
                    statements.append(line)
            _run(cursor, statements)
            # The script turns it off, and then a login that is not its owner may not touch the catalog.
            cursor.execute("SET LOCAL row_security = on")
        except BaseException:
            process.kill()
            raise
        said = process.stderr.read()
    if process.returncode != 0:
        raise ArchiveRefused(_said(said))


def _run(cursor: Cursor, statements: list[bytes]) -> None:
    if any(line.strip() and not line.startswith(b"--") for line in statements):
        cursor.execute(b"".join(statements))
    statements.clear()


class _Rows:
    """The rows of one COPY in a script, as a file that ends with them."""

    def __init__(self, script: IO[bytes]) -> None:
        self._script = script
        self._rest = b""
        self._is_over = False

    def read(self, size: int = 8192) -> bytes:
        """Return the next piece, of ``size`` bytes at the most; nothing at the end."""
        while len(self._rest) < size and not self._is_over:
            line = self._script.readline()
            if line in (b"\\.\n", b""):
                self._is_over = True
            else:
                self._rest += line
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece


def _program(name: str, programs: Path | None) -> str:
    found = shutil.which(name, path=None if programs is None else str(programs))
    if found is None:
        raise ArchiveRefused(
            f"{name} is not there: install Postgres' client programs of the server's version or a newer one, or "
            "name their folder with --programs"
        )
    return found


def _where(database: Database) -> tuple[str, ...]:
    arguments: dict[str, Any] = database.url.translate_connect_args(username="user", database="dbname")
    arguments.pop("password", None)
    query = {key: value for key, value in database.url.query.items() if key != "options"}
    return (f"--dbname={make_dsn(**arguments, **query)}", "--no-password")


def _environment(database: Database) -> dict[str, str]:
    # Not on the command line, where everybody on the machine could read it.
    password = database.url.password
    return {**os.environ, **({} if password is None else {"PGPASSWORD": str(password)})}


def _said(output: bytes) -> str:
    return " ".join(output.decode(errors="replace").split()) or "it said nothing"
