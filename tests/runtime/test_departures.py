"""Workers that are gone, or go, and served many tenants: what they held goes on, wherever it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cloacina_celery.core.lifecycle import State
from cloacina_celery.core.settings import Settings
from cloacina_celery.runtime.reaper import Reaper
from cloacina_celery.store import busy, catalog, recovery, removal, workers
from cloacina_celery.store.database import Database
from cloacina_celery.store.driver_errors import LockNotAvailable
from cloacina_celery.store.workers import Reserved
from tests.store.rows import age_of_server, claim, events, read, run, shift, submit
from tests.support.databases import connect
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg2 import extensions

    from cloacina_celery.store.database import Cursor
    from cloacina_celery.store.ringing import Ring

MANY = 60
"""Tenants: more than two looks' batches."""


@pytest.fixture(scope="module")
def database(session_databases: Any) -> Iterator[Database]:
    """The package's view of the module's database, on a server that was not just started."""
    with session_databases.fresh() as url:
        made = Database(url)
        observer = connect(url)
        eventually(
            lambda: age_of_server(observer) > workers.RESTART_GRACE, why="the server's restart grace to end"
        )
        observer.close()
        yield made
        made.dispose()


@pytest.fixture(scope="module")
def tenants(database: Database) -> list[str]:
    """Many tenants, which the module's tests share; none is marked as busy."""
    names = [f"tenant_d{n:02}" for n in range(MANY)]
    for name in names:
        catalog.create(database, name)
    return names


@pytest.fixture
def cursor(database: Database, tenants: list[str]) -> Iterator[Cursor]:
    """A cursor in tenants that are empty, and a register that is empty too."""
    with database.statement() as lent:
        lent.execute("DELETE FROM cloacina.workers; DELETE FROM cloacina.busy")
        for name in tenants:
            lent.execute(f"DELETE FROM {name}.cloacina_executions; DELETE FROM {name}.cloacina_events")
        yield lent


@pytest.fixture
def other(database: Database) -> Iterator[extensions.connection]:
    """Somebody else's connection, in a transaction."""
    connection = connect(database.url.render_as_string(hide_password=False))
    connection.autocommit = False
    yield connection
    connection.close()


class Observed:
    """A reaper that trusts its view, and what it sent and counted."""

    def __init__(
        self, database: Database, *, depth: int | None = 0, then: Callable[[], object] = lambda: None
    ) -> None:
        self.rung: list[tuple[str, str]] = []
        self.counted: list[str] = []
        self._depth = depth
        self._then = then
        self.reaper = Reaper(
            database, Settings(),
            publish=self._publish, send_letters=lambda _: [], can_publish=lambda _: True, queue_depth=self._count,
            on_abandoned=lambda *_: None,
        )  # fmt: skip
        eventually(lambda: self._is_sure(), why="the reaper to trust its view")

    def _is_sure(self) -> bool:
        self.reaper._watch.look()
        outlook = self.reaper._watch._outlook
        return outlook is not None and outlook.judges_locks

    def _publish(self, rings: Any) -> None:
        ring: Ring
        for ring in rings:
            self.rung.append((ring.tenant, ring.execution_id))
        if rings:
            self._then()

    def _count(self, queue: str) -> int | None:
        self.counted.append(queue)
        return self._depth


def die(cursor: Cursor, worker_id: int) -> None:
    """Let a worker have lost its lock a minute ago."""
    cursor.execute(
        "UPDATE cloacina.workers SET has_lock = true, heartbeat_at = now() - interval '1 minute' WHERE id = %s",
        (worker_id,),
    )


def is_stopped(cursor: Cursor, worker_id: int) -> bool:
    cursor.execute("SELECT stopped_at IS NOT NULL FROM cloacina.workers WHERE id = %s", (worker_id,))
    return cursor.fetchone() == (True,)


