"""The workers' register: a lock that goes with its connection says who is dead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cloacina_celery import devservers
from cloacina_celery.store import migrate, workers
from cloacina_celery.store.database import Database
from tests.store.rows import age_of_server
from tests.support.waiting import database_time, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from psycopg2 import extensions

    from cloacina_celery.store.database import Cursor, StoreConnection

RESTARTED = "pg_postmaster_start_time() < now() - make_interval(secs => 10)"


@pytest.fixture
def register(database: Database, cursor: Cursor) -> Iterator[Cursor]:
    """A cursor on a database with a register, on a server that has not just been started."""
    migrate.ensure_catalog(database)

    def has_run_a_while() -> bool:
        cursor.execute(f"SELECT {RESTARTED}")
        row = cursor.fetchone()
        return row is not None and bool(row[0])

    eventually(has_run_a_while, why="the server to be up for ten seconds")
    yield cursor
    cursor.execute("UPDATE cloacina.workers SET stopped_at = now() WHERE stopped_at IS NULL")


@pytest.fixture
def liveness(database: Database) -> Iterator[StoreConnection]:
    """The connection that holds a worker's lock."""
    connection = database.dedicated_connection()
    yield connection
    connection.close()


def find_dead(cursor: Cursor) -> list[tuple[int, str]]:
    return [(dead.worker_id, dead.reason) for dead in workers.look(cursor, grace=2, lease_ttl=15).dead]


def age(cursor: Cursor, worker_id: int, seconds: float) -> None:
    cursor.execute(
        "UPDATE cloacina.workers SET heartbeat_at = now() - make_interval(secs => %s) WHERE id = %s",
        (seconds, worker_id),
    )


def test_a_worker_is_dead_as_soon_as_its_connection_is_gone_and_its_grace_is_over(
    register: Cursor, liveness: StoreConnection
) -> None:
    worker_id = workers.register(register, name="w1", tenants=["tenant_a", "tenant_b"])
    with liveness.cursor() as holder:
        workers.hold_lock(holder, worker_id)
    age(register, worker_id, 3600)
    assert find_dead(register) == []
    liveness.close()
    eventually(
        lambda: find_dead(register) == [(worker_id, "its liveness lock is gone")],
        why="the lock to go with its connection",
    )
    (dead,) = workers.look(register, grace=2, lease_ttl=15).dead
    assert dead.tenants == ("tenant_a", "tenant_b")
    age(register, worker_id, 1)
    assert find_dead(register) == []


def test_after_the_servers_start_only_who_has_shown_itself_since_can_be_called_dead(tmp_path: Path) -> None:
    """All lost their locks with it: who has not had its lock back may be about to take it."""
    url = devservers.start(tmp_path).database_url
    try:
        database = Database(url)
        migrate.ensure_catalog(database)
        with database.statement() as cursor:
            from_before = workers.register(cursor, name="from before", tenants=[])
            since = workers.register(cursor, name="since", tenants=[])
            cursor.execute("UPDATE cloacina.workers SET has_lock = true")
            age(cursor, from_before, 3600)
            workers.heartbeat(cursor, since)
            assert [one for one, _ in eventually(lambda: find_dead(cursor), why="a death")] == [since]
            eventually(lambda: from_before in dict(find_dead(cursor)), 20, "the other death")
            assert age_of_server(cursor.connection) > workers.RESTART_GRACE
        database.dispose()
    finally:
        devservers.stop(tmp_path)


def test_a_worker_that_comes_back_from_its_grave_can_die_again(
    register: Cursor, liveness: StoreConnection, database: Database
) -> None:
    """It was frozen, its connection was cut, and it goes on: only its old attempts are lost."""
    worker_id = workers.register(register, name="w1", tenants=["tenant_a"])
    with liveness.cursor() as holder:
        workers.hold_lock(holder, worker_id)
    liveness.close()
    workers.stop(register, worker_id, reason="its liveness lock is gone")
    assert worker_id not in [one.worker_id for one in workers.alive(register)]
    second = database.dedicated_connection()
    with second.cursor() as holder:
        workers.hold_lock(holder, worker_id)
    assert worker_id in [one.worker_id for one in workers.alive(register)]
    second.close()
    age(register, worker_id, 3)
    eventually(lambda: worker_id in dict(find_dead(register)), why="its second death to be seen")


def test_a_worker_without_a_lock_is_dead_when_its_leases_must_have_run_out(register: Cursor) -> None:
    worker_id = workers.register(register, name="w1", tenants=[])
    age(register, worker_id, 29)
    assert find_dead(register) == []
    age(register, worker_id, 31)
    assert find_dead(register) == [(worker_id, "no heartbeat for 30 s")]
    workers.heartbeat(register, worker_id)
    assert find_dead(register) == []


def test_another_databases_lock_is_nobodys_life_here(
    register: Cursor, liveness: StoreConnection, database: Database
) -> None:
    worker_id = workers.register(register, name="w1", tenants=[])
    register.execute("UPDATE cloacina.workers SET has_lock = true WHERE id = %s", (worker_id,))
    age(register, worker_id, 60)
    assert [one for one, _ in find_dead(register)] == [worker_id]


def test_who_signed_off_is_neither_alive_nor_dead(register: Cursor) -> None:
    worker_id = workers.register(register, name="w1", tenants=["tenant_a"])
    (alive,) = workers.alive(register)
    assert (alive.worker_id, alive.name, alive.tenants) == (worker_id, "w1", ("tenant_a",))
    workers.stop(register, worker_id, reason="shut down")
    age(register, worker_id, 3600)
    assert (workers.alive(register), find_dead(register)) == ([], [])
    workers.stop(register, worker_id, reason="found dead")
    register.execute("SELECT end_reason FROM cloacina.workers WHERE id = %s", (worker_id,))
    assert register.fetchone() == ("shut down",)


def test_one_reaper_at_a_time_buries_a_worker(database: Database, register: Cursor) -> None:
    worker_id = workers.register(register, name="w1", tenants=[])
    with database.transaction() as first:
        assert workers.lock_dead(first, [worker_id]) == {worker_id}
        assert not workers.lock_dead(register, [worker_id])
        workers.stop(first, worker_id, reason="found dead")
    assert not workers.lock_dead(register, [worker_id])


def test_a_look_counts_who_is_known_and_who_is_silent_and_reads_the_databases_clock(
    register: Cursor, liveness: StoreConnection, observer: extensions.connection
) -> None:
    frozen, fresh, dead = (workers.register(register, name=name, tenants=[]) for name in ("f", "g", "d"))
    with liveness.cursor() as holder:
        workers.hold_lock(holder, frozen)
    age(register, frozen, 16)
    age(register, dead, 31)
    before = database_time(observer).timestamp()
    seen = workers.look(register, grace=2, lease_ttl=15)
    assert (seen.known, seen.silent, [one.worker_id for one in seen.dead]) == (3, 2, [dead])
    assert before <= seen.database_at <= database_time(observer).timestamp()
    workers.stop(register, dead, reason="test")
    workers.heartbeat(register, frozen)
    seen = workers.look(register, grace=2, lease_ttl=15)
    assert (seen.known, seen.silent, seen.dead) == (2, 0, ())
    assert fresh in [one.worker_id for one in workers.alive(register)]
