"""Celery's result object, answered by the row alone: each state, without a worker."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from celery import exceptions
from celery.exceptions import TaskRevokedError

from cloacina_celery import TenantNotBound
from cloacina_celery.plugin.results import DurableResult
from cloacina_celery.store import executions, queries, recovery, settlements

if TYPE_CHECKING:
    from celery.result import AsyncResult as Result

    from tests.plugin.conftest import Place

ERROR = {
    "exc_type": "OSError", "exc_module": "builtins", "exc_message": ["no", 7], "traceback": "Traceback: there",
}  # fmt: skip


def submit(place: Place, tenant: str) -> Result:
    result: Result = place.shop.add.apply_async((1, 2), tenant=tenant)
    return result


def move(place: Place, tenant: str, result: Result, state: str) -> None:
    """Bring a pending row to a state of Celery's."""
    with place.shop.cloacina.database.transaction() as cursor:
        claim = {"attempt": 1, "worker_id": 1, "lease_ttl": 15.0, "policy": None}
        if state not in ("PENDING", "REVOKED"):
            assert executions.claim(cursor, tenant, result.id, **claim)  # type: ignore[arg-type]
        match state:
            case "SUCCESS":
                assert settlements.succeed(cursor, tenant, result.id, 1, json.dumps({"total": 3}))
            case "RETRY":
                assert settlements.retry(cursor, tenant, result.id, 1, error=ERROR, delay=60.0)
            case "FAILURE":
                assert settlements.end_failed(cursor, tenant, result.id, 1, error=ERROR, reason="test")
            case "REVOKED":
                assert queries.cancel(cursor, tenant, result.id, reason="test")
            case "ABANDONED":
                (orphan,) = recovery.lock_attempt(cursor, tenant, result.id, 1)
                exhausted = recovery.Orphan(
                    execution_id=orphan.execution_id, attempt=1, failures=0, recoveries=3, max_recoveries=3,
                    message=orphan.message,
                )  # fmt: skip
                recovery.recover(cursor, tenant, exhausted, reason="its process died")


@pytest.mark.parametrize("state", ["PENDING", "STARTED", "RETRY", "SUCCESS", "FAILURE", "REVOKED"])
def test_a_rows_state_is_celerys(place: Place, tenant: str, state: str) -> None:
    result = submit(place, tenant)
    move(place, tenant, result, state)
    assert result.state == state
    assert result.ready() is (state in ("SUCCESS", "FAILURE", "REVOKED"))
    assert result.successful() is (state == "SUCCESS")
    assert result.failed() is (state == "FAILURE")


def test_get_returns_what_the_row_keeps(place: Place, tenant: str) -> None:
    result = submit(place, tenant)
    move(place, tenant, result, "SUCCESS")
    assert result.get(timeout=1) == {"total": 3}
    assert result.date_done is not None


def test_get_raises_the_error_that_the_row_keeps(place: Place, tenant: str) -> None:
    result = submit(place, tenant)
    move(place, tenant, result, "FAILURE")
    with pytest.raises(OSError, match="no") as error:
        result.get(timeout=1)
    assert error.value.args == ("no", 7)
    assert result.traceback == "Traceback: there"
    assert isinstance(result.get(timeout=1, propagate=False), OSError)


def test_get_of_a_cancelled_or_abandoned_execution_says_so(place: Place, tenant: str) -> None:
    cancelled, abandoned = submit(place, tenant), submit(place, tenant)
    move(place, tenant, cancelled, "REVOKED")
    move(place, tenant, abandoned, "ABANDONED")
    with pytest.raises(TaskRevokedError):
        cancelled.get(timeout=1)
    with pytest.raises(Exception, match="abandoned: lost 4 times") as error:
        abandoned.get(timeout=1)
    assert type(error.value).__name__ == "WorkerLostError"
    assert abandoned.state == "FAILURE"


def test_get_waits_no_longer_than_it_was_told(place: Place, tenant: str) -> None:
    with pytest.raises(exceptions.TimeoutError, match=r"was not settled within 0\.05 s"):
        submit(place, tenant).get(timeout=0.05)


def test_a_result_is_found_by_its_id_where_its_tenant_is_known(
    place: Place, tenant: str, other_tenant: str
) -> None:
    cloacina, app = place.shop.cloacina, place.shop.app
    result = submit(place, tenant)
    move(place, tenant, result, "SUCCESS")
    assert cloacina.result(result.id, tenant=tenant).get(timeout=1) == {"total": 3}
    assert cloacina.result(result.id, tenant=other_tenant).state == "PENDING"
    assert app.AsyncResult(result.id).get(timeout=1) == {"total": 3}
    assert place.shop.add.AsyncResult(result.id).state == "SUCCESS"
    # As in a process that did not submit it:
    cloacina.parts.kernel.locations._tenants.clear()
    with cloacina.tenant(tenant):
        assert app.AsyncResult(result.id).state == "SUCCESS"
        assert place.shop.add.AsyncResult(result.id).state == "SUCCESS"
    with pytest.raises(TenantNotBound, match=f"the result of execution {result.id}"):
        place.shop.add.AsyncResult(result.id).state  # noqa: B018


def test_what_has_no_row_is_pending_as_celery_has_it(place: Place, tenant: str) -> None:
    assert place.shop.cloacina.result("nobody", tenant=tenant).state == "PENDING"


def test_revoking_a_result_cancels_its_row(place: Place, tenant: str) -> None:
    result = submit(place, tenant)
    result.revoke()
    assert place.rows(tenant) == [(result.id, "cancelled")]
    assert result.state == "REVOKED"


def test_a_plain_tasks_result_is_none_of_ours(place: Place) -> None:
    place.redis.delete("celery")
    result: Any = place.shop.plain_add.apply_async((1, 2))
    assert not isinstance(result, DurableResult)
    assert [message["task"] for message in place.messages("celery")] == ["shop.plain_add"]
    assert "cloacina_tenant" not in place.messages("celery")[0]


def test_forgetting_a_result_keeps_the_row(place: Place, tenant: str) -> None:
    result = submit(place, tenant)
    move(place, tenant, result, "SUCCESS")
    result.forget()
    assert place.rows(tenant) == [(result.id, "succeeded")]
