"""Many calls in one transaction: all or none, in order, and one execution per key whoever else submits it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from cloacina_celery import InvalidPayload, TenantNotBound, UnknownTenant
from tests.support.waiting import wait_for_row

if TYPE_CHECKING:
    from tests.plugin.conftest import Place


def keyed(place: Place, *keys: str) -> list[Any]:
    return [place.shop.add.s(n, n).set(idempotency_key=key) for n, key in enumerate(keys)]


def test_results_come_in_the_order_of_the_calls_and_each_is_a_row_and_a_message(
    place: Place, tenant: str
) -> None:
    results = place.shop.cloacina.submit_many([place.shop.add.s(n, 1) for n in range(20)], tenant=tenant)
    bodies = {message["id"]: message["body"][0] for message in place.messages(tenant)}
    assert [bodies[result.id] for result in results] == [[n, 1] for n in range(20)]
    assert {execution_id for execution_id, _ in place.rows(tenant)} == {result.id for result in results}


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    "wrong", [lambda shop: object(), lambda shop: shop.add, lambda shop: shop.add.s(object(), 1)]
)
def test_one_call_that_cannot_be_submitted_keeps_all_of_them_back(
    place: Place, tenant: str, wrong: Any
) -> None:
    with pytest.raises(InvalidPayload):
        place.shop.cloacina.submit_many([place.shop.add.s(1, 1), wrong(place.shop)], tenant=tenant)


def test_a_key_in_a_bulk_is_one_execution_and_the_second_gets_the_first_ones_result(
    place: Place, tenant: str
) -> None:
    before = place.shop.add.apply_async((7, 7), tenant=tenant, idempotency_key="b")
    a, b, again = place.shop.cloacina.submit_many(keyed(place, "a", "b", "a"), tenant=tenant)
    assert b.id == before.id
    assert a.id == again.id
    assert len(place.rows(tenant)) == len(place.messages(tenant)) == 2


def test_two_bulks_with_the_same_keys_in_opposite_orders_do_not_wait_for_each_other(
    place: Place, tenant: str
) -> None:
    keys = [f"key-{n:02}" for n in range(30)]
    ids: list[list[str]] = []

    def submit_backwards() -> None:
        calls = keyed(place, *reversed(keys))
        ids.append([result.id for result in place.shop.cloacina.submit_many(calls, tenant=tenant)])

    second = threading.Thread(target=submit_backwards)
    with place.shop.cloacina.session(tenant):
        first = [
            result.id for result in place.shop.cloacina.submit_many(keyed(place, *keys[:15]), tenant=tenant)
        ]
        second.start()
        wait_for_row(
            place.observer,
            "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'",
            why="the second bulk to stand at the first one's rows",
        )
        # Whoever took the last keys first would hold here what this transaction wants.
        first += [
            result.id for result in place.shop.cloacina.submit_many(keyed(place, *keys[15:]), tenant=tenant)
        ]
    second.join()
    assert list(reversed(ids[0])) == first
    assert len(place.rows(tenant)) == len(place.messages(tenant)) == len(keys)


def test_a_bulk_joins_the_open_session_and_goes_with_it(place: Place, tenant: str) -> None:
    with place.shop.cloacina.session(tenant) as session:
        place.shop.cloacina.submit_many([place.shop.add.s(1, 1)])
        assert place.messages(tenant) == []
        session.rollback()
    assert place.rows(tenant) == place.messages(tenant) == []


def test_a_bulk_needs_a_tenant_that_exists(place: Place) -> None:
    with pytest.raises(TenantNotBound):
        place.shop.cloacina.submit_many([place.shop.add.s(1, 1)])
    with pytest.raises(UnknownTenant):
        place.shop.cloacina.submit_many([place.shop.add.s(1, 1)], tenant="tenant_nobody")
