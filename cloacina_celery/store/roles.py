"""Tenants' roles: what Postgres itself refuses when one tenant's statement reaches for another's rows.

A tenant's role may use its schema and create in it, and owns what its sessions make there. It owns neither the
schema nor our tables: their owner could plant a trigger, a rule or a policy, and the reaper, which touches every
tenant's rows, would run that code with its own rights.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from psycopg2 import errors, sql

from cloacina_celery.core.tenant import LEGACY_TENANT, group_of, role_of
from cloacina_celery.errors import IsolationRefused
from cloacina_celery.store.database import Cursor
from cloacina_celery.store.savepoints import savepoint

OURS = r"cloacina\_%"
"""The names of our own tables in a tenant's schema, as LIKE has it."""

INHERIT_OPTION = 160000
"""The server's version from which a membership, and not the member, says whether it inherits."""

_MARK = "cloacina_celery, database {}: {}"
_OUR_GRANTS = {"cloacina_version": sql.SQL("SELECT")}
_GRANTS = sql.SQL("SELECT, INSERT, UPDATE, DELETE")

# What the login makes in the schema by hand shall be of use to the tenant. Not TRIGGER: whoever may plant one
# on the login's table has its code run by the login.
_DEFAULTS = {
    "TABLES": "SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES",
    "SEQUENCES": "SELECT, UPDATE, USAGE",
}

# Sequences of a column, rows' and arrays' types and an extension's parts go with what they belong to.
_OBJECTS = """
    WITH found AS (
        SELECT 'pg_class'::regclass AS kind, oid, relowner AS owner FROM pg_class
        WHERE relnamespace = %(schema)s::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
          AND relname NOT LIKE %(ours)s
        UNION ALL
        SELECT 'pg_proc'::regclass, oid, proowner FROM pg_proc WHERE pronamespace = %(schema)s::regnamespace
        UNION ALL
        SELECT 'pg_type'::regclass, t.oid, t.typowner FROM pg_type t LEFT JOIN pg_class c ON c.oid = t.typrelid
        WHERE t.typnamespace = %(schema)s::regnamespace AND (t.typtype IN ('e', 'd', 'r') OR c.relkind = 'c')
        UNION ALL
        SELECT 'pg_operator'::regclass, oid, oprowner FROM pg_operator WHERE oprnamespace = %(schema)s::regnamespace
        UNION ALL
        SELECT 'pg_opclass'::regclass, oid, opcowner FROM pg_opclass WHERE opcnamespace = %(schema)s::regnamespace
        UNION ALL
        SELECT 'pg_opfamily'::regclass, oid, opfowner FROM pg_opfamily WHERE opfnamespace = %(schema)s::regnamespace
        UNION ALL
        SELECT 'pg_collation'::regclass, oid, collowner FROM pg_collation
        WHERE collnamespace = %(schema)s::regnamespace
        UNION ALL
        SELECT 'pg_statistic_ext'::regclass, oid, stxowner FROM pg_statistic_ext
        WHERE stxnamespace = %(schema)s::regnamespace
    )
    SELECT named.type, named.identity, found.owner = me.oid, found.owner::regrole::text
    FROM found JOIN pg_roles me ON me.rolname = current_user
    CROSS JOIN LATERAL pg_identify_object(found.kind, found.oid, 0) AS named
    WHERE found.owner <> %(role)s::regrole AND NOT EXISTS (
        SELECT FROM pg_depend d WHERE d.classid = found.kind AND d.objid = found.oid AND d.refobjid <> found.oid
          AND (d.deptype IN ('e', 'i')
               OR d.deptype = 'a' AND d.refobjsubid <> 0 AND found.kind = 'pg_class'::regclass))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Powers:
    """What the connection's login may do about roles."""

    login: str
    database: int
    version: int
    is_superuser: bool
    may_create_roles: bool
    inherits: bool
    public_is_open: bool

    @property
    def inherits_from_tenants(self) -> bool:
        """Whether the login has its tenants' rights without taking their role: before Postgres 16 it says so itself."""
        return self.inherits and not self.is_superuser and self.version < INHERIT_OPTION


def powers(cursor: Cursor) -> Powers:
    """Ask what the connection's login may do."""
    cursor.execute(
        """
        SELECT session_user::text, d.oid, current_setting('server_version_num')::int, r.rolsuper OR u.rolsuper,
               u.rolcreaterole OR u.rolsuper, r.rolinherit,
               EXISTS (SELECT FROM pg_namespace n CROSS JOIN LATERAL aclexplode(n.nspacl) AS acl
                       WHERE n.nspname = 'public' AND acl.grantee = 0 AND acl.privilege_type = 'CREATE')
        FROM pg_roles r, pg_roles u, pg_database d
        WHERE r.rolname = session_user AND u.rolname = current_user AND d.datname = current_database()
        """
    )
    row = cursor.fetchone()
    assert row is not None
    login, database, version, is_superuser, may_create, inherits, public_is_open = row
    return Powers(
        login=login, database=database, version=version, is_superuser=is_superuser, may_create_roles=may_create,
        inherits=inherits, public_is_open=public_is_open,
    )  # fmt: skip


