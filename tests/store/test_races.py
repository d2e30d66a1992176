"""Two who want the same row, in both orders: the second is seen at the first one's lock before that one ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cloacina_celery.core.lifecycle import State
from cloacina_celery.core.settings import Settings
from cloacina_celery.runtime.reaper import Reaper
from cloacina_celery.store import executions, queries, recovery, ringing, settlements
from cloacina_celery.store.bounded import bounded_transaction
from tests.store.rows import (
    EXECUTION_ID,
    LEASE,
    WORKER,
    Rival,
    claim,
    events,
    expire,
    read,
    run,
    shift,
    submission,
    submit,
)

if TYPE_CHECKING:
    from psycopg2 import extensions

    from cloacina_celery.store.database import Cursor, Database
    from cloacina_celery.store.ringing import Ring


def settle(cursor: Cursor, tenant: str) -> Any:
    return settlements.succeed(cursor, tenant, EXECUTION_ID, 1, None)


def heartbeat(cursor: Cursor, tenant: str) -> Any:
    return executions.heartbeat(cursor, tenant, [(EXECUTION_ID, 1)], lease_ttl=LEASE)


def release(cursor: Cursor, tenant: str) -> Any:
    return recovery.release(cursor, tenant, WORKER, reason="test")


def cancel(cursor: Cursor, tenant: str) -> Any:
    return queries.cancel(cursor, tenant, EXECUTION_ID, reason="test")


def recover_expired(cursor: Cursor, tenant: str) -> Any:
    return _recover(cursor, tenant, recovery.lock_expired(cursor, tenant, limit=10))


def recover_attempt(cursor: Cursor, tenant: str) -> Any:
    return _recover(cursor, tenant, recovery.lock_attempt(cursor, tenant, EXECUTION_ID, 1))


def recover_worker(cursor: Cursor, tenant: str) -> Any:
    return _recover(cursor, tenant, recovery.lock_of_worker(cursor, tenant, WORKER, limit=10))


def _recover(cursor: Cursor, tenant: str, orphans: list[recovery.Orphan]) -> Any:
    return [recovery.recover(cursor, tenant, orphan, reason="test") for orphan in orphans]


@pytest.mark.parametrize(
    ("first", "second", "state", "kind"),
    [
        (settle, recover_attempt, State.SUCCEEDED, "succeeded"),
        (recover_attempt, settle, State.PENDING, "recovered"),
        (recover_expired, settle, State.PENDING, "recovered"),
        (recover_worker, settle, State.PENDING, "recovered"),
        (settle, release, State.SUCCEEDED, "succeeded"),
        (release, settle, State.PENDING, "released"),
        (settle, cancel, State.SUCCEEDED, "succeeded"),
        (cancel, settle, State.CANCELLED, "cancelled"),
        (recover_expired, heartbeat, State.PENDING, "recovered"),
        (recover_expired, release, State.PENDING, "recovered"),
        (release, recover_attempt, State.PENDING, "released"),
        (recover_expired, recover_attempt, State.PENDING, "recovered"),
        (cancel, recover_attempt, State.CANCELLED, "cancelled"),
        (settle, settle, State.SUCCEEDED, "succeeded"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_who_comes_second_to_a_row_finds_its_fence_closed(
    database: Database, cursor: Cursor, tenant: str, observer: extensions.connection,
    first: Any, second: Any, state: State, kind: str,
) -> None:  # fmt: skip
    run(cursor, tenant)
    expire(cursor, tenant)
    with database.transaction() as lent:
        assert first(lent, tenant)
        rival = Rival(database, lambda other: second(other, tenant))
        rival.wait_until_blocked(observer)
    assert not rival.answer()
    assert read(cursor, tenant).state is state
    assert events(cursor, tenant) == [("submitted", 0), ("claimed", 1), (kind, 1)]


def test_of_two_claims_of_one_attempt_the_second_is_declined(
    database: Database, cursor: Cursor, tenant: str, observer: extensions.connection
) -> None:
    submit(cursor, tenant)
    with database.transaction() as lent:
        assert claim(lent, tenant)
        rival = Rival(database, lambda other: claim(other, tenant, worker_id=42))
        rival.wait_until_blocked(observer)
    assert rival.answer() is None
    assert read(cursor, tenant).worker_id == WORKER
    assert events(cursor, tenant) == [("submitted", 0), ("claimed", 1)]


def test_of_two_claims_the_second_gets_the_attempt_where_the_first_one_is_rolled_back(
    database: Database, cursor: Cursor, tenant: str, observer: extensions.connection
) -> None:
    submit(cursor, tenant)
    with bounded_transaction(database) as lent:
        assert claim(lent, tenant)
        rival = Rival(database, lambda other: claim(other, tenant, worker_id=42))
        rival.wait_until_blocked(observer)
        lent.connection.rollback()
    assert rival.answer().attempt == 1
    assert read(cursor, tenant).worker_id == 42
    assert events(cursor, tenant) == [("submitted", 0), ("claimed", 1)]


def test_a_sweep_does_not_see_a_submission_that_is_not_committed(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    with database.transaction() as lent:
        submit(lent, tenant, delay=60.0)
        shift(lent, tenant, "run_at", -61)
        assert ringing.ring_due(cursor, tenant, limit=9) == []
    assert [ring.execution_id for ring in ringing.ring_due(cursor, tenant, limit=9)] == [EXECUTION_ID]


def test_a_submission_of_an_id_that_a_sweep_is_ringing_waits_and_changes_nothing(
    database: Database, cursor: Cursor, tenant: str, observer: extensions.connection
) -> None:
    submit(cursor, tenant, delay=60.0)
    shift(cursor, tenant, "run_at", -61)
    with database.transaction() as lent:
        assert ringing.ring_due(lent, tenant, limit=9)
        rival = Rival(database, lambda other: executions.submit(other, tenant, submission()))
        rival.wait_until_blocked(observer)
    assert rival.answer() is None
    assert read(cursor, tenant).rung_at is not None
    assert events(cursor, tenant) == [("submitted", 0)]


def test_a_recovery_of_the_attempt_waits_for_a_heartbeat_that_came_first_and_then_goes_on(
    database: Database, cursor: Cursor, tenant: str, observer: extensions.connection
) -> None:
    # It knows that the child is dead; a heartbeat of the main process, sent before that was noticed, saves nobody.
    run(cursor, tenant)
    with database.transaction() as lent:
        assert heartbeat(lent, tenant)
        rival = Rival(database, lambda other: recover_attempt(other, tenant))
        rival.wait_until_blocked(observer)
    assert rival.answer()
    assert events(cursor, tenant) == [("submitted", 0), ("claimed", 1), ("recovered", 1)]


@pytest.mark.parametrize("second", [settle, recover_attempt, release, heartbeat], ids=lambda f: f.__name__)
@pytest.mark.parametrize("first", [settle, recover_attempt, cancel], ids=lambda f: f.__name__)
def test_where_the_first_rolls_back_the_second_goes_on(
    database: Database, cursor: Cursor, tenant: str, observer: extensions.connection, first: Any, second: Any
) -> None:
    run(cursor, tenant)
    rival: Rival | None = None
    try:
        with database.transaction() as lent:
            assert first(lent, tenant)
            rival = Rival(database, lambda other: second(other, tenant))
            rival.wait_until_blocked(observer)
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert rival is not None
    assert rival.answer()


@pytest.mark.parametrize("holder", [settle, heartbeat, cancel, release], ids=lambda f: f.__name__)
@pytest.mark.parametrize("sweep", [recover_expired, recover_worker], ids=lambda f: f.__name__)
def test_a_sweep_passes_by_a_row_that_somebody_is_writing(
    database: Database, cursor: Cursor, tenant: str, holder: Any, sweep: Any
) -> None:
    run(cursor, tenant)
    run(cursor, tenant, "e-2")
    for name in (EXECUTION_ID, "e-2"):
        expire(cursor, tenant, name)
    with database.transaction() as lent:
        if holder is release:
            cursor.execute(f"UPDATE {tenant}.cloacina_executions SET worker_id = 7 WHERE id = 'e-1'")
            assert recovery.release(lent, tenant, 7, reason="test")
        else:
            assert holder(lent, tenant)
        with bounded_transaction(database) as other:
            assert [one.execution_id for one in sweep(other, tenant)] == ["e-2"]


def test_a_heartbeat_that_came_first_keeps_the_row_from_the_sweep(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    run(cursor, tenant)
    expire(cursor, tenant)
    assert heartbeat(cursor, tenant)
    with database.transaction() as lent:
        assert recover_expired(lent, tenant) == []
    assert settle(cursor, tenant)


def test_two_sweeps_at_once_share_the_orphans_and_recover_each_once(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    names = {f"e-{n}" for n in range(6)}
    for name in names:
        run(cursor, tenant, name)
        expire(cursor, tenant, name)
    with database.transaction() as one, bounded_transaction(database) as other:
        first = recovery.lock_expired(one, tenant, limit=4)
        second = recovery.lock_expired(other, tenant, limit=10)
        assert (len(first), len(second)) == (4, 2)
        for lent, orphans in ((one, first), (other, second)):
            for orphan in orphans:
                recovery.recover(lent, tenant, orphan, reason="test")
    for name in names:
        assert [kind for kind, _ in events(cursor, tenant, name)] == ["submitted", "claimed", "recovered"]


@pytest.mark.parametrize("verb", ["ring_due", "ring_stranded"])
def test_two_polls_at_once_ring_each_row_once(
    database: Database, cursor: Cursor, tenant: str, verb: str
) -> None:
    for n in range(6):
        submit(cursor, tenant, f"e-{n}", delay=60.0 if verb == "ring_due" else None)
        shift(cursor, tenant, "run_at" if verb == "ring_due" else "rung_at", -61, f"e-{n}")

    def ring(lent: Cursor, limit: int) -> set[str]:
        rings = (
            ringing.ring_due(lent, tenant, limit=limit)
            if verb == "ring_due"
            else ringing.ring_stranded(lent, tenant, limit=limit, stranded_after=10)
        )
        return {one.execution_id for one in rings}

    with database.transaction() as one, bounded_transaction(database) as other:
        first, second = ring(one, 4), ring(other, 10)
    assert (len(first), len(second)) == (4, 2)
    assert first | second == {f"e-{n}" for n in range(6)}


def test_a_claim_that_came_first_keeps_a_stranded_row_from_being_rung(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    submit(cursor, tenant)
    shift(cursor, tenant, "rung_at", -60)
    with database.transaction() as lent:
        assert claim(lent, tenant)
        assert ringing.ring_stranded(cursor, tenant, limit=9, stranded_after=10) == []
    assert ringing.ring_stranded(cursor, tenant, limit=9, stranded_after=10) == []


def reaper(database: Database, published: list[Ring]) -> Reaper:
    return Reaper(
        database, Settings(),
        publish=published.extend, send_letters=lambda _: [], can_publish=lambda _: True, queue_depth=lambda _: 0,
        on_abandoned=lambda *_: None,
    )  # fmt: skip


def test_ten_reapers_do_what_one_does(database: Database, cursor: Cursor, tenant: str) -> None:
    names = [f"e-{n}" for n in range(8)]
    for name in names:
        run(cursor, tenant, name)
        expire(cursor, tenant, name)
    published: list[Ring] = []
    rivals = [
        Rival(database, lambda _: reaper(database, published).sweep([tenant], check_stranded=False))
        for _ in range(10)
    ]
    assert sum(rival.answer() for rival in rivals) == 8
    assert sorted((ring.execution_id, ring.attempt) for ring in published) == [(name, 2) for name in names]


def test_a_locked_or_broken_tenant_does_not_stop_the_sweep_of_the_others(
    database: Database, cursor: Cursor, tenant: str, other_tenant: str
) -> None:
    run(cursor, other_tenant)
    expire(cursor, other_tenant)
    published: list[Ring] = []
    with database.transaction() as lent:
        lent.execute(f"LOCK TABLE {tenant}.cloacina_executions IN ACCESS EXCLUSIVE MODE")
        swept = reaper(database, published).sweep([tenant, "tenant_missing", other_tenant])
    assert swept == 1
    assert [ring.tenant for ring in published] == [other_tenant]
