"""A call becomes a row first, in the caller's transaction where there is one, and then a message, or neither."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from cloacina_celery import TenantMismatch, TenantNotBound
from tests.support.waiting import database_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine

    from tests.plugin.conftest import Place


@pytest.fixture
def users_engine(place: Place) -> Iterator[Engine]:
    """The user's own engine on the same database, with connections that know no tenant of ours."""
    engine = create_engine(place.database_url)
    yield engine
    engine.dispose()


def sent(place: Place, tenant: str) -> list[str]:
    """Return the ids of the messages in a tenant's queue, each of which must have a row."""
    ids = [message["id"] for message in place.messages(tenant)]
    assert set(ids) <= {execution_id for execution_id, _ in place.rows(tenant)}
    return ids


def test_a_call_is_a_row_and_a_message_that_names_it(place: Place, tenant: str) -> None:
    with place.shop.cloacina.tenant(tenant):
        result = place.shop.add.delay(1, y=2)
    assert place.rows(tenant) == [(result.id, "pending")]
    (message,) = place.messages(tenant)
    assert message["task"] == "shop.add"
    assert (message["id"], message["cloacina_tenant"], message["cloacina_attempt"]) == (result.id, tenant, 1)
    assert message["body"][:2] == [[1], {"y": 2}]
    assert place.messages("celery") == []


@pytest.mark.parametrize("way", ["bound", "named", "named over bound", "queue", "send_task", "signature"])
def test_a_tenant_is_bound_named_or_its_queues(
    place: Place, tenant: str, other_tenant: str, way: str
) -> None:
    shop = place.shop
    match way:
        case "bound":
            with shop.cloacina.tenant(tenant):
                result = shop.add.delay(1, 2)
        case "named":
            result = shop.add.apply_async((1, 2), tenant=tenant)
        case "named over bound":
            with shop.cloacina.tenant(other_tenant):
                result = shop.add.apply_async((1, 2), tenant=tenant)
        case "queue":
            result = shop.add.apply_async((1, 2), queue=tenant)
        case "send_task":
            result = shop.app.send_task("shop.add", (1, 2), tenant=tenant)
        case _:
            result = shop.add.s(1).apply_async((2,), tenant=tenant)
    assert sent(place, tenant) == [result.id]
    assert place.rows(other_tenant) == []


def test_without_a_tenant_nothing_is_submitted_anywhere(place: Place) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: place.shop.add.delay(1, 2),
        lambda: place.shop.add.apply_async((1, 2), queue="celery"),
        lambda: place.shop.add.apply_async((1, 2), idempotency_key="k"),
        lambda: place.shop.app.send_task("shop.add", (1, 2)),
        lambda: place.shop.add.s(1, 2).apply_async(),
    ]
    for call in calls:
        with pytest.raises(TenantNotBound, match=r"no tenant is bound for task shop\.add: bind one with"):
            call()
    assert place.messages("celery") == []


def test_the_queue_of_another_tenant_is_refused(place: Place, tenant: str, other_tenant: str) -> None:
    with pytest.raises(TenantMismatch, match=f"to the queue of tenant '{other_tenant}': leave queue= away"):
        place.shop.add.apply_async((1, 2), tenant=tenant, queue=other_tenant)
    assert place.rows(tenant) == place.rows(other_tenant) == []


@pytest.mark.parametrize("option", ["countdown", "eta", "eta as text"])
def test_a_delayed_call_is_a_row_alone_until_it_is_due(place: Place, tenant: str, option: str) -> None:
    eta = datetime.now(UTC) + timedelta(hours=1)
    ways: dict[str, dict[str, Any]] = {
        "countdown": {"countdown": 3600},
        "eta": {"eta": eta},
        "eta as text": {"eta": eta.isoformat()},
    }
    result = place.shop.add.apply_async((1, 2), tenant=tenant, **ways[option])
    assert place.messages(tenant) == []
    row = place.shop.cloacina.executions(tenant).get(result.id)
    assert abs(row.run_at - database_time(place.observer) - timedelta(hours=1)) < timedelta(seconds=10)


