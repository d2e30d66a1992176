"""What an operator does to a tenant that stays: suspend, resume, drain, set."""

from __future__ import annotations

from dataclasses import dataclass

from cloacina_celery.core.tenancy import TenantState, Verb, after
from cloacina_celery.core.tenant import quote
from cloacina_celery.core.words import counted
from cloacina_celery.store import audit, catalog
from cloacina_celery.store.bounded import bounded_transaction
from cloacina_celery.store.database import Cursor, Database
from cloacina_celery.store.guards import may
from cloacina_celery.store.statements import Statement

LOCK_TIMEOUT_MS = 10_000
"""How long a verb waits for another on the same tenant, or for a transaction in its tables."""

CLAIMS_TAKE = 2.0
"""Seconds after which what still writes a tenant's rows is no claim: one takes milliseconds."""

# Only a claim is answered by the tenant's state, and a claim that began before the state changed saw the old one.
_WRITERS = """
    SELECT coalesce(array_agg(virtualtransaction), '{}') FROM pg_locks
    WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND relation = to_regclass(%s)
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""

_GIVE_BACK = Statement(
    "give_back",
    f"""
    WITH released AS (
        UPDATE {{s}}.cloacina_executions
        SET state = 'pending', releases = releases + 1, lease_expires_at = NULL, run_at = now(), rung_at = NULL
        WHERE {may("give back")}
        RETURNING id, attempt, worker_id
    ), recorded AS (
        INSERT INTO {{s}}.cloacina_events (execution_id, kind, attempt, worker_id, reason)
        SELECT id, 'released', attempt, worker_id, $1::text FROM released
    )
    SELECT count(*) FROM released
    """,
)
_COUNT_OPEN = Statement(
    "count_open",
    """
    SELECT (SELECT count(*) FROM {s}.cloacina_executions WHERE state = 'pending' AND rung_at IS NULL)
         + (SELECT count(*) FROM {s}.cloacina_executions WHERE state = 'pending' AND rung_at IS NOT NULL),
           (SELECT count(*) FROM {s}.cloacina_executions WHERE state = 'running'),
           (SELECT count(*) FROM {s}.cloacina_outbox)
    """,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What a tenant has that has not ended: executions, and letters in its outbox; false if there is nothing."""

    pending: int
    running: int
    letters: int

    def __bool__(self) -> bool:
        return self.pending + self.running + self.letters > 0

    def __str__(self) -> str:
        waiting = counted(self.pending, "execution waits", "executions wait")
        running = counted(self.running, "runs", "run")
        letters = counted(self.letters, "letter is to be sent", "letters are to be sent")
        return f"{waiting}, {running}" + (f", {letters}" if self.letters else "")


def suspend(database: Database, name: str, *, by: str, refuse_submits: bool = False) -> bool:
    """Let nothing new start: when this returns, every claim that came before it is committed.

    Args:
        refuse_submits: whether submissions are refused; else their rows wait.

    Raises:
        UnknownTenant: there is none, or it was removed.
    """
    is_change = _change(database, name, Verb.SUSPEND, by=by, refuses_submits=refuse_submits)
    _outwait_claims(database, name)
    return is_change


def resume(database: Database, name: str, *, by: str) -> bool:
    """Let executions start again; rows that waited are rung by the polls, oldest first.

    Raises:
        UnknownTenant: there is none, or it was removed.
    """
    return _change(database, name, Verb.RESUME, by=by, refuses_submits=False)


def drain(database: Database, name: str, *, by: str) -> bool:
    """Refuse submissions, and let what is there run to its end.

    Raises:
        UnknownTenant: there is none, or it was removed.
    """
    return _change(database, name, Verb.DRAIN, by=by, refuses_submits=True)


