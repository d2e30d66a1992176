"""A sweep that neither locks what it decides about nor looks again when it writes."""

from cloacina_celery.chaos.app import app
from cloacina_celery.store import recovery
from tests.chaos.mutants.races import replaced, widen_sweep

recovery._LOCK_EXPIRED = replaced(recovery._LOCK_EXPIRED, (" FOR UPDATE SKIP LOCKED", ""))
recovery._LOCK_OF_WORKER = replaced(recovery._LOCK_OF_WORKER, (" FOR UPDATE SKIP LOCKED", ""))
recovery._RECOVER = replaced(
    recovery._RECOVER,
    ("WHERE id = $1::text AND attempt = $2::int AND state = 'running'", "WHERE id = $1::text"),
)
widen_sweep()

__all__ = ["app"]
