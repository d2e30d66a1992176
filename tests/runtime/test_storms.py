"""Storms: many workers die at once, or only seem to; nothing is judged in haste and nothing rushes back."""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections import Counter
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from psycopg2 import sql

from cloacina_celery.core.settings import Settings
from cloacina_celery.errors import CloacinaError
from cloacina_celery.runtime import watch
from cloacina_celery.runtime.keeper import Keeper
from cloacina_celery.runtime.lease import Duties
from cloacina_celery.runtime.reaper import Reaper
from cloacina_celery.store import catalog, removal, turns, workers
from cloacina_celery.store.database import Database
from cloacina_celery.store.driver_errors import DriverError
from tests.store.rows import Rival, age_of_server, events, read, run, shift
from tests.support.databases import connect
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from psycopg2 import extensions

    from cloacina_celery.store.ringing import Ring

HASTY = Settings(
    lease_ttl=3.0,
    heartbeat_interval=1.0,
    liveness_grace=0.5,
    poll_interval=0.05,
    recovery_rate=20.0,
    recovery_burst=10,
)
CATCH_UP = 3.5
"""Seconds after which all workers with these settings have shown themselves."""


@pytest.fixture
def database(database_url: str, observer: extensions.connection) -> Iterator[Database]:
    """The package's view of a fresh database, on a server that was not just started."""
    eventually(
        lambda: age_of_server(observer) > workers.RESTART_GRACE, why="the server's restart grace to end"
    )
    made = Database(database_url)
    yield made
    made.dispose()


@pytest.fixture
def tenants(database: Database, new_tenant_name: Callable[[], str]) -> list[str]:
    """Four tenants."""
    names = sorted(new_tenant_name() for _ in range(4))
    for name in names:
        catalog.create(database, name)
    return names


class Sweeper:
    """A reaper that looks again and again, in a thread of its own, and what it publishes."""

    def __init__(self, database_url: str, tenants: list[str]) -> None:
        self.published: list[tuple[float, Ring]] = []
        self._database = Database(database_url)
        self._tenants = tenants
        self.reaper = Reaper(
            self._database, HASTY,
            publish=lambda rings: self.published.extend((time.monotonic(), ring) for ring in rings),
            send_letters=lambda _: [], can_publish=lambda _: True, queue_depth=lambda _: None,
            on_abandoned=lambda *_: None,
        )  # fmt: skip
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.looks = 0

    def _run(self) -> None:
        while not self._stopping.wait(HASTY.poll_interval):
            try:
                self.reaper.recover_dead_workers()
                self.reaper.sweep(self._tenants)
                self.looks += 1
            except (DriverError, CloacinaError) as error:
                self.reaper.note_answer(error)

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join()
        self._database.dispose()


@pytest.fixture
def sweeper_of(database_url: str) -> Iterator[Callable[[list[str]], Sweeper]]:
    """A function that starts a reaper."""
    started: list[Sweeper] = []

    def start(tenants: list[str]) -> Sweeper:
        started.append(Sweeper(database_url, tenants))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture
def keeper_of(database_url: str) -> Iterator[Callable[..., Keeper]]:
    """A function that starts a worker's background work, without recovery, which holds an execution."""
    started: list[tuple[Database, Keeper]] = []

    def start(tenant: str, execution_id: str) -> Keeper:
        database = Database(database_url)
        settings = Settings(lease_ttl=3.0, heartbeat_interval=1.0, enable_recovery=False)
        reaper = Reaper(
            database, settings, publish=lambda _: None, send_letters=lambda _: [], can_publish=lambda _: True,
            queue_depth=lambda _: None, on_abandoned=lambda *_: None,
        )  # fmt: skip
        keeper = Keeper(
            database, settings, reaper, name=f"holder of {execution_id}",
            duties=Duties(
                tenants=lambda: [tenant], held=lambda: [(tenant, execution_id, 1)], reserved=dict,
            ),
        )  # fmt: skip
        keeper.start()
        started.append((database, keeper))
        return keeper

    yield start
    for database, keeper in started:
        keeper.stop(reason="the test is over")
        database.dispose()


