"""Wrong arguments: each is an error of ours that names the thing and the mend, and nothing is half-written."""

from __future__ import annotations

import time
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from cloacina_celery import (
    CloacinaError,
    ExecutionNotFound,
    InvalidPayload,
    SettingsError,
    TransitionRefused,
    UnknownTenant,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.plugin.conftest import Place

NOT_JSON: list[Any] = [object(), {1, 2}.__iter__(), lambda: None, 1j, {("a", "b"): 1}, Path, Exception("no")]
LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("value", [*NOT_JSON, LOOP], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("where", ["args", "kwargs", "headers", "in a session"])
def test_what_json_cannot_carry_is_refused_and_the_task_is_named(
    place: Place, tenant: str, value: Any, where: str
) -> None:
    def call() -> None:
        match where:
            case "args":
                place.shop.add.apply_async((value, 1), tenant=tenant)
            case "kwargs":
                place.shop.add.apply_async(kwargs={"x": [{"deep": value}], "y": 1}, tenant=tenant)
            case "headers":
                place.shop.add.apply_async((1, 1), tenant=tenant, headers={"mine": value})
            case _:
                with place.shop.cloacina.session(tenant):
                    place.shop.add.delay(1, value)

    with pytest.raises(
        InvalidPayload, match=r"of shop\.add cannot be carried by JSON .*pass plain values"
    ) as error:
        call()
    assert isinstance(error.value, CloacinaError)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("value", ["a\0b", "\0", ["\0"], {"k\0": 1}, "\\\0"], ids=repr)
def test_a_nul_character_is_refused_because_postgres_cannot_store_it(
    place: Place, tenant: str, value: Any
) -> None:
    with pytest.raises(
        InvalidPayload, match="contain a NUL character, which Postgres cannot store: remove it"
    ):
        place.shop.add.apply_async((value, 1), tenant=tenant)


@pytest.mark.parametrize(
    "value",
    ["\\u0000", "c:\\u0000", "'\"; DROP SCHEMA public; --", "%s %(x)s {s} $1", "größe \N{SNOWMAN}", "\ud800",
     "\x01\x1f\x7f", 2**70, Decimal("1.10"), None, True, [], {"a": [1, {"b": None}]}, "x" * 200_000],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_what_json_can_carry_arrives_in_row_and_message(place: Place, tenant: str, value: Any) -> None:
    result = place.shop.add.apply_async((value, 1), tenant=tenant)
    assert place.rows(tenant) == [(result.id, "pending")]
    (message,) = place.messages(tenant)
    if not isinstance(value, Decimal):  # kombu writes those its own way
        assert message["body"][0] == [value, 1]


def not_ours(place: Place) -> Any:
    return Session(create_engine("sqlite://"))


CALLS: dict[str, tuple[Callable[[Place, str], Any], str]] = {
    "session: no session": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, session="session"),
        "session= takes a SQLAlchemy Session, not str",
    ),
    "session: an engine": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, session=p.shop.cloacina.database.engine),
        "session= takes a SQLAlchemy Session, not Engine",
    ),
    "session: the class": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, session=Session),
        "session= takes a SQLAlchemy Session, not",
    ),
    "session: another kind of database": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, session=not_ours(p)),
        "session= takes a Session on Postgres through psycopg2 or psycopg, not on sqlite",
    ),
    "idempotency_key: empty": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, idempotency_key=""),
        "idempotency_key is a non-empty string, not ''",
    ),
    "idempotency_key: a number": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, idempotency_key=42),
        "idempotency_key is a non-empty string, not 42",
    ),
    "idempotency_key: with a NUL": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, idempotency_key="a\0b"),
        "contain a NUL character",
    ),
    "idempotency_key: and an id": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, idempotency_key="k", task_id="e"),
        "pass either task_id or idempotency_key",
    ),
    "idempotency_key: of send_task": (
        lambda p, t: p.shop.app.send_task("shop.add", (1, 2), tenant=t, idempotency_key="k"),
        r"send_task\(\) takes no idempotency_key: call task.apply_async\(\), or pass task_id=",
    ),
    "execution_id(): empty": (
        lambda p, t: p.shop.cloacina.execution_id("", tenant=t),
        "idempotency_key is a non-empty string, not ''",
    ),
    "execution_id(): no string": (
        lambda p, t: p.shop.cloacina.execution_id(42, tenant=t),
        "idempotency_key is a non-empty string, not 42",
    ),
    "task_id: too long": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, task_id="e" * 256),
        "task_id is a string of 1 to 255 characters",
    ),
    "task_id: a number": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, task_id=42),
        "task_id is a string of 1 to 255 characters, not 42",
    ),
    "task_id: with a NUL": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, task_id="a\0b"),
        "contain a NUL character",
    ),
    "serializer": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, serializer="pickle"),
        "serializer='pickle'; a durable task's row carries JSON only",
    ),
    "countdown: a text": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, countdown="soon"),
        "countdown is a number of seconds, of ten years at the most, not 'soon'",
    ),
    "countdown: nan": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, countdown=float("nan")),
        "countdown is a number of seconds",
    ),
    "countdown: endless": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, countdown=float("inf")),
        "countdown is a number of seconds",
    ),
    "countdown: beyond all calendars": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, countdown=1e18),
        "countdown is a number of seconds",
    ),
    "eta: a number": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, eta=5),
        "eta is a datetime or one in ISO 8601, not 5",
    ),
    "eta: a text that is none": (
        lambda p, t: p.shop.add.apply_async((1, 2), tenant=t, eta="tomorrow"),
        "eta is a datetime or one in ISO 8601, not 'tomorrow'",
    ),
    "tenant= of a plain task": (
        lambda p, t: p.shop.plain_add.apply_async((1, 2), tenant=t),
        "tenant= was given for shop.plain_add, which is not a durable task: decorate it",
    ),
    "idempotency_key= of a plain task": (
        lambda p, _: p.shop.plain_add.apply_async((1, 2), idempotency_key="k"),
        "idempotency_key= was given for shop.plain_add, which is not a durable task",
    ),
    "session= of a plain task": (
        lambda p, _: p.shop.plain_add.apply_async((1, 2), session=Session()),
        "session= was given for shop.plain_add, which is not a durable task",
    ),
    "result(): None": (
        lambda p, t: p.shop.cloacina.result(None, tenant=t),
        "an execution's id is a non-empty string, not None",
    ),
    "result(): empty": (
        lambda p, t: p.shop.cloacina.result("", tenant=t),
        "an execution's id is a non-empty string, not ''",
    ),
    "list(): no such state": (
        lambda p, t: p.shop.cloacina.executions(t).list(state="done"),
        "unknown state 'done': one of pending, running, succeeded, failed, abandoned, cancelled",
    ),
    "list(): a list of states": (
        lambda p, t: p.shop.cloacina.executions(t).list(state=["failed"]),
        r"unknown state \['failed'\]: one of pending",
    ),
    "list(): limit 0": (
        lambda p, t: p.shop.cloacina.executions(t).list(limit=0),
        "limit is a whole number of at least 1, not 0",
    ),
    "list(): limit below 0": (
        lambda p, t: p.shop.cloacina.executions(t).list(limit=-1),
        "limit is a whole number of at least 1, not -1",
    ),
    "list(): limit as text": (
        lambda p, t: p.shop.cloacina.executions(t).list(limit="all"),
        "limit is a whole number of at least 1, not 'all'",
    ),
    "list(): task with a NUL": (
        lambda p, t: p.shop.cloacina.executions(t).list(task="a\0"),
        "task is a non-empty string without NUL characters",
    ),
}


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_argument_is_an_error_that_names_it_and_leaves_nothing(
    place: Place, tenant: str, call: str
) -> None:
    work, message = CALLS[call]
    with pytest.raises(InvalidPayload, match=message):
        work(place, tenant)