@pytest.mark.parametrize("countdown", [0, -5, 0.0])
def test_a_countdown_that_is_over_is_due_at_once(place: Place, tenant: str, countdown: float) -> None:
    result = place.shop.add.apply_async((1, 2), tenant=tenant, countdown=countdown)
    assert sent(place, tenant) == [result.id]


# --- transactions ---


def test_in_a_tenants_session_row_and_message_come_with_the_commit(place: Place, tenant: str) -> None:
    with place.shop.cloacina.session(tenant) as session:
        session.execute(text("INSERT INTO notes (text, attempt) VALUES ('order', 0)"))
        result = place.shop.add.delay(1, 2)
        assert place.rows(tenant) == []
        assert place.messages(tenant) == []
    assert place.rows(tenant) == [(result.id, "pending")]
    assert sent(place, tenant) == [result.id]


@pytest.mark.usefixtures("nothing_left")
def test_in_a_tenants_session_that_raises_there_is_neither(place: Place, tenant: str) -> None:
    def work() -> None:
        with place.shop.cloacina.session(tenant):
            place.shop.add.delay(1, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()


def test_a_commit_in_the_middle_sends_what_came_before_and_the_session_goes_on(
    place: Place, tenant: str
) -> None:
    with place.shop.cloacina.session(tenant) as session:
        first = place.shop.add.delay(1, 2)
        session.commit()
        assert sent(place, tenant) == [first.id]
        second = place.shop.add.delay(3, 4)
        session.rollback()
        third = place.shop.add.delay(5, 6)
    assert sent(place, tenant) == [first.id, third.id]
    assert second.id not in dict(place.rows(tenant))


def test_what_leaves_after_the_commit_is_what_the_row_says(place: Place, tenant: str) -> None:
    numbers = [1]
    with place.shop.cloacina.session(tenant):
        result = place.shop.add.delay(numbers, 2)
        numbers.append(2)
    (message,) = place.messages(tenant)
    with place.observer.cursor() as cursor:
        cursor.execute(f"SELECT message FROM {tenant}.cloacina_executions WHERE id = %s", (result.id,))
        ((stored,),) = cursor.fetchall()
    assert message["body"] == json.loads(stored)[2]
    assert message["body"][0] == [[1], 2]


@pytest.mark.parametrize("wrap", ["plain", "scoped"])
@pytest.mark.parametrize("ends", ["commit", "rollback", "close", "commit of later work"])
def test_a_call_joins_the_users_own_session(
    place: Place, tenant: str, users_engine: Engine, wrap: str, ends: str
) -> None:
    session: Any = Session(users_engine) if wrap == "plain" else scoped_session(sessionmaker(users_engine))
    place.shop.add.apply_async((1, 2), tenant=tenant, session=session)
    assert place.rows(tenant) == []
    if ends == "commit of later work":
        session.close()
        session.execute(text("SELECT 1"))
        session.commit()
    else:
        getattr(session, ends)()
    is_there = ends == "commit"
    assert len(place.rows(tenant)) == len(place.messages(tenant)) == is_there
    session.close()


def test_the_users_session_may_belong_to_nobody_or_to_another_schema(
    place: Place, tenant: str, users_engine: Engine
) -> None:
    with Session(users_engine) as session, session.begin():
        session.execute(text("SET LOCAL search_path = public"))
        with place.shop.cloacina.tenant(tenant):
            result = place.shop.add.apply_async((1, 2), session=session)
        assert session.execute(text("SHOW search_path")).scalar_one() == "public"
    assert sent(place, tenant) == [result.id]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [
        ("release", "commit", ["before", "within", "after"]),
        ("rollback", "commit", ["before", "after"]),
        ("release", "rollback", []),
        ("rollback", "rollback", []),
    ],
)
def test_a_savepoint_takes_its_calls_along_and_nothing_leaves_before_the_outer_commit(
    place: Place, tenant: str, users_engine: Engine, own: bool, inner: str, outer: str, expected: list[str]
) -> None:
    def call(name: str) -> None:
        options: dict[str, Any] = {"session": session} if own else {}
        place.shop.add.apply_async((1, 2), tenant=tenant, task_id=f"{tenant}-{name}", **options)

    with (
        suppress(ZeroDivisionError),
        Session(users_engine) if own else place.shop.cloacina.session(tenant) as session,
    ):
        call("before")
        savepoint = session.begin_nested()
        call("within")
        savepoint.commit() if inner == "release" else savepoint.rollback()
        assert place.messages(tenant) == []
        call("after")
        assert place.messages(tenant) == []
        if outer == "rollback":
            raise ZeroDivisionError
        if own:
            session.commit()
    ids = [f"{tenant}-{name}" for name in expected]
    assert sorted(sent(place, tenant)) == sorted(ids)
    assert sorted(execution_id for execution_id, _ in place.rows(tenant)) == sorted(ids)


