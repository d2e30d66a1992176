"""A limit is never exceeded, whoever claims at once, and what found no room waits its turn."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from cloacina_celery.core.lifecycle import State
from cloacina_celery.core.limits import Limits
from cloacina_celery.core.tenancy import Verb
from cloacina_celery.errors import TenantStateRefused, UnknownTenant
from cloacina_celery.store import (
    audit,
    catalog,
    executions,
    limits,
    queries,
    recovery,
    removal,
    ringing,
    settlements,
    tenancy,
)
from cloacina_celery.store.audit import AuditEntry
from cloacina_celery.store.driver_errors import DeadlockDetected, LockNotAvailable
from cloacina_celery.store.limits import Deferred
from tests.store.rows import LEASE, WORKER, Rival, bring_to, events, run, shift, submit
from tests.support.waiting import LOCKS, wait_for_row

if TYPE_CHECKING:
    from psycopg2 import extensions

    from cloacina_celery.store.database import Cursor, Database


def claim(database: Database, tenant: str, name: str, attempt: int = 1) -> Any:
    """Ask for the lease on an attempt of a limited tenant."""
    with database.transaction() as cursor:
        return claim_in(cursor, tenant, name, attempt)


def claim_in(cursor: Cursor, tenant: str, name: str, attempt: int = 1) -> Any:
    """The same in a transaction that is open."""
    return limits.claim(cursor, tenant, name, attempt=attempt, worker_id=WORKER, lease_ttl=LEASE, policy=None)


def limit(database: Database, tenant: str, **given: Any) -> None:
    """Set a tenant's limits."""
    with database.transaction() as cursor:
        limits.put(cursor, tenant, Limits(**given))


def ring_next(database: Database, tenant: str) -> list[str]:
    """Ring who has waited longest, if there is room."""
    with database.transaction() as cursor:
        return [ring.execution_id for ring in limits.ring_next(cursor, tenant)]


def ring_waiting(database: Database, tenant: str, most: int = 100) -> list[str]:
    """Ring as many as there is room for."""
    with database.transaction() as cursor:
        return [ring.execution_id for ring in limits.ring_waiting(cursor, tenant, limit=most)]


