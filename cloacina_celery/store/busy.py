"""Hints of which tenants may have work, so that a sweep's cost follows the work and not the tenants.

A hint is written beside the rows and not with them: a row of the catalog that each submission writes would make
all submissions of a tenant wait for the longest transaction among them. So a hint may be missing, for a row whose
transaction was open for very long, and whoever relies on hints looks at all tenants now and then.
"""

from __future__ import annotations

from cloacina_celery.core.tenant import quote
from cloacina_celery.store.database import Cursor, note_met

MARK_INTERVAL = 60.0
"""Seconds after which a process that goes on submitting for a tenant marks it anew."""

IDLE_AFTER = 300.0
"""Seconds that a mark holds at the least: several intervals, so that no mark is taken away which is relied upon."""


def mark(cursor: Cursor, tenant: str) -> None:
    """Note that the tenant may have work. Its commit need not reach the disk."""
    cursor.execute(
        """
        WITH marked AS (
            INSERT INTO cloacina.busy AS b (tenant) VALUES (%s)
            ON CONFLICT (tenant) DO UPDATE SET marked_at = now()
            WHERE b.marked_at < now() - make_interval(secs => %s)
            RETURNING tenant
        )
        SELECT set_config('synchronous_commit', 'off', true) FROM marked
        """,
        (tenant, MARK_INTERVAL / 2),
    )


def unmark(cursor: Cursor, tenant: str) -> None:
    """Take the mark of a tenant away that is no more."""
    cursor.execute("DELETE FROM cloacina.busy WHERE tenant = %s", (tenant,))


def hand_over(cursor: Cursor, old: str, new: str) -> None:
    """Mark a tenant under its new name, as durably as the transaction that moves it."""
    unmark(cursor, old)
    cursor.execute("INSERT INTO cloacina.busy (tenant) VALUES (%s) ON CONFLICT DO NOTHING", (new,))


def marked(cursor: Cursor) -> frozenset[str]:
    """Return the tenants that may have work."""
    cursor.execute("SELECT tenant FROM cloacina.busy")
    return frozenset(row[0] for row in cursor.fetchall())


def old(cursor: Cursor, *, limit: int) -> list[str]:
    """Return tenants whose mark is so old that it is to be looked at, the oldest first."""
    cursor.execute(
        "SELECT tenant FROM cloacina.busy WHERE marked_at < now() - make_interval(secs => %s)"
        " ORDER BY marked_at LIMIT %s",
        (IDLE_AFTER, limit),
    )
    return [tenant for (tenant,) in cursor.fetchall()]


def renew_or_remove(cursor: Cursor, tenant: str) -> bool:
    """Renew an old mark if a sweep may yet have something to move there, else remove it; tell whether it stays.

    A tenant that is gone has nothing, and its mark goes.
    """
    s = quote(tenant)
    note_met(cursor, tenant)
    cursor.execute("SELECT to_regclass(%s)", (f"{s}.cloacina_executions",))
    if cursor.fetchone() != (None,):
        cursor.execute(
            f"""
            SELECT EXISTS (SELECT FROM {s}.cloacina_executions WHERE state = 'pending' AND rung_at IS NULL)
                OR EXISTS (SELECT FROM {s}.cloacina_executions WHERE state = 'pending' AND rung_at IS NOT NULL)
                OR EXISTS (SELECT FROM {s}.cloacina_executions WHERE state = 'running')
                OR EXISTS (SELECT FROM {s}.cloacina_outbox)
            """
        )
        if cursor.fetchone() == (True,):
            cursor.execute("UPDATE cloacina.busy SET marked_at = now() WHERE tenant = %s", (tenant,))
            return True
    # Whoever marked it since we looked keeps it.
    cursor.execute(
        "DELETE FROM cloacina.busy WHERE tenant = %s AND marked_at < now() - make_interval(secs => %s)",
        (tenant, IDLE_AFTER),
    )
    return False
