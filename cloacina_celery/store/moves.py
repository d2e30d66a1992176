"""Rename and adopt: a tenant's rows come under another name in one transaction, and none of them is copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cloacina_celery.core.tenancy import TenantState, Verb, after, entering
from cloacina_celery.core.tenant import quote, validate_tenant_name
from cloacina_celery.errors import TenantStateRefused, UnknownTenant
from cloacina_celery.store import audit, busy, catalog, logins, migrate, roles
from cloacina_celery.store.database import Cursor, Database
from cloacina_celery.store.removal import OUR_TABLES, in_use, shut
from cloacina_celery.store.statements import Statement
from cloacina_celery.store.tenancy import LOCK_TIMEOUT_MS, Left, count_open, move_to

Rewrite = Callable[[str], str]

BATCH = 500

# What names the old tenant in its messages is what a caller wrote into a callback's options.
_NAMING = Statement(
    "naming",
    """
    SELECT id, message FROM {s}.cloacina_executions
    WHERE state = 'pending' AND id > $1::text AND position($2::text IN message) > 0 ORDER BY id LIMIT $3::int
    """,
)
_REWRITE = Statement(
    "rewrite",
    "UPDATE {s}.cloacina_executions SET message = $2::text WHERE id = $1::text AND state = 'pending'",
)
_UNRING_ALL = Statement(
    "unring_all",
    "UPDATE {s}.cloacina_executions SET rung_at = NULL WHERE state = 'pending' AND rung_at IS NOT NULL",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What would move out of a schema, by table with its rows, and what would stay."""

    moves: dict[str, int]
    left: Left
    stays: tuple[str, ...]


def move(database: Database, old: str, new: str, verb: Verb, *, by: str, rewrite: Rewrite) -> bool:
    """Bring a suspended tenant under another name, under which it stays suspended; ``False`` if that is done.

    It is all in one transaction. A tombstone of the old name says where it went, until `removal.confirm` ends the
    verb.

    Args:
        rewrite: has a stored message name the new tenant where it names the old one.

    Raises:
        InvalidTenantName: the new name cannot be a tenant's.
        IsolationRefused: see `roles.rename` and, for an adoption, `roles.isolate_new`.
        TenantStateRefused: it is not suspended, something runs in it, or the new name is in use.
        UnknownTenant: there is none of the old name.
    """
    validate_tenant_name(new)
    found = catalog.find(database, old)
    if found is None:
        raise UnknownTenant(old)
    if not found.standing.exists and found.moved_to == new:
        return False
    catalog.outlive_stale_knowledge(database, new)
    with in_use(old, verb), database.engine.begin() as connection:
        cursor = connection.connection.cursor()
        migrate.lock(connection)
        cursor.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
        shut(cursor, old)
        tenant = catalog.lock(cursor, old)
        if after(verb, tenant.standing) is tenant.state:
            raise UnknownTenant(old, removed=True, moved_to=tenant.moved_to)
        left = count_open(cursor, old)
        if left.running:
            raise TenantStateRefused(
                old, tenant.state, verb,
                f"{left}. Wait for them, or run `tenant suspend {old} --give-back`",
            )  # fmt: skip
        require_free(cursor, new, verb)
        catalog.enter(cursor, new, verb, catalog.look_for_name(cursor, new), by=by, heir_of=tenant)
        if verb is Verb.ADOPT:
            cursor.execute(f"CREATE SCHEMA IF NOT EXISTS {quote(new)}")
            for table in OUR_TABLES:
                cursor.execute(f"ALTER TABLE {quote(old)}.{table} SET SCHEMA {quote(new)}")
            roles.isolate_new(cursor, new, database.isolation)
        else:
            cursor.execute(f"ALTER SCHEMA {quote(old)} RENAME TO {quote(new)}")
            roles.rename(cursor, old, new)
            logins.hand_over(cursor, old, new)
        busy.hand_over(cursor, old, new)
        unring_all(cursor, new)
        rewrite_all(cursor, new, old, rewrite)
        move_to(
            cursor, tenant, TenantState.REMOVED, by=by, unfinished=verb, moved_to=new, refuses_submits=False
        )
        audit.record(
            cursor,
            old,
            verb,
            "moved",
            epoch=tenant.epoch,
            by=by,
            detail=f"to {new}, {left}",
        )
    return True


def plan(database: Database, name: str, new: str) -> Inventory:
    """Say what of a schema is ours and would move, and which relations of others would stay.

    Raises:
        InvalidTenantName, TenantStateRefused: somebody has the new name.
    """
    with database.transaction() as cursor:
        require_free(cursor, new, Verb.ADOPT)
        there = catalog.look_for_name(cursor, new)
        if there is not None:
            entering(Verb.ADOPT, there.standing)
        moves = {}
        for table in OUR_TABLES:
            cursor.execute(f"SELECT count(*) FROM {quote(name)}.{table}")
            moves[table] = _one(cursor)
        left = count_open(cursor, name)
        cursor.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace(%s) AND relname <> ALL (%s)"
            " AND relkind IN ('r', 'p', 'v', 'm', 'f') ORDER BY relname",
            (quote(name), list(OUR_TABLES)),
        )
        stays = tuple(row[0] for row in cursor.fetchall())
    return Inventory(moves=moves, left=left, stays=stays)


def unring_all(cursor: Cursor, name: str) -> None:
    """Have the polls ring for all rows that wait: their messages are in a queue of another name, or in none."""
    _UNRING_ALL.execute(cursor, name)


def require_free(cursor: Cursor, new: str, verb: Verb) -> None:
    """Do nothing if a schema of this name, or for an adoption tables of ours in it, are not there.

    Raises:
        TenantStateRefused: they are.
    """
    # Tables of the user's may be in the schema already that ours are adopted into; a renamed one must not be there.
    free = f"{quote(new)}.cloacina_executions" if verb is Verb.ADOPT else quote(new)
    function = "to_regclass" if verb is Verb.ADOPT else "to_regnamespace"
    cursor.execute(f"SELECT {function}(%s) IS NULL", (free,))
    if not _one(cursor):
        raise TenantStateRefused(
            new, "in use already, as a tenant or as somebody's schema", verb, "choose a name that is free"
        )


def rewrite_all(cursor: Cursor, tenant: str, old: str, rewrite: Rewrite) -> None:
    """Have the messages of rows that wait, and that name the tenant by its old name, written anew."""
    last = ""
    while True:
        _NAMING.execute(cursor, tenant, last, f'"{old}"', BATCH)
        rows = cursor.fetchall()
        for execution_id, message in rows:
            rewritten = rewrite(message)
            if rewritten != message:
                _REWRITE.execute(cursor, tenant, execution_id, rewritten)
        if len(rows) < BATCH:
            return
        last = rows[-1][0]


def _one(cursor: Cursor) -> Any:
    row = cursor.fetchone()
    return None if row is None else row[0]