def test_what_finds_no_room_waits_and_is_rung_when_a_slot_is_free(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    limit(database, tenant, max_concurrent_tasks=1)
    for name in ("a", "b"):
        submit(cursor, tenant, name)
    assert claim(database, tenant, "a").attempt == 1
    assert claim(database, tenant, "b") == Deferred()
    assert limits.waiting(cursor, [tenant]) == [tenant]
    assert ring_next(database, tenant) == []
    assert ring_waiting(database, tenant) == []
    assert settlements.succeed(cursor, tenant, "a", 1, None)
    assert ring_next(database, tenant) == ["b"]
    assert limits.waiting(cursor, [tenant]) == []
    assert claim(database, tenant, "b").attempt == 1
    assert events(cursor, tenant, "b") == [("submitted", 0), ("deferred", 0), ("claimed", 1)]


def test_the_poll_and_the_sweep_leave_what_waits_alone(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    limit(database, tenant, is_paused=True)
    submit(cursor, tenant, "a")
    assert claim(database, tenant, "a") == Deferred()
    shift(cursor, tenant, "run_at", -3600, "a")
    assert recovery.glance(cursor, [tenant], stranded_after=0) == []
    assert ringing.ring_due(cursor, tenant, limit=9) == []
    assert ringing.ring_stranded(cursor, tenant, limit=9, stranded_after=0) == []
    # Its message is in no queue, and nobody misses it there.
    assert ringing.count_rung(cursor, tenant) == 0


def test_those_that_wait_are_rung_in_the_order_in_which_they_were_due(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    limit(database, tenant, is_paused=True)
    for place, name in enumerate(["late", "first", "second"]):
        submit(cursor, tenant, name)
        shift(cursor, tenant, "run_at", -[1, 3, 2][place], name)
        assert claim(database, tenant, name) == Deferred()
    limit(database, tenant, max_concurrent_tasks=2)
    assert ring_next(database, tenant) == ["first"]
    assert ring_next(database, tenant) == ["second"]
    assert ring_next(database, tenant) == ["late"]


def test_rows_that_are_on_their_way_to_a_slot_are_not_rung_for_twice(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    limit(database, tenant, is_paused=True)
    for name in "abcde":
        submit(cursor, tenant, name)
        assert claim(database, tenant, name) == Deferred()
    limit(database, tenant, max_concurrent_tasks=2)
    assert ring_waiting(database, tenant, 1) == ["a"]
    assert ring_waiting(database, tenant) == ["b"]
    assert ring_waiting(database, tenant) == []
    # One whose message was lost is not waited for: the slot goes to the next.
    shift(cursor, tenant, "rung_at", -limits.COMING - 1, "a")
    assert ring_waiting(database, tenant) == ["c"]


@pytest.mark.parametrize("most", [1, 3])
def test_many_claims_at_once_never_exceed_the_limit_and_leave_no_slot_idle(
    database: Database, cursor: Cursor, tenant: str, most: int
) -> None:
    limit(database, tenant, max_concurrent_tasks=most)
    names = [f"e{number}" for number in range(12)]
    for name in names:
        submit(cursor, tenant, name)
    answers: list[Any] = []
    together = threading.Barrier(len(names))

    def ask(name: str) -> None:
        together.wait(10)
        answers.append(claim(database, tenant, name))

    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sum(isinstance(answer, executions.Claim) for answer in answers) == most
    assert answers.count(Deferred()) == len(names) - most
    assert queries.count(cursor, tenant)[State.RUNNING] == most


@pytest.mark.parametrize("frees_first", [True, False])
def test_a_claim_that_races_a_settlement_has_the_slot_or_is_rung_for_it(
    database: Database, cursor: Cursor, tenant: str, observer: extensions.connection, *, frees_first: bool
) -> None:
    limit(database, tenant, max_concurrent_tasks=1)
    run(cursor, tenant, "running")
    submit(cursor, tenant, "next")
    if frees_first:
        assert settlements.succeed(cursor, tenant, "running", 1, None)
        assert ring_next(database, tenant) == []
        assert claim(database, tenant, "next").attempt == 1
    else:
        with database.transaction() as first:
            assert claim_in(first, tenant, "next") == Deferred()
            assert settlements.succeed(cursor, tenant, "running", 1, None)
            # The one who frees the slot stands at the claim's lock, and so sees the row that waits.
            rival = Rival(database, lambda lent: limits.ring_next(lent, tenant))
            rival.wait_until_blocked(observer)
        assert [ring.execution_id for ring in rival.answer()] == ["next"]


@pytest.mark.parametrize("state", [s for s in State if s is not State.RUNNING])
def test_whatever_ends_an_attempt_frees_its_slot(
    database: Database, cursor: Cursor, tenant: str, state: State
) -> None:
    limit(database, tenant, max_concurrent_tasks=1)
    run(cursor, tenant, "running")
    submit(cursor, tenant, "next")
    assert claim(database, tenant, "next") == Deferred()
    settlements.succeed(cursor, tenant, "running", 1, None)
    bring_to(cursor, tenant, state, "other")
    assert ring_next(database, tenant) == ["next"]


def test_a_message_twice_of_a_row_that_waits_or_runs_changes_nothing(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    limit(database, tenant, max_concurrent_tasks=1)
    for name in ("a", "b"):
        submit(cursor, tenant, name)
    assert claim(database, tenant, "a").attempt == 1
    assert claim(database, tenant, "a") is None
    assert claim(database, tenant, "b") == Deferred()
    assert claim(database, tenant, "b") == Deferred()
    assert claim(database, tenant, "b", attempt=2) is None
    assert claim(database, tenant, "nobody") is None


def test_a_paused_tenant_starts_nothing_and_what_waited_is_due_when_it_is_resumed(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    submit(cursor, tenant, "a")
    limit(database, tenant, is_paused=True)
    assert claim(database, tenant, "a") == Deferred()
    limit(database, tenant)
    assert [ring.execution_id for ring in ringing.ring_due(cursor, tenant, limit=9)] == ["a"]
    assert claim(database, tenant, "a").attempt == 1


def test_a_claim_decided_by_the_old_limits_does_not_leave_its_row_waiting_for_nobody(
    database: Database, cursor: Cursor, tenant: str, observer: extensions.connection
) -> None:
    limit(database, tenant, is_paused=True)
    submit(cursor, tenant, "a")
    with database.transaction() as first:
        assert claim_in(first, tenant, "a") == Deferred()
        rival = Rival(database, lambda lent: limits.put(lent, tenant, Limits()))
        rival.wait_until_blocked(observer)
    rival.answer()
    assert [ring.execution_id for ring in ringing.ring_due(cursor, tenant, limit=9)] == ["a"]


def test_a_rate_is_a_bucket_of_a_seconds_worth(database: Database, cursor: Cursor, tenant: str) -> None:
    limit(database, tenant, max_rate=3)
    for number in range(6):
        submit(cursor, tenant, f"e{number}")
    answers = [claim(database, tenant, f"e{number}") for number in range(4)]
    assert [isinstance(answer, Deferred) for answer in answers] == [False, False, False, True]
    age(cursor, tenant, 1 / 3)
    assert not isinstance(claim(database, tenant, "e4"), Deferred)
    assert claim(database, tenant, "e5") == Deferred()
    # However long nobody came, no more than a second's worth is there.
    age(cursor, tenant, 3600)
    assert ring_waiting(database, tenant) == ["e3", "e5"]
    assert not isinstance(claim(database, tenant, "e3"), Deferred)


def test_a_rate_below_one_a_second_lets_one_at_a_time_start(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    limit(database, tenant, max_rate=0.1)
    for name in ("a", "b"):
        submit(cursor, tenant, name)
    assert not isinstance(claim(database, tenant, "a"), Deferred)
    assert claim(database, tenant, "b") == Deferred()
    age(cursor, tenant, 9.9)
    assert ring_next(database, tenant) == []
    age(cursor, tenant, 0.2)
    assert ring_next(database, tenant) == ["b"]


def test_a_rate_that_is_changed_holds_at_once_and_spends_nothing_twice(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    limit(database, tenant, max_rate=1 / 3600)
    for number in range(6):
        submit(cursor, tenant, f"e{number}")
    assert not isinstance(claim(database, tenant, "e0"), Deferred)
    assert claim(database, tenant, "e1") == Deferred()
    # Of the new rate's bucket the one start is spent.
    limit(database, tenant, max_rate=3)
    assert ring_next(database, tenant) == ["e1"]
    answers = [claim(database, tenant, f"e{number}") for number in range(1, 4)]
    assert [isinstance(answer, Deferred) for answer in answers] == [False, False, True]
    # A full bucket stays a full one, and no more, under a lower rate.
    limit(database, tenant, max_rate=0.1)
    age(cursor, tenant, 9.9)
    assert ring_next(database, tenant) == []
    age(cursor, tenant, 0.2)
    assert ring_next(database, tenant) == ["e3"]


def test_a_message_that_is_declined_costs_nothing_of_the_rate(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    limit(database, tenant, max_rate=1)
    submit(cursor, tenant, "a")
    assert claim(database, tenant, "nobody") is None
    assert not isinstance(claim(database, tenant, "a"), Deferred)


def test_one_tenants_limit_is_not_anothers(
    database: Database, cursor: Cursor, tenant: str, other_tenant: str
) -> None:
    limit(database, tenant, max_concurrent_tasks=1, max_rate=1)
    run(cursor, tenant, "running")
    submit(cursor, other_tenant, "a")
    assert claim(database, other_tenant, "a").attempt == 1
    assert limits.waiting(cursor, [tenant, other_tenant]) == []


def test_limits_are_kept_and_their_changes_are_listed(
    database: Database, cursor: Cursor, tenant: str, other_tenant: str
) -> None:
    assert limits.get(cursor, tenant) == Limits()
    wanted = Limits(max_concurrent_tasks=4, max_rate=0.5, is_paused=True, weight=7)
    with database.transaction() as lent:
        limits.put(lent, tenant, wanted)
    assert limits.get(cursor, tenant) == wanted
    assert tenant in limits.limited(cursor)
    assert other_tenant not in limits.limited(cursor)
    changes = dict(limits.changed(cursor, within=30))
    assert (changes[tenant], changes[other_tenant]) == (True, False)
    assert limits.seats(cursor)[tenant] == (True, 7)
    assert limits.seats(cursor)[other_tenant] == (False, 1)
    with database.transaction() as lent, pytest.raises(UnknownTenant):
        limits.put(lent, "tenant_nobody", wanted)
    with pytest.raises(UnknownTenant):
        limits.get(cursor, "tenant_nobody")


def test_a_weight_makes_no_limited_tenant(database: Database, cursor: Cursor, tenant: str) -> None:
    limit(database, tenant, weight=4)
    assert tenant not in limits.limited(cursor)
    assert dict(limits.changed(cursor, within=30))[tenant] is False


def test_each_change_of_a_limit_is_audited_in_its_transaction_and_no_change_is_not(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    def entries() -> list[AuditEntry]:
        return [entry for entry in audit.history(database, tenant) if entry.verb == Verb.LIMIT]

    with database.transaction() as lent:
        limits.put(lent, tenant, Limits(max_rate=2, is_paused=True, weight=4), by="ann")
        assert entries() == []  # as nobody else sees the limits yet
    with database.transaction() as lent:
        limits.put(lent, tenant, Limits(max_rate=2, is_paused=True, weight=4), by="bob")
        limits.put(lent, tenant, Limits(max_concurrent_tasks=3, weight=4), by="eve")
    first, second = entries()
    assert (first.operator, first.epoch) == ("ann", 1)
    assert first.detail == "max_rate = 2, was none, is_paused = true, was false, weight = 4, was 1"
    assert second.operator == "eve"
    assert (
        second.detail
        == "max_concurrent_tasks = 3, was none, max_rate = none, was 2, is_paused = false, was true"
    )


def test_a_row_that_somebody_holds_keeps_the_tenants_other_claims_waiting_no_longer_than_its_own_bound(
    database: Database, cursor: Cursor, tenant: str, observer: extensions.connection
) -> None:
    limit(database, tenant, max_concurrent_tasks=9)
    for name in ("held", "free"):
        submit(cursor, tenant, name)
    with observer.cursor() as holder:
        holder.execute(f"BEGIN; SELECT FROM {tenant}.cloacina_executions WHERE id = 'held' FOR UPDATE")
        try:
            rival = Rival(database, lambda lent: claim_in(lent, tenant, "held"))
            # In a transaction of its own, which the holder's end would let through: it must not need that.
            with pytest.raises(LockNotAvailable):
                rival.answer()
            assert claim(database, tenant, "free").attempt == 1
        finally:
            holder.execute("ROLLBACK")
    assert claim(database, tenant, "held").attempt == 1


@pytest.mark.parametrize("verb", ["limit", "give back"])
def test_a_verb_that_races_a_removal_waits_for_it_and_neither_ends_in_a_deadlock(
    database: Database, tenant: str, observer: extensions.connection, verb: str
) -> None:
    tenancy.suspend(database, tenant, by="test")

    def work(lent: Cursor) -> object:
        if verb == "limit":
            return limits.put(lent, tenant, Limits())
        return tenancy.give_back(database, tenant, by="test")

    with database.transaction() as removing:
        removal.shut(removing, tenant)
        rival = Rival(database, work)
        wait_for_row(
            observer,
            f"SELECT 1 FROM {LOCKS} WHERE locktype = 'relation' AND NOT granted",
            why="the verb to wait",
        )
        # A rival that had the row by now would wait for the table, and we for the row.
        assert catalog.lock(removing, tenant).name == tenant
        removal.drop_schema(removing, tenant)
    with pytest.raises(UnknownTenant, match="was removed"):
        rival.answer()


def test_a_deadlock_all_the_same_is_told_as_a_lock_that_is_not_to_be_had() -> None:
    with pytest.raises(TenantStateRefused, match="do this again"), removal.in_use("tenant_x", Verb.DROP):
        raise DeadlockDetected


def test_a_removed_tenant_has_no_limits_and_the_next_of_its_name_begins_without(
    database: Database, cursor: Cursor, tenant: str
) -> None:
    limit(database, tenant, max_concurrent_tasks=1, max_rate=1, is_paused=True)
    removal.remove(database, tenant, by="test")
    with pytest.raises(UnknownTenant, match="was removed"):
        limits.get(cursor, tenant)
    with pytest.raises(UnknownTenant), database.transaction() as lent:
        limits.put(lent, tenant, Limits())
    removal.confirm(database, tenant, Verb.DROP, by="test", detail="")
    assert catalog.create(database, tenant)
    assert limits.get(cursor, tenant) == Limits()


def test_those_that_wait_are_found_by_their_index(cursor: Cursor, tenant: str) -> None:
    cursor.execute("SET enable_seqscan = off")
    cursor.execute(
        f"EXPLAIN SELECT id FROM {tenant}.cloacina_executions "
        "WHERE state = 'pending' AND rung_at = 'infinity' ORDER BY run_at, id LIMIT 1"
    )
    plan = "\n".join(line for (line,) in cursor.fetchall())
    cursor.execute("RESET enable_seqscan")
    assert "cloacina_executions_waiting" in plan
    assert "Sort" not in plan


def age(cursor: Cursor, tenant: str, seconds: float) -> None:
    """Let some seconds have gone by for the tenant's rate."""
    cursor.execute(
        f"UPDATE {tenant}.cloacina_pace SET full_at = full_at - make_interval(secs => %s)", (seconds,)
    )
    assert cursor.rowcount == 1
