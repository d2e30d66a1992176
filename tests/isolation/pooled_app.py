"""The app of the tests behind PgBouncer, set up as docs/operating.md says."""

from __future__ import annotations

import os

from celery import Celery
from sqlalchemy import text

from cloacina_celery import Cloacina, RetryPolicy

app = Celery("pooled", broker=os.environ["CLOACINA_BROKER_URL"])
cloacina = Cloacina(
    app,
    database_url=os.environ["CLOACINA_DATABASE_URL"],
    liveness="lease",
    prepared_statements=False,
    lease_ttl=3.0,
    heartbeat_interval=1.0,
)
TWICE = RetryPolicy(max_attempts=2, initial_delay=0.1, backoff="fixed", jitter=False)


@cloacina.task(name="pooled.where")
def where() -> list[str]:
    """Return path and role that the task's session has, after a commit in the middle too."""
    seen = []
    with cloacina.session() as session:
        for _ in range(2):
            seen += list(session.execute(text("SELECT current_setting('search_path'), current_user")).one())
            session.commit()
    return seen


@cloacina.task(name="pooled.second_time", retry=TWICE)
def second_time(key: str) -> int:
    """Write an effect and fail at the first attempt, and write it again at the second."""
    execution = cloacina.current_execution()
    assert execution is not None
    with cloacina.session() as session:
        session.execute(
            text("INSERT INTO effects VALUES (:key, :attempt)"), {"key": key, "attempt": execution.attempt}
        )
    if execution.attempt == 1:
        raise OSError(key)
    return execution.attempt


@cloacina.task(name="pooled.until_killed")
def until_killed(key: str) -> int:
    """Write an effect, and at the first attempt wait for the end of the process."""
    execution = cloacina.current_execution()
    assert execution is not None
    with cloacina.session() as session:
        session.execute(
            text("INSERT INTO effects VALUES (:key, :attempt)"), {"key": key, "attempt": execution.attempt}
        )
        if execution.attempt == 1:
            session.execute(text("SELECT pg_sleep(300)"))
    return execution.attempt


@cloacina.task(name="pooled.then")
def then(previous: int) -> int:
    """Add one to what went before."""
    return previous + 1
