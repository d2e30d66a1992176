"""The verbs of a tenant's life through the API, on a real broker: refusals, repetitions, crashes between two steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cloacina_celery.core.tenancy import Verb
from cloacina_celery.errors import (
    InvalidPayload,
    SubmitRefused,
    TenantStateRefused,
    TenantUnfinished,
    UnknownTenant,
)
from cloacina_celery.plugin import queues
from cloacina_celery.store import removal, tenancy
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloacina_celery.plugin.tenants import Tenants
    from tests.plugin.conftest import Place


class Crash(Exception):
    """The process dies here."""


def tenants_of(place: Place) -> Tenants:
    found: Tenants = place.shop.cloacina.tenants
    return found


def add(place: Place, tenant: str, **options: Any) -> str:
    return str(place.shop.add.apply_async((1, 2), tenant=tenant, **options).id)


def is_refused(place: Place, tenant: str, error: type[Exception]) -> bool:
    try:
        add(place, tenant)
    except error:
        return True
    return False


# Submitting


def test_what_is_submitted_to_a_suspended_tenant_is_committed_and_waits(place: Place, tenant: str) -> None:
    tenants_of(place).suspend(tenant)
    execution_id = add(place, tenant)
    assert place.rows(tenant) == [(execution_id, "pending")]


def test_a_tenant_suspended_so_refuses_what_is_submitted_and_says_how_it_opens(
    place: Place, tenant: str
) -> None:
    tenants_of(place).suspend(tenant, refuse_submits=True)
    with pytest.raises(SubmitRefused, match=f"tenant resume {tenant}"):
        add(place, tenant)
    with pytest.raises(SubmitRefused), place.shop.cloacina.session(tenant):
        add(place, tenant)
    assert (place.rows(tenant), place.messages(tenant)) == ([], [])
    tenants_of(place).resume(tenant)
    assert add(place, tenant)


def test_another_process_hears_of_it_within_a_second(place: Place, tenant: str) -> None:
    add(place, tenant)
    # Past the API, as another process does it: this one still believes what it read.
    tenancy.drain(place.shop.cloacina.database, tenant, by="test")
    eventually(lambda: is_refused(place, tenant, SubmitRefused), 2, "the submission to be refused")


# Dropping


def test_a_drop_leaves_neither_schema_nor_queue_and_a_name_that_says_so(place: Place, tenant: str) -> None:
    add(place, tenant)
    assert tenants_of(place).drop(tenant, now=True)
    assert place.redis.keys(f"*{tenant}*") == []
    with place.observer.cursor() as cursor:
        cursor.execute("SELECT to_regnamespace(%s)", (tenant,))
        assert cursor.fetchone() == (None,)
    with pytest.raises(UnknownTenant, match="was removed"):
        add(place, tenant)
    assert not tenants_of(place).drop(tenant)
    assert [(entry.verb, entry.step) for entry in tenants_of(place).audit(tenant)] == [
        ("create", "entered"), ("suspend", "suspended"), ("drop", "schema dropped"), ("drop", "gone"),
    ]  # fmt: skip


def test_a_drop_with_work_left_drains_and_loses_nothing(place: Place, tenant: str) -> None:
    execution_id = add(place, tenant)
    with pytest.raises(TenantStateRefused, match="1 execution waits"):
        tenants_of(place).drop(tenant)
    assert place.rows(tenant) == [(execution_id, "pending")]
    with pytest.raises(SubmitRefused):
        add(place, tenant)
    place.shop.cloacina.executions(tenant).cancel(execution_id)
    assert tenants_of(place).drop(tenant)


STEPS: dict[str, tuple[Any, str, bool]] = {
    "before it was suspended": (tenancy, "suspend", False),
    "after it was suspended": (tenancy, "suspend", True),
    "before its schema went": (removal, "remove_now", False),
    "after its schema went": (removal, "remove_now", True),
    "before its queue went": (queues.TenantQueues, "_delete", False),
    "after its queue went": (queues.TenantQueues, "_delete", True),
    "before that was entered": (removal, "confirm", False),
    "after that was entered": (removal, "confirm", True),
}


def crash(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, *, afterwards: bool) -> None:
    real: Callable[..., Any] = getattr(where, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if afterwards:
            real(*args, **kwargs)
        raise Crash

    monkeypatch.setattr(where, name, dying)


@pytest.mark.parametrize("step", STEPS)
def test_a_drop_that_crashed_between_two_steps_is_completed_by_the_next_one(
    place: Place, tenant: str, step: str
) -> None:
    add(place, tenant)
    where, name, afterwards = STEPS[step]
    with pytest.MonkeyPatch.context() as patched:
        crash(patched, where, name, afterwards=afterwards)
        with pytest.raises(Crash):
            tenants_of(place).drop(tenant, now=True)
    tenants_of(place).drop(tenant, now=True)
    assert place.redis.keys(f"*{tenant}*") == []
    assert tenants_of(place).get(tenant).unfinished is None
    steps = [entry.step for entry in tenants_of(place).audit(tenant) if entry.verb == "drop"]
    assert steps == ["schema dropped", "gone"]
    assert tenants_of(place).create(tenant)


def test_a_drop_with_the_broker_away_says_what_is_left_to_do_and_nothing_takes_its_name_before(
    place: Place, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionRefusedError("nobody there")

    with monkeypatch.context() as patched:
        patched.setattr(queues.TenantQueues, "_delete", refuse)
        with pytest.raises(TenantUnfinished, match=r"did not delete its queue .* run it again"):
            tenants_of(place).drop(tenant)
    assert tenants_of(place).get(tenant).unfinished is Verb.DROP
    with pytest.raises(TenantStateRefused, match="run `tenant drop` once more"):
        tenants_of(place).create(tenant)
    with pytest.raises(UnknownTenant):
        add(place, tenant)
    assert tenants_of(place).drop(tenant)


# Coming back


def test_a_key_means_another_execution_once_its_tenant_was_created_anew(place: Place, tenant: str) -> None:
    first = add(place, tenant, idempotency_key="order-42")
    tenants_of(place).drop(tenant, now=True)
    tenants_of(place).create(tenant)
    second = add(place, tenant, idempotency_key="order-42")
    assert second != first
    assert second == place.shop.cloacina.execution_id("order-42", tenant=tenant)
    assert place.rows(tenant) == [(second, "pending")]
    (message,) = place.messages(tenant)
    assert (message["id"], message["cloacina_epoch"]) == (second, 2)


def test_nothing_but_create_brings_a_removed_tenant_back(place: Place, tenant: str) -> None:
    tenants_of(place).drop(tenant, now=True)
    assert tenants_of(place).open_for([tenant, "celery"]) == [tenant]
    with pytest.raises(UnknownTenant, match="was removed"):
        tenants_of(place).open_for([tenant])
    with pytest.raises(UnknownTenant, match="was removed"):
        tenants_of(place).open(tenant)
    assert tenant not in [one.name for one in tenants_of(place).list()]
    assert tenant in [one.name for one in tenants_of(place).list(with_removed=True)]
    assert tenants_of(place).create(tenant)
    assert tenants_of(place).get(tenant).epoch == 2
    assert place.rows(tenant) == []


# Settings of its own


@pytest.mark.parametrize(
    "wrong", [{"retain_succeeded": -1}, {"retain_failed": float("nan")}, {"retain_failed": "1"}, {"pace": 3},
              {"retain_failed": True}], ids=str,
)  # fmt: skip
def test_a_time_that_is_none_is_refused_and_changes_nothing(
    place: Place, tenant: str, wrong: dict[str, Any]
) -> None:
    with pytest.raises(InvalidPayload, match=r"retain_|pace"):
        tenants_of(place).set(tenant, **wrong)
    assert tenants_of(place).get(tenant).retain_failed is None


def test_a_time_of_its_own_is_set_and_taken_away_again(place: Place, tenant: str) -> None:
    assert tenants_of(place).set(tenant, retain_succeeded=60, retain_failed=0)
    found = tenants_of(place).get(tenant)
    assert (found.retain_succeeded, found.retain_failed) == (60, 0)
    assert not tenants_of(place).set(tenant, retain_succeeded=60)
    assert tenants_of(place).set(tenant, retain_succeeded=None)
    assert tenants_of(place).get(tenant).retain_succeeded is None
    assert [entry.detail for entry in tenants_of(place).audit(tenant)][1:] == [
        "retain_succeeded = 60 s, retain_failed = 0 s", "retain_succeeded = the setting",
    ]  # fmt: skip
