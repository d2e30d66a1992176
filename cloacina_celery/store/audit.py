"""The audit: what was done to which tenant, when and by whom. Entries are added and never changed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cloacina_celery.store.database import Cursor, Database
from cloacina_celery.store.driver_errors import UndefinedTable


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One step of one verb."""

    tenant: str
    epoch: int | None
    at: datetime
    verb: str
    step: str
    database_user: str
    operator: str
    detail: str | None


_COLUMNS = tuple(AuditEntry.__dataclass_fields__)


def record(
    cursor: Cursor,
    tenant: str,
    verb: str,
    step: str,
    *,
    epoch: int | None,
    by: str,
    detail: str | None = None,
) -> None:
    """Enter a step, in the transaction that takes it."""
    cursor.execute(
        "INSERT INTO cloacina.audit (tenant, epoch, verb, step, operator, detail) VALUES (%s, %s, %s, %s, %s, %s)",
        (tenant, epoch, verb, step, by, detail),
    )


def history(database: Database, tenant: str | None = None, *, limit: int = 100) -> list[AuditEntry]:
    """List the last entries of a tenant's name, or of all, in order; those of its earlier epochs too."""
    with database.statement() as cursor:
        try:
            cursor.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM cloacina.audit WHERE %(t)s::text IS NULL OR tenant = %(t)s"
                " ORDER BY id DESC LIMIT %(limit)s",
                {"t": tenant, "limit": limit},
            )
        except UndefinedTable:
            return []
        return [AuditEntry(**dict(zip(_COLUMNS, row, strict=True))) for row in reversed(cursor.fetchall())]
