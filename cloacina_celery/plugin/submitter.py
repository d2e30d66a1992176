"""Submitting: the row first, in the caller's transaction where there is one; then the message."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu import Queue
from kombu.exceptions import KombuError, OperationalError
from sqlalchemy.orm import Session, scoped_session

from cloacina_celery.core.retry import MAX_DELAY
from cloacina_celery.errors import (
    CloacinaError,
    InvalidPayload,
    TenantMismatch,
    TenantNotBound,
    UnknownTenant,
)
from cloacina_celery.plugin.envelope import KEY_HEADER, Envelope
from cloacina_celery.runtime.attempt import RequestedRetry
from cloacina_celery.runtime.context import Unit, bound_tenant, current_attempt, current_unit
from cloacina_celery.runtime.units import SessionUnit, settlement
from cloacina_celery.store import chords, executions
from cloacina_celery.store.database import Cursor, InvalidSchemaName, UndefinedTable
from cloacina_celery.store.executions import Ring, Submission, Submitted
from cloacina_celery.telemetry import log

if TYPE_CHECKING:
    from cloacina_celery.plugin.app import Cloacina

Send = Callable[..., Any]

MAX_ID_LENGTH = 255
BROKER_PAUSE = 1.0
"""Seconds for which a broker that refused a message is not tried again by the background publisher."""

PUBLISH_RETRY = {"max_retries": 2, "interval_start": 0, "interval_step": 0.1, "interval_max": 0.2}
"""Enough for a connection that went stale; for a broker that is down there is the row."""

_KEY_NAMESPACE = uuid.UUID("6f1e2d0c-8a44-4b0e-9d43-0c1f5a6b7c8d")
_CANVAS_OPTIONS = ("exchange", "routing_key", "queue", "exchange_type", "declare", "headers", "serializer",
                   "retry", "retry_policy", "connection", "delivery_mode", "compression", "timeout",
                   "confirm_timeout", "event_dispatcher")  # fmt: skip

# Errors of a broker that is down or refuses; what else may go wrong is a mistake and must be seen.
BROKER_TROUBLE = (KombuError, OperationalError, OSError)


def id_for_key(tenant: str, key: object) -> str:
    """Derive the one execution id that a key has in a tenant: so racing callers meet at the primary key.

    Raises:
        InvalidPayload: the key is none.
    """
    if not isinstance(key, str) or not key:
        raise InvalidPayload(f"idempotency_key is a non-empty string, not {key!r}")
    return str(uuid.uuid5(_KEY_NAMESPACE, f"{tenant}/{key}"))


class Submitter:
    """Turn Celery's send into submit and publish."""

    def __init__(self, cloacina: Cloacina) -> None:
        self._cloacina = cloacina
        self._down_until = 0.0
        self._queues: dict[str, Queue] = {}

    def submit(self, producer: Any, name: str, message: Any, send: Send, options: dict[str, Any]) -> None:
        """Insert the row of a durable call and publish its message, now or after the caller's commit."""
        headers, properties, body, sent_event = message
        headers.update(options.get("headers") or {})
        delay = _seconds(headers.pop("cloacina_delay", None))
        eta = _aware(headers.pop("cloacina_eta", None), self._cloacina.app.timezone)
        envelope = Envelope(headers, {**properties, **_properties(options)}, body)
        attempt = current_attempt()
        if attempt is not None and attempt.id == headers["id"] and attempt.task == name:
            # The task's own self.retry(): no new row, the settlement will move this one.
            attempt.requested_retry = RequestedRetry(message=envelope.dump(name), delay=delay, eta=eta)
            return
        tenant, unit = self._place(name, options, headers)
        submission = self._submission(name, envelope, delay, eta, options)
        if unit is not None:
            # What leaves after the commit is what the row says, also if the caller changes a list meanwhile.
            body = Envelope.load(submission.message).body
        self._cloacina.remember(submission.execution_id, tenant)
        submitted = self._insert(tenant, submission, unit)
        if submitted is None or not submitted.is_due:
            return
        headers.update(envelope.ringing_for(tenant, submitted.attempt, 0))
        publish = _Publication(
            self, producer, send, name, (headers, properties, body, sent_event), tenant, headers["id"],
            submitted.attempt, envelope.properties,
        )  # fmt: skip
        if unit is None:
            publish.now()
        else:
            unit.after_commit(publish.later)

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
            and queue_name not in (tenant, self._cloacina.app.conf.task_default_queue)
            and self._cloacina.knows(queue_name)
        ):
            if tenant is not None:
                raise TenantMismatch(
                    f"{name} was sent for tenant {tenant!r} to the queue of tenant {queue_name!r}: "
                    "leave queue= away, a tenant's queue has its name"
                )
            tenant = queue_name
        if tenant is None:
            raise TenantNotBound(f"task {name}")
        self._cloacina.require_known(tenant)
        return tenant

    def publish_rings(self, rings: Sequence[Ring]) -> None:
        """Publish messages from rows; what the broker refuses is noted in the row and left to the next poll."""
        if not rings:
            return
        app = self._cloacina.app
        done = 0
        try:
            with app.producer_pool.acquire(block=True) as producer:
                for ring in rings:
                    self._publish_ring(producer, ring)
                    done += 1
        except BROKER_TROUBLE as error:
            self._down_until = time.monotonic() + BROKER_PAUSE
            for ring in rings[done:]:
                self._unring(ring.tenant, ring.execution_id, ring.attempt, error)

    def can_publish(self) -> bool:
        """Tell whether the broker has not just refused."""
        return time.monotonic() >= self._down_until

    def queue_depth(self, tenant: str) -> int | None:
        """Count the messages that wait in a tenant's queue; ``None`` if the broker does not say."""
        try:
            with self._cloacina.app.connection_for_write() as connection:
                channel = connection.default_channel
                try:
                    return int(channel.queue_declare(queue=tenant, passive=True).message_count)
                except connection.channel_errors:
                    return 0  # no such queue, so nothing waits in it
        except BROKER_TROUBLE:
            return None

    def send_plain(self, send: Send, name: str, message: Any, options: dict[str, Any]) -> None:
        """Send a message of a plain task that had to wait for a commit."""
        with self._cloacina.app.producer_pool.acquire(block=True) as producer:
            send(producer, name, message, **options)

    def _publish_ring(self, producer: Any, ring: Ring) -> None:
        envelope = Envelope.load(ring.message)
        self._publish(
            producer,
            self._cloacina.send,
            envelope.headers["task"],
            (envelope.ringing_for(ring.tenant, ring.attempt, ring.failures), {}, envelope.body, None),
            ring.tenant,
            envelope.properties,
        )

    def _publish(
        self, producer: Any, send: Send, name: str, message: Any, tenant: str, properties: dict[str, Any]
    ) -> None:
        send(
            producer, name, message, queue=self._queue(tenant), serializer="json", retry=True,
            retry_policy=PUBLISH_RETRY, **properties,
        )  # fmt: skip

    def _queue(self, tenant: str) -> Queue:
        queue = self._queues.get(tenant)
        if queue is None:
            queues = self._cloacina.app.amqp.queues
            # Not added to app.amqp.queues: a worker started without -Q consumes all that is in there.
            queue = self._queues[tenant] = queues.get(tenant) or queues.new_missing(tenant)
        return queue

    def _unring(self, tenant: str, execution_id: str, attempt: int, error: BaseException) -> None:
        log(
            "submit.unpublished", tenant=tenant, execution_id=execution_id, error=" ".join(str(error).split())
        )
        try:
            with self._cloacina.database.statement() as cursor:
                executions.unring(cursor, tenant, execution_id, attempt)
        except CloacinaError:
            pass  # the row is committed as rung; the sweep finds it stranded

    def _place(self, name: str, options: dict[str, Any], headers: dict[str, Any]) -> tuple[str, Unit | None]:
        explicit, session = options.get("tenant"), options.get("session")
        if options.get("idempotency_key") is not None and KEY_HEADER not in headers:
            raise InvalidPayload(
                "send_task() takes no idempotency_key: call task.apply_async(), or pass "
                "task_id=cloacina.execution_id(key, tenant=...)"
            )
        tenant = self.resolve_tenant(name, explicit, options.get("queue"))
        if session is not None:
            if isinstance(session, scoped_session):
                session = session()
            if not isinstance(session, Session):
                raise InvalidPayload(f"session= takes a SQLAlchemy Session, not {type(session).__name__}")
            return tenant, SessionUnit(session, tenant)
        unit = current_unit()
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
        task = self._cloacina.app.tasks.get(name)
        return Submission(
            execution_id=execution_id,
            task=name,
            message=envelope.dump(name),
            max_recoveries=self._cloacina.max_recoveries_of(task),
            policy=self._cloacina.stored_policy_of(task),
            delay=delay,
            eta=eta if delay is None else None,
            group_id=envelope.headers.get("group") if in_chord else None,
            group_index=envelope.headers.get("group_index") if in_chord else None,
        )

    def _insert(self, tenant: str, submission: Submission, unit: Unit | None) -> Submitted | None:
        database = self._cloacina.database
        try:
            chord_size = self._cloacina.take_chord_size(submission.group_id)
            if unit is not None:
                return _insert_all(unit.cursor(), tenant, submission, chord_size)
            if chord_size is not None:
                with settlement(database, tenant) as own:
                    return _insert_all(own.cursor(), tenant, submission, chord_size)
            with database.statement() as cursor:
                return executions.submit(cursor, tenant, submission, prepare=database.prepared_statements)
        except (UndefinedTable, InvalidSchemaName) as error:
            self._cloacina.forget_tenant(tenant)
            raise UnknownTenant(tenant) from error


