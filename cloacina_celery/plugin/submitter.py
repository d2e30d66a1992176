"""Submitting: the row first, in the caller's transaction where there is one; then the message."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from celery.utils.time import maybe_iso8601, maybe_make_aware
from sqlalchemy.orm import Session, scoped_session

from cloacina_celery.core.retry import MAX_DELAY
from cloacina_celery.core.tenancy import Standing
from cloacina_celery.errors import (
    CloacinaError,
    DatabaseUnavailable,
    InvalidPayload,
    TenantMismatch,
    TenantNotBound,
    UnknownTenant,
)
from cloacina_celery.plugin.envelope import DELAY_HEADERS, KEY_HEADER, Envelope
from cloacina_celery.plugin.publisher import FirstRing, Publisher
from cloacina_celery.runtime.attempt import RequestedRetry
from cloacina_celery.runtime.context import Unit, bound_tenant, current_attempt, current_unit
from cloacina_celery.runtime.units import SessionUnit, settlement
from cloacina_celery.store import chords, executions
from cloacina_celery.store.database import Cursor
from cloacina_celery.store.driver_errors import InvalidSchemaName, UndefinedTable, on_lent_connection
from cloacina_celery.store.executions import Submission, Submitted

if TYPE_CHECKING:
    from cloacina_celery.plugin.kernel import Kernel

T = TypeVar("T")

OWN_OPTIONS = ("tenant", "idempotency_key", "session")
"""What ``apply_async`` takes beside Celery's options."""

MAX_ID_LENGTH = 255

_KEY_NAMESPACE = uuid.UUID("6f1e2d0c-8a44-4b0e-9d43-0c1f5a6b7c8d")
_CANVAS_OPTIONS = ("exchange", "routing_key", "queue", "exchange_type", "declare", "headers", "serializer",
                   "retry", "retry_policy", "connection", "delivery_mode", "compression", "timeout",
                   "confirm_timeout", "event_dispatcher")  # fmt: skip


def id_for_key(tenant: Standing, key: object) -> str:
    """Derive the one execution id that a key has in a tenant: so racing callers meet at the primary key.

    In each epoch it is another, so that what is left of a removed tenant's call finds no row of the new one; where
    the tenant moves it stays the same.

    Raises:
        InvalidPayload: the key is none.
    """
    if not isinstance(key, str) or not key:
        raise InvalidPayload(f"idempotency_key is a non-empty string, not {key!r}")
    return str(uuid.uuid5(_KEY_NAMESPACE, f"{tenant.key_space}/{key}"))


