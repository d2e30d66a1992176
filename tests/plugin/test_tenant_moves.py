"""Rename and adopt: rows, keys and callbacks come along, in one transaction, and crashes leave one of the two names."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from cloacina_celery.core.tenancy import TenantState, Verb
from cloacina_celery.errors import InvalidTenantName, TenantStateRefused, UnknownTenant
from cloacina_celery.plugin import queues
from cloacina_celery.plugin.envelope import Envelope
from cloacina_celery.store import executions, moves, removal
from tests.plugin.test_tenants import Crash, add, crash, tenants_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.plugin.conftest import Place


@pytest.fixture
def new(new_tenant_name: Callable[[], str]) -> str:
    """A name that nobody has."""
    return new_tenant_name()


@pytest.fixture
def legacy(place: Place) -> Iterator[str]:
    """The legacy tenant, in `public`, beside a table of somebody else's."""
    tenants = tenants_of(place)
    with place.observer.cursor() as cursor, ExitStack() as stack:
        cursor.execute("CREATE TABLE IF NOT EXISTS public.orders AS SELECT 42 AS id")
        stack.callback(cursor.execute, "DROP TABLE public.orders")
        tenants.create("public", legacy=True)
        stack.callback(lambda: tenants.drop("public", now=True))
        yield "public"


def claim(place: Place, tenant: str, execution_id: str, **options: Any) -> executions.Claim | None:
    with place.shop.cloacina.database.statement() as cursor:
        return executions.claim(
            cursor, tenant, execution_id, attempt=1, worker_id=1, lease_ttl=15, policy=None, **options
        )


def test_a_renamed_tenant_has_its_rows_and_keys_under_the_new_name_and_waits(
    place: Place, tenant: str, new: str
) -> None:
    tenants = tenants_of(place)
    tenants.set(tenant, retain_failed=60)
    limited = tenants.limit(tenant, max_concurrent_tasks=3, max_rate=0.5, paused=True, weight=4)
    execution_id = add(place, tenant, idempotency_key="order-42")
    with pytest.raises(TenantStateRefused, match=f"run `tenant suspend {tenant}` first"):
        tenants.rename(tenant, new)
    tenants.suspend(tenant)
    assert tenants.rename(tenant, new)
    assert place.rows(new) == [(execution_id, "pending")]
    assert place.redis.keys(f"*{tenant}*") == []
    assert add(place, new, idempotency_key="order-42") == execution_id
    found = tenants.get(new)
    assert (found.state, found.retain_failed, found.epoch) == (TenantState.SUSPENDED, 60, 1)
    assert tenants.limits(new) == limited
    with place.observer.cursor() as cursor:
        # As late as the move, so that the workers of the new name see that it is limited.
        cursor.execute("SELECT limits_changed_at >= changed_at FROM cloacina.tenants WHERE name = %s", (new,))
        assert cursor.fetchall() == [(True,)]
    assert claim(place, new, execution_id) is None
    tenants.resume(new)
    assert place.shop.cloacina.sweep() >= 1
    assert [message["id"] for message in place.messages(new)] == [execution_id]
    assert claim(place, new, execution_id) is not None


def test_the_old_name_is_a_tombstone_that_says_where_its_tenant_went(
    place: Place, tenant: str, new: str
) -> None:
    tenants = tenants_of(place)
    tenants.suspend(tenant)
    tenants.rename(tenant, new)
    assert not tenants.rename(tenant, new)
    with pytest.raises(UnknownTenant, match=f"was moved to '{new}'"):
        add(place, tenant)
    with pytest.raises(UnknownTenant, match=f"was moved to '{new}'"):
        tenants.open_for([tenant])
    with pytest.raises(UnknownTenant, match=f"was moved to '{new}'"):
        tenants.limit(tenant, paused=True)
    # It may begin anew, as somebody else.
    tenants.create(tenant)
    assert place.rows(tenant) == []
    key = {"idempotency_key": "order-42"}
    assert add(place, tenant, **key) != add(place, new, **key)


def test_callbacks_that_name_the_tenant_name_the_new_one_and_arguments_stay_as_they_are(
    place: Place, tenant: str, new: str
) -> None:
    shop = place.shop
    link = shop.add.s(9).set(tenant=tenant, queue=tenant)
    shop.note.apply_async(
        ({"tenant": tenant},), tenant=tenant, link=link | shop.add.s(tenant).set(tenant=tenant)
    )
    tenants_of(place).suspend(tenant)
    tenants_of(place).rename(tenant, new)
    with place.observer.cursor() as cursor:
        cursor.execute(f"SELECT message FROM {new}.cloacina_executions")
        ((stored,),) = cursor.fetchall()
    envelope = Envelope.load(stored)
    assert envelope.body[0] == [{"tenant": tenant}]
    (callback,) = envelope.embed["callbacks"]
    first, second = callback["kwargs"]["tasks"]
    assert (first["options"]["tenant"], first["options"]["queue"]) == (new, new)
    assert (second["options"]["tenant"], second["args"]) == (new, [tenant])


@pytest.mark.parametrize("wrong", ["public", "a-b", "cloacina_control", "cloacina"])
def test_a_name_that_cannot_be_a_tenants_is_refused_and_nothing_moves(
    place: Place, tenant: str, wrong: str
) -> None:
    tenants_of(place).suspend(tenant)
    with pytest.raises(InvalidTenantName):
        tenants_of(place).rename(tenant, wrong)
    assert place.rows(tenant) == []