def roles(cursor: Cursor) -> dict[str, str | None]:
    """Read each tenant's role; ``None`` is a tenant that search_path alone keeps apart."""
    cursor.execute("SELECT name, role FROM cloacina.tenants")
    return dict(cursor.fetchall())


def isolate_new(cursor: Cursor, tenant: str, level: str) -> None:
    """Give a new tenant its role, in the transaction that makes it, as far as ``level`` asks for one.

    Raises:
        IsolationRefused: ``level`` is ``role`` and the login may not create one, or the role's name is taken.
    """
    if (
        level == "schema"
        or tenant == LEGACY_TENANT
        or (level == "auto" and not powers(cursor).may_create_roles)
    ):
        return
    isolate(cursor, tenant)


def isolate(cursor: Cursor, tenant: str) -> list[str]:
    """Give a tenant its role and hand over to it what the login owns in its schema; doing so twice does no harm.

    Returns the objects that others own and that stay theirs. Needs a transaction, and `migrate.lock`.

    Raises:
        IsolationRefused: the tenant is ``public``, the login may not create roles, or the role's name is taken.
    """
    if tenant == LEGACY_TENANT:
        raise IsolationRefused(tenant, "the legacy tenant shares 'public' with others and cannot have a role")
    can = powers(cursor)
    if not can.may_create_roles:
        raise IsolationRefused(
            tenant,
            f"login {can.login!r} may not create its role: ALTER ROLE {_plain(can.login)} CREATEROLE, or set "
            "cloacina_isolation to 'schema' and have search_path alone keep tenants apart",
        )
    role, group = role_of(tenant, can.database), group_of(can.database)
    _ensure(cursor, can, group, "all tenants", tenant)
    _ensure(cursor, can, role, f"tenant {tenant}", tenant)
    _run(cursor, "GRANT {group} TO {role}", role=role, group=group)
    _run(cursor, "GRANT USAGE ON SCHEMA cloacina TO {group}", group=group)
    _run(cursor, "GRANT SELECT ON cloacina.tenants TO {group}", group=group)
    if not can.is_superuser:
        option = " WITH INHERIT FALSE, SET TRUE" if can.version >= INHERIT_OPTION else ""
        _run(cursor, "GRANT {role} TO {login}" + option, role=role, login=can.login)
    _run(cursor, "GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}", schema=tenant, role=role)
    for kind, rights in _DEFAULTS.items():
        statement = f"ALTER DEFAULT PRIVILEGES IN SCHEMA {{schema}} GRANT {rights} ON {kind} TO {{role}}"
        _run(cursor, statement, schema=tenant, role=role)
    cursor.execute("UPDATE cloacina.tenants SET role = %s WHERE name = %s", (role, tenant))
    grant(cursor, tenant, role)
    return _hand_over(cursor, tenant, role)


def grant_again(cursor: Cursor, tenant: str) -> None:
    """Let a tenant's role, if it has one, use the tables that a migration has just made."""
    cursor.execute("SELECT role FROM cloacina.tenants WHERE name = %s", (tenant,))
    row = cursor.fetchone()
    if row is not None and row[0] is not None:
        grant(cursor, tenant, row[0])


def grant(cursor: Cursor, tenant: str, role: str) -> None:
    """Let a tenant's role read and write our tables in its schema, and do nothing else to them."""
    # Only what is not as it should be: a migration with nothing to do runs no DDL.
    cursor.execute(
        """
        SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = %(schema)s AND c.relkind IN ('r', 'p') AND c.relname LIKE %(ours)s
          AND c.relowner = (SELECT oid FROM pg_roles WHERE rolname = current_user)
          AND (has_table_privilege(%(role)s, c.oid, 'TRUNCATE') OR NOT has_table_privilege(%(role)s, c.oid, 'SELECT'))
        """,
        {"schema": tenant, "ours": OURS, "role": role},
    )
    for (table,) in cursor.fetchall():
        names = {
            "schema": sql.Identifier(tenant),
            "table": sql.Identifier(table),
            "role": sql.Identifier(role),
        }
        # The first line takes back what the schema's default privileges gave.
        cursor.execute(sql.SQL("REVOKE ALL ON {schema}.{table} FROM {role}").format(**names))
        cursor.execute(
            sql.SQL("GRANT {what} ON {schema}.{table} TO {role}").format(
                what=_OUR_GRANTS.get(table, _GRANTS), **names
            )
        )