def test_a_savepoint_within_a_savepoint_goes_with_the_outer_one(place: Place, tenant: str) -> None:
    with place.shop.cloacina.session(tenant) as session:
        outer = session.begin_nested()
        with session.begin_nested():
            place.shop.add.delay(1, 2)
        outer.rollback()
        kept = place.shop.add.delay(3, 4)
    assert sent(place, tenant) == [kept.id]
    assert place.rows(tenant) == [(kept.id, "pending")]


def test_a_session_of_one_tenant_takes_no_calls_for_another(
    place: Place, tenant: str, other_tenant: str
) -> None:
    def work() -> None:
        with place.shop.cloacina.session(tenant):
            place.shop.add.apply_async((1, 2), tenant=other_tenant)

    with pytest.raises(TenantMismatch, match="inside a transaction of tenant"):
        work()
    with place.shop.cloacina.session(tenant), place.shop.cloacina.tenant(other_tenant):
        result = place.shop.add.delay(1, 2)
        assert sent(place, other_tenant) == [result.id]
    assert place.rows(tenant) == []


# --- who inherits what ---


def test_asyncio_tasks_and_to_thread_inherit_the_tenant(place: Place, tenant: str, other_tenant: str) -> None:
    cloacina = place.shop.cloacina

    async def work(name: str) -> list[str]:
        with cloacina.tenant(name):
            task = asyncio.create_task(later())
            in_thread = await asyncio.to_thread(cloacina.current_tenant)
            return [cloacina.current_tenant(), in_thread, await task]

    async def later() -> str:
        await asyncio.sleep(0)
        return str(cloacina.current_tenant())

    async def both() -> list[list[str]]:
        return list(await asyncio.gather(work(tenant), work(other_tenant)))

    assert asyncio.run(both()) == [[tenant] * 3, [other_tenant] * 3]
    with pytest.raises(TenantNotBound):
        cloacina.current_tenant()


def test_what_outlives_a_sessions_block_submits_by_itself_and_is_not_lost(place: Place, tenant: str) -> None:
    async def work() -> str:
        with place.shop.cloacina.session(tenant) as session:
            session.execute(text("SELECT 1"))
            task = asyncio.create_task(later())
        return await task

    async def later() -> str:
        await asyncio.sleep(0)
        return str(place.shop.add.delay(1, 2).id)

    execution_id = asyncio.run(work())
    assert sent(place, tenant) == [execution_id]


def test_a_thread_is_not_in_the_transaction_of_the_code_that_started_it(place: Place, tenant: str) -> None:
    seen: list[str] = []
    with place.shop.cloacina.session(tenant):
        inside = place.shop.add.delay(1, 2)
        thread = threading.Thread(
            target=lambda: seen.append(place.shop.add.apply_async((3, 4), tenant=tenant).id)
        )
        thread.start()
        thread.join()
        assert sent(place, tenant) == seen
    assert sent(place, tenant) == [*seen, inside.id]


def test_a_bound_tenant_ends_with_its_block_also_when_it_raises(
    place: Place, tenant: str, other_tenant: str
) -> None:
    cloacina = place.shop.cloacina

    def fail() -> None:
        with cloacina.tenant(other_tenant):
            raise ZeroDivisionError

    with cloacina.tenant(tenant):
        with pytest.raises(ZeroDivisionError):
            fail()
        assert cloacina.current_tenant() == tenant
    with pytest.raises(TenantNotBound, match="There is no default tenant"):
        cloacina.current_tenant()
