"""The catalog of tenants: who exists, and how one comes to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cloacina_celery.core.tenancy import KNOWN_FOR, Standing, TenantState, Verb, entering
from cloacina_celery.core.tenant import LEGACY_TENANT, quote, validate_tenant_name
from cloacina_celery.errors import InvalidTenantName, IsolationRefused, UnknownTenant
from cloacina_celery.store import audit, busy, migrate, roles
from cloacina_celery.store.bounded import bound
from cloacina_celery.store.database import Cursor, Database
from cloacina_celery.store.driver_errors import InvalidSchemaName, LockNotAvailable, UndefinedTable

HAND_OVER_LOCK_TIMEOUT_MS = 5000
"""For how long the hand-over of a tenant's tables waits for those who use them: they wait behind it."""

NOBODY = "cloacina_celery"
"""Who is entered in the audit where nobody was named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One row of the catalog."""

    name: str
    is_legacy: bool
    created_at: datetime
    state: TenantState
    refuses_submits: bool
    epoch: int
    retain_succeeded: float | None
    retain_failed: float | None
    unfinished: Verb | None
    moved_to: str | None
    key_space: str | None
    changed_at: datetime
    changed_by: str | None
    revision: str | None

    @property
    def standing(self) -> Standing:
        """What matters to those that work for the tenant."""
        return Standing(
            name=self.name, state=self.state, epoch=self.epoch, refuses_submits=self.refuses_submits,
            unfinished=self.unfinished, moved_to=self.moved_to, inherited_key_space=self.key_space,
        )  # fmt: skip


_COLUMNS = tuple(Tenant.__dataclass_fields__)
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM cloacina.tenants"


def names(database: Database) -> list[str]:
    """List the names of all tenants that exist; none where nothing was ever created."""
    return [tenant.name for tenant in tenants(database)]


def tenants(database: Database, *, with_removed: bool = False) -> list[Tenant]:
    """List the tenants that exist by name, and on request the tombstones of removed ones."""
    condition = "" if with_removed else " WHERE state <> 'removed'"
    with database.statement() as cursor:
        try:
            cursor.execute(f"{_SELECT}{condition} ORDER BY name")
        except UndefinedTable:
            return []
        return [_tenant(row) for row in cursor.fetchall()]


def find(database: Database, name: str) -> Tenant | None:
    """Return a tenant's row, or its tombstone; ``None`` where there never was one."""
    return find_all(database, [name]).get(name)


def find_all(database: Database, wanted: Sequence[str]) -> dict[str, Tenant]:
    """Return the rows and tombstones of these names, by name, in one statement."""
    with database.statement() as cursor:
        try:
            cursor.execute(f"{_SELECT} WHERE name = ANY(%s)", (list(wanted),))
        except UndefinedTable:
            return {}
        return {row[0]: _tenant(row) for row in cursor.fetchall()}


def exists(database: Database, name: str) -> bool:
    """Tell whether a tenant of exactly this name exists."""
    found = find(database, name)
    return found is not None and found.standing.exists


def require(cursor: Cursor, name: str) -> None:
    """Do nothing if a tenant exists, as this connection sees it now.

    Raises:
        UnknownTenant: there is none, or it was removed.
    """
    cursor.execute("SELECT state = 'removed', moved_to FROM cloacina.tenants WHERE name = %s", (name,))
    row = cursor.fetchone()
    if row is None or row[0]:
        raise UnknownTenant(name, removed=row is not None, moved_to=row[1] if row else None)


def open_tables(cursor: Cursor, name: str) -> None:
    """Let nobody drop or move a tenant's tables until the transaction ends; if it has none, do nothing.

    For whoever needs the tenant's row and its tables: the table comes before the row, as for those who remove it.

    Raises:
        UnknownTenant: they were dropped or moved while this waited.
    """
    table = f"{quote(name)}.cloacina_executions"
    cursor.execute("SELECT to_regclass(%s)", (table,))
    if cursor.fetchone() != (None,):
        try:
            cursor.execute(f"LOCK TABLE {table} IN ROW EXCLUSIVE MODE")
        except (UndefinedTable, InvalidSchemaName) as error:
            raise UnknownTenant(name, removed=True) from error


def lock(cursor: Cursor, name: str) -> Tenant:
    """Lock a tenant's row for the transaction, so that one verb at a time acts on it.

    Raises:
        UnknownTenant: there never was one of this name.
    """
    try:
        cursor.execute(f"{_SELECT} WHERE name = %s FOR UPDATE", (name,))
    except UndefinedTable as error:
        raise UnknownTenant(name) from error
    row = cursor.fetchone()
    if row is None:
        raise UnknownTenant(name)
    return _tenant(row)