def test_what_a_dead_worker_held_is_recovered_also_in_a_tenant_that_no_mark_names(
    database: Database, cursor: Cursor, tenants: list[str]
) -> None:
    observed = Observed(database)
    worker_id = workers.register(cursor, name="dead", tenants=tenants)
    alive = workers.register(cursor, name="alive", tenants=tenants)
    for tenant in (tenants[3], tenants[-2]):
        run(cursor, tenant, worker_id=worker_id)
        run(cursor, tenant, "another's", worker_id=alive)
    busy.mark(cursor, tenants[-2])
    die(cursor, worker_id)
    assert observed.reaper.recover_dead_workers() == 2
    assert is_stopped(cursor, worker_id)
    # The one that is marked goes on before the others are looked at.
    assert observed.rung == [(tenants[-2], "e-1"), (tenants[3], "e-1")]
    assert read(cursor, tenants[3], "another's").state is State.RUNNING
    assert not is_stopped(cursor, alive)


def test_a_dead_worker_costs_a_statement_for_many_tenants_and_not_one_for_each(
    database: Database, cursor: Cursor, tenants: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = Observed(database)
    for _ in range(3):
        die(cursor, workers.register(cursor, name="dead", tenants=tenants))
    run(cursor, tenants[7], worker_id=workers.alive(cursor)[0].worker_id)
    lent: list[int] = []
    transaction = Database.transaction
    monkeypatch.setattr(Database, "transaction", lambda self: lent.append(1) or transaction(self))
    assert observed.reaper.recover_dead_workers() == 1
    assert len(lent) < MANY / 4
    assert workers.alive(cursor) == []


def test_queues_are_counted_only_where_a_dead_workers_messages_may_be_missing(
    database: Database, cursor: Cursor, tenants: list[str]
) -> None:
    observed = Observed(database)
    worker_id = workers.register(cursor, name="dead", tenants=tenants)
    workers.heartbeat(cursor, worker_id, {tenants[5]: Reserved(count=1)})
    for tenant, seconds in [(tenants[5], -60.0), (tenants[6], 0.0)]:
        busy.mark(cursor, tenant)
        submit(cursor, tenant)
        shift(cursor, tenant, "rung_at", seconds)
    # Here there is something to do, and none of it is a message that was lost.
    busy.mark(cursor, tenants[7])
    submit(cursor, tenants[7], delay=60.0)
    shift(cursor, tenants[7], "run_at", -61)
    die(cursor, worker_id)
    observed.reaper.recover_dead_workers()
    assert observed.counted == [tenants[5]]
    assert observed.rung == [(tenants[5], "e-1")]


def test_a_worker_is_buried_only_when_each_tenant_has_answered_and_the_others_do_not_wait_for_it(
    database: Database, cursor: Cursor, tenants: list[str], other: extensions.connection
) -> None:
    observed = Observed(database)
    worker_id = workers.register(cursor, name="dead", tenants=tenants)
    locked, free = tenants[10], tenants[11]
    for tenant in (locked, free):
        run(cursor, tenant, worker_id=worker_id)
    die(cursor, worker_id)
    with other.cursor() as somebody:
        somebody.execute(f"LOCK TABLE {locked}.cloacina_executions")
    assert observed.reaper.recover_dead_workers() == 1
    assert observed.rung == [(free, "e-1")]
    assert not is_stopped(cursor, worker_id)
    other.rollback()
    assert observed.reaper.recover_dead_workers() == 1
    assert is_stopped(cursor, worker_id)


def test_a_tenant_that_is_dropped_after_the_look_into_the_register_keeps_nobody_from_going_on(
    database: Database, cursor: Cursor, new_tenant_name: Callable[[], str]
) -> None:
    staying, dropped = sorted(new_tenant_name() for _ in range(2))
    for name in (staying, dropped):
        catalog.create(database, name)
    observed = Observed(database)
    worker_id = workers.register(cursor, name="dead", tenants=[staying, dropped])
    run(cursor, staying, worker_id=worker_id)
    die(cursor, worker_id)
    dead = observed.reaper._watch.look()
    removal.remove(database, dropped, by="the test", with_work=True)
    assert observed.reaper._departures.bury(dead) == 1
    assert not is_stopped(cursor, worker_id)
    observed.reaper.recover_dead_workers()
    assert is_stopped(cursor, worker_id)


def test_what_a_child_that_outlives_its_worker_claims_after_the_look_is_recovered_before_the_burial(
    database: Database, cursor: Cursor, tenants: list[str]
) -> None:
    tenant = tenants[20]
    worker_id = workers.register(cursor, name="dead", tenants=tenants)
    run(cursor, tenant, worker_id=worker_id)
    for n in range(2):
        submit(cursor, tenant, f"late-{n}")
    late = iter(range(2))

    def claim_late() -> None:
        for n in late:
            assert claim(cursor, tenant, f"late-{n}", worker_id=worker_id)
            break

    observed = Observed(database, then=claim_late)
    die(cursor, worker_id)
    # The first claim comes before the second look, which finds it; the second one after that.
    assert observed.reaper.recover_dead_workers() == 2
    assert not is_stopped(cursor, worker_id)
    assert observed.reaper.recover_dead_workers() == 1
    assert is_stopped(cursor, worker_id)
    assert recovery.holders(cursor, [tenant], [worker_id]) == [(tenant, frozenset())]


def test_two_reapers_bury_a_worker_once(
    database: Database, cursor: Cursor, tenants: list[str], other: extensions.connection
) -> None:
    observed = Observed(database)
    worker_id = workers.register(cursor, name="dead", tenants=tenants)
    run(cursor, tenants[0], worker_id=worker_id)
    die(cursor, worker_id)
    with other.cursor() as another_reaper:
        workers.lock_dead(another_reaper, [worker_id])
        assert observed.reaper.recover_dead_workers() == 0
        # It dies over it.
        other.rollback()
    assert observed.reaper.recover_dead_workers() == 1
    assert events(cursor, tenants[0]) == [("submitted", 0), ("claimed", 1), ("recovered", 1)]
    assert is_stopped(cursor, worker_id)


def test_a_worker_that_comes_back_and_dies_again_is_looked_for_in_all_its_tenants_again(
    database: Database, cursor: Cursor, tenants: list[str], other: extensions.connection
) -> None:
    observed = Observed(database)
    worker_id = workers.register(cursor, name="frozen", tenants=tenants)
    die(cursor, worker_id)
    with other.cursor() as somebody:
        somebody.execute(f"LOCK TABLE {tenants[1]}.cloacina_executions")
    observed.reaper.recover_dead_workers()
    workers.heartbeat(cursor, worker_id)
    observed.reaper.recover_dead_workers()
    run(cursor, tenants[40], worker_id=worker_id)
    die(cursor, worker_id)
    other.rollback()
    assert observed.reaper.recover_dead_workers() == 1
    assert is_stopped(cursor, worker_id)


def test_a_worker_that_ends_gives_back_what_it_holds_and_says_where_it_could_not_look(
    database: Database, cursor: Cursor, tenants: list[str], other: extensions.connection
) -> None:
    observed = Observed(database)
    worker_id = workers.register(cursor, name="ends", tenants=tenants)
    locked, free = tenants[30], tenants[31]
    for tenant in (locked, free):
        run(cursor, tenant, worker_id=worker_id)
    with other.cursor() as somebody:
        somebody.execute(f"LOCK TABLE {locked}.cloacina_executions")
    with pytest.raises(LockNotAvailable):
        observed.reaper.release_worker(tenants, worker_id, reason="the test")
    assert observed.rung == [(free, "e-1")]
    other.rollback()
    assert observed.reaper.release_worker(tenants, worker_id, reason="the test") == 1
    assert events(cursor, locked)[-1] == ("released", 1)