class _Publication:
    """The message of one new row, on its way."""

    def __init__(
        self, submitter: Submitter, producer: Any, send: Send, name: str, message: Any, tenant: str,
        execution_id: str, attempt: int, properties: dict[str, Any],
    ) -> None:  # fmt: skip
        self._submitter = submitter
        self._producer = producer
        self._send = send
        self._name = name
        self._message = message
        self._tenant = tenant
        self._execution_id = execution_id
        self._attempt = attempt
        self._properties = properties

    def now(self) -> None:
        """Publish; the row is committed, so a broker that refuses is logged and not raised."""
        try:
            self._publish(self._producer)
        except BROKER_TROUBLE as error:
            self._submitter._unring(self._tenant, self._execution_id, self._attempt, error)

    def later(self) -> None:
        """Publish with a producer of its own: the caller's has gone back to its pool."""
        try:
            with self._submitter._cloacina.app.producer_pool.acquire(block=True) as producer:
                self._publish(producer)
        except BROKER_TROUBLE as error:
            self._submitter._unring(self._tenant, self._execution_id, self._attempt, error)

    def _publish(self, producer: Any) -> None:
        headers, _properties, body, sent_event = self._message
        self._submitter._publish(
            producer, self._send, self._name, (headers, {}, body, sent_event), self._tenant, self._properties
        )


def _insert_all(
    cursor: Cursor, tenant: str, submission: Submission, chord_size: int | None
) -> Submitted | None:
    submitted = executions.submit(cursor, tenant, submission)
    if chord_size is not None and submission.group_id is not None:
        chords.open_(cursor, tenant, submission.group_id, chord_size)
    return submitted


def _properties(options: dict[str, Any]) -> dict[str, Any]:
    from cloacina_celery.plugin.amqp import OWN_OPTIONS

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