class Submitter:
    """Turn Celery's send into submit, and publish after the commit."""

    def __init__(self, kernel: Kernel, publisher: Publisher) -> None:
        self._kernel = kernel
        self._publisher = publisher

    def submit(self, producer: Any, name: str, message: Any, options: dict[str, Any]) -> None:
        """Insert the row of a durable call and publish its message, now or after the caller's commit."""
        headers, properties, body, sent_event = message
        headers.update(options.get("headers") or {})
        delay = _seconds(headers.pop(DELAY_HEADERS["countdown"], None))
        eta = _aware(headers.pop(DELAY_HEADERS["eta"], None), self._kernel.app.timezone)
        envelope = Envelope(headers, {**properties, **_properties(options)}, body)
        attempt = current_attempt()
        if attempt is not None and attempt.id == headers["id"] and attempt.task == name:
            # The task's own self.retry(): no new row, the settlement will move this one.
            attempt.requested_retry = RequestedRetry(message=envelope.dump(name), delay=delay, eta=eta)
            return
        tenant, unit = _patiently(lambda: self._place(name, options, headers))
        submission = self._submission(name, envelope, tenant, delay, eta, options)
        if unit is not None:
            # What leaves after the commit is what the row says, also if the caller changes a list meanwhile.
            body = Envelope.load(submission.message).body
        self._kernel.locations.remember(submission.execution_id, tenant)
        for execution_id in envelope.following_ids():
            self._kernel.locations.remember(execution_id, tenant)
        # A hint may be missing, and must not cost a submission that has its connection already.
        with suppress(DatabaseUnavailable):
            self._kernel.busy_marks.ensure(tenant)
        # Before the row: once that is committed, nothing but the broker may fail, and that is no error.
        epoch = self._kernel.tenants.epoch_of(tenant)
        submitted = self._insert(tenant, submission, unit)
        if submitted is None or not submitted.is_due:
            return
        first = FirstRing(
            tenant=tenant,
            execution_id=submission.execution_id,
            attempt=submitted.attempt,
            task=name,
            message=(envelope.ringing_for(tenant, epoch, submitted.attempt, 0), {}, body, sent_event),
            properties=envelope.properties,
        )
        if unit is None:
            self._publisher.publish(first)
        else:
            unit.after_commit(lambda: self._publish_later(first))

    def _publish_later(self, first: FirstRing) -> None:
        # The transaction may have been open for longer than the tenant's mark holds.
        with suppress(CloacinaError):  # the submission is committed, whatever becomes of the mark
            self._kernel.busy_marks.ensure(first.tenant)
        self._publisher.publish(first)

    def resolve_tenant(self, name: str, explicit: str | None, queue: object) -> str:
        """Find the tenant of a call: named, bound, or the queue's; never a default.

        Raises:
            TenantNotBound: none of the three says one.
            TenantMismatch: the queue is another tenant's.
            UnknownTenant: the catalog does not know it.
        """
        tenant = bound_tenant() if explicit is None else explicit
        queue_name = getattr(queue, "name", queue)
        if (
            isinstance(queue_name, str)
            and queue_name not in (tenant, self._kernel.app.conf.task_default_queue)
            and self._kernel.tenants.knows(queue_name)
        ):
            if tenant is not None:
                raise TenantMismatch(
                    f"{name} was sent for tenant {tenant!r} to the queue of tenant {queue_name!r}: "
                    "leave queue= away, a tenant's queue has its name"
                )
            tenant = queue_name
        if tenant is None:
            raise TenantNotBound(f"task {name}")
        self._kernel.tenants.require(tenant)
        return tenant

    def _place(self, name: str, options: dict[str, Any], headers: dict[str, Any]) -> tuple[str, Unit | None]:
        explicit, session = options.get("tenant"), options.get("session")
        if options.get("idempotency_key") is not None and KEY_HEADER not in headers:
            raise InvalidPayload(
                "send_task() takes no idempotency_key: call task.apply_async(), or pass "
                "task_id=cloacina.execution_id(key, tenant=...)"
            )
        tenant = self.resolve_tenant(name, explicit, options.get("queue"))
        attempt, unit = current_attempt(), current_unit()
        # What a tenant's executions submit belongs to them: a tenant that takes nothing new lets it run to its end.
        if not (
            (attempt is not None and attempt.tenant == tenant) or (unit is not None and unit.is_settlement)
        ):
            self._kernel.tenants.standing_of(tenant).admit()
        if session is not None:
            if isinstance(session, scoped_session):
                session = session()
            if not isinstance(session, Session):
                raise InvalidPayload(f"session= takes a SQLAlchemy Session, not {type(session).__name__}")
            return tenant, SessionUnit(session, tenant)
        if unit is not None and unit.tenant != tenant:
            raise TenantMismatch(
                f"{name} was sent for tenant {tenant!r} inside a transaction of tenant {unit.tenant!r}: "
                "send it outside the session's block"
            )
        return tenant, unit

    def _submission(
        self,
        name: str,
        envelope: Envelope,
        tenant: str,
        delay: float | None,
        eta: datetime | None,
        options: dict[str, Any],
    ) -> Submission:
        execution_id = envelope.headers["id"]
        if not isinstance(execution_id, str) or not 0 < len(execution_id) <= MAX_ID_LENGTH:
            raise InvalidPayload(
                f"task_id is a string of 1 to {MAX_ID_LENGTH} characters, not {execution_id!r}"
            )
        if options.get("serializer") not in (None, "json"):
            raise InvalidPayload(
                f"{name} was sent with serializer={options['serializer']!r}; a durable task's row carries JSON only"
            )
        in_chord = envelope.embed.get("chord") is not None
        task = self._kernel.app.tasks.get(name)
        return Submission(
            execution_id=execution_id,
            task=name,
            message=envelope.dump(name),
            max_recoveries=self._kernel.max_recoveries_of(task),
            policy=self._kernel.stored_policy_of(task),
            delay=delay,
            eta=eta if delay is None else None,
            group_id=envelope.headers.get("group") if in_chord else None,
            group_index=envelope.headers.get("group_index") if in_chord else None,
            is_rung=self._publisher.can_publish(tenant),
        )

    def _insert(self, tenant: str, submission: Submission, unit: Unit | None) -> Submitted | None:
        database = self._kernel.database
        try:
            chord_size = self._kernel.chord_sizes.take(submission.group_id)
            if unit is not None:
                with on_lent_connection():
                    return _insert_all(unit.cursor(), tenant, submission, chord_size)

            def insert() -> Submitted | None:
                if chord_size is not None:
                    with settlement(database, tenant) as own:
                        return _insert_all(own.cursor(), tenant, submission, chord_size)
                with database.statement() as cursor:
                    return executions.submit(cursor, tenant, submission, prepare=database.prepared_statements)

            # Doing it again is safe, since the id is the same; if the first time was committed after all, the message
            # is found missing and sent by the sweep.
            return _patiently(insert)
        except (UndefinedTable, InvalidSchemaName) as error:
            self._kernel.tenants.forget(tenant)
            raise UnknownTenant(tenant) from error


def _patiently(work: Callable[[], T]) -> T:
    """Wait for the database inside of a task, as its worker does; a caller outside is told that it is away."""
    attempt = current_attempt()
    return work() if attempt is None else attempt.wait_for_database(work)


def _insert_all(
    cursor: Cursor, tenant: str, submission: Submission, chord_size: int | None
) -> Submitted | None:
    submitted = executions.submit(cursor, tenant, submission)
    if chord_size is not None and submission.group_id is not None:
        chords.open_(cursor, tenant, submission.group_id, chord_size)
    return submitted


def _properties(options: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v
        for k, v in options.items()
        if k not in _CANVAS_OPTIONS and k not in OWN_OPTIONS and v is not None
    }


def _seconds(countdown: object) -> float | None:
    if countdown is None:
        return None
    is_number = isinstance(countdown, (int, float)) and not isinstance(countdown, bool)
    if not is_number or not -MAX_DELAY <= countdown <= MAX_DELAY:  # type: ignore[operator]  # a number
        raise InvalidPayload(f"countdown is a number of seconds, of ten years at the most, not {countdown!r}")
    return float(countdown)  # type: ignore[arg-type]  # as above


def _aware(eta: Any, timezone: Any) -> datetime | None:
    if eta is None:
        return None
    try:
        parsed = maybe_iso8601(eta) if isinstance(eta, str) else eta
    except ValueError:
        parsed = None
    if not isinstance(parsed, datetime):
        raise InvalidPayload(f"eta is a datetime or one in ISO 8601, not {eta!r}")
    aware: datetime = maybe_make_aware(parsed, timezone)
    return aware
