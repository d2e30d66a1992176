"""What many tenants cost the database: creation, migration, sweeps, and a worker of all of them that dies."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.__main__ import _percentile

BUSY = 100
"""One tenant in so many has work while a dead worker is recovered."""


def create(cloacina: Any, names: list[str]) -> dict[str, float]:
    """Create the tenants, and ask what is asked about all of them."""
    from cloacina_celery.store import fleet, limits, migrate

    database = cloacina.database
    creations = sorted(timed(lambda name=name: cloacina.tenants.create(name)) for name in names)

    def look_into_catalog() -> None:
        with database.statement() as cursor:
            limits.seats(cursor)

    def read_revisions() -> None:
        with database.statement() as cursor:
            migrate.revisions_of(cursor, names)

    return {
        "create, p50": statistics.median(creations),
        "create, p99": _percentile(creations, 99),
        "migrate, nothing to do, all": timed(lambda: fleet.stale(database)),
        "revisions read, all": timed(read_revisions),
        "look into the catalog": timed(look_into_catalog),
    }


def sweep(cloacina: Any, names: list[str]) -> dict[str, float]:
    """Sweep tenants that have no work: all of them anew, as beat asks for it, and as a poll does."""
    reaper, settings = cloacina.parts.recovery.reaper(), cloacina.settings

    def after(pause: float, work: Callable[[], object]) -> float:
        # The longer ago the last one was, the more of the unmarked tenants have their turn.
        reaper.attend(names)
        time.sleep(pause)
        return timed(work)

    reaper.sweep_all()  # looks for old executions too, which it does once an hour
    _mark_only(cloacina.database, [])
    return {
        "sweep of idle tenants, all": timed(reaper.sweep_all),
        "one look at every tenant": timed(lambda: reaper.sweep(names)),
        "a sweep of idle tenants that beat asks for": after(
            settings.sweep_interval, lambda: reaper.sweep_all(everything=False)
        ),
        "a poll of idle tenants": after(settings.poll_interval, lambda: reaper.sweep(reaper.attend(names))),
    }


def lose_a_worker(cloacina: Any, names: list[str]) -> dict[str, float]:
    """Have a worker of all tenants die with one execution in its hands."""
    from cloacina_celery.core.settings import Settings
    from cloacina_celery.runtime.reaper import Reaper
    from cloacina_celery.store import executions, queries, workers
    from cloacina_celery.store.executions import Submission

    database, tenant, rung = cloacina.database, names[-1], []
    with database.statement() as cursor:
        row = Submission(execution_id="lost", task="bench.lost", message="[]", max_recoveries=3)
        worker_id = workers.register(cursor, name="dead", tenants=names)
        executions.submit(cursor, tenant, row)
        executions.claim(cursor, tenant, "lost", attempt=1, worker_id=worker_id, lease_ttl=600.0, policy=None)
        cursor.execute(
            "UPDATE cloacina.workers SET has_lock = true, heartbeat_at = now() - interval '1 hour' WHERE id = %s",
            (worker_id,),
        )
    _mark_only(database, [*names[:: -(-len(names) // BUSY)], tenant])
    database.dispose()  # the backend of a reaper has not met them lately
    reaper = Reaper(
        database, Settings(),
        publish=lambda rings: rung.extend(time.monotonic() for _ in rings), send_letters=lambda _: [],
        can_publish=lambda _: True, queue_depth=lambda _: 0, on_abandoned=lambda *_: None,
    )  # fmt: skip
    recovered = 0
    while not recovered:  # one that has just begun judges nobody
        time.sleep(0.2)
        began = time.monotonic()
        recovered = reaper.recover_dead_workers()
    buried = time.monotonic()
    with database.statement() as cursor:
        queries.cancel(cursor, tenant, "lost", reason="the benchmark")
    return {
        "dead worker of all: its execution goes on": rung[0] - began,
        "dead worker of all: buried": buried - began,
    }


def migrate_all(cloacina: Any, names: list[str]) -> dict[str, float]:
    """Migrate the tenants to a revision that adds a table, in one process."""
    from cloacina_celery.store import fleet

    with _new_revision():
        began = time.monotonic()
        failed = [done for done in fleet.migrate_all(cloacina.database, names, jobs=1) if done.error]
        took = time.monotonic() - began
    assert not failed, failed[0]
    return {"migrate, one new revision, all": took, "migrate, one new revision, each": took / len(names)}


def timed(work: Callable[[], object]) -> float:
    """Return how many seconds the work took."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


@contextmanager
def _new_revision() -> Iterator[None]:
    from cloacina_celery.store import migrate

    head, script = migrate.TENANT_HEAD, migrate._script
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(Path(migrate.__file__).parent / "migrations" / "tenant", folder, dirs_exist_ok=True)
        Path(folder, "versions", "t9999_bench.py").write_text(
            f"from alembic import op\nrevision, down_revision, works_from = 't9999', '{head}', 't0001'\n"
            "def upgrade():\n    op.execute('CREATE TABLE cloacina_bench (id bigint PRIMARY KEY)')\n"
        )

        def extended(branch: str) -> Any:
            from alembic.script import ScriptDirectory

            return ScriptDirectory(folder) if branch == "tenant" else script(branch)

        migrate.TENANT_HEAD, migrate._script = "t9999", extended
        try:
            yield
        finally:
            migrate.TENANT_HEAD, migrate._script = head, script


def _mark_only(database: Any, tenants: list[str]) -> None:
    from cloacina_celery.store import busy

    with database.statement() as cursor:
        cursor.execute("DELETE FROM cloacina.busy")
        for tenant in tenants:
            busy.mark(cursor, tenant)
