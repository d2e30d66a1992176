"""The worker's bootstep: opens the tenants, enters the worker in the register, and runs its keeper."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from celery import bootsteps

from cloacina_celery.errors import CloacinaError, DatabaseUnavailable, SettingsError
from cloacina_celery.plugin.limits import LOOK_INTERVAL as LIMITS_INTERVAL
from cloacina_celery.plugin.request import ReservedMessages, held_attempts
from cloacina_celery.plugin.selection import LOOK_INTERVAL, Followed
from cloacina_celery.plugin.tenants import Tenants
from cloacina_celery.runtime.keeper import Keeper, worker_name
from cloacina_celery.runtime.lease import Duties
from cloacina_celery.runtime.patrol import Patrol
from cloacina_celery.telemetry import logger

if TYPE_CHECKING:
    from cloacina_celery.plugin.kernel import Kernel
    from cloacina_celery.plugin.parts import Parts

EX_CONFIG, EX_UNAVAILABLE = 78, 69
"""The exit codes of a worker that refuses to start, and of one whose database does not answer (sysexits.h)."""

CHILD_CHECK_INTERVAL = 0.2
"""Seconds between two looks for dead children of the pool."""


class KeeperStep(bootsteps.StartStopStep):
    """Run the keeper from before the pool's first child until after its last."""

    label = "Cloacina"
    _child_check: Any = None
    _watches: tuple[Patrol, ...] = ()

    def create(self, worker: Any) -> Keeper:
        """Open the tenants of the worker's queues and make the keeper.

        A tenant that was named and cannot be served ends the start; one that a pattern selects is left out.
        """
        parts: Parts = worker.app.cloacina.parts
        kernel = parts.kernel
        queues = worker.app.amqp.queues
        try:
            _prepare_green_pool(worker)
            followed = Followed.of(kernel, worker)
            for removed in Tenants(parts).open_for(list(queues.consume_from), selects=followed.selects):
                queues.deselect(removed)
            followed.begin()
            keeper = Keeper(
                kernel.database,
                kernel.settings,
                parts.recovery.reaper(),
                name=worker_name(worker.hostname),
                duties=Duties(
                    tenants=followed.tenants,
                    held=held_attempts,
                    reserved=ReservedMessages().by_tenant,
                    look=kernel.tenants.look_again,
                ),
            )
        except CloacinaError as error:
            logger.critical("cannot start: %s", error)
            print(f"cloacina: cannot start: {error}", file=sys.stderr)
            # To be started again is of use after the one and not after the other: supervisors can tell them apart.
            raise SystemExit(
                EX_UNAVAILABLE if isinstance(error, DatabaseUnavailable) else EX_CONFIG
            ) from None
        kernel.keeper, kernel.worker_id = keeper, keeper.worker_id
        kernel.boards[keeper.worker_id] = keeper.board
        limiter = parts.limiter
        self._watches = (
            Patrol(followed.look, name="cloacina-catalog", interval=LOOK_INTERVAL),
            Patrol(
                lambda: limiter.look(followed.tenants()), name="cloacina-limits", interval=LIMITS_INTERVAL
            ),
        )
        return keeper

    def start(self, worker: Any) -> None:
        """Start the keeper, and the watches over the catalog and the limits."""
        super().start(worker)
        for watch in self._watches:
            watch.start()

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        """Look for dead children often: Celery's own look may come before the child can be reaped, and the
        next one only after five seconds."""
        maintain_pool = getattr(worker.pool, "maintain_pool", None)
        if maintain_pool is not None:
            # Celery comes here at each connection to the broker.
            if self._child_check is not None:
                self._child_check.cancel()
            self._child_check = hub.call_repeatedly(CHILD_CHECK_INTERVAL, maintain_pool)

    def stop(self, worker: Any) -> None:
        """Let the running tasks end, then sign off."""
        if worker.pool:
            worker.pool.stop()
        self._sign_off(worker, "the worker was shut down")

    def terminate(self, worker: Any) -> None:
        """End the running tasks, give them back, and sign off."""
        if worker.pool:
            worker.pool.terminate()
        self._sign_off(worker, "the worker was shut down at once")

    def _sign_off(self, worker: Any, reason: str) -> None:
        for watch in self._watches:
            watch.stop()
        if self.obj is not None:
            self.obj.stop(reason=reason)
            kernel: Kernel = worker.app.cloacina.parts.kernel
            kernel.keeper = None


def _prepare_green_pool(worker: Any) -> None:
    # psycopg2 waits in C, where gevent cannot switch: without this hook one query would stop every greenlet.
    if "gevent" in worker.pool_cls.__module__:
        try:
            from psycogreen.gevent import patch_psycopg
        except ImportError:
            raise SettingsError(
                "the gevent pool needs psycogreen: pip install 'cloacina_celery[gevent]', or choose another pool"
            ) from None
        patch_psycopg()
