"""The app of the isolation tests: tasks that say where they are, and tasks that leave traces behind."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from celery import Celery
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from cloacina_celery import Cloacina, CloacinaError, RetryPolicy

app = Celery("isolated", broker=os.environ["CLOACINA_BROKER_URL"])
cloacina = Cloacina(app, database_url=os.environ["CLOACINA_DATABASE_URL"])
ONCE = RetryPolicy(max_attempts=1)
SCHEMAS = text("SELECT current_schemas(true)")
"""With the connection's schema of temporary tables, which stays, empty, once there was one: `marks` shows it."""


def seen_by(session: Session) -> list[Any]:
    """Return the path, the schemas that it means, and whose table the plain name `marks` is."""
    return [
        session.execute(text("SHOW search_path")).scalar_one(),
        [name for name in session.execute(SCHEMAS).scalar_one() if not name.startswith("pg_temp_")],
        session.execute(text("SELECT whose FROM marks")).scalar_one(),
    ]


@cloacina.task(name="isolated.look", retry=ONCE)
def look() -> dict[str, Any]:
    """Say where the task is at each point of its session's life."""
    with cloacina.session() as session:
        seen = {"at first": seen_by(session)}
        session.commit()
        seen["after a commit"] = seen_by(session)
        with session.begin_nested():
            seen["in a savepoint"] = seen_by(session)
            savepoint = session.begin_nested()
            session.execute(text("SET LOCAL search_path = public"))
            savepoint.rollback()
            seen["after a savepoint was rolled back"] = seen_by(session)
        session.rollback()
        seen["after a rollback"] = seen_by(session)
    with cloacina.session() as session:
        seen["in a second block"] = seen_by(session)
        pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
    return {"seen": seen, "tenant": cloacina.current_tenant(), "backend": pid}


@cloacina.task(name="isolated.leave_traces", retry=ONCE)
def leave_traces() -> int:
    """Leave on the connection what outlives a transaction, and say which connection it was."""
    with cloacina.session() as session:
        session.execute(text("CREATE TEMP TABLE marks AS SELECT 'a temporary table''s' AS whose"))
        session.execute(text("SET search_path = public"))
        session.commit()
        return int(session.execute(text("SELECT pg_backend_pid()")).scalar_one())


@cloacina.task(name="isolated.without_a_tenant", retry=ONCE)
def without_a_tenant() -> str:
    """Read the table by its plain name on a connection of the plugin's that nobody bound."""
    try:
        with cloacina.database.engine.connect() as connection:
            return str(connection.execute(text("SELECT whose FROM marks")).scalar_one())
    except DBAPIError as error:
        return type(error.orig).__name__


@cloacina.task(name="isolated.elsewhere", retry=ONCE)
def elsewhere(tenant: str) -> str:
    """Ask for another tenant's session."""
    try:
        with cloacina.session(tenant) as session:
            return str(seen_by(session))
    except CloacinaError as error:
        return type(error).__name__


@cloacina.task(name="isolated.call_another", retry=ONCE)
def call_another() -> str:
    """Call a task without naming a tenant, and return its id."""
    return str(look.delay().id)


@cloacina.task(name="isolated.inherit", retry=ONCE)
def inherit() -> list[str]:
    """Say which tenant an asyncio task and a thread of asyncio's see."""

    async def ask() -> list[str]:
        task = asyncio.create_task(asyncio.to_thread(cloacina.current_tenant))
        return [cloacina.current_tenant(), await task]

    return asyncio.run(ask())


@cloacina.task(name="isolated.mark", retry=ONCE)
def mark(whose: str) -> None:
    """Add a mark: the proof that user code ran."""
    with cloacina.session() as session:
        session.execute(text("INSERT INTO ran (whose) VALUES (:whose)"), {"whose": whose})
