"""What one tenant's damaged rows and letters cost: that row or letter, and nobody else's work."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, cast

import pytest

from cloacina_celery.plugin.limits import Limiter
from cloacina_celery.runtime.reaper import Reaper
from cloacina_celery.runtime.units import settlement
from cloacina_celery.store import executions, limits, outbox, workers
from cloacina_celery.store.outbox import Letter
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloacina_celery.store.ringing import Ring
    from tests.plugin.conftest import Place

PLAIN: list[Any] = [
    {"id": "p", "task": "shop.plain_add"}, {}, [[1, 2], {}, {}], None, {"queue": "plain_ones"},
]  # fmt: skip
UNKNOWN_COMPRESSION = json.dumps([*PLAIN[:4], {**PLAIN[4], "compression": "nonesuch"}])


def run(place: Place, sql: str, *arguments: Any) -> list[Any]:
    with place.shop.cloacina.database.statement() as cursor:
        cursor.execute(sql, arguments)
        return cursor.fetchall() if cursor.description else []


def due(place: Place, tenant: str) -> str:
    """Submit an execution whose message has not been sent, and whose time has come."""
    execution_id: str = place.shop.add.apply_async((1, 2), tenant=tenant, countdown=60).id
    run(place, f"UPDATE {tenant}.cloacina_executions SET run_at = now() WHERE id = %s", execution_id)
    return execution_id


def held(place: Place, tenant: str, worker_id: int, **options: Any) -> str:
    """Submit an execution and have a worker run it."""
    execution_id: str = place.shop.add.apply_async((1, 2), tenant=tenant, countdown=60, **options).id
    run(place, f"UPDATE {tenant}.cloacina_executions SET run_at = now() WHERE id = %s", execution_id)
    with place.shop.cloacina.database.statement() as cursor:
        assert executions.claim(
            cursor, tenant, execution_id, attempt=1, worker_id=worker_id, lease_ttl=600.0, policy=None
        )
    return execution_id


def damage(place: Place, tenant: str, *execution_ids: str, spent: bool = False) -> None:
    recoveries = "max_recoveries" if spent else "recoveries"
    run(
        place,
        f"UPDATE {tenant}.cloacina_executions SET message = '[]', recoveries = {recoveries} WHERE id = ANY(%s)",
        list(execution_ids),
    )


def dead_worker(place: Place, *tenants: str) -> int:
    with place.shop.cloacina.database.statement() as cursor:
        worker_id = workers.register(cursor, name="dead", tenants=tenants)
        cursor.execute(
            "UPDATE cloacina.workers SET has_lock = true, heartbeat_at = now() - interval '1 minute' WHERE id = %s",
            (worker_id,),
        )
    return worker_id


def leave(place: Place, tenant: str, *messages: str) -> None:
    """Leave letters behind that have waited for long."""
    with place.shop.cloacina.database.statement() as cursor:
        for message in messages:
            outbox.put(cursor, tenant, "shop.plain_add", message)
        cursor.execute(f"UPDATE {tenant}.cloacina_outbox SET created_at = now() - interval '1 hour'")


def sent(place: Place, queue: str) -> list[str]:
    return [message["id"] for message in place.messages(queue)]


def test_the_others_due_rows_are_rung_and_their_dead_workers_runs_recovered(
    place: Place, tenant: str, other_tenant: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker_id = dead_worker(place, tenant, other_tenant)
    leave(place, tenant, "[]", UNKNOWN_COMPRESSION)
    damaged = due(place, tenant)
    abandoned = held(place, tenant, worker_id)
    damage(place, tenant, damaged)
    damage(place, tenant, abandoned, spent=True)
    # In a damaged tenant, too, the rest goes on.
    own_due, own_lost = due(place, tenant), held(place, tenant, worker_id)
    their_due, their_lost = due(place, other_tenant), held(place, other_tenant, worker_id)
    reaper = place.shop.cloacina.parts.recovery.reaper()

    def all_done() -> bool:
        reaper.recover_dead_workers()
        reaper.sweep([tenant, other_tenant])
        return {own_due, own_lost} <= set(sent(place, tenant)) and {their_due, their_lost} <= set(
            sent(place, other_tenant)
        )

    eventually(all_done, 10, "what is not damaged to go on")
    assert dict(place.rows(tenant))[abandoned] == "abandoned"
    assert damaged not in sent(place, tenant)
    assert run(place, f"SELECT count(*) FROM {tenant}.cloacina_outbox") == [(2,)]
    said = {record.cloacina_event for record in caplog.records if hasattr(record, "cloacina_event")}
    assert {"callback.unsent", "message.unsendable", "recover.unfollowed"} <= said


def test_a_damaged_letter_does_not_stop_the_next(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    bad = [Letter(id=n, task="bad", message=m) for n, m in enumerate(["[]", "", UNKNOWN_COMPRESSION], 1)]
    good = Letter(id=9, task="shop.plain_add", message=json.dumps(PLAIN))
    with caplog.at_level(logging.WARNING, "cloacina"):
        assert place.shop.cloacina.parts.outbox.send([*bad, good]) == [9]
    assert sent(place, "plain_ones") == ["p"]
    assert [record.cloacina["task"] for record in caplog.records] == ["bad"] * 3  # type: ignore[attr-defined]


def test_a_letter_that_cannot_be_sent_is_no_trouble_to_its_settlement(place: Place, tenant: str) -> None:
    cloacina = place.shop.cloacina
    with settlement(cloacina.database, tenant) as unit:
        cloacina.parts.outbox.post(unit, "shop.plain_add", PLAIN[:4], {"compression": "nonesuch"})
    assert run(place, f"SELECT task FROM {tenant}.cloacina_outbox") == [("shop.plain_add",)]


def test_a_damaged_message_keeps_no_other_of_its_batch_from_being_sent(place: Place, tenant: str) -> None:
    ids = [due(place, tenant) for _ in range(3)]
    damage(place, tenant, ids[1])
    place.shop.cloacina.parts.recovery.reaper().sweep([tenant])
    assert sent(place, tenant) == [ids[0], ids[2]]


def test_what_follows_an_abandonment_is_undone_as_a_whole_and_the_abandonment_stays(
    place: Place, tenant: str
) -> None:
    cloacina = place.shop.cloacina
    execution_id = held(place, tenant, 1)
    followers: list[str] = []

    @cloacina.task(name="shop.submitting_errback")
    def submitting(request: Any, error: Any, traceback: Any) -> None:
        followers.append(place.shop.add.delay(1, 2).id)

    ((stored,),) = run(place, f"SELECT message FROM {tenant}.cloacina_executions WHERE id = %s", execution_id)
    message = json.loads(stored)
    message[2][2]["errbacks"] = [submitting.s(), {"task": "shop.nobody", "args": 7}]
    run(
        place,
        f"UPDATE {tenant}.cloacina_executions SET message = %s, recoveries = max_recoveries WHERE id = %s",
        json.dumps(message),
        execution_id,
    )
    assert cloacina.parts.recovery.recover_attempt(tenant, execution_id, 1, reason="its process died")
    assert len(followers) == 1
    assert place.rows(tenant) == [(execution_id, "abandoned")]
    assert place.messages(tenant) == []


class Failing:
    """A publisher of rings that raises for one tenant, as for trouble that nobody has thought of."""

    def __init__(self, place: Place, tenant: str) -> None:
        self._publisher = place.shop.cloacina.parts.publisher
        self._tenant = tenant
        self.can_publish = self._publisher.can_publish

    def publish_rings(self, rings: Sequence[Ring]) -> None:
        """Publish the others'."""
        if any(ring.tenant == self._tenant for ring in rings):
            raise LookupError("nobody has thought of it")
        self._publisher.publish_rings(rings)


