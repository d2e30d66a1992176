"""Claiming: every message is checked, and one of them opens the lease, before any user code runs."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Any

from celery import Task
from celery.exceptions import Ignore

from cloacina_celery.core.lifecycle import trust_window
from cloacina_celery.core.settings import MAX_INTEGER
from cloacina_celery.core.tenancy import FIRST_EPOCH
from cloacina_celery.errors import DatabaseUnavailable, InvalidTenantName, MessageRefused, UnknownTenant
from cloacina_celery.plugin.envelope import ATTEMPT_HEADER, EPOCH_HEADER, TENANT_HEADER
from cloacina_celery.runtime.attempt import Attempt
from cloacina_celery.runtime.context import current_worker_id
from cloacina_celery.runtime.patience import until_available
from cloacina_celery.runtime.trust import steady_clock
from cloacina_celery.store import executions, limits, ringing
from cloacina_celery.store.driver_errors import InvalidSchemaName, LockNotAvailable, UndefinedTable, one_line
from cloacina_celery.store.executions import Claim
from cloacina_celery.store.limits import Deferred
from cloacina_celery.telemetry import log

if TYPE_CHECKING:
    from cloacina_celery.plugin.kernel import Kernel
    from cloacina_celery.plugin.limits import Limiter


class Claimer:
    """Turn messages into attempts, or decline them."""

    def __init__(self, kernel: Kernel, limiter: Limiter) -> None:
        self._kernel = kernel
        self._limiter = limiter

    def claim(self, task: Task) -> Attempt:
        """Open the lease of the attempt that the current message rings for; wait for a database that is away.

        Raises:
            Ignore: the message is refused, stale or doubled.
        """
        request = task.request
        headers = request.headers or {}
        tenant, number = headers.get(TENANT_HEADER), headers.get(ATTEMPT_HEADER)
        epoch = headers.get(EPOCH_HEADER, FIRST_EPOCH)
        try:
            self._check(tenant, number, epoch, request)
        except (MessageRefused, InvalidTenantName, UnknownTenant) as error:
            log("message.refused", execution_id=request.id, task=task.name, error=error)
            raise Ignore(str(error)) from error
        assert isinstance(tenant, str)
        assert isinstance(number, int)
        kernel = self._kernel
        database = kernel.database
        worker_id = current_worker_id() or kernel.worker_id
        # Should the claim's answer be lost, its event tells this call from any other, another child's too.
        claimant = f"by process {os.getpid()}, claim {secrets.token_hex(4)}"
        asked_at = steady_clock()
        is_in_doubt = is_held = False

        def ask() -> Claim | Deferred | None:
            nonlocal asked_at, is_held
            asked_at = steady_clock()
            is_limited = self._limiter.is_limited(tenant)
            with database.transaction() if is_limited else database.statement() as cursor:
                given = (limits.claim if is_limited else executions.claim)(
                    cursor,
                    tenant,
                    request.id,
                    attempt=number,
                    worker_id=worker_id,
                    lease_ttl=kernel.settings.lease_ttl,
                    policy=kernel.stored_policy_of(task),
                    claimant=claimant,
                    epoch=epoch,
                    prepare=database.prepared_statements,
                )
                if given is None and is_in_doubt:
                    given = executions.find_claim(
                        cursor, tenant, request.id, attempt=number, claimant=claimant,
                        lease_ttl=kernel.settings.lease_ttl,
                    )  # fmt: skip
                    if given is not None:
                        log("claim.found", tenant=tenant, execution_id=request.id, attempt=number)
                # This was its message: a row that waits all the same is rung when its tenant starts work again.
                is_held = given is None and ringing.unring(cursor, tenant, [(request.id, number)])
                return given

        def wait(error: DatabaseUnavailable) -> None:
            nonlocal is_in_doubt
            is_in_doubt = True
            log("claim.waiting", tenant=tenant, execution_id=request.id, error=error)

        def ask_or_let_go() -> Claim | Deferred | None:
            try:
                return ask()
            except LockNotAvailable as error:
                # Limited tenants' claims queue up behind this one: they go first, and the row is asked for again.
                raise DatabaseUnavailable(
                    f"another transaction holds the execution's row: {one_line(error)}"
                ) from error

        try:
            claim = until_available(ask_or_let_go, wait)
        except (UndefinedTable, InvalidSchemaName) as error:
            kernel.tenants.forget(tenant)
            log(
                "message.refused",
                tenant=tenant,
                execution_id=request.id,
                task=task.name,
                error=UnknownTenant(tenant),
            )
            raise Ignore(f"tenant {tenant} is gone") from error
        if claim is None and is_held:
            log("claim.held", tenant=tenant, execution_id=request.id, attempt=number)
            raise Ignore(f"held back: {tenant} starts nothing now")
        if isinstance(claim, Deferred):
            log("claim.deferred", tenant=tenant, execution_id=request.id, attempt=number)
            raise Ignore(f"tenant {tenant} is at its limit; the execution waits")
        if claim is None:
            log("claim.declined", tenant=tenant, execution_id=request.id, attempt=number)
            raise Ignore(f"stale or duplicate message for attempt {number}")
        return Attempt(
            database=database, tenant=tenant, id=request.id, task=task.name, attempt=claim.attempt,
            failures=claim.failures, recoveries=claim.recoveries,
            trusted_until=asked_at + trust_window(kernel.settings.lease_ttl), board=kernel.boards.get(worker_id),
        )  # fmt: skip

    def _check(self, tenant: object, number: object, epoch: object, request: Any) -> None:
        if not isinstance(tenant, str) or not (_is_int4(number) and _is_int4(epoch)) or "\0" in request.id:
            raise MessageRefused(
                f"the message of {request.id} carries no {TENANT_HEADER} and {ATTEMPT_HEADER}: it was not sent by "
                "cloacina_celery; send durable tasks through an app that has the plugin"
            )
        queue = (request.delivery_info or {}).get("routing_key")
        if queue is not None and queue != tenant:
            raise MessageRefused(
                f"the message of {request.id} says tenant {tenant!r} but came from queue {queue!r}: a tenant's "
                "messages travel in the queue of its name only"
            )
        self._kernel.tenants.require(tenant)


def _is_int4(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and abs(number) <= MAX_INTEGER
