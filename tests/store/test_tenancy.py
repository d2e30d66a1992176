"""Suspended, draining and removed tenants: what the rows do, and who comes first when two act at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg2
import pytest

from cloacina_celery.core.lifecycle import State
from cloacina_celery.core.settings import Settings
from cloacina_celery.core.tenancy import TenantState, Verb
from cloacina_celery.errors import TenantStateRefused, UnknownTenant
from cloacina_celery.runtime.reaper import Reaper
from cloacina_celery.store import audit, catalog, executions, removal, ringing, settlements, tenancy
from cloacina_celery.store.driver_errors import UndefinedTable
from cloacina_celery.store.tenancy import Left
from tests.store.rows import EXECUTION_ID, LEASE, WORKER, Rival, claim, events, expire, read, run, submit
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg2 import extensions

    from cloacina_celery.store.database import Cursor, Database
    from cloacina_celery.store.ringing import Ring

BY = "ada@laptop"
VERBS: dict[str, Callable[[Database, str], Any]] = {
    "suspend": lambda database, name: tenancy.suspend(database, name, by=BY),
    "resume": lambda database, name: tenancy.resume(database, name, by=BY),
    "drain": lambda database, name: tenancy.drain(database, name, by=BY),
    "drop": lambda database, name: removal.remove(database, name, by=BY, with_work=True),
}


def entries(database: Database, tenant: str) -> list[tuple[str, str]]:
    return [(entry.verb, entry.step) for entry in audit.history(database, tenant)]


def state_of(database: Database, tenant: str) -> TenantState:
    found = catalog.find(database, tenant)
    assert found is not None
    return found.state


def reaper(database: Database, published: list[Ring]) -> Reaper:
    return Reaper(
        database, Settings(),
        publish=published.extend, send_letters=lambda _: [], can_publish=lambda _: True, queue_depth=lambda _: 0,
        on_abandoned=lambda *_: None,
    )  # fmt: skip


def test_nothing_is_claimed_in_a_suspended_tenant_and_all_of_it_after_its_resumption(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    submit(cursor, tenant)
    assert tenancy.suspend(database, tenant, by=BY)
    assert claim(cursor, tenant) is None
    assert read(cursor, tenant).state is State.PENDING
    assert tenancy.resume(database, tenant, by=BY)
    assert claim(cursor, tenant) is not None
    assert events(cursor, tenant) == [("submitted", 0), ("claimed", 1)]


def test_a_row_whose_message_was_declined_is_rung_at_the_resumption_and_not_before(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    submit(cursor, tenant)
    tenancy.suspend(database, tenant, by=BY)
    assert ringing.unring(cursor, tenant, [(EXECUTION_ID, 1)])
    published: list[Ring] = []
    assert reaper(database, published).sweep([tenant]) == 0
    tenancy.resume(database, tenant, by=BY)
    assert reaper(database, published).sweep([tenant]) == 1
    assert [(ring.execution_id, ring.attempt) for ring in published] == [(EXECUTION_ID, 1)]
    row = read(cursor, tenant)
    assert (row.attempt, row.failures, row.recoveries, row.releases) == (0, 0, 0, 0)


def test_a_suspended_tenants_stranded_rows_are_left_alone(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    submit(cursor, tenant)
    tenancy.suspend(database, tenant, by=BY)
    assert ringing.ring_stranded(cursor, tenant, limit=9, stranded_after=-1) == []
    tenancy.resume(database, tenant, by=BY)
    assert len(ringing.ring_stranded(cursor, tenant, limit=9, stranded_after=-1)) == 1


def test_what_runs_in_a_suspended_tenant_settles_and_what_was_lost_is_recovered_to_wait(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    run(cursor, tenant)
    run(cursor, tenant, "e-2")
    tenancy.suspend(database, tenant, by=BY)
    assert executions.heartbeat(cursor, tenant, [(EXECUTION_ID, 1)], lease_ttl=LEASE)
    assert settlements.succeed(cursor, tenant, EXECUTION_ID, 1, None)
    expire(cursor, tenant, "e-2")
    assert reaper(database, []).sweep([tenant], check_stranded=False) == 1
    assert read(cursor, tenant, "e-2").state is State.PENDING
    assert claim(cursor, tenant, "e-2", attempt=2) is None


def test_what_is_given_back_spends_no_budget_and_closes_the_fence_of_its_attempt(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    run(cursor, tenant)
    tenancy.suspend(database, tenant, by=BY)
    assert tenancy.give_back(database, tenant, by=BY) == 1
    assert tenancy.give_back(database, tenant, by=BY) == 0
    row = read(cursor, tenant)
    assert (row.state, row.releases, row.recoveries, row.rung_at) == (State.PENDING, 1, 0, None)
    assert not settlements.succeed(cursor, tenant, EXECUTION_ID, 1, None)
    assert entries(database, tenant) == [
        ("create", "entered"), ("suspend", "suspended"), ("suspend", "given back"),
    ]  # fmt: skip


def test_a_draining_tenant_starts_and_ends_what_it_has(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    submit(cursor, tenant)
    assert tenancy.drain(database, tenant, by=BY)
    assert tenancy.count_open(cursor, tenant) == Left(pending=1, running=0, letters=0)
    assert claim(cursor, tenant) is not None
    assert tenancy.count_open(cursor, tenant) == Left(pending=0, running=1, letters=0)
    assert settlements.succeed(cursor, tenant, EXECUTION_ID, 1, None)
    assert not tenancy.count_open(cursor, tenant)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_is_done_again_changes_nothing(database: Database, tenant: str, verb: str) -> None:
    VERBS[verb](database, tenant)
    state, audited = state_of(database, tenant), entries(database, tenant)
    assert not VERBS[verb](database, tenant)
    assert (state_of(database, tenant), entries(database, tenant)) == (state, audited)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_on_a_tenant_that_never_was_is_refused(database: Database, tenant: str, verb: str) -> None:
    with pytest.raises(UnknownTenant, match="'tenant_never'"):
        VERBS[verb](database, "tenant_never")


def test_the_audit_says_who_and_when_and_is_never_changed(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    tenancy.suspend(database, tenant, by=BY)
    entry = audit.history(database, tenant)[-1]
    assert (entry.verb, entry.step, entry.operator, entry.epoch) == ("suspend", "suspended", BY, 1)
    assert entry.database_user
    assert entry.detail == "from active; submissions are taken"
    for change in ("UPDATE cloacina.audit SET operator = 'nobody'", "DELETE FROM cloacina.audit",
                   "TRUNCATE cloacina.audit"):  # fmt: skip
        with pytest.raises(psycopg2.errors.InsufficientPrivilege, match="append-only"):
            cursor.execute(change)
    assert audit.history(database, tenant)[-1] == entry


# Dropping


def test_a_drop_that_would_lose_work_is_refused_and_says_how_much(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    submit(cursor, tenant)
    run(cursor, tenant, "e-2")
    with pytest.raises(TenantStateRefused, match="1 execution waits, 1 runs"):
        removal.remove(database, tenant, by=BY)
    assert read(cursor, tenant).state is State.PENDING
    assert removal.remove(database, tenant, by=BY, with_work=True) == 2
    assert removal.is_gone(cursor, tenant)


def test_a_message_of_an_earlier_epoch_starts_nothing(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    removal.remove(database, tenant, by=BY)
    with pytest.raises(TenantStateRefused, match="run `tenant drop` once more"):
        catalog.create(database, tenant)
    removal.confirm(database, tenant, Verb.DROP, by=BY, detail="")
    assert catalog.create(database, tenant)
    submit(cursor, tenant)
    assert claim(cursor, tenant) is None
    claimed = executions.claim(
        cursor, tenant, EXECUTION_ID, attempt=1, worker_id=WORKER, lease_ttl=LEASE, policy=None, epoch=2
    )
    assert claimed is not None


def test_a_name_is_created_anew_only_when_nobody_believes_any_more_what_it_was(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    removal.remove(database, tenant, by=BY)
    removal.confirm(database, tenant, Verb.DROP, by=BY, detail="")
    catalog.create(database, tenant)
    cursor.execute(
        "SELECT (SELECT created_at FROM cloacina.tenants WHERE name = %s)"
        " - (SELECT max(at) FROM cloacina.audit WHERE tenant = %s AND verb = 'drop' AND step <> 'gone')"
        " >= interval '1 s'",
        (tenant, tenant),
    )
    assert cursor.fetchone() == (True,)


def test_a_dead_worker_is_buried_although_one_of_its_tenants_is_gone(
    database: Database, cursor: Cursor, tenant: str, other_tenant: str
) -> None:
    from cloacina_celery.store import workers

    worker_id = workers.register(cursor, name="test", tenants=[tenant, other_tenant])
    run(cursor, other_tenant, worker_id=worker_id)
    removal.remove(database, tenant, by=BY)
    cursor.execute(
        "UPDATE cloacina.workers SET heartbeat_at = now() - interval '1 h' WHERE id = %s", (worker_id,)
    )
    eventually(lambda: _started_long_ago(cursor), 30, "Postgres to have run for long enough")
    # A reaper that has just begun doubts its view for a moment.
    burying = reaper(database, [])
    assert eventually(burying.recover_dead_workers, 30, "the worker to be buried") == 1
    cursor.execute("SELECT stopped_at IS NOT NULL FROM cloacina.workers WHERE id = %s", (worker_id,))
    assert cursor.fetchone() == (True,)


def _started_long_ago(cursor: Cursor) -> bool:
    cursor.execute("SELECT pg_postmaster_start_time() < now() - interval '11 s'")
    return cursor.fetchone() == (True,)


# Races, in both orders


def test_a_suspension_waits_for_the_claim_that_came_before_it(
    database: Database, cursor: Cursor, tenant: str, observer: extensions.connection
) -> None:
    submit(cursor, tenant)
    with database.transaction() as lent:
        assert claim(lent, tenant) is not None
        rival = Rival(database, lambda _: tenancy.suspend(database, tenant, by=BY))
        eventually(lambda: state_of(database, tenant) is TenantState.SUSPENDED, why="the state to change")
        assert rival.is_at_work()
    assert rival.answer()
    assert read(cursor, tenant).state is State.RUNNING


def test_a_claim_that_comes_after_the_suspension_finds_it(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    submit(cursor, tenant)
    tenancy.suspend(database, tenant, by=BY)
    assert [claim(cursor, tenant) for _ in range(3)] == [None] * 3


def test_a_drop_waits_for_the_claim_or_the_submission_that_came_before_it_and_sees_it(
    database: Database, cursor: Cursor, tenant: str, observer: extensions.connection
) -> None:
    with database.transaction() as lent:
        submit(lent, tenant)
        rival = Rival(database, lambda _: removal.remove(database, tenant, by=BY))
        eventually(lambda: _waits_for_lock(observer), why="the drop to stand at the table")
    with pytest.raises(TenantStateRefused, match="1 execution waits, 0 run"):
        rival.answer()
    with database.transaction() as lent:
        assert claim(lent, tenant) is not None
        rival = Rival(database, lambda _: removal.remove(database, tenant, by=BY))
        eventually(lambda: _waits_for_lock(observer), why="the drop to stand at the table")
    with pytest.raises(TenantStateRefused, match="0 executions wait, 1 runs"):
        rival.answer()


@pytest.mark.parametrize("verb", ["submit", "claim", "settle"])
def test_who_comes_after_the_drop_finds_no_table(
    database: Database, cursor: Cursor, tenant: str, observer: extensions.connection, verb: str
) -> None:
    run(cursor, tenant, "e-1")
    submit(cursor, tenant, "e-2")
    work: dict[str, Callable[[Cursor], Any]] = {
        "submit": lambda lent: submit(lent, tenant, "e-3"),
        "claim": lambda lent: claim(lent, tenant, "e-2"),
        "settle": lambda lent: settlements.succeed(lent, tenant, "e-1", 1, None),
    }
    with database.transaction() as lent:
        removal.drop_schema(lent, tenant)
        rival = Rival(database, work[verb])
        rival.wait_until_blocked(observer)
    with pytest.raises(UndefinedTable):
        rival.answer()


def test_two_drops_at_once_are_one(database: Database, cursor: Cursor, tenant: str) -> None:
    submit(cursor, tenant)
    rivals = [
        Rival(database, lambda _: removal.remove(database, tenant, by=BY, with_work=True)) for _ in range(4)
    ]
    assert sorted(rival.answer() for rival in rivals) == [0, 0, 0, 1]
    assert [step for verb, step in entries(database, tenant) if verb == "drop"] == ["schema dropped"]


def test_a_process_that_dies_in_the_middle_of_a_drop_leaves_the_tenant_whole(
    database: Database, cursor: Cursor, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(cursor, tenant)

    def die(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(removal, "move_to", die)
    with pytest.raises(ZeroDivisionError):
        removal.remove(database, tenant, by=BY, with_work=True)
    assert state_of(database, tenant) is TenantState.ACTIVE
    assert claim(cursor, tenant) is not None


def _waits_for_lock(observer: extensions.connection) -> bool:
    with observer.cursor() as cursor:
        cursor.execute(
            "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return cursor.fetchone() is not None
