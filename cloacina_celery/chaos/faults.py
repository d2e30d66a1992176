"""The faults: each is done to a run, and tells what it did, or does nothing where it makes no sense now."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from cloacina_celery.chaos import queues
from cloacina_celery.store.ringing import Ring

if TYPE_CHECKING:
    from cloacina_celery.chaos.drive import Run
    from cloacina_celery.chaos.fleet import Member

BURST = 60
"""Executions submitted at once before a queue is meddled with, so that something waits in it."""

LOCKED_FOR = 2.0
"""Seconds for which a tenant's table is locked: longer than the reaper waits for a lock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A fault that happened: when by the database's clock, to which processes, and to which messages."""

    kind: str
    at: datetime
    detail: str
    pids: tuple[int, ...] = ()
    lost_ids: tuple[str, ...] = ()
    is_total: bool = False
    """Whether it may keep every worker from the database."""
    is_crash: bool = False
    """Whether Postgres may have forgotten the last moments' claims."""
    until: datetime | None = None
    """When it was over, where that is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One kind of fault."""

    kind: str
    strike: Callable[[Run], Done | None]
    weight: int = 2
    needs: frozenset[str] = frozenset()
    """What the run's ground has to have for it."""


def kill_child(run: Run) -> Done | None:
    """Kill one process of a worker's pool."""
    worker = run.any_worker()
    children = worker.children() if worker else []
    if worker is None or not children:
        return None
    child = run.random.choice(children)
    struck = done(run, "kill -9 of a child", f"{child} of {worker.name}", worker)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return struck


def kill_main(run: Run) -> Done | None:
    """Kill a worker's main process; the kernel ends its children."""
    worker = run.any_worker()
    if worker is None:
        return None
    struck = done(run, "kill -9 of a worker", worker.name, worker)
    worker.send(signal.SIGKILL)
    return struck


def kill_machine(run: Run) -> Done | None:
    """Kill a worker and all its children in the same moment."""
    worker = run.any_worker()
    if worker is None:
        return None
    struck = done(run, "power loss of a worker", worker.name, worker)
    worker.send(signal.SIGKILL, whole=True)
    return struck


def freeze(run: Run) -> Done | None:
    """Stop a worker and its children until their leases have run out, then let them go on."""
    worker = run.any_worker()
    if worker is None or any(one.is_frozen for one in run.fleet.workers):
        return None
    seconds = run.lease_ttl * run.random.uniform(1.3, 1.8)
    struck = done(run, "freeze past the lease", f"{worker.name} for {seconds:.1f} s", worker)
    worker.is_frozen = True
    worker.send(signal.SIGSTOP, whole=True)

    def thaw() -> None:
        worker.send(signal.SIGCONT, whole=True)
        worker.is_frozen = False

    run.later(seconds, thaw)
    return struck


def cut_connections(run: Run) -> Done | None:
    """Terminate some or all of the package's backends in this run's database."""
    share = run.random.choice((0.3, 1.0))
    struck = done(run, "database connections cut", f"{share:.0%} of them", is_total=True)
    run.cut_connections(share)
    return struck


def lose_some(run: Run) -> Done | None:
    """Delete one in ten of a queue's messages, and at least one."""
    tenant = run.burst(BURST)
    skip = run.random.randrange(10)
    count = iter(range(queues.BATCH))
    taken: list[str] = []

    def copies(message: queues.Taken) -> int:
        if next(count) % 10 != skip:
            return 1
        taken.append(message.execution_id)
        return 0

    at = run.now()
    queues.meddle(run.broker, tenant, copies)
    return _lost(at, "one message in ten lost", tenant, taken)


def lose_queue(run: Run) -> Done | None:
    """Empty a tenant's queue."""
    tenant, at = run.burst(BURST), run.now()
    taken = queues.meddle(run.broker, tenant, lambda _: 0)
    return _lost(at, "queue emptied", tenant, [one.execution_id for one in taken])


