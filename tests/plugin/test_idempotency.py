"""One execution per key and tenant, whoever calls, and however many at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from cloacina_celery.core.shard import Selection
from cloacina_celery.errors import DatabaseUnavailable
from cloacina_celery.plugin.selection import Followed
from cloacina_celery.store import executions, settlements
from tests.support.waiting import wait_for_row

if TYPE_CHECKING:
    from tests.plugin.conftest import Place


def call(place: Place, tenant: str, key: str = "order-42", *args: int) -> str:
    return str(place.shop.add.apply_async(args or (1, 2), tenant=tenant, idempotency_key=key).id)


def test_a_second_call_with_a_key_gets_the_first_ones_result_and_sends_nothing(
    place: Place, tenant: str
) -> None:
    first, second = call(place, tenant), call(place, tenant, "order-42", 8, 9)
    assert first == second == place.shop.cloacina.execution_id("order-42", tenant=tenant)
    assert place.rows(tenant) == [(first, "pending")]
    (message,) = place.messages(tenant)
    assert message["body"][0] == [1, 2]


def test_another_key_or_another_tenant_is_another_execution(
    place: Place, tenant: str, other_tenant: str
) -> None:
    ids = {call(place, tenant), call(place, tenant, "order-43"), call(place, other_tenant)}
    assert len(ids) == 3
    assert (len(place.rows(tenant)), len(place.rows(other_tenant))) == (2, 1)


@pytest.mark.parametrize(
    "key", ["\N{SNOWMAN}", "a/b", " ", "x" * 10_000, "'; --"], ids=lambda key: repr(key)[:12]
)
def test_any_text_is_a_key(place: Place, tenant: str, key: str) -> None:
    assert call(place, tenant, key) == call(place, tenant, key)
    assert len(place.rows(tenant)) == 1


def test_a_key_is_taken_also_when_its_execution_has_ended(place: Place, tenant: str) -> None:
    execution_id = call(place, tenant)
    with place.shop.cloacina.database.statement() as cursor:
        assert executions.claim(
            cursor, tenant, execution_id, attempt=1, worker_id=1, lease_ttl=15, policy=None
        )
        assert settlements.succeed(cursor, tenant, execution_id, 1, "3")
    again = place.shop.add.apply_async((1, 2), tenant=tenant, idempotency_key="order-42")
    assert (again.state, again.get(timeout=1)) == ("SUCCESS", 3)
    assert len(place.messages(tenant)) == 1


def test_send_task_takes_the_id_that_a_key_has(place: Place, tenant: str) -> None:
    execution_id = place.shop.cloacina.execution_id("order-42", tenant=tenant)
    place.shop.app.send_task("shop.add", (1, 2), tenant=tenant, task_id=execution_id)
    assert call(place, tenant) == execution_id
    assert place.rows(tenant) == [(execution_id, "pending")]


def test_twenty_calls_at_once_make_one_row_and_one_message(place: Place, tenant: str) -> None:
    with ThreadPoolExecutor(20) as pool:
        ids = set(pool.map(lambda _: call(place, tenant), range(20)))
    assert len(ids) == 1
    assert place.rows(tenant) == [(ids.pop(), "pending")]
    assert len(place.messages(tenant)) == 1


@pytest.mark.parametrize("first_commits", [True, False])
def test_a_call_waits_for_the_transaction_that_has_its_key_and_takes_over_if_that_fails(
    place: Place, tenant: str, first_commits: bool
) -> None:
    ids: list[str] = []
    second = threading.Thread(target=lambda: ids.append(call(place, tenant, "order-42", 8, 9)))

    def first() -> None:
        with place.shop.cloacina.session(tenant):
            call(place, tenant)
            second.start()
            wait_for_row(
                place.observer,
                "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'",
                why="the second call to stand at the first one's row",
            )
            assert place.messages(tenant) == []
            if not first_commits:
                raise ZeroDivisionError

    if first_commits:
        first()
    else:
        with pytest.raises(ZeroDivisionError):
            first()
    second.join()
    assert place.rows(tenant) == [(ids[0], "pending")]
    (message,) = place.messages(tenant)
    assert message["body"][0] == ([1, 2] if first_commits else [8, 9])


def test_a_worker_that_selects_a_tenant_by_a_pattern_knows_its_keys_also_when_the_database_is_away(
    place: Place, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.observer.cursor() as cursor:
        cursor.execute(
            "UPDATE cloacina.tenants SET epoch = 2, key_space = 'older' WHERE name = %s", (tenant,)
        )
    kernel = place.shop.cloacina.parts.kernel
    kernel.tenants.forget(tenant)
    worker = SimpleNamespace(app=place.shop.app)
    followed = Followed(kernel, worker, Selection.of([tenant[:-1] + "*"]))
    assert tenant in followed._missing()[0]

    def away(_names: object) -> Any:
        raise DatabaseUnavailable("it restarts")

    # The catalog is asked anew each second.
    monkeypatch.setattr(kernel.tenants, "_fresh_until", {})
    monkeypatch.setattr(kernel.tenants, "_look_up", away)
    read = kernel.tenants.standing_of(tenant)
    assert (read.epoch, read.key_space) == (2, "older")