def bury_alive(cursor: Any, tenants: list[str], *, dead: int, rows_each: int) -> None:
    """Register workers that have no lock and are silent, and give each running rows of all tenants."""
    for n in range(dead):
        worker_id = workers.register(cursor, name=f"w{n}", tenants=tenants)
        cursor.execute(
            "UPDATE cloacina.workers SET has_lock = true, heartbeat_at = now() - interval '1 minute' WHERE id = %s",
            (worker_id,),
        )
        for tenant in tenants:
            cursor.execute(
                sql.SQL(
                    """
                    INSERT INTO {s}.cloacina_executions (id, task, state, attempt, max_recoveries, message,
                        worker_id, lease_expires_at, started_at, rung_at)
                    SELECT 'e-' || %s || '-' || n, 'shop.add', 'running', 1, 3, '[{{}}, {{}}, [[], {{}}, {{}}]]',
                        %s, now() + interval '1 minute', now(), now()
                    FROM generate_series(1, %s) n
                    """
                ).format(s=sql.Identifier(tenant)),
                (n, worker_id, rows_each),
            )


def most_within_a_second(instants: list[datetime]) -> int:
    """Count the instants in the fullest second, wherever it begins."""
    at = sorted(instant.timestamp() for instant in instants)
    return max(bisect_left(at, begin + 1.0) - n for n, begin in enumerate(at))


def test_fifty_workers_that_die_together_are_doubted_then_recovered_once_and_in_turns(
    database: Database,
    tenants: list[str],
    sweeper_of: Callable[[list[str]], Sweeper],
    observer: extensions.connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="cloacina")
    with database.transaction() as cursor:
        bury_alive(cursor, tenants, dead=50, rows_each=2)
    began = time.monotonic()
    sweepers = [sweeper_of(tenants) for _ in range(3)]

    def published() -> list[tuple[float, Ring]]:
        return [entry for sweeper in sweepers for entry in sweeper.published]

    eventually(lambda: len(published()) >= 400, 40, "all to be sent out again")
    assert Counter((r.tenant, r.execution_id, r.attempt) for _, r in published()).most_common(1)[0][1] == 1
    # Nobody was judged before the pause was over, and all three said so.
    assert min(at for at, _ in published()) - began >= HASTY.lease_ttl
    reasons = [r.message for r in caplog.records if getattr(r, "cloacina_event", "") == "sweep.paused"]
    assert len(reasons) == 3
    assert all("50 of 50 workers fell silent at the same time" in line for line in reasons)
    eventually(
        lambda: [getattr(r, "cloacina_event", "") for r in caplog.records].count("sweep.resumed") == 3,
        why="the end of the pause to be told",
    )
    phases = []
    for tenant in tenants:
        with observer.cursor() as look:
            look.execute(
                sql.SQL(
                    "SELECT run_at FROM {s}.cloacina_executions WHERE state = 'pending' AND recoveries = 1"
                ).format(s=sql.Identifier(tenant))
            )
            instants = [row[0] for row in look.fetchall()]
            look.execute(
                sql.SQL("SELECT count(*) FROM {s}.cloacina_events WHERE kind = 'recovered'").format(
                    s=sql.Identifier(tenant)
                )
            )
            assert look.fetchone() == (100,)
        assert len(instants) == 100
        fullest = most_within_a_second(instants)
        took = (max(instants) - min(instants)).total_seconds()
        print(f"FIGURE most starts of a tenant in a second: {fullest}; its 100 took {took:.2f} s")
        assert fullest <= HASTY.recovery_rate + HASTY.recovery_burst + 1
        assert took >= (100 - HASTY.recovery_burst - 1) / HASTY.recovery_rate - 0.5
        gaps = [
            (b - a).total_seconds()
            for a, b in zip(sorted(instants)[-40:], sorted(instants)[-39:], strict=False)
        ]
        phases.append(max(gaps) - min(gaps))
    # Slots of 50 ms, and a start anywhere in each: no two gaps are the same.
    assert min(phases) > 0.02
    with observer.cursor() as look:
        look.execute("SELECT count(*) FROM cloacina.workers WHERE stopped_at IS NULL")
        assert look.fetchone() == (0,)