def lose_all_queues(run: Run) -> Done | None:
    """Empty every tenant's queue, as a broker that comes back without its data."""
    run.burst(BURST)
    at = run.now()
    taken = [
        one.execution_id for name in run.plan.tenants for one in queues.meddle(run.broker, name, lambda _: 0)
    ]
    return _lost(at, "all queues emptied", "all tenants", taken)


def repeat(run: Run) -> Done | None:
    """Have each message of a queue delivered three times, and keep copies to deliver once more, late."""
    tenant = run.burst(BURST)
    taken = queues.meddle(run.broker, tenant, lambda _: 3)
    run.random.shuffle(taken)
    if not taken:
        return None
    run.later(run.lease_ttl * run.random.uniform(0.3, 1.0), lambda: queues.put(run.broker, taken))
    return done(run, "messages repeated", f"{len(taken)} of {tenant}")


def ring_for_old_attempts(run: Run) -> Done | None:
    """Deliver messages of attempts that were claimed before, each twice in a row."""
    rings = [
        Ring(tenant=tenant, execution_id=id_, attempt=number, failures=0, recoveries=0, message=message)
        for tenant, id_, attempt, message in run.claimed_before()
        for number in range(1, attempt + 1)
        for _ in range(2)
    ]
    if not rings:
        return None
    run.cloacina.parts.publisher.publish_rings(rings)
    return done(run, "messages of old attempts", f"{len(rings)}")


def shut_down_warmly(run: Run) -> Done | None:
    """Replace a worker, the old one ending by SIGTERM."""
    worker = run.any_worker()
    if worker is None:
        return None
    run.fleet.send_away(worker, signal.SIGTERM)
    return done(run, "SIGTERM and replacement", worker.name)


def shut_down_coldly(run: Run) -> Done | None:
    """Replace a worker, the old one ending by SIGQUIT."""
    worker = run.any_worker()
    if worker is None:
        return None
    struck = done(run, "SIGQUIT and replacement", worker.name, worker)
    run.fleet.send_away(worker, signal.SIGQUIT)
    return struck


def recycle_children(run: Run) -> Done | None:
    """Replace a worker by one whose children end after a few tasks each."""
    worker = run.any_worker()
    if worker is None:
        return None
    run.fleet.send_away(worker, signal.SIGTERM)
    replacement = run.fleet.add_worker("--max-tasks-per-child", str(run.random.randint(1, 5)))
    return done(run, "children recycled", f"{replacement.name} for {worker.name}")


def restart_beat(run: Run) -> Done | None:
    """End one of the beats, which is started again."""
    if not run.fleet.beats:
        return None
    beat = run.random.choice(run.fleet.beats)
    number = run.random.choice((signal.SIGTERM, signal.SIGKILL))
    run.fleet.beats.remove(beat)
    run.fleet.leaving.append(beat)
    beat.leave(number)
    return done(run, "restart of beat", f"{beat.name} by {number.name}")


def lock_tenant(run: Run) -> Done | None:
    """Lock a tenant's executions against everybody for a while."""
    tenant = run.random.choice(run.plan.tenants)
    # In a thread, since the driver itself may have to wait for this lock.
    threading.Thread(target=run.hold_lock, args=(tenant, LOCKED_FOR), daemon=True).start()
    return done(run, "tenant locked", f"{tenant} for {LOCKED_FOR:g} s", is_total=True)


def done(run: Run, kind: str, detail: str, *workers: Member, is_total: bool = False) -> Done:
    """Note a fault that strikes now."""
    pids = tuple(worker.pid for worker in workers)
    return Done(kind=kind, at=run.now(), detail=detail, pids=pids, is_total=is_total)


def _lost(at: datetime, kind: str, where: str, ids: list[str]) -> Done | None:
    if not ids:
        return None
    return Done(kind=kind, at=at, detail=f"{len(ids)} of {where}", lost_ids=tuple(ids))