def give_back(database: Database, name: str, *, by: str) -> int:
    """Give back what runs in a suspended tenant, and return how many; no budget is spent.

    The attempts' fences are closed with it: what they still do is rolled back.
    """
    with bounded_transaction(database, lock_timeout_ms=LOCK_TIMEOUT_MS) as cursor:
        catalog.open_tables(cursor, name)
        tenant = catalog.lock(cursor, name)
        if tenant.state is not TenantState.SUSPENDED:
            return 0  # somebody resumed it meanwhile
        count = give_back_all(cursor, name, f"the tenant was suspended by {by}")
        if count:
            audit.record(
                cursor, name, Verb.SUSPEND, "given back", epoch=tenant.epoch, by=by, detail=f"{count} running"
            )
    return count


def give_back_all(cursor: Cursor, name: str, reason: str) -> int:
    """Make all that runs in a tenant pending again, and return how many."""
    _GIVE_BACK.execute(cursor, name, reason)
    row = cursor.fetchone()
    return int(row[0]) if row else 0


def count_open(cursor: Cursor, name: str) -> Left:
    """Count what of a tenant has not ended, over small indexes."""
    _COUNT_OPEN.execute(cursor, name)
    pending, running, letters = cursor.fetchone() or (0, 0, 0)
    return Left(pending=pending, running=running, letters=letters)


def set_retention(database: Database, name: str, changes: dict[str, float | None], *, by: str) -> bool:
    """Give a tenant times of its own for what has ended, or with ``None`` those of the app again.

    Args:
        changes: seconds by column, ``retain_succeeded`` or ``retain_failed``; 0 is for ever.

    Raises:
        UnknownTenant: there is none, or it was removed.
    """
    with bounded_transaction(database, lock_timeout_ms=LOCK_TIMEOUT_MS) as cursor:
        tenant = catalog.lock(cursor, name)
        after(Verb.SET, tenant.standing)
        wanted = {column: value for column, value in changes.items() if getattr(tenant, column) != value}
        for column, value in wanted.items():
            cursor.execute(f"UPDATE cloacina.tenants SET {column} = %s WHERE name = %s", (value, name))
        if wanted:
            said = ", ".join(f"{c} = {'the setting' if v is None else f'{v:g} s'}" for c, v in wanted.items())
            audit.record(cursor, name, Verb.SET, "set", epoch=tenant.epoch, by=by, detail=said)
    return bool(wanted)


def move_to(
    cursor: Cursor, tenant: catalog.Tenant, state: TenantState, *, by: str, **columns: object
) -> None:
    """Enter a state, and who put the tenant there; ``columns`` change with it."""
    values = {**columns, "state": state, "changed_by": by}
    assigned = ", ".join(f"{column} = %s" for column in values)
    cursor.execute(
        f"UPDATE cloacina.tenants SET {assigned}, changed_at = clock_timestamp() WHERE name = %s",
        (*values.values(), tenant.name),
    )


def _change(database: Database, name: str, verb: Verb, *, by: str, refuses_submits: bool) -> bool:
    with bounded_transaction(database, lock_timeout_ms=LOCK_TIMEOUT_MS) as cursor:
        tenant = catalog.lock(cursor, name)
        state = after(verb, tenant.standing)
        if state is tenant.state and refuses_submits == tenant.refuses_submits:
            return False
        move_to(cursor, tenant, state, by=by, refuses_submits=refuses_submits)
        audit.record(
            cursor, name, verb, str(state), epoch=tenant.epoch, by=by,
            detail=f"from {tenant.state}; submissions are {'refused' if refuses_submits else 'taken'}",
        )  # fmt: skip
    return True


def _outwait_claims(database: Database, name: str) -> None:
    table = f"{quote(name)}.cloacina_executions"
    with database.statement() as cursor:
        waited, pause = 0.0, 0.02
        writers: set[str] | None = None
        while writers is None or (writers and waited < CLAIMS_TAKE):
            # Also before the first look: a claim that has its snapshot takes its lock a moment later.
            cursor.execute("SELECT pg_sleep(%s)", (pause,))
            waited += pause
            cursor.execute(_WRITERS, (table,))
            row = cursor.fetchone()
            now = set(row[0]) if row else set()
            writers = now if writers is None else writers & now