def failing_reaper(place: Place, tenant: str) -> Reaper:
    failing, parts = Failing(place, tenant), place.shop.cloacina.parts
    return Reaper(
        place.shop.cloacina.database, place.shop.cloacina.settings,
        publish=failing.publish_rings, send_letters=parts.outbox.send, can_publish=failing.can_publish,
        queue_depth=lambda _: 0, on_abandoned=lambda *_: None,
    )  # fmt: skip


def test_whatever_a_tenant_raises_the_sweep_goes_on(place: Place, tenant: str, other_tenant: str) -> None:
    due(place, tenant)
    theirs = due(place, other_tenant)
    failing_reaper(place, tenant).sweep([tenant, other_tenant])
    assert sent(place, other_tenant) == [theirs]


def test_whatever_a_tenant_raises_a_dead_workers_others_are_recovered_and_their_lost_messages_rung(
    place: Place, tenant: str, other_tenant: str
) -> None:
    worker_id = dead_worker(place, *sorted([tenant, other_tenant]))
    first, second = sorted([tenant, other_tenant])
    held(place, first, worker_id)
    theirs = held(place, second, worker_id)
    lost = {one: place.shop.add.apply_async((1, 2), tenant=one).id for one in (first, second)}
    place.redis.delete(first, second)
    for one in (first, second):
        run(
            place,
            f"UPDATE {one}.cloacina_executions SET rung_at = now() - interval '1 hour' WHERE id = %s",
            lost[one],
        )
    reaper = failing_reaper(place, first)

    def all_rung() -> bool:
        reaper.recover_dead_workers()
        return {theirs, lost[second]} <= set(sent(place, second))

    eventually(all_rung, 10, "the second tenant's work to go on")


def test_whatever_a_tenant_raises_a_worker_that_ends_gives_the_others_their_work_back(
    place: Place, tenant: str, other_tenant: str
) -> None:
    worker_id = dead_worker(place, tenant, other_tenant)
    held(place, tenant, worker_id)
    theirs = held(place, other_tenant, worker_id)
    with pytest.raises(LookupError):
        failing_reaper(place, tenant).release_worker([tenant, other_tenant], worker_id, reason="the test")
    assert sent(place, other_tenant) == [theirs]


def test_whatever_a_limited_tenant_raises_the_others_are_looked_at(
    place: Place, tenant: str, other_tenant: str, caplog: pytest.LogCaptureFixture
) -> None:
    cloacina = place.shop.cloacina
    waiting = {}
    for one in (tenant, other_tenant):
        waiting[one] = place.shop.add.apply_async((1, 2), tenant=one).id
        cloacina.tenants.limit(one, paused=True)
        with cloacina.database.transaction() as cursor:
            deferred = limits.claim(
                cursor, one, waiting[one], attempt=1, worker_id=1, lease_ttl=60.0, policy=None
            )
        assert deferred == limits.Deferred()
        cloacina.tenants.limit(one, paused=False, max_concurrent_tasks=1)
    place.redis.delete(tenant, other_tenant)
    limiter = Limiter(cloacina.parts.kernel, cast("Any", Failing(place, tenant)))
    limiter.look([tenant, other_tenant])
    limiter.slot_freed(tenant)
    assert sent(place, other_tenant) == [waiting[other_tenant]]
    assert "limits.failed" in caplog.text
