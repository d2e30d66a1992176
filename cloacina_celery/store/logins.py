"""Tenants' own logins: each reaches its tenant's schema, and nothing of any other, whatever its code does.

A login inherits its tenant's role, and from a group what a worker needs of the shared tables, whose row level
security shows it its tenant's rows alone. Two of a tenant may be valid at a time, so that one replaces the other
while workers run. Postgres gets what it checks a password with, never the password, so no log of its can have it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from psycopg2 import errors, sql
from psycopg2.extensions import encrypt_password

from cloacina_celery.core.tenancy import Verb, after
from cloacina_celery.core.tenant import MAX_BYTES, login_of, workers_of
from cloacina_celery.errors import IsolationRefused, SettingsError
from cloacina_celery.store import audit, catalog, roles
from cloacina_celery.store.bounded import bounded_transaction
from cloacina_celery.store.cluster_roles import create, ensure, mark, mark_of, quoted, run
from cloacina_celery.store.database import Cursor, Database
from cloacina_celery.store.driver_errors import one_line

PASSWORD_BYTES = 32
"""Random bytes in a generated password: 43 characters that need no quoting in a URL."""

LOGIN = "a tenant's login"
"""What a login says of itself; whose it is stands in the catalog, since tenants are renamed."""

LOCK_TIMEOUT_MS = 10_000

_SHARED = (
    "GRANT USAGE ON SCHEMA cloacina TO {group}",
    "GRANT SELECT ON cloacina.cloacina_version, cloacina.revisions TO {group}",
    "GRANT UPDATE (recovery_paced_until) ON cloacina.tenants TO {group}",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON cloacina.workers, cloacina.busy TO {group}",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """One login of a tenant; ``valid_until`` is when its password ends, on the database's clock."""

    username: str
    tenant: str
    created_at: datetime
    created_by: str
    valid_until: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a worker of one tenant connects with. Nothing keeps the password but whoever gets this."""

    tenant: str
    username: str
    password: str = field(repr=False)
    database_url: str = field(repr=False)


_COLUMNS = tuple(Login.__dataclass_fields__)


def of_tenant(cursor: Cursor, tenant: str) -> list[Login]:
    """List a tenant's logins, oldest first."""
    cursor.execute(
        f"SELECT {', '.join(_COLUMNS)} FROM cloacina.logins WHERE tenant = %s ORDER BY created_at, username",
        (tenant,),
    )
    return [Login(**dict(zip(_COLUMNS, row, strict=True))) for row in cursor.fetchall()]


def own_tenant(cursor: Cursor) -> tuple[str, str | None]:
    """Return this connection's login, and the tenant whose own it is; ``None`` for one that serves any tenant."""
    cursor.execute("SELECT session_user::text, cloacina.tenant_of(session_user)")
    login, tenant = cursor.fetchone() or ("", None)
    return login, tenant


def issue(
    database: Database,
    tenant: str,
    *,
    username: str | None,
    password: str | None,
    overlap: float | None,
    by: str,
) -> Credentials:
    """Make a login for a tenant, and return what nobody can read again.

    Args:
        overlap: seconds after which the tenant's earlier logins end; ``None`` leaves them as they are.

    Raises:
        IsolationRefused: the tenant has no role, the login may not create one, or the name is taken.
        SettingsError: the name or the password cannot be one.
        UnknownTenant: there is none, or it was removed.
    """
    password = secrets.token_urlsafe(PASSWORD_BYTES) if password is None else _checked_password(password)
    with bounded_transaction(database, lock_timeout_ms=LOCK_TIMEOUT_MS) as cursor:
        found = catalog.lock(cursor, tenant)
        after(Verb.LOGIN, found.standing)
        can, role = roles.powers(cursor), roles.roles(cursor)[tenant]
        if role is None:
            raise IsolationRefused(
                tenant,
                f"it has no role that a login could inherit: run `celery -A <app> cloacina tenant isolate {tenant}`",
            )
        if not can.may_create_roles:
            raise IsolationRefused(
                tenant,
                f"login {can.login!r} may not create another: ALTER ROLE {quoted(can.login)} CREATEROLE",
            )
        name = login_of(role, secrets.token_hex(4)) if username is None else _checked_username(username)
        _make(cursor, can, name, password, tenant=tenant, role=role)
        if overlap is not None:
            _end_earlier(cursor, tenant, overlap)
        cursor.execute(
            "INSERT INTO cloacina.logins (username, tenant, created_by) VALUES (%s, %s, %s)",
            (name, tenant, by),
        )
        detail = f"login {name}" + ("" if overlap is None else f"; the earlier ones end in {overlap:g} s")
        audit.record(cursor, tenant, Verb.LOGIN, "issued", epoch=found.epoch, by=by, detail=detail)
    url = database.url.set(drivername="postgresql", username=name, password=password)
    return Credentials(
        tenant=tenant,
        username=name,
        password=password,
        database_url=url.render_as_string(hide_password=False),
    )


def revoke(database: Database, tenant: str, username: str, *, by: str) -> bool:
    """End a tenant's login and its connections, and tell whether there was one.

    What it owns becomes the tenant's role's. First it can log in no more, then its connections end, then it goes:
    interrupted in between, doing it again ends it.

    Raises:
        IsolationRefused: a role of that name is there and is not the tenant's login, or not ours to end.
        UnknownTenant: there is none, or it was removed.
    """
    with bounded_transaction(database, lock_timeout_ms=LOCK_TIMEOUT_MS) as cursor:
        after(Verb.LOGIN, catalog.lock(cursor, tenant).standing)
        if username not in {login.username for login in of_tenant(cursor, tenant)}:
            if mark_of(cursor, username) is None:
                return False
            raise IsolationRefused(
                tenant, f"role {username!r} is no login of it: see `tenant logins {tenant}`"
            )
        if _is_there(cursor, username):
            with _in_our_words(tenant, username, by=roles.powers(cursor).login):
                run(cursor, "ALTER ROLE {login} NOLOGIN", login=username)
    with bounded_transaction(database, lock_timeout_ms=LOCK_TIMEOUT_MS) as cursor:
        found = catalog.lock(cursor, tenant)
        _drop(cursor, tenant, username)
        audit.record(
            cursor, tenant, Verb.LOGIN, "revoked", epoch=found.epoch, by=by, detail=f"login {username}"
        )
    return True


