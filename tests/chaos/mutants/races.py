"""Statements replaced in place, and pauses inside the two transactions that others race with."""

from __future__ import annotations

import dataclasses
from typing import Any

from cloacina_celery.store import executions, recovery
from cloacina_celery.store.statements import Statement

CLAIM_PAUSE = 0.05
SWEEP_PAUSE = 0.6
"""Seconds, longer than the time between two polls of two workers."""


def replaced(statement: Statement, *changes: tuple[str, str]) -> Statement:
    """Return the statement with parts of its text replaced.

    Raises:
        ValueError: it does not contain one of them any more: the mutation has to be written anew.
    """
    sql = statement.sql
    for old, new in changes:
        if old not in sql:
            raise ValueError(f"statement {statement.name} does not contain {old!r}")
        sql = sql.replace(old, new)
    return dataclasses.replace(statement, sql=sql)


def widen_claim() -> None:
    """Have each claim read the row a moment before it writes it."""
    claim: Any = executions.claim

    def slow(cursor: Any, tenant: str, execution_id: str, **options: Any) -> Any:
        cursor.execute(
            f'SELECT pg_sleep(%s) FROM "{tenant}".cloacina_executions WHERE id = %s',
            (CLAIM_PAUSE, execution_id),
        )
        return claim(cursor, tenant, execution_id, **options)

    executions.claim = slow


def widen_sweep() -> None:
    """Have each recovery look at the orphans a moment before it moves them on."""
    recover: Any = recovery.recover

    def slow(cursor: Any, *args: Any, **options: Any) -> Any:
        cursor.execute("SELECT pg_sleep(%s)", (SWEEP_PAUSE,))
        return recover(cursor, *args, **options)

    recovery.recover = slow
