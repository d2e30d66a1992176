"""Many calls at once: one transaction, one wait for the disk, and results in the callers' order."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from celery.canvas import Signature

from cloacina_celery.errors import InvalidPayload
from cloacina_celery.plugin.task import DurableTask
from cloacina_celery.runtime.context import bind_tenant, current_unit
from cloacina_celery.runtime.units import joint

if TYPE_CHECKING:
    from cloacina_celery.plugin.kernel import Kernel
    from cloacina_celery.plugin.results import DurableResult


def submit_many(kernel: Kernel, calls: Iterable[Any], tenant: str, session: Any) -> list[DurableResult]:
    """Submit calls of durable tasks for a tenant, all of them or none; see `Cloacina.submit_many`."""
    signatures = [_checked(kernel, call) for call in calls]
    # Two callers with the same keys in another order would wait for each other for ever.
    in_order = sorted(
        enumerate(signatures), key=lambda numbered: numbered[1].options.get("idempotency_key") or ""
    )
    results: dict[int, DurableResult] = {}
    is_joined = session is not None or current_unit() is not None
    with bind_tenant(tenant), nullcontext() if is_joined else joint(kernel.database, tenant):
        for number, signature in in_order:
            results[number] = signature.apply_async(tenant=tenant, session=session)
    return [results[number] for number in range(len(signatures))]


def _checked(kernel: Kernel, call: Any) -> Signature:
    task = kernel.app.tasks.get(call.task) if isinstance(call, Signature) else None
    if not isinstance(task, DurableTask):
        raise InvalidPayload(
            f"submit_many() takes signatures of durable tasks, such as charge.s(42), not {call!r}"
        )
    key = call.options.get("idempotency_key")
    if key is not None and not isinstance(key, str):
        raise InvalidPayload(f"idempotency_key is a non-empty string, not {key!r}")
    return call
