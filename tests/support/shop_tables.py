"""The tables through which the shop's tasks and the tests see each other, in the tenant's own schema.

`runs` is the log of starts, written outside every transaction of the plugin, so that a killed task still
leaves its mark. `gates` holds the keys that a test has released. `notes` takes effects that must commit with
the settlement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg2 import extensions, sql

from tests.support.databases import connect
from tests.support.waiting import PATIENCE, eventually

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

TABLES = """
CREATE TABLE IF NOT EXISTS {schema}.runs (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    key text NOT NULL,
    execution_id text NOT NULL,
    attempt integer NOT NULL,
    is_recovery boolean NOT NULL,
    pid integer NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE IF NOT EXISTS {schema}.gates (key text PRIMARY KEY);
CREATE TABLE IF NOT EXISTS {schema}.notes (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    text text NOT NULL,
    attempt integer NOT NULL
);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One start of a task, as the task itself saw it; `started_at` is the database's clock."""

    key: str
    execution_id: str
    attempt: int
    is_recovery: bool
    pid: int
    started_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One committed effect of a task."""

    text: str
    attempt: int


def prepare_shop(database_url: str, tenant: str) -> None:
    """Create the shop's tables in a tenant's schema, where they are not there yet.

    Raises:
        psycopg2.errors.InvalidSchemaName: the tenant does not exist; creating it is the product's work, not
            ours.
    """
    conn = connect(database_url)
    try:
        with conn.cursor() as cursor:
            cursor.execute(sql.SQL(TABLES).format(schema=sql.Identifier(tenant)))
    finally:
        conn.close()


def record_run(
    conn: extensions.connection,
    tenant: str,
    run_key: str,
    *,
    execution_id: str,
    attempt: int,
    is_recovery: bool,
    pid: int,
) -> None:
    """Write one start, committed at once."""
    _execute(
        conn,
        "INSERT INTO {schema}.runs (key, execution_id, attempt, is_recovery, pid)"
        " VALUES (%s, %s, %s, %s, %s)",
        tenant,
        (run_key, execution_id, attempt, is_recovery, pid),
    )


def runs(conn: extensions.connection, tenant: str, key: str) -> list[Run]:
    """Return the starts with this key, the first one first."""
    rows = _fetch(
        conn,
        "SELECT key, execution_id, attempt, is_recovery, pid, started_at FROM {schema}.runs"
        " WHERE key = %s ORDER BY number",
        tenant,
        (key,),
    )
    return [
        Run(
            key=row[0], execution_id=row[1], attempt=row[2], is_recovery=row[3], pid=row[4], started_at=row[5]
        )
        for row in rows
    ]


def wait_for_runs(
    conn: extensions.connection, tenant: str, key: str, number: int, timeout: float = PATIENCE
) -> list[Run]:
    """Return the starts with this key as soon as there are `number` of them or more.

    Raises:
        AssertionError: there were fewer after `timeout` seconds.
    """

    def enough() -> list[Run]:
        seen = runs(conn, tenant, key)
        return seen if len(seen) >= number else []

    return eventually(enough, timeout, f"{number} starts of {key!r} in {tenant}")


def open_gate(conn: extensions.connection, tenant: str, key: str) -> None:
    """Release every task of the tenant that waits, or ever will wait, at this key."""
    _execute(conn, "INSERT INTO {schema}.gates (key) VALUES (%s) ON CONFLICT DO NOTHING", tenant, (key,))


def gate_is_open(conn: extensions.connection, tenant: str, key: str) -> bool:
    """Whether a test has released this key."""
    return bool(_fetch(conn, "SELECT 1 FROM {schema}.gates WHERE key = %s", tenant, (key,)))


def notes(conn: extensions.connection, tenant: str) -> list[Note]:
    """Return the committed effects, the first one first."""
    rows = _fetch(conn, "SELECT text, attempt FROM {schema}.notes ORDER BY number", tenant, ())
    return [Note(text=row[0], attempt=row[1]) for row in rows]


def _execute(conn: extensions.connection, statement: str, tenant: str, params: Sequence[Any]) -> None:
    with conn.cursor() as cursor:
        cursor.execute(sql.SQL(statement).format(schema=sql.Identifier(tenant)), params)


def _fetch(
    conn: extensions.connection, statement: str, tenant: str, params: Sequence[Any]
) -> list[tuple[Any, ...]]:
    with conn.cursor() as cursor:
        cursor.execute(sql.SQL(statement).format(schema=sql.Identifier(tenant)), params)
        rows: list[tuple[Any, ...]] = cursor.fetchall()
    return rows