def test_two_workers_that_die_together_are_recovered_at_once(
    database: Database, tenants: list[str], sweeper_of: Callable[[list[str]], Sweeper]
) -> None:
    with database.transaction() as cursor:
        bury_alive(cursor, tenants, dead=2, rows_each=1)
    began = time.monotonic()
    sweeper = sweeper_of(tenants)
    eventually(lambda: len(sweeper.published) == 8, 5, "their executions to be sent out again")
    print(f"FIGURE two dead workers of a small system: {time.monotonic() - began:.2f} s")


@pytest.fixture
def no_database(
    database_server: str, observer: extensions.connection
) -> Callable[[], AbstractContextManager[None]]:
    """A block in which the database refuses everybody but the observer, without a restart of the server."""

    @contextmanager
    def cut() -> Iterator[None]:
        with observer.cursor() as cursor:
            cursor.execute("SELECT current_database(), pg_backend_pid()")
            name, own = cursor.fetchone() or ("", 0)
        admin = connect(database_server)
        allow = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}").format
        try:
            with admin.cursor() as cursor:
                cursor.execute(allow(sql.Identifier(name), sql.SQL("false")))
                cursor.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> %s",
                    (name, own),
                )
                yield
        finally:
            with admin.cursor() as cursor:
                cursor.execute(allow(sql.Identifier(name), sql.SQL("true")))
            admin.close()

    return cut


def pass_by(observer: extensions.connection, seconds: float) -> None:
    """Let time pass on the database's clock."""
    with observer.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s)", (seconds,))


def lease_of(observer: extensions.connection, tenant: str) -> Any:
    with observer.cursor() as cursor:
        return read(cursor, tenant).lease_expires_at


def held(database: Database, tenant: str, keeper_of: Callable[..., Keeper]) -> Keeper:
    """Start a worker that holds the plain row of the tenant."""
    keeper = keeper_of(tenant, "e-1")
    with database.statement() as cursor:
        run(cursor, tenant, worker_id=keeper.worker_id)
    return keeper