def test_a_name_or_a_schema_that_is_in_use_is_refused(
    place: Place, tenant: str, other_tenant: str, new: str
) -> None:
    tenants_of(place).suspend(tenant)
    with pytest.raises(TenantStateRefused, match="in use already"):
        tenants_of(place).rename(tenant, other_tenant)
    with place.observer.cursor() as cursor:
        cursor.execute(f"CREATE SCHEMA {new}")
    with pytest.raises(TenantStateRefused, match="in use already"):
        tenants_of(place).rename(tenant, new)
    assert tenants_of(place).get(tenant).state is TenantState.SUSPENDED


def test_nothing_moves_while_something_runs(place: Place, tenant: str, new: str) -> None:
    execution_id = add(place, tenant)
    assert claim(place, tenant, execution_id) is not None
    tenants_of(place).suspend(tenant)
    with pytest.raises(TenantStateRefused, match="1 run"):
        tenants_of(place).rename(tenant, new)
    tenants_of(place).suspend(tenant, give_back=True)
    assert tenants_of(place).rename(tenant, new)


STEPS: dict[str, tuple[Any, str, bool]] = {
    "before it moved": (moves, "move", False),
    "in the middle of the transaction": (moves, "rewrite_all", True),
    "after it moved": (moves, "move", True),
    "after the workers were told": (queues.TenantQueues, "hand_over", True),
    "after the old queue went": (queues.TenantQueues, "remove", True),
    "after that was entered": (removal, "confirm", True),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_move_that_crashed_between_two_steps_is_completed_by_the_next_one(
    place: Place, tenant: str, new: str, step: str
) -> None:
    execution_id = add(place, tenant)
    tenants_of(place).suspend(tenant)
    where, name, afterwards = STEPS[step]
    with pytest.MonkeyPatch.context() as patched:
        crash(patched, where, name, afterwards=afterwards)
        with pytest.raises(Crash):
            tenants_of(place).rename(tenant, new)
    tenants_of(place).rename(tenant, new)
    assert place.rows(new) == [(execution_id, "pending")]
    assert place.redis.keys(f"*{tenant}*") == []
    assert tenants_of(place).get(tenant).unfinished is None
    steps = [entry.step for entry in tenants_of(place).audit(tenant) if entry.verb == Verb.RENAME]
    assert steps == ["moved", "gone"]


# Adopting


def test_an_adoption_is_planned_without_changing_anything(place: Place, legacy: str, new: str) -> None:
    add(place, legacy)
    plan = tenants_of(place).plan_adoption(new)
    assert plan.moves["cloacina_executions"] == 1
    assert set(plan.moves) == set(removal.OUR_TABLES)
    assert (str(plan.left), plan.stays) == ("1 execution waits, 0 run", ("orders",))
    assert tenants_of(place).get(legacy).state is TenantState.ACTIVE
    assert len(place.rows(legacy)) == 1


def test_what_is_ours_moves_out_of_public_and_everything_else_stays(
    place: Place, legacy: str, new: str
) -> None:
    execution_id = add(place, legacy, idempotency_key="order-42")
    assert tenants_of(place).adopt(new)
    assert not tenants_of(place).adopt(new)
    assert place.rows(new) == [(execution_id, "pending")]
    assert add(place, new, idempotency_key="order-42") == execution_id
    with place.observer.cursor() as cursor:
        cursor.execute("SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace")
        assert cursor.fetchall() == [("orders",)]
    with pytest.raises(UnknownTenant, match=f"was moved to '{new}'"):
        add(place, legacy)
    tenants_of(place).resume(new)
    assert place.shop.cloacina.sweep() >= 1
    assert claim(place, new, execution_id) is not None
    # Identities count on, and a new legacy tenant may begin.
    assert add(place, new)
    assert tenants_of(place).create("public", legacy=True)


def test_an_adoption_into_a_schema_with_tables_of_the_users_leaves_them(
    place: Place, legacy: str, new: str
) -> None:
    with place.observer.cursor() as cursor:
        cursor.execute(f"CREATE SCHEMA {new}; CREATE TABLE {new}.orders AS SELECT 7 AS id")
        tenants_of(place).adopt(new)
        cursor.execute(f"SELECT id FROM {new}.orders")
        assert cursor.fetchall() == [(7,)]


def test_an_adoption_suspends_and_is_refused_while_something_runs(
    place: Place, legacy: str, new: str
) -> None:
    execution_id = add(place, legacy)
    assert claim(place, legacy, execution_id, epoch=tenants_of(place).get(legacy).epoch) is not None
    with pytest.raises(TenantStateRefused, match="1 run"):
        tenants_of(place).adopt(new)
    assert tenants_of(place).get(legacy).state is TenantState.SUSPENDED
    assert place.rows(legacy) == [(execution_id, "running")]


def test_only_the_legacy_tenant_is_adopted_from(place: Place, tenant: str, new: str) -> None:
    with pytest.raises(InvalidTenantName, match="only 'public'"):
        tenants_of(place).adopt(new, source=tenant)
    with pytest.raises(InvalidTenantName, match="'public' is renamed by no one"):
        tenants_of(place).rename("public", new)
