"""Settling: what an attempt came to is recorded together with its effects and with what follows from it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionInfo
from celery import Task
from celery.exceptions import Ignore, Reject
from celery.exceptions import Retry as CeleryRetry

from cloacina_celery.core.lifecycle import Fail, Retry
from cloacina_celery.errors import (
    DatabaseUnavailable,
    InvalidPayload,
    LeaseLost,
)
from cloacina_celery.plugin.claimer import Claimer
from cloacina_celery.plugin.envelope import dump_json
from cloacina_celery.plugin.failures import describe_error, lineage_of, retry_after
from cloacina_celery.runtime import settling
from cloacina_celery.runtime.attempt import Attempt
from cloacina_celery.runtime.context import Unit, bind_attempt, bind_tenant, bind_unit
from cloacina_celery.runtime.units import CursorUnit, SessionUnit, settlement
from cloacina_celery.store import settlements
from cloacina_celery.store.bounded import bound
from cloacina_celery.store.database import Cursor
from cloacina_celery.store.driver_errors import is_disconnect, on_lent_connection
from cloacina_celery.telemetry import log

if TYPE_CHECKING:
    from cloacina_celery.plugin.kernel import Kernel
    from cloacina_celery.plugin.limits import Limiter

Body = Callable[[], Any]


class Settler:
    """Carry attempts from their message to their settled row."""

    def __init__(self, kernel: Kernel, limiter: Limiter) -> None:
        self._kernel = kernel
        self._limiter = limiter
        self._claimer = Claimer(kernel, limiter)
        self.recover_attempt: settling.RecoverAttempt

    def run(self, task: Task, body: Body) -> Any:
        """Claim the attempt that the current message rings for, run ``body``, and settle the outcome.

        Raises:
            Ignore: nothing was run, or nothing that it did remains: refused, stale, or fenced.
            celery.exceptions.Retry: the row is pending again, for Celery's hooks and logs.
            Exception: the body's own, after the row has been settled as failed.
        """
        attempt = self._claimer.claim(task)
        try:
            with bind_attempt(attempt):
                return self._run_claimed(task, attempt, body)
        finally:
            attempt.discard_session()
            self._limiter.slot_freed(attempt.tenant)

    def _run_claimed(self, task: Task, attempt: Attempt, body: Body) -> Any:
        try:
            result = body()
        except Ignore as ignored:
            self._settle_ignored(attempt, ignored)
            raise
        except Reject as rejected:
            self._settle_rejected(task, attempt, rejected)
            raise Ignore(f"rejected: {rejected}") from rejected
        except CeleryRetry as retry:
            self._settle_requested_retry(task, attempt, retry)
            raise
        except LeaseLost as lost:
            self._lost(attempt, lost)
        except Exception as error:  # noqa: BLE001  # whatever a task raises is its outcome
            self._recover_if_cut(attempt, error)
            return self._settle_failed(task, attempt, error)
        else:
            if attempt.requested_retry is not None:  # self.retry(throw=False)
                asked = CeleryRetry(when=attempt.requested_retry.eta or attempt.requested_retry.delay)
                self._settle_requested_retry(task, attempt, asked)
                raise asked
            self._settle_succeeded(task, attempt, result)
            return result

    # Succeeding

    def _settle_succeeded(self, task: Task, attempt: Attempt, result: Any) -> None:
        request = task.request
        try:
            stored = (
                None
                if request.ignore_result or result is None
                else dump_json(task.backend.prepare_value(result), f"the result of {task.name}")
            )
        except InvalidPayload as error:
            self._settle_failed(task, attempt, error)
            return
        follows = bool(request.callbacks or request.chain or request.chord)
        try:
            if attempt.session is not None:
                self._commit_with_session(task, attempt, result, stored, follows=follows)
            elif follows:

                def succeed(unit: CursorUnit) -> None:
                    self._succeed(unit.cursor(), attempt, stored)
                    self._follow_success(task, attempt, result)

                settling.settle(attempt, succeed, "succeeded")
            else:
                self._succeed_alone(attempt, stored)
        except LeaseLost as lost:
            self._lost(attempt, lost)
        except Exception as error:  # noqa: BLE001  # the database, or what follows, may refuse anything
            if not is_disconnect(error):
                self._recover_if_cut(attempt, error)
                # Such as a constraint that the effects break at the flush or the commit: a failure like any other.
                self._settle_failed(task, attempt, error)
            self._after_lost_commit(attempt, error)
        # What follows is in the database; Celery's tracer must not send it a second time.
        request.callbacks = request.chain = None

    def _succeed_alone(self, attempt: Attempt, stored: str | None) -> None:
        try:
            with attempt.database.statement() as cursor:
                self._succeed(cursor, attempt, stored, prepare=attempt.database.prepared_statements)
        except DatabaseUnavailable as error:
            settling.note_waiting(attempt, error)
            settling.settle(
                attempt,
                lambda unit: self._succeed(unit.cursor(), attempt, stored),
                "succeeded",
                is_in_doubt=True,
            )

    def _succeed(
        self, cursor: Cursor, attempt: Attempt, stored: str | None, *, prepare: bool = False
    ) -> None:
        if not settlements.succeed(
            cursor, attempt.tenant, attempt.id, attempt.attempt, stored, prepare=prepare
        ):
            raise LeaseLost(attempt.tenant, attempt.id, attempt.attempt)

    def _commit_with_session(
        self, task: Task, attempt: Attempt, result: Any, stored: str | None, *, follows: bool
    ) -> None:
        session = attempt.session
        assert session is not None
        unit: Unit = SessionUnit(session, attempt.tenant, is_settlement=True)
        with on_lent_connection():
            self._succeed(unit.cursor(), attempt, stored)
        if follows:
            with bind_unit(unit):
                self._follow_success(task, attempt, result)
        session.commit()

    def _follow_success(self, task: Task, attempt: Attempt, result: Any) -> None:
        request, app = task.request, task.app
        options = {"parent_id": attempt.id, "root_id": request.root_id or attempt.id}
        if app.conf.task_inherit_parent_priority:
            options["priority"] = (request.delivery_info or {}).get("priority")
        for callback in request.callbacks or ():
            app.signature(callback).apply_async((result,), **options)
        if request.chain:
            chain = list(request.chain)
            app.signature(chain.pop()).apply_async((result,), chain=chain, **options)
        if request.chord:
            task.backend.on_chord_part_return(request, "SUCCESS", result)

    # Failing

    def _settle_failed(self, task: Task, attempt: Attempt, error: Exception) -> Any:
        attempt.discard_session()
        einfo = ExceptionInfo()
        described = describe_error(task, error, einfo.traceback)
        decision: Retry | Fail | None = None

        def fail(unit: CursorUnit) -> None:
            nonlocal decision
            made = settlements.fail(
                unit.cursor(), attempt.tenant, attempt.id, attempt.attempt, error=described,
                lineage=lineage_of(error), random=random.random(), default_policy=self._kernel.policy_of(task),
                retry_after=retry_after(error),
            )  # fmt: skip
            self._require(made is not None, attempt)
            decision = made
            if isinstance(made, Fail):
                task.backend.after_failure(task.request, error, einfo.traceback)

        self._settle(attempt, fail, "failed", "retry_scheduled")
        match decision:
            case Retry(delay=delay):
                raise CeleryRetry(exc=error, when=delay) from error
            case _:
                raise error

    def _settle_requested_retry(self, task: Task, attempt: Attempt, retry: CeleryRetry) -> None:
        requested = attempt.requested_retry
        cause = retry.exc or retry
        # self.retry(throw=False) raises nothing.
        traceback = ExceptionInfo().traceback if sys.exc_info()[0] is not None else None
        described = describe_error(task, cause, traceback)
        when = retry.when if requested is None else None
        delay = requested.delay if requested else when if isinstance(when, (int, float)) else None
        eta = requested.eta if requested else when if isinstance(when, datetime) else None

        def retry_later(unit: CursorUnit) -> None:
            settled = settlements.retry(
                unit.cursor(), attempt.tenant, attempt.id, attempt.attempt, error=described, delay=delay, eta=eta,
                message=requested.message if requested else None,
            )  # fmt: skip
            self._require(settled, attempt)

        self._settle(attempt, retry_later, "retry_scheduled")

    def _settle_ignored(self, attempt: Attempt, ignored: Ignore) -> None:
        replacement = attempt.replacement

        def cancel(unit: CursorUnit) -> None:
            settled = settlements.end_cancelled(
                unit.cursor(), attempt.tenant, attempt.id, attempt.attempt,
                reason=f"the task raised Ignore: {ignored}".replace("\0", ""),
            )  # fmt: skip
            self._require(settled, attempt)

        def replace(unit: CursorUnit) -> None:
            settled = settlements.park(unit.cursor(), attempt.tenant, attempt.id, attempt.attempt)
            self._require(settled, attempt)
            replacement.apply_async()

        if replacement is None:
            self._settle(attempt, cancel, "cancelled")
        else:
            self._settle(attempt, replace, "replaced")

    def _settle_rejected(self, task: Task, attempt: Attempt, rejected: Reject) -> None:
        if not rejected.requeue:
            with suppress(Reject, CeleryRetry):
                self._settle_failed(task, attempt, rejected)
            return

        def release(unit: CursorUnit) -> None:
            settled = settlements.release_attempt(
                unit.cursor(), attempt.tenant, attempt.id, attempt.attempt,
                reason="the task asked to be requeued",
            )  # fmt: skip
            self._require(settled, attempt)

        self._settle(attempt, release, "released")

    def settle_timed_out(
        self, tenant: str, execution_id: str, attempt: int, error: Exception, request: Any
    ) -> None:
        """Settle an attempt whose hard time limit is over, from the worker's main process."""
        task = self._kernel.app.tasks[request.task]
        with bind_tenant(tenant), settlement(self._kernel.database, tenant) as unit:
            bound(unit.cursor())
            decision = settlements.fail(
                unit.cursor(), tenant, execution_id, attempt, error=describe_error(task, error, None),
                lineage=lineage_of(error), random=random.random(), default_policy=self._kernel.policy_of(task),
            )  # fmt: skip
            if isinstance(decision, Fail):
                task.backend.after_failure(request, error, None)

    # When the fence or the database refuses

    @staticmethod
    def _require(settled: bool, attempt: Attempt) -> None:
        if not settled:
            raise LeaseLost(attempt.tenant, attempt.id, attempt.attempt)

    def _settle(self, attempt: Attempt, write: Callable[[CursorUnit], None], *kinds: str) -> None:
        try:
            settling.settle(attempt, write, *kinds)
        except LeaseLost as lost:
            self._lost(attempt, lost)

    def _lost(self, attempt: Attempt, lost: LeaseLost) -> Any:
        attempt.discard_session()
        log("settle.fenced", tenant=attempt.tenant, execution_id=attempt.id, attempt=attempt.attempt)
        raise Ignore(str(lost)) from lost

    def _after_lost_commit(self, attempt: Attempt, error: Exception) -> None:
        """Return if the session's commit, whose answer did not come, was done all the same.

        Raises:
            Ignore: it was not, and the execution will run again; or the attempt was lost.
        """
        try:
            if not settling.after_lost_commit(attempt, error, self.recover_attempt):
                raise Ignore("the settlement was rolled back; the execution will run again") from error
        except LeaseLost as lost:
            self._lost(attempt, lost)

    def _recover_if_cut(self, attempt: Attempt, error: Exception) -> None:
        """Move the attempt on by its recovery budget if what it raised came from a connection of ours that broke.

        The task did nothing wrong, so no failure is counted; but its statement may be what breaks the server, so
        it does not run for ever.

        Raises:
            Ignore: it did, and the attempt has been recovered or abandoned.
        """
        try:
            reason = settling.recover_if_cut(attempt, error, self.recover_attempt)
        except LeaseLost as lost:
            self._lost(attempt, lost)
        if reason is not None:
            raise Ignore(f"the run was lost: {reason}") from error
