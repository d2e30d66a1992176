"""The doctor: looks at settings, database, broker, workers and tenants, and says of each what to do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kombu.exceptions import KombuError
from kombu.transport import virtual

from cloacina_celery.core.health import CLOCKS_APART, DUE_FOR_LONG, SWEPT_LONG_AGO, Finding, Grade
from cloacina_celery.core.tenancy import STARTING_STATES
from cloacina_celery.core.tenant import CATALOG_SCHEMA, LEGACY_TENANT
from cloacina_celery.core.words import counted
from cloacina_celery.errors import CloacinaError
from cloacina_celery.runtime.forks import without_fork
from cloacina_celery.store import health, migrate, roles, workers
from cloacina_celery.store.driver_errors import refusals_in_words
from cloacina_celery.store.overview import Overview, overviews

if TYPE_CHECKING:
    from kombu import Connection

    from cloacina_celery.plugin.kernel import Kernel
    from cloacina_celery.store.workers import AliveWorker

BROKER_PATIENCE = 5.0
"""Seconds that the broker has to answer."""

NAMED = 5
"""So many tenants are named in a finding; of more there is a number."""


def examine(kernel: Kernel) -> Iterator[Finding]:
    """Look at one thing after the other; what one of them keeps from being seen is left out."""
    try:
        settings, database = kernel.settings, kernel.database
    except CloacinaError as error:
        yield _wrong("settings", str(error), "mend the setting")
        return
    yield (
        _ok("settings", "they fit together")
        if settings.enable_recovery
        else _mind(
            "settings",
            "cloacina_enable_recovery is off",
            "without it nothing lost is recovered: set it in some process",
        )
    )
    seen: list[Overview] = []
    alive: list[AliveWorker] = []
    try:
        with refusals_in_words():
            yield from _database(kernel)
            with database.statement() as cursor:
                if (at := migrate.revision_of(cursor, CATALOG_SCHEMA)) is None:
                    yield _mind("schemas", "there is no catalog yet", "create a tenant, or start a worker")
                elif not migrate.works_with(cursor, at, "catalog"):
                    yield _wrong(
                        "schemas", f"the catalog is at {at}, this version works with {migrate.CATALOG_HEAD}",
                        "run `schema migrate`, or upgrade this process",
                    )  # fmt: skip
            if at is not None:
                seen = list(overviews(database))
                with database.statement() as cursor:
                    alive = workers.alive(cursor)
                yield from _schemas(kernel, seen)
    except CloacinaError as error:
        yield _wrong(
            "database", str(error), "mend that first: it keeps tenants and workers from being looked at"
        )
    yield from _workers(alive, lease_ttl=settings.lease_ttl)
    serving = {name for one in alive if one.silent_for <= settings.lease_ttl for name in one.tenants}
    yield from _tenants(seen, serving)
    yield from _broker(kernel, [one.tenant.name for one in seen], serving)


def _database(kernel: Kernel) -> Iterator[Finding]:
    with kernel.database.statement() as cursor:
        asked_at = time.time()
        server = health.server(cursor)
        apart = server.clock - (asked_at + time.time()) / 2
        can = roles.powers(cursor)
    if server.version < health.OLDEST_SERVER:
        yield _wrong(
            "database", f"Postgres {server.version_name} is not supported", "upgrade it to 14 or newer"
        )
    else:
        yield _ok(
            "database", f"Postgres {server.version_name}, database {server.database}, login {server.login}"
        )
    if abs(apart) > CLOCKS_APART:
        yield _mind("clocks", f"the database's is {apart:+.1f} s from this machine's", "have both set by NTP")
    else:
        yield _ok("clocks", f"the database's is {apart:+.1f} s from this machine's")
    if not server.may_create_schemas:
        yield _mind(
            "privileges", f"login {server.login} may not create schemas, so no tenants",
            f"GRANT CREATE ON DATABASE {server.database} TO {server.login}, or create tenants with another login",
        )  # fmt: skip
    if can.is_superuser:
        yield _mind(
            "privileges", f"login {can.login} is a superuser: to a task that says RESET ROLE everything is open",
            "give the app a login of its own",
        )  # fmt: skip
    elif not can.may_create_roles and kernel.database.isolation != "schema":
        yield _mind(
            "privileges", f"login {can.login} may not create roles: search_path alone keeps new tenants apart",
            f"ALTER ROLE {can.login} CREATEROLE, or set cloacina_isolation to 'schema'",
        )  # fmt: skip


def _schemas(kernel: Kernel, seen: list[Overview]) -> Iterator[Finding]:
    names = [one.tenant.name for one in seen]
    with kernel.database.statement() as cursor:
        at = migrate.revisions_of(cursor, names)
        behind = [name for name in names if not migrate.works_with(cursor, at.get(name), "tenant")]
        closed = health.closed_tenants(cursor, [name for name in names if name in at])
        known = roles.roles(cursor) if names else {}
    if behind:
        yield _wrong(
            "schemas", f"not at {migrate.TENANT_HEAD}: {_named(behind)}", "run `schema migrate --recheck`"
        )
    elif names:
        yield _ok("schemas", f"{counted(len(names), 'tenant')} at {migrate.TENANT_HEAD}")
    if closed:
        yield _wrong(
            "privileges", f"the login may not use our tables of {_named(closed)}",
            "have their owner grant USAGE on the schema, and SELECT, INSERT, UPDATE, DELETE on the tables",
        )  # fmt: skip
    apart = [name for name in names if name != LEGACY_TENANT and known.get(name) is None]
    if apart and kernel.database.isolation != "schema":
        yield _mind("isolation", f"without a role: {_named(apart)}", "run `tenant isolate`")


def _workers(alive: list[AliveWorker], *, lease_ttl: float) -> Iterator[Finding]:
    silent = [one for one in alive if one.silent_for > lease_ttl]
    for one in silent:
        yield _wrong(
            "workers", f"{one.name} has given no sign for {one.silent_for:.0f} s",
            "it is dead, frozen or cut off: restart it; any worker of its tenants, or `sweep`, recovers what it held",
        )  # fmt: skip
    for one in alive:
        if one not in silent and (one.swept_for or 0) > SWEPT_LONG_AGO:
            yield _wrong(
                "workers", f"{one.name} is alive and has not swept its tenants for {one.swept_for:.0f} s",
                "see its log and what its connections wait for in pg_stat_activity; then restart it",
            )  # fmt: skip
    if len(alive) > len(silent):
        yield _ok("workers", f"{counted(len(alive) - len(silent), 'worker')} alive")


def _tenants(seen: list[Overview], serving: set[str]) -> Iterator[Finding]:
    for one in seen:
        if one.trouble:
            yield _wrong(
                "tenants", f"{one.tenant.name} could not be looked at: {one.trouble}",
                "see who holds the lock in pg_stat_activity, or run `schema migrate --recheck`",
            )  # fmt: skip
        if one.tenant.unfinished:
            yield _wrong(
                "tenants", f"{one.tenant.unfinished} of {one.tenant.name} is not finished", "run it once more"
            )
        if one.overdue:
            yield _wrong(
                "tenants", f"{one.tenant.name}: {counted(one.overdue, 'lease')} ran out and not recovered yet",
                "if it stays so no worker sweeps: see the workers' logs, or run `sweep`",
            )  # fmt: skip
    working = [one for one in seen if one.tenant.state in STARTING_STATES]
    stuck = [one for one in working if one.tenant.name not in serving and one.due]
    if stuck:
        yield _wrong(
            "tenants", f"work is due and no worker serves {_named([one.tenant.name for one in stuck])}",
            "start a worker with -Q of their names, or of a pattern",
        )  # fmt: skip
    idle = [one.tenant.name for one in working if one.tenant.name not in serving and not one.due]
    if idle:
        yield _mind("tenants", f"no worker serves {_named(idle)}", "start one before they have work")
    late = [one for one in working if (one.oldest_due or 0) > DUE_FOR_LONG and one.tenant.name in serving]
    for one in late:
        yield _mind(
            "tenants", f"{one.tenant.name}: the oldest of {one.due} due has waited for {one.oldest_due:.0f} s",
            "add workers or concurrency; see also `tenant limit` and `execution show`",
        )  # fmt: skip


def _broker(kernel: Kernel, tenants: list[str], serving: set[str]) -> Iterator[Finding]:
    app = kernel.app
    # Without the address's password: it goes into tickets.
    address = app.connection_for_read().as_uri()
    try:
        with without_fork(), app.connection_for_read(connect_timeout=BROKER_PATIENCE) as connection:
            connection.ensure_connection(max_retries=1, timeout=BROKER_PATIENCE)
            unheard = [
                name
                for name in [*tenants, app.conf.task_default_queue]
                if _waits_unheard(connection, name, serving)
            ]
    except (KombuError, OSError, *app.connection_for_read().connection_errors) as error:
        yield _wrong(
            "broker", f"{address} does not answer: {' '.join(str(error).split())}",
            "submissions are committed and wait; start it, or mend its URL",
        )  # fmt: skip
        return
    yield _ok("broker", f"{address} answers")
    if unheard:
        yield _wrong(
            "queues",
            f"messages wait and nobody consumes {_named(unheard)}",
            "start a worker with -Q of their names",
        )


def _waits_unheard(connection: Connection, queue: str, serving: set[str]) -> bool:
    """Tell whether messages wait in a queue without a consumer; a broker that knows none is asked for messages only."""
    try:
        declared = connection.default_channel.queue_declare(queue=queue, passive=True)
    except connection.channel_errors:
        return False  # there is no such queue, so nothing waits in it
    if isinstance(connection.default_channel, virtual.Channel):
        return bool(declared.message_count) and queue not in serving
    return bool(declared.message_count) and not declared.consumer_count


def _named(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _ok(what: str, found: str) -> Finding:
    return Finding(what=what, grade=Grade.OK, found=found)


def _mind(what: str, found: str, do: str) -> Finding:
    return Finding(what=what, grade=Grade.MIND, found=found, do=do)


def _wrong(what: str, found: str, do: str) -> Finding:
    return Finding(what=what, grade=Grade.WRONG, found=found, do=do)
