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
from cloacina_celery.store.cluster_roles import ensure, mark, mark_of, quoted, run, taken
from cloacina_celery.store.database import Cursor
from cloacina_celery.store.savepoints import savepoint

OURS = r"cloacina\_%"
"""The names of our own tables in a tenant's schema, as LIKE has it."""

INHERIT_OPTION = 160000
"""The server's version from which a membership, and not the member, says whether it inherits."""

_OUR_GRANTS = {"cloacina_version": sql.SQL("SELECT")}
_GRANTS = sql.SQL("SELECT, INSERT, UPDATE, DELETE")

# What the login makes in the schema by hand shall be of use to the tenant. Not TRIGGER: whoever may plant one
# on the login's table has its code run by the login.
_DEFAULTS = {
    "TABLES": "SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES",
    "SEQUENCES": "SELECT, UPDATE, USAGE",
}

# What depends on a schema, and not what has it: that is found by an index, and pg_class has the tables of thousands.
_INSIDE = """
    WITH inside AS MATERIALIZED (
        SELECT classid, objid FROM pg_depend
        WHERE refclassid = 'pg_namespace'::regclass AND refobjid = %(schema)s::regnamespace
    ), relations AS MATERIALIZED (
        SELECT c.oid, relname, relkind, relowner FROM inside JOIN pg_class c ON c.oid = objid
        WHERE classid = 'pg_class'::regclass
    )
"""

# Sequences of a column, rows' and arrays' types and an extension's parts go with what they belong to.
_OBJECTS = (
    _INSIDE
    + """
    , found AS (
        SELECT 'pg_class'::regclass AS kind, oid, relowner AS owner FROM relations
        WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND relname NOT LIKE %(ours)s
        UNION ALL
        SELECT classid, oid, proowner FROM inside JOIN pg_proc ON oid = objid WHERE classid = 'pg_proc'::regclass
        UNION ALL
        SELECT classid, t.oid, t.typowner FROM inside JOIN pg_type t ON t.oid = objid
        LEFT JOIN pg_class c ON c.oid = t.typrelid
        WHERE classid = 'pg_type'::regclass AND (t.typtype IN ('e', 'd', 'r') OR c.relkind = 'c')
        UNION ALL
        SELECT classid, oid, oprowner FROM inside JOIN pg_operator ON oid = objid
        WHERE classid = 'pg_operator'::regclass
        UNION ALL
        SELECT classid, oid, opcowner FROM inside JOIN pg_opclass ON oid = objid WHERE classid = 'pg_opclass'::regclass
        UNION ALL
        SELECT classid, oid, opfowner FROM inside JOIN pg_opfamily ON oid = objid
        WHERE classid = 'pg_opfamily'::regclass
        UNION ALL
        SELECT classid, oid, collowner FROM inside JOIN pg_collation ON oid = objid
        WHERE classid = 'pg_collation'::regclass
        UNION ALL
        SELECT classid, oid, stxowner FROM inside JOIN pg_statistic_ext ON oid = objid
        WHERE classid = 'pg_statistic_ext'::regclass
    )
    SELECT named.type, named.identity, found.owner = me.oid, found.owner::regrole::text
    FROM found JOIN pg_roles me ON me.rolname = current_user
    CROSS JOIN LATERAL pg_identify_object(found.kind, found.oid, 0) AS named
    WHERE found.owner <> %(role)s::regrole AND NOT EXISTS (
        SELECT FROM pg_depend d WHERE d.classid = found.kind AND d.objid = found.oid AND d.refobjid <> found.oid
          AND (d.deptype IN ('e', 'i')
               OR d.deptype = 'a' AND d.refobjsubid <> 0 AND found.kind = 'pg_class'::regclass))
"""
)

_UNGRANTED = (
    _INSIDE
    + """
    SELECT relname FROM relations
    WHERE relkind IN ('r', 'p') AND relname LIKE %(ours)s
      AND relowner = (SELECT oid FROM pg_roles WHERE rolname = current_user)
      AND (has_table_privilege(%(role)s, oid, 'TRUNCATE') OR NOT has_table_privilege(%(role)s, oid, 'SELECT'))
"""
)


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
            f"login {can.login!r} may not create its role: ALTER ROLE {quoted(can.login)} CREATEROLE, or set "
            "cloacina_isolation to 'schema' and have search_path alone keep tenants apart",
        )
    role, group = role_of(tenant, can.database), group_of(can.database)
    ensure(cursor, group, mark(can.database, "all tenants"), tenant)
    ensure(cursor, role, mark(can.database, f"tenant {tenant}"), tenant)
    run(cursor, "GRANT {group} TO {role}", role=role, group=group)
    run(cursor, "GRANT USAGE ON SCHEMA cloacina TO {group}", group=group)
    run(cursor, "GRANT SELECT ON cloacina.tenants TO {group}", group=group)
    if not can.is_superuser:
        option = " WITH INHERIT FALSE, SET TRUE" if can.version >= INHERIT_OPTION else ""
        run(cursor, "GRANT {role} TO {login}" + option, role=role, login=can.login)
    run(cursor, "GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}", schema=tenant, role=role)
    for kind, rights in _DEFAULTS.items():
        statement = f"ALTER DEFAULT PRIVILEGES IN SCHEMA {{schema}} GRANT {rights} ON {kind} TO {{role}}"
        run(cursor, statement, schema=tenant, role=role)
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
    cursor.execute(_UNGRANTED, {"schema": quoted(tenant), "ours": OURS, "role": role})
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
    if mark_of(cursor, role) != mark(database[0], f"tenant {tenant}"):
        return
    cursor.execute("UPDATE cloacina.tenants SET role = NULL WHERE role = %s", (role,))
    with suppress(errors.DependentObjectsStillExist, errors.InsufficientPrivilege), savepoint(cursor):
        # As the role: its login has none of its rights of its own.
        cursor.execute("SELECT set_config('role', %s, true)", (role,))
        run(cursor, "DROP OWNED BY {role} CASCADE", role=role)
        cursor.execute("SELECT set_config('role', 'none', true)")
        run(cursor, "DROP ROLE {role}", role=role)


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
    if mark_of(cursor, after) is not None:
        raise IsolationRefused(new, taken(after))
    moved = mark(can.database, f"tenant {new}")
    try:
        run(cursor, "ALTER ROLE {before} RENAME TO {after}", before=before, after=after)
        cursor.execute(sql.SQL("COMMENT ON ROLE {} IS %s").format(sql.Identifier(after)), (moved,))
    except errors.InsufficientPrivilege:
        login = quoted(can.login)
        member = (
            f", and GRANT {quoted(before)} TO {login} WITH ADMIN OPTION"
            if can.version >= INHERIT_OPTION
            else ""
        )
        raise IsolationRefused(
            old, f"login {can.login!r} may not rename its role: ALTER ROLE {login} CREATEROLE{member}"
        ) from None
    cursor.execute("UPDATE cloacina.tenants SET role = %s WHERE name = %s", (after, new))


def _hand_over(cursor: Cursor, tenant: str, role: str) -> list[str]:
    schema = quoted(tenant)
    cursor.execute(_OBJECTS, {"schema": schema, "ours": OURS, "role": quoted(role)})
    left = []
    for kind, identity, is_logins, owner in cursor.fetchall():
        if is_logins:
            noun = "statistics" if kind == "statistics object" else kind
            # Both are Postgres' own words, quoted by it.
            cursor.execute(f"ALTER {noun} {identity} OWNER TO {quoted(role)}")
        else:
            left.append(f"{kind} {identity} of {owner}")
    return left