@pytest.mark.parametrize("verb", ["get", "history", "cancel", "requeue"])
@pytest.mark.parametrize("execution_id", ["nobody", "", None, 42, "a\0b", ["e"]], ids=repr)
def test_an_execution_that_is_not_there_is_named_with_its_tenant(
    place: Place, tenant: str, verb: str, execution_id: Any
) -> None:
    with pytest.raises(ExecutionNotFound) as error:
        getattr(place.shop.cloacina.executions(tenant), verb)(execution_id)
    assert str(error.value) == f"no execution {execution_id!r} in tenant {tenant!r}"


@pytest.mark.parametrize("verb", ["cancel", "requeue"])
def test_a_reason_is_a_text(place: Place, tenant: str, verb: str) -> None:
    result = place.shop.add.apply_async((1, 2), tenant=tenant)
    executions = place.shop.cloacina.executions(tenant)
    for reason in ("a\0b", "", 5, None):
        with pytest.raises(InvalidPayload, match="reason is a non-empty string without NUL characters"):
            getattr(executions, verb)(result.id, reason=reason)
    assert executions.get(result.id).state == "pending"


def test_a_transition_that_does_not_exist_says_from_which_state_it_does(place: Place, tenant: str) -> None:
    result = place.shop.add.apply_async((1, 2), tenant=tenant)
    executions = place.shop.cloacina.executions(tenant)
    with pytest.raises(
        TransitionRefused, match="it is pending; only failed, abandoned and cancelled ones can be"
    ):
        executions.requeue(result.id)
    assert executions.cancel(result.id).state == "cancelled"
    with pytest.raises(TransitionRefused, match="it is cancelled; only pending and running ones can be"):
        executions.cancel(result.id)
    assert executions.requeue(result.id).state == "pending"


def test_a_tenant_that_another_process_dropped_is_unknown_at_its_next_use(place: Place, tenant: str) -> None:
    cloacina = place.shop.cloacina
    executions = cloacina.executions(tenant)
    result = place.shop.add.apply_async((1, 2), tenant=tenant)
    with place.observer.cursor() as cursor:
        standing = cloacina.parts.kernel.tenants.standing_of(tenant)
        cursor.execute(f"DROP SCHEMA {tenant} CASCADE; DELETE FROM cloacina.tenants WHERE name = '{tenant}'")
    calls: list[Callable[[], Any]] = [
        lambda: executions.get(result.id),
        executions.list,
        executions.count,
        lambda: executions.history(result.id),
        lambda: executions.cancel(result.id),
        lambda: place.shop.add.apply_async((1, 2), tenant=tenant),
        lambda: result.state,
        lambda: result.revoke(),
    ]
    for call in calls:
        # What this process read before.
        cloacina.parts.kernel.tenants._note(tenant, standing, time.monotonic())
        with pytest.raises(UnknownTenant, match=tenant):
            call()


def test_an_unknown_task_of_a_runner_is_answered_with_the_known_ones(place: Place, tenant: str) -> None:
    from cloacina_celery import Runner

    with (
        Runner.with_schema(place.database_url, tenant, app=place.shop.app) as runner,
        pytest.raises(SettingsError, match=r"unknown task 'shop\.ad': the app knows .*shop\.add"),
    ):
        runner.execute("shop.ad", 1, 2)
