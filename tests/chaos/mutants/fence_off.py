"""Settling without a fence: a zombie's settlement, and its effects with it, are taken."""

from cloacina_celery.chaos.app import app
from cloacina_celery.store import executions
from tests.chaos.mutants.races import replaced

executions._SUCCEED = replaced(
    executions._SUCCEED,
    ("WHERE id = $1::text AND attempt = $2::int AND state = 'running'", "WHERE id = $1::text"),
)

__all__ = ["app"]
