"""What a starting worker says and refuses about how its tenants are kept apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cloacina_celery.core.tenant import LEGACY_TENANT
from cloacina_celery.errors import IsolationRefused, SettingsError
from cloacina_celery.store import logins, roles
from cloacina_celery.telemetry import log

if TYPE_CHECKING:
    from cloacina_celery.store.database import Database


def own_tenant(
    database: Database, queues: Sequence[str], created: Callable[[str], bool], *, selects: bool
) -> str | None:
    """Return the tenant whose own login this process has; ``None`` for a login that serves any tenant.

    Args:
        queues: what the worker is to consume.
        created: tells whether a queue of this name would become a tenant's.
        selects: whether it will serve tenants that are not among the queues.

    Raises:
        SettingsError: at the level ``login`` nobody may select.
        IsolationRefused: a queue is another tenant's; or the level ``login`` is asked for, and it is nobody's own.
    """
    with database.statement() as cursor:
        login, own = logins.own_tenant(cursor)
        known = roles.roles(cursor)
    others = [queue for queue in queues if queue != own and (queue in known or created(queue))]
    if others and own is not None:
        raise IsolationRefused(
            others[0],
            f"login {login!r} is the own one of tenant {own!r} and serves no other: give the worker the credentials "
            f"of `celery -A <app> cloacina tenant login {others[0]}`",
        )
    if others and database.isolation == "login":
        raise IsolationRefused(
            others[0],
            f"cloacina_isolation is 'login', and login {login!r} is no tenant's own: give the worker the credentials "
            f"of `celery -A <app> cloacina tenant login {others[0]}`",
        )
    if selects and own is None and database.isolation == "login":
        raise SettingsError(
            f"cloacina_isolation is 'login', and login {login!r} is no tenant's own: a worker serves one tenant "
            "there, with -Q and the tenant's name"
        )
    return own


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