def drop_all(cursor: Cursor, tenant: str) -> None:
    """Drop the logins of a tenant that is being removed."""
    for login in of_tenant(cursor, tenant):
        _drop(cursor, tenant, login.username)


def hand_over(cursor: Cursor, old: str, new: str) -> None:
    """Let the logins of a tenant that moves be those of its new name."""
    cursor.execute("UPDATE cloacina.logins SET tenant = %s WHERE tenant = %s", (new, old))


def _make(cursor: Cursor, can: roles.Powers, name: str, password: str, *, tenant: str, role: str) -> None:
    create(cursor, name, "LOGIN INHERIT", mark(can.database, LOGIN), tenant)
    verifier = encrypt_password(password, name, scope=cursor.connection, algorithm="scram-sha-256")
    cursor.execute(sql.SQL("ALTER ROLE {} PASSWORD %s").format(sql.Identifier(name)), (verifier,))
    group = workers_of(can.database)
    ensure(cursor, group, mark(can.database, "all tenants' logins"), tenant)
    for statement in _SHARED:
        run(cursor, statement, group=group)
    for granted in (role, group):
        run(cursor, "GRANT {granted} TO {login}", granted=granted, login=name)
    if not can.is_superuser:
        option = " WITH INHERIT FALSE, SET TRUE" if can.version >= roles.INHERIT_OPTION else ""
        # To end its connections and to take over what it owns, one has to be it.
        run(cursor, "GRANT {login} TO {us}" + option, login=name, us=can.login)
    cursor.execute(
        "SELECT current_database(), has_database_privilege(%s, current_database(), 'CONNECT')", (name,)
    )
    database, may_connect = cursor.fetchone()
    if not may_connect:
        run(cursor, "GRANT CONNECT ON DATABASE {database} TO {login}", database=database, login=name)
    # Also where a pooler drops the option that empties it.
    run(
        cursor,
        "ALTER ROLE {login} IN DATABASE {database} SET search_path = ''",
        login=name,
        database=database,
    )


def _end_earlier(cursor: Cursor, tenant: str, overlap: float) -> None:
    for login in of_tenant(cursor, tenant):
        cursor.execute(
            "UPDATE cloacina.logins SET valid_until = least(valid_until, now() + make_interval(secs => %s))"
            " WHERE username = %s RETURNING valid_until, valid_until < now()",
            (overlap, login.username),
        )
        valid_until, is_over = cursor.fetchone()
        if is_over or not _is_there(cursor, login.username):
            _drop(cursor, tenant, login.username)
        else:
            cursor.execute(
                sql.SQL("ALTER ROLE {} VALID UNTIL %s").format(sql.Identifier(login.username)),
                (valid_until.isoformat(),),
            )


def _drop(cursor: Cursor, tenant: str, username: str) -> None:
    if _is_there(cursor, username):
        role = roles.roles(cursor).get(tenant)
        with _in_our_words(tenant, username, by=roles.powers(cursor).login):
            # As itself: whoever issued it has none of its rights, nor of the tenant's role's.
            cursor.execute("SELECT set_config('role', %s, true)", (username,))
            cursor.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE usename = %s AND pid <> pg_backend_pid()",
                (username,),
            )
            if role is not None:
                run(cursor, "REASSIGN OWNED BY {login} TO {role}", login=username, role=role)
            run(cursor, "DROP OWNED BY {login}", login=username)
            cursor.execute("SELECT set_config('role', 'none', true)")
            run(cursor, "DROP ROLE {login}", login=username)
    cursor.execute("DELETE FROM cloacina.logins WHERE username = %s", (username,))


@contextmanager
def _in_our_words(tenant: str, username: str, *, by: str) -> Iterator[None]:
    try:
        yield
    except errors.InsufficientPrivilege:
        raise IsolationRefused(
            tenant,
            f"login {by!r} may not end its login {username!r}: let whoever issued it do so, or "
            f"ALTER ROLE {quoted(by)} CREATEROLE and GRANT {quoted(username)} TO {quoted(by)} WITH ADMIN OPTION",
        ) from None
    except errors.DependentObjectsStillExist as error:
        raise IsolationRefused(
            tenant,
            f"its login {username!r} owns something elsewhere: {one_line(error)}; DROP OWNED there first",
        ) from None


def _is_there(cursor: Cursor, username: str) -> bool:
    # One of that name that somebody else has made since is not ours to touch.
    return mark_of(cursor, username) == mark(roles.powers(cursor).database, LOGIN)


def _checked_username(name: Any) -> str:
    if not isinstance(name, str) or not name or "\0" in name:
        raise SettingsError(f"a login's name is a string of 1 to {MAX_BYTES} bytes, not {name!r}")
    if len(name.encode()) > MAX_BYTES or name.startswith("pg_"):
        raise SettingsError(
            f"login name {name!r} cannot be one: Postgres takes {MAX_BYTES} bytes, and keeps 'pg_...' for itself"
        )
    return name


def _checked_password(password: Any) -> str:
    if not isinstance(password, str) or not password or "\0" in password:
        raise SettingsError("a password is a string of at least one character, none of them NUL")
    return password
