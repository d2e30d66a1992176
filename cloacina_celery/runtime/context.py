"""Who is being served: the bound tenant, the running execution and the open transaction, as contextvars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

from cloacina_celery.errors import TenantNotBound

if TYPE_CHECKING:
    from cloacina_celery.runtime.attempt import Attempt
    from cloacina_celery.store.database import Cursor


class Unit(Protocol):
    """A transaction that submissions can join; what they publish leaves after its commit, or never."""

    @property
    def tenant(self) -> str:
        """The tenant whose rows the transaction writes."""

    is_open: bool
    """Whether its block is still running: what outlives the block must not write into a transaction that is over."""

    @property
    def is_settlement(self) -> bool:
        """Whether the transaction settles an attempt: then even plain messages wait for its commit."""

    def cursor(self) -> Cursor:
        """Open a cursor inside the transaction."""

    def after_commit(self, action: Callable[[], None]) -> None:
        """Run ``action`` once the transaction has committed."""


_tenant: ContextVar[str | None] = ContextVar("cloacina_tenant", default=None)
_attempt: ContextVar[Attempt | None] = ContextVar("cloacina_attempt", default=None)
_unit: ContextVar[Unit | None] = ContextVar("cloacina_unit", default=None)
_worker_id: ContextVar[int | None] = ContextVar("cloacina_worker_id", default=None)


def bound_tenant() -> str | None:
    """Return the bound tenant, if any."""
    return _tenant.get()


def require_tenant(wanted_for: str) -> str:
    """Return the bound tenant.

    Raises:
        TenantNotBound: there is none, and there is no default.
    """
    tenant = _tenant.get()
    if tenant is None:
        raise TenantNotBound(wanted_for)
    return tenant


def current_attempt() -> Attempt | None:
    """Return the attempt that this code runs in, if any."""
    return _attempt.get()


def current_unit() -> Unit | None:
    """Return the open transaction that submissions join, if any."""
    unit = _unit.get()
    return unit if unit is not None and unit.is_open else None


def current_worker_id() -> int | None:
    """Return the embedded worker that this thread runs for; ``None`` in a worker process of Celery's."""
    return _worker_id.get()


def enter_worker(worker_id: int) -> None:
    """Let this thread run for an embedded worker, from now on."""
    _worker_id.set(worker_id)


@contextmanager
def bind_tenant(tenant: str) -> Iterator[None]:
    """Bind a tenant for the block. An open transaction of another tenant is not joined inside it."""
    token = _tenant.set(tenant)
    unit = _unit.get()
    unit_token = _unit.set(None) if unit is not None and unit.tenant != tenant else None
    try:
        yield
    finally:
        if unit_token is not None:
            _unit.reset(unit_token)
        _tenant.reset(token)


@contextmanager
def bind_attempt(attempt: Attempt) -> Iterator[None]:
    """Bind an attempt and its tenant for the block; whatever transaction is open around it stays outside."""
    tenant_token, attempt_token, unit_token = (
        _tenant.set(attempt.tenant),
        _attempt.set(attempt),
        _unit.set(None),
    )
    try:
        yield
    finally:
        _unit.reset(unit_token)
        _attempt.reset(attempt_token)
        _tenant.reset(tenant_token)


@contextmanager
def leave_attempt() -> Iterator[None]:
    """Run the block outside of any attempt, for the same tenant and in the same open transaction."""
    token = _attempt.set(None)
    try:
        yield
    finally:
        _attempt.reset(token)


@contextmanager
def bind_unit(unit: Unit) -> Iterator[None]:
    """Let submissions in the block join the transaction, and those of an asyncio task that outlives it not."""
    token = _unit.set(unit)
    try:
        yield
    finally:
        unit.is_open = False
        _unit.reset(token)