def test_after_a_time_without_a_database_nobody_takes_a_healthy_workers_execution(
    database: Database,
    tenants: list[str],
    sweeper_of: Callable[[list[str]], Sweeper],
    keeper_of: Callable[..., Keeper],
    no_database: Callable[[], AbstractContextManager[None]],
    observer: extensions.connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tenant = tenants[0]
    keeper = held(database, tenant, keeper_of)
    sweeper = sweeper_of(tenants)
    eventually(lambda: sweeper.reaper._watch.judges_leases, why="the reaper to have watched for long enough")
    before = eventually(lambda: lease_of(observer, tenant), why="the lease")
    with no_database():
        # Until the lease has run out and the worker's lock is long gone.
        pass_by(observer, 5)
    seen = sweeper.looks
    eventually(lambda: sweeper.looks > seen + 2, why="the reaper to be back")
    eventually(lambda: lease_of(observer, tenant) > before, why="the holder to be back too")
    seen = sweeper.looks
    eventually(lambda: sweeper.reaper._watch.judges_leases and sweeper.looks > seen, why="the doubt to end")
    with observer.cursor() as cursor:
        assert [kind for kind, _ in events(cursor, tenant)] == ["submitted", "claimed"]
    told = [r.message for r in caplog.records if "sweep.paused" in r.message]
    assert len(told) == 1
    assert "the database was out of reach for" in told[0]
    # And one that does not come back is recovered when the doubt has ended.
    with no_database():
        keeper._leases.stop()
        pass_by(observer, 4)
    back_at = time.monotonic()
    eventually(lambda: sweeper.published, why="the recovery of an execution whose holder stayed away")
    print(f"FIGURE a worker that did not come back with the database: {time.monotonic() - back_at:.2f} s")
    assert time.monotonic() - back_at <= CATCH_UP + 2.0


def test_a_reaper_that_starts_believes_a_lease_that_ran_out_only_when_it_has_watched(
    database: Database,
    tenants: list[str],
    sweeper_of: Callable[[list[str]], Sweeper],
    keeper_of: Callable[..., Keeper],
    observer: extensions.connection,
) -> None:
    tenant = tenants[0]
    held(database, tenant, keeper_of)
    with observer.cursor() as cursor:
        eventually(lambda: read(cursor, tenant).lease_expires_at, why="the row to run")
        shift(cursor, tenant, "lease_expires_at", -60)
    sweeper = sweeper_of(tenants)
    eventually(lambda: sweeper.reaper._watch.judges_leases, why="the reaper to have watched for long enough")
    with observer.cursor() as cursor:
        assert [kind for kind, _ in events(cursor, tenant)] == ["submitted", "claimed"]


def test_when_the_databases_clock_jumps_leases_say_nothing_until_they_were_extended_on_it(
    database: Database,
    tenants: list[str],
    sweeper_of: Callable[[list[str]], Sweeper],
    keeper_of: Callable[..., Keeper],
    observer: extensions.connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A server's clock cannot be set for a test: its instants are moved back, and what it says is moved on."""
    tenant = tenants[0]
    held(database, tenant, keeper_of)
    sweeper = sweeper_of(tenants)
    eventually(lambda: sweeper.reaper._watch.judges_leases, why="the reaper to have watched for long enough")
    look, ahead = workers.look, [0.0]

    def look_ahead(cursor: Any, **options: Any) -> workers.Register:
        seen = look(cursor, **options)
        return workers.Register(
            database_at=seen.database_at + ahead[0], known=seen.known, silent=seen.silent, dead=seen.dead
        )

    monkeypatch.setattr(watch.workers, "look", look_ahead)
    seen = sweeper.looks
    eventually(lambda: sweeper.looks > seen + 1, why="a look through the moved clock")
    ahead[0] = 600.0
    eventually(lambda: not sweeper.reaper._watch.judges_leases, why="the jump to be seen")
    with observer.cursor() as cursor:
        shift(cursor, tenant, "lease_expires_at", -600)
        seen = sweeper.looks
        eventually(lambda: sweeper.looks > seen + 2, why="the reaper to see the lease that ran out")
        eventually(lambda: sweeper.reaper._watch.judges_leases, why="the doubt to end")
        seen = sweeper.looks
        eventually(lambda: sweeper.looks > seen + 2, why="the reaper to judge again")
        assert [kind for kind, _ in events(cursor, tenant)] == ["submitted", "claimed"]
    assert [r.message for r in caplog.records if "the database's clock jumped by +600" in r.message]


def test_a_reaper_that_stood_still_for_longer_than_a_lease_looks_again_before_it_judges(
    database: Database,
    tenants: list[str],
    sweeper_of: Callable[[list[str]], Sweeper],
    keeper_of: Callable[..., Keeper],
    observer: extensions.connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As a host that was frozen with all its workers: the reaper is the first to thaw."""
    tenant = tenants[0]
    held(database, tenant, keeper_of)
    sweeper = sweeper_of(tenants)
    eventually(lambda: sweeper.reaper._watch.judges_leases, why="the reaper to have watched for long enough")
    look, is_frozen = workers.look, threading.Event()
    thaw = threading.Event()

    def freeze(cursor: Any, **options: Any) -> workers.Register:
        is_frozen.set()
        thaw.wait()
        return look(cursor, **options)

    monkeypatch.setattr(watch.workers, "look", freeze)
    assert is_frozen.wait(5)
    with observer.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(1.5)")
        shift(cursor, tenant, "lease_expires_at", -60)
        thaw.set()
        seen = sweeper.looks
        eventually(lambda: sweeper.looks > seen + 2, why="the reaper to thaw")
        eventually(lambda: sweeper.reaper._watch.judges_leases, why="the doubt to end")
        assert [kind for kind, _ in events(cursor, tenant)] == ["submitted", "claimed"]
    assert [r.message for r in caplog.records if "s after the one before" in r.message]


# --- turns ---


def take(database: Database, tenant: str, number: int) -> list[datetime | None]:
    return turns.take(database, tenant, rate=10.0, burst=5, draws=[0.5] * number)


def test_turns_are_shared_by_all_who_take_them_and_are_each_tenants_own(
    database: Database, tenants: list[str]
) -> None:
    first, second = tenants[:2]
    # The sixth slot begins at this very moment, so a hair later it counts as begun.
    *at_once, _, seventh = take(database, first, 7)
    assert at_once == [None] * 5
    later = [seventh, *take(database, first, 3), *take(database, first, 1)]
    assert None not in later
    assert later == sorted(later, key=str)
    assert take(database, second, 5) == [None] * 5


def test_whoever_holds_a_tenants_row_in_the_catalog_stops_no_recovery(
    database: Database, tenants: list[str]
) -> None:
    with database.transaction() as cursor:
        cursor.execute("UPDATE cloacina.tenants SET retain_failed = 1 WHERE name = %s", (tenants[0],))
        began = time.monotonic()
        taken = take(database, tenants[0], 8)
        assert time.monotonic() - began < 1.0
        assert [turn is None for turn in taken] == [True] * 5 + [False] * 3
        assert take(database, tenants[1], 1) == [None]


def test_turns_of_a_tenant_that_was_dropped_meanwhile_are_reckoned_without_it(database: Database) -> None:
    catalog.create(database, "tenant_there")
    assert [turn is None for turn in take(database, "tenant_gone", 6)] == [True] * 5 + [False]


def test_a_clock_that_was_set_back_costs_an_hour_at_the_most(
    database: Database, tenants: list[str], observer: extensions.connection
) -> None:
    with observer.cursor() as cursor:
        cursor.execute("UPDATE cloacina.tenants SET recovery_paced_until = now() + interval '1 year'")
        (turn,) = take(database, tenants[0], 1)
        cursor.execute("SELECT %s - now() BETWEEN interval '59 minutes' AND interval '61 minutes'", (turn,))
        assert cursor.fetchone() == (True,)


@pytest.mark.parametrize("who_is_first", ["drop", "recovery"])
def test_a_drop_and_a_recovery_of_the_same_tenant_get_out_of_each_others_way(
    database: Database, tenants: list[str], who_is_first: str, observer: extensions.connection
) -> None:
    tenant = tenants[0]
    with database.statement() as cursor:
        run(cursor, tenant)
    settled: list[Any] = []
    reaper = Reaper(
        database, HASTY, publish=settled.extend, send_letters=lambda _: [], can_publish=lambda _: True,
        queue_depth=lambda _: None, on_abandoned=lambda *_: None,
    )  # fmt: skip

    def drop(_: Any) -> None:
        removal.remove(database, tenant, by="test", with_work=True)

    def recover(_: Any) -> None:
        with suppress(DriverError, CloacinaError):
            reaper.recover_attempt(tenant, "e-1", 1, reason="test")

    # Both stand at a reader's table lock, in this order, and go on together.
    reader = connect(database.url.render_as_string(hide_password=False))
    with reader.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute(
            sql.SQL("SELECT FROM {}.cloacina_executions FOR UPDATE").format(sql.Identifier(tenant))
        )
        rivals = [
            Rival(database, work) for work in ((drop, recover) if who_is_first == "drop" else (recover, drop))
        ]
        eventually(lambda: waiting(observer) >= 1, why="one of them to wait")
        cursor.execute("ROLLBACK")
    reader.close()
    for rival in rivals:
        rival.answer()
    assert tenant not in catalog.names(database)


def waiting(observer: extensions.connection) -> int:
    with observer.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        row = cursor.fetchone()
    assert row is not None
    return int(row[0])
