"""Drop: a tenant's schema goes in one transaction, and a tombstone with its epoch stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cloacina_celery.core.tenancy import TenantState, Verb, after
from cloacina_celery.core.tenant import LEGACY_TENANT, quote
from cloacina_celery.errors import TenantStateRefused
from cloacina_celery.store import audit, busy, catalog, logins, migrate, roles
from cloacina_celery.store.bounded import bounded_transaction
from cloacina_celery.store.database import Cursor, Database
from cloacina_celery.store.driver_errors import DeadlockDetected, LockNotAvailable
from cloacina_celery.store.tenancy import LOCK_TIMEOUT_MS, count_open, move_to

LONG = 1.0
"""Seconds after which a transaction in the tables of a tenant that is to go is not waited for."""

TRIES = 3

OUR_TABLES = (
    "cloacina_executions",
    "cloacina_events",
    "cloacina_chords",
    "cloacina_outbox",
    "cloacina_pace",
    migrate.VERSION_TABLE,
)


def remove(
    database: Database, name: str, *, by: str, with_work: bool = False, lock_timeout_ms: int = LOCK_TIMEOUT_MS
) -> int:
    """Drop the tenant's schema, of the legacy tenant only our own tables, and leave a tombstone.

    It is all in one transaction: whoever submits or claims comes before it, and is seen, or finds no table.
    Done again after a crash it does nothing; `confirm` is what ends the verb.

    Args:
        with_work: also if executions have not ended; they are gone with it.

    Returns:
        How many executions had not ended.

    Raises:
        TenantStateRefused: some have not, or a transaction in the tenant's tables does not end.
        UnknownTenant: there never was such a tenant.
    """
    with in_use(name, Verb.DROP), database.engine.begin() as connection:
        cursor = connection.connection.cursor()
        migrate.lock(connection)
        cursor.execute(f"SET LOCAL lock_timeout = {lock_timeout_ms}")
        # Table before catalog row, the order in which a reaper comes to them too.
        shut(cursor, name)
        tenant = catalog.lock(cursor, name)
        if after(Verb.DROP, tenant.standing) is tenant.state:
            return 0
        lost = count_open(cursor, name)
        if lost and not with_work:
            raise TenantStateRefused(
                name, tenant.state, Verb.DROP,
                f"{lost}. `tenant drain {name} --wait` says when they have, "
                "--now drops them too",
            )  # fmt: skip
        drop_schema(cursor, name)
        move_to(
            cursor, tenant, TenantState.REMOVED, by=by, unfinished=Verb.DROP, refuses_submits=False,
            retain_succeeded=None, retain_failed=None, recovery_paced_until=None,
        )  # fmt: skip
        audit.record(
            cursor, name, Verb.DROP, "schema dropped", epoch=tenant.epoch, by=by,
            detail=f"with what was left: {lost}" if lost else "nothing was left",
        )  # fmt: skip
        return lost.pending + lost.running


def remove_now(database: Database, name: str, *, by: str) -> int:
    """Do as `remove` with work that has not ended, and end the transactions that stand in its way.

    Raises:
        TenantStateRefused: some do not end; they are not ours to end.
    """
    for _ in range(TRIES):
        try:
            return remove(database, name, by=by, with_work=True, lock_timeout_ms=int(LONG * 1000))
        except TenantStateRefused:
            end_transactions(database, name, by=by)
    return remove(database, name, by=by, with_work=True)


def end_transactions(database: Database, name: str, *, by: str) -> int:
    """End the transactions that keep a tenant's tables from being dropped, and return how many.

    Such as that of a task whose tenant is dropped while it runs: it has lost its execution, and may not know yet.
    """
    with database.transaction() as cursor:
        tenant = catalog.lock(cursor, name)
        cursor.execute(
            """
            SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
            WHERE pid <> pg_backend_pid() AND xact_start < clock_timestamp() - make_interval(secs => %s) AND pid IN (
                SELECT l.pid FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
                WHERE c.relnamespace = to_regnamespace(%s)
                  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()))
            """,
            (LONG, quote(name)),
        )
        row = cursor.fetchone()
        count = int(row[0]) if row else 0
        if count:
            audit.record(
                cursor,
                name,
                Verb.DROP,
                "transactions ended",
                epoch=tenant.epoch,
                by=by,
                detail=f"{count} of them",
            )
    return count


def drop_schema(cursor: Cursor, name: str) -> None:
    """Drop what is a tenant's in the database."""
    busy.unmark(cursor, name)
    if name == LEGACY_TENANT:
        for table in OUR_TABLES:
            cursor.execute(f"DROP TABLE IF EXISTS {quote(name)}.{table}")
    else:
        cursor.execute(f"DROP SCHEMA IF EXISTS {quote(name)} CASCADE")
        logins.drop_all(cursor, name)
        roles.drop(cursor, name)


def is_gone(cursor: Cursor, name: str) -> bool:
    """Tell whether nothing of the tenant's is left in the database."""
    if name == LEGACY_TENANT:
        cursor.execute("SELECT to_regclass(%s) IS NULL", (f"{quote(name)}.cloacina_executions",))
    else:
        cursor.execute("SELECT to_regnamespace(%s) IS NULL", (quote(name),))
    row = cursor.fetchone()
    return bool(row and row[0])


def confirm(database: Database, name: str, verb: Verb, *, by: str, detail: str) -> bool:
    """End a verb that left a tombstone: all else that it had to do is done and was verified.

    Returns:
        Whether that is news.
    """
    with bounded_transaction(database, lock_timeout_ms=LOCK_TIMEOUT_MS) as cursor:
        tenant = catalog.lock(cursor, name)
        if tenant.unfinished is not verb:
            return False
        cursor.execute("UPDATE cloacina.tenants SET unfinished = NULL WHERE name = %s", (name,))
        audit.record(cursor, name, verb, "gone", epoch=tenant.epoch, by=by, detail=detail)
    return True


def forget(cursor: Cursor, names: Sequence[str]) -> None:
    """Delete the tombstones of tenants whose names nobody has known or will use; the audit keeps what was done."""
    cursor.execute("DELETE FROM cloacina.tenants WHERE name = ANY(%s) AND state = 'removed'", (list(names),))


def shut(cursor: Cursor, name: str) -> None:
    """Keep everybody out of the tenant's rows until the transaction ends; wait for those who are in."""
    table = f"{quote(name)}.cloacina_executions"
    cursor.execute("SELECT to_regclass(%s)", (table,))
    if cursor.fetchone() != (None,):
        cursor.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")


@contextmanager
def in_use(name: str, verb: Verb) -> Iterator[None]:
    """Say what to do about a lock that is not to be had.

    Raises:
        TenantStateRefused: it was waited for as long as the transaction in the block would.
    """
    try:
        yield
    except (LockNotAvailable, DeadlockDetected) as error:
        raise TenantStateRefused(
            name, "in use", verb,
            "a transaction in its tables does not end. pg_stat_activity shows whose; end it, and do this again",
        ) from error  # fmt: skip