def create(database: Database, name: str, *, legacy: bool = False, by: str = NOBODY) -> bool:
    """Make the tenant exist at our revision, and tell whether it is new.

    Row, schema and tables come in one transaction: after a crash there is all of it or nothing.
    A schema of that name that is there already is adopted; what is in it stays.
    The name of a removed tenant begins anew, with the next epoch.

    Raises:
        InvalidTenantName: the name breaks the rule, or a tenant differs from it only in case.
        SchemaMismatch: the tenant exists at another revision.
        TenantStateRefused: a removal of that name has not been finished.
    """
    validate_tenant_name(name, allow_legacy=legacy)
    migrate.ensure_catalog(database)
    if exists(database, name):
        with database.statement() as cursor:
            migrate.check(cursor, name, "tenant")
        return False
    outlive_stale_knowledge(database, name)
    with database.engine.begin() as connection:
        migrate.lock(connection)
        cursor = connection.connection.cursor()
        if (there := look_for_name(cursor, name)) is not None and there.standing.exists:
            return False
        enter(cursor, name, Verb.CREATE, there, by=by)
        migrate.upgrade(connection, name, "tenant")
        roles.isolate_new(cursor, name, database.isolation)
        # Whoever has marked the removed one of this name lately will not do so again for a while.
        busy.hand_over(cursor, name, name)
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


def look_for_name(cursor: Cursor, name: str) -> Tenant | None:
    """Return who has a name or had it last. Needs the migration lock, so that nobody else takes it meanwhile.

    Raises:
        InvalidTenantName: somebody has one that differs only in case.
    """
    cursor.execute(f"{_SELECT} WHERE lower(name) = lower(%s) FOR UPDATE", (name,))
    row = cursor.fetchone()
    if row is not None and row[0] != name:
        raise InvalidTenantName(
            name, f"tenant {row[0]!r} exists and differs only in case; choose another name"
        )
    return None if row is None else _tenant(row)


def enter(
    cursor: Cursor,
    name: str,
    verb: Verb,
    there: Tenant | None,
    *,
    by: str,
    heir_of: Tenant | None = None,
    key_space: str | None = None,
) -> TenantState:
    """Enter a tenant that a verb brings into being, under an epoch of its own, and return its state.

    Args:
        there: what `look_for_name` found.
        heir_of: the tenant that moves to this name, with its settings, limits and idempotency keys.
        key_space: what its idempotency keys were counted by where it comes from.

    Raises:
        TenantStateRefused: the name is in use.
    """
    never_was = Standing(name=name, state=TenantState.REMOVED)
    if heir_of is not None:
        key_space = heir_of.standing.key_space
    state = entering(verb, there.standing if there else never_was)
    cursor.execute(
        """
        INSERT INTO cloacina.tenants AS tenants
            (name, is_legacy, state, epoch, changed_by, key_space, retain_succeeded, retain_failed, revision,
             max_concurrent_tasks, max_rate, is_paused, weight, limits_changed_at)
        SELECT %s, %s, %s, 1, %s, %s, heir.retain_succeeded, heir.retain_failed, heir.revision,
               heir.max_concurrent_tasks, heir.max_rate, coalesce(heir.is_paused, false), coalesce(heir.weight, 1),
               clock_timestamp()
        FROM (SELECT %s::text AS name) AS wanted LEFT JOIN cloacina.tenants heir USING (name)
        ON CONFLICT (name) DO UPDATE SET
            is_legacy = excluded.is_legacy, state = excluded.state, epoch = tenants.epoch + 1, created_at = now(),
            refuses_submits = false, retain_succeeded = excluded.retain_succeeded,
            retain_failed = excluded.retain_failed, key_space = excluded.key_space, recovery_paced_until = NULL,
            revision = excluded.revision, unfinished = NULL, moved_to = NULL,
            max_concurrent_tasks = excluded.max_concurrent_tasks, max_rate = excluded.max_rate,
            is_paused = excluded.is_paused, weight = excluded.weight,
            limits_changed_at = excluded.limits_changed_at,
            changed_at = now(), changed_by = excluded.changed_by
        RETURNING epoch
        """,
        (name, name == LEGACY_TENANT, state, by, key_space, heir_of and heir_of.name),
    )
    row = cursor.fetchone()
    detail = f"as {state}" + (f", from {heir_of.name}" if heir_of else "")
    audit.record(cursor, name, verb, "entered", epoch=row[0] if row else None, by=by, detail=detail)
    return state


def outlive_stale_knowledge(database: Database, name: str) -> None:
    """Wait until no process believes any more what it read of a tenant before it was removed.

    What they still send for it then finds nothing, or meets another epoch than its own.
    """
    with database.statement() as cursor:
        cursor.execute(
            "SELECT pg_sleep(extract(epoch FROM changed_at - clock_timestamp()) + %s)"
            " FROM cloacina.tenants WHERE name = %s AND state = 'removed'"
            " AND changed_at > clock_timestamp() - make_interval(secs => %s)",
            (KNOWN_FOR, name, KNOWN_FOR),
        )


def revisions(database: Database) -> list[tuple[str, str | None]]:
    """List each tenant with the revision its schema is at."""
    found = []
    for tenant in names(database):
        with database.statement() as cursor:
            found.append((tenant, migrate.revision_of(cursor, tenant)))
    return found


def _tenant(row: tuple[Any, ...]) -> Tenant:
    values = dict(zip(_COLUMNS, row, strict=True))
    values["state"] = TenantState(values["state"])
    if values["unfinished"] is not None:
        values["unfinished"] = Verb(values["unfinished"])
    return Tenant(**values)
