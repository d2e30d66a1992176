"""A claim that looks first and writes then: two messages for one attempt both find it free."""

from __future__ import annotations

from typing import Any

from cloacina_celery.chaos.app import app
from cloacina_celery.store import executions
from tests.chaos.mutants.races import CLAIM_PAUSE, replaced

claim: Any = executions.claim
executions._CLAIM = replaced(
    executions._CLAIM,
    (
        "WHERE id = $1::text AND attempt = $2::int - 1 AND state = 'pending' AND run_at <= now()",
        "WHERE id = $1::text",
    ),
    ("attempt = attempt + 1", "attempt = $2::int"),
)


def look_then_write(cursor: Any, tenant: str, execution_id: str, **options: Any) -> Any:
    """Claim in two steps, with the pause of the sound build between them."""
    cursor.execute(
        f'SELECT pg_sleep(%s) FROM "{tenant}".cloacina_executions WHERE id = %s'
        " AND attempt = %s - 1 AND state = 'pending' AND run_at <= now()",
        (CLAIM_PAUSE, execution_id, options["attempt"]),
    )
    return None if cursor.fetchone() is None else claim(cursor, tenant, execution_id, **options)


executions.claim = look_then_write

__all__ = ["app"]
