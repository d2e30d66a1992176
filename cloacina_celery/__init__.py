"""Durable work for many tenants on Celery, which recovers by itself.

A tenant is a Postgres schema and a Celery queue of the same name; each call of a durable task is a row in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cloacina_celery.core.retry import RetryPolicy
from cloacina_celery.errors import (
    ArchiveRefused,
    CloacinaError,
    DatabaseUnavailable,
    ExecutionNotFound,
    InvalidPayload,
    InvalidTenantName,
    LeaseLost,
    MessageRefused,
    SchemaMismatch,
    SettingsError,
    SubmitRefused,
    TenantMismatch,
    TenantNotBound,
    TenantStateRefused,
    TenantUnfinished,
    TransitionRefused,
    UnknownTenant,
)
from cloacina_celery.plugin.app import Cloacina
from cloacina_celery.plugin.task import DurableTask
from cloacina_celery.runner import Runner
from cloacina_celery.runtime.logs import TenantFilter

if TYPE_CHECKING:
    from celery import Celery

    app: Celery
    cloacina: Cloacina

__version__ = "0.1.0"

__all__ = [
    "ArchiveRefused",
    "Cloacina",
    "CloacinaError",
    "DatabaseUnavailable",
    "DurableTask",
    "ExecutionNotFound",
    "InvalidPayload",
    "InvalidTenantName",
    "LeaseLost",
    "MessageRefused",
    "RetryPolicy",
    "Runner",
    "SchemaMismatch",
    "SettingsError",
    "SubmitRefused",
    "TenantFilter",
    "TenantMismatch",
    "TenantNotBound",
    "TenantStateRefused",
    "TenantUnfinished",
    "TransitionRefused",
    "UnknownTenant",
]


def __getattr__(name: str) -> Any:
    # The packaged app is built when somebody asks for it (`celery -A cloacina_celery ...`), never by an import.
    if name in ("app", "cloacina"):
        from cloacina_celery.packaged import build

        globals()["app"], globals()["cloacina"] = build()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
