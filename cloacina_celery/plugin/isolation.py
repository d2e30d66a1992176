"""What a starting worker says and refuses about how its tenants are kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cloacina_celery.core.tenant import LEGACY_TENANT
from cloacina_celery.errors import IsolationRefused
from cloacina_celery.store import roles
from cloacina_celery.telemetry import log

if TYPE_CHECKING:
    from cloacina_celery.store.database import Database


def check(database: Database, tenants: Sequence[str]) -> None:
    """Say once at a start what weakens the level that is wanted; nothing of it is changed here.

    Raises:
        IsolationRefused: the level ``role`` is asked for by name and a tenant has none.
    """
    if database.isolation == "schema":
        return
    with database.statement() as cursor:
        can, known = roles.powers(cursor), roles.roles(cursor)
    without = [name for name in tenants if name != LEGACY_TENANT and name in known and known[name] is None]
    if without and database.isolation == "role":
        raise IsolationRefused(
            without[0],
            "it has no role and cloacina_isolation is 'role': run `celery -A <app> cloacina tenant isolate "
            f"{' '.join(without)}`",
        )
    if not can.may_create_roles and not any(known.values()):
        log("isolation.fallback", login=can.login)
    else:
        for name in without:
            log("isolation.left", tenant=name)
        if can.is_superuser:
            log("isolation.superuser", login=can.login)
        if can.inherits_from_tenants:
            log("isolation.inherits", login=can.login)
    if LEGACY_TENANT in known and can.public_is_open:
        log("isolation.public", schema=LEGACY_TENANT)
