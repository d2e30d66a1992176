"""Settling without a fence: a zombie does not ask whether it still holds its execution, and its settlement is taken."""

from typing import Any

from cloacina_celery.chaos.app import app
from cloacina_celery.runtime.attempt import Attempt
from cloacina_celery.store import executions, settlements
from tests.chaos.mutants.races import replaced

settlements._SUCCEED = replaced(
    settlements._SUCCEED,
    ("WHERE id = $1::text AND attempt = $2::int AND state = 'running'", "WHERE id = $1::text"),
)


def is_held(*_: Any) -> bool:
    """Hold every execution, whoever else does."""
    return True


executions.is_held = is_held
Attempt.is_trusted = property(lambda _: True)  # type: ignore[assignment,method-assign]

__all__ = ["app"]