def drop(cursor: Cursor, tenant: str) -> None:
    """Drop a tenant's role with all that it owns in this database, before or after its schema is dropped.

    A role that somebody else made, or that has things in another database of the cluster, stays, without rights
    here.
    """
    cursor.execute("SELECT oid FROM pg_database WHERE datname = current_database()")
    database = cursor.fetchone()
    assert database is not None
    role = role_of(tenant, database[0])
    if _mark_of(cursor, role) != _MARK.format(database[0], f"tenant {tenant}"):
        return
    cursor.execute("UPDATE cloacina.tenants SET role = NULL WHERE role = %s", (role,))
    with suppress(errors.DependentObjectsStillExist, errors.InsufficientPrivilege), savepoint(cursor):
        # As the role: its login has none of its rights of its own.
        cursor.execute("SELECT set_config('role', %s, true)", (role,))
        _run(cursor, "DROP OWNED BY {role} CASCADE", role=role)
        cursor.execute("SELECT set_config('role', 'none', true)")
        _run(cursor, "DROP ROLE {role}", role=role)


def rename(cursor: Cursor, old: str, new: str) -> None:
    """Give the role of a tenant that has moved from ``old`` to ``new``, if it has one, the name of ``new``.

    The catalog must know both.

    Raises:
        IsolationRefused: the login may not rename a role, or the new name is taken.
    """
    can = powers(cursor)
    before, after = role_of(old, can.database), role_of(new, can.database)
    cursor.execute("UPDATE cloacina.tenants SET role = NULL WHERE name = %s AND role = %s", (old, before))
    if not cursor.rowcount:
        return
    if _mark_of(cursor, after) is not None:
        raise IsolationRefused(new, _taken(after))
    mark = _MARK.format(can.database, f"tenant {new}")
    try:
        _run(cursor, "ALTER ROLE {before} RENAME TO {after}", before=before, after=after)
        cursor.execute(sql.SQL("COMMENT ON ROLE {} IS %s").format(sql.Identifier(after)), (mark,))
    except errors.InsufficientPrivilege:
        login = _plain(can.login)
        member = (
            f", and GRANT {_plain(before)} TO {login} WITH ADMIN OPTION"
            if can.version >= INHERIT_OPTION
            else ""
        )
        raise IsolationRefused(
            old, f"login {can.login!r} may not rename its role: ALTER ROLE {login} CREATEROLE{member}"
        ) from None
    cursor.execute("UPDATE cloacina.tenants SET role = %s WHERE name = %s", (after, new))


def _ensure(cursor: Cursor, can: Powers, role: str, what: str, tenant: str) -> None:
    mark = _MARK.format(can.database, what)
    found = _mark_of(cursor, role)
    if found is None:
        try:
            _run(cursor, "CREATE ROLE {role} NOLOGIN", role=role)
        except errors.DuplicateObject:
            raise IsolationRefused(tenant, _taken(role)) from None
        cursor.execute(sql.SQL("COMMENT ON ROLE {} IS %s").format(sql.Identifier(role)), (mark,))
    elif found != mark:
        raise IsolationRefused(tenant, _taken(role))


def _taken(role: str) -> str:
    return (
        f"role {role!r} exists and was not made by this package for it: rename it with "
        f'ALTER ROLE "{role}" RENAME TO ..., or drop it'
    )


def _mark_of(cursor: Cursor, role: str) -> str | None:
    """Read what a role says of itself; ``None`` where there is no such role, empty where it says nothing."""
    cursor.execute(
        "SELECT coalesce(shobj_description(oid, 'pg_authid'), '') FROM pg_roles WHERE rolname = %s", (role,)
    )
    row = cursor.fetchone()
    return None if row is None else str(row[0])


def _hand_over(cursor: Cursor, tenant: str, role: str) -> list[str]:
    quoted = _plain(tenant)
    cursor.execute(_OBJECTS, {"schema": quoted, "ours": OURS, "role": _plain(role)})
    left = []
    for kind, identity, is_logins, owner in cursor.fetchall():
        if is_logins:
            noun = "statistics" if kind == "statistics object" else kind
            # Both are Postgres' own words, quoted by it.
            cursor.execute(f"ALTER {noun} {identity} OWNER TO {_plain(role)}")
        else:
            left.append(f"{kind} {identity} of {owner}")
    return left


def _run(cursor: Cursor, statement: str, **names: str) -> None:
    cursor.execute(sql.SQL(statement).format(**{key: sql.Identifier(name) for key, name in names.items()}))


def _plain(name: str) -> str:
    """Quote any name as an identifier."""
    return '"' + name.replace('"', '""') + '"'
