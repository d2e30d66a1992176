"""Who comes first in a tenant's queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloacina_celery.store import ringing

if TYPE_CHECKING:
    from types import ModuleType


def queued(shop: ModuleType, tenant: str) -> list[str]:
    """Take the queue's messages in the order in which a worker would."""
    with shop.app.connection_for_read() as connection:
        channel = connection.default_channel
        taken = []
        while (message := channel.basic_get(tenant, no_ack=True)) is not None:
            taken.append(message.headers["id"])
        return taken


def test_what_had_started_is_sent_to_the_head_of_its_queue_and_the_rest_to_its_end(
    shop: ModuleType, tenant_name: str
) -> None:
    parts = shop.cloacina.parts
    shop.cloacina.tenants.create(tenant_name)
    lost, *others = (shop.add.apply_async((n, n), tenant=tenant_name).id for n in range(3))
    assert queued(shop, tenant_name) == [lost, *others]
    with parts.kernel.database.statement() as cursor:
        rings = ringing.ring_stranded(cursor, tenant_name, limit=9, stranded_after=-1)
    by_id = {ring.execution_id: ring for ring in rings}
    parts.publisher.publish_rings([by_id[name] for name in others])

    with parts.kernel.database.transaction() as cursor:
        cursor.execute(
            f"UPDATE {tenant_name}.cloacina_executions SET state = 'running', attempt = 1, lease_expires_at = now() "
            "WHERE id = %s",
            (lost,),
        )
    parts.recovery.reaper().recover_attempt(tenant_name, lost, 1, reason="test")
    parts.publisher.publish_rings([by_id[others[0]]])
    assert queued(shop, tenant_name) == [lost, *others, others[0]]
