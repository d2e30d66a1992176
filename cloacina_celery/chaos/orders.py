"""Faults that an execution is ordered to meet: its code kills, hangs, holds the GIL, or is cancelled."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kombu.exceptions import KombuError

from cloacina_celery.chaos.faults import Done, done
from cloacina_celery.chaos.plan import HOLDS_GIL

if TYPE_CHECKING:
    from cloacina_celery.chaos.drive import Run

WAYS = ("claimed", "written", "main", "exit", "segfault")
TIME_LIMIT = 2.0
"""Seconds, far more than an attempt takes that does not hang."""


def die_while_running(run: Run) -> Done | None:
    """Submit executions whose first run ends its process: SIGKILL, ``os._exit``, a segmentation fault."""
    ways = run.random.sample(WAYS, 3)
    for way in ways:
        run.submit(run.plan.job("doomed", run.random.choice(run.plan.tenants), dies=way))
    return done(run, "death by the task itself", ", ".join(ways))


def run_into_hard_limit(run: Run) -> Done | None:
    """Submit an execution whose first run hangs, and is killed for its time limit."""
    return _hang(run, "hard time limit", {"time_limit": TIME_LIMIT})


def run_into_soft_limit(run: Run) -> Done | None:
    """Submit an execution whose first run hangs, and is told so by an exception."""
    return _hang(run, "soft time limit", {"soft_time_limit": TIME_LIMIT})


def hold_gil(run: Run) -> Done | None:
    """Submit an execution that makes a C call which keeps the GIL for longer than a lease."""
    seconds = run.lease_ttl * run.random.uniform(1.2, 1.5)
    run.submit(run.plan.job(HOLDS_GIL, run.random.choice(run.plan.tenants), holds_gil=seconds))
    return done(run, "GIL held past the lease", f"for {seconds:.1f} s")


def cancel_running(run: Run) -> Done | None:
    """Submit an execution that waits, and cancel it, which it notices itself."""
    tenant = run.random.choice(run.plan.tenants)
    return _cancel(run, "cancel", tenant, lambda id_: run.cloacina.executions(tenant).cancel(id_))


def revoke_running(run: Run) -> Done | None:
    """Submit an execution that waits, and revoke it with its process."""
    tenant = run.random.choice(run.plan.tenants)

    def revoke(id_: str) -> None:
        # As a result's revoke() does, but told to the run's own workers alone: others would keep the id in mind.
        run.cloacina.executions(tenant).cancel(id_)
        workers = [worker.nodename for worker in run.fleet.workers]
        with suppress(KombuError, OSError):  # a broker that refuses: the task finds out by itself
            run.app.control.revoke(id_, terminate=True, destination=workers)

    return _cancel(run, "revoke with terminate", tenant, revoke)


def _hang(run: Run, kind: str, options: dict[str, float]) -> Done | None:
    run.submit(run.plan.job(kind, run.random.choice(run.plan.tenants), options=options, hangs=True))
    return done(run, kind, f"of {TIME_LIMIT:g} s")


def _cancel(run: Run, kind: str, tenant: str, cancel: Any) -> Done | None:
    job = run.plan.job(kind, tenant, expected="cancelled", is_cancelled=True)
    run.submit(job)
    run.later(run.random.uniform(0.0, 2.0), lambda: run.cancel(job, cancel))
    return done(run, kind, "")
