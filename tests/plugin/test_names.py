"""The naming rule at every door of the plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cloacina_celery import InvalidTenantName, Runner, UnknownTenant

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloacina_celery import Cloacina
    from tests.plugin.conftest import Place

WRONG = ["", "a" * 64, "tenant-acme", "tenant acme", 'ten"ant', "tenant.acme", "größe", "pg_acme", "cloacina",
         "information_schema", "tenant\0", 5, b"tenant", ["tenant"]]  # fmt: skip


def enter(context: Any) -> None:
    with context:
        pass


DOORS: dict[str, Callable[[Place, Any], Any]] = {
    "tenant()": lambda p, name: enter(p.shop.cloacina.tenant(name)),
    "session()": lambda p, name: enter(p.shop.cloacina.session(name)),
    "executions()": lambda p, name: p.shop.cloacina.executions(name),
    "result()": lambda p, name: p.shop.cloacina.result("e-1", tenant=name),
    "execution_id()": lambda p, name: p.shop.cloacina.execution_id("key", tenant=name),
    "apply_async()": lambda p, name: p.shop.add.apply_async((1, 2), tenant=name),
    "apply_async() with a key": lambda p, name: p.shop.add.apply_async(
        (1,), tenant=name, idempotency_key="k"
    ),
    "send_task()": lambda p, name: p.shop.app.send_task("shop.add", (1, 2), tenant=name),
    "tenants.create()": lambda p, name: p.shop.cloacina.tenants.create(name),
    "tenants.drop()": lambda p, name: p.shop.cloacina.tenants.drop(name),
    "Runner.with_schema()": lambda p, name: Runner.with_schema(p.database_url, name, app=p.shop.app),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", WRONG, ids=repr)
def test_a_name_that_breaks_the_rule_is_refused_at_every_door(
    place: Place, tenant: str, door: str, name: object
) -> None:
    # A bound tenant is no way out: what is named is what is meant.
    with place.shop.cloacina.tenant(tenant), pytest.raises(InvalidTenantName, match="invalid tenant name"):
        DOORS[door](place, name)


@pytest.mark.parametrize("door", sorted(set(DOORS) - {"tenant()", "result()", "execution_id()", "tenants.create()",
                                                      "Runner.with_schema()"}))  # fmt: skip
def test_a_tenant_that_nobody_created_is_refused_at_every_door_with_the_command_that_creates_it(
    place: Place, door: str
) -> None:
    with pytest.raises(
        UnknownTenant, match="create it with `celery -A <app> cloacina tenant create tenant_nobody`"
    ):
        DOORS[door](place, "tenant_nobody")


def test_public_is_taken_on_purpose_only(place: Place) -> None:
    cloacina: Cloacina = place.shop.cloacina
    with pytest.raises(InvalidTenantName, match="pass legacy=True"):
        cloacina.tenants.create("public")
    with pytest.raises(UnknownTenant):
        place.shop.add.apply_async((1, 2), tenant="public")
    assert cloacina.tenants.create("public", legacy=True)
    try:
        assert place.shop.add.apply_async((1, 2), tenant="public").id == place.rows("public")[0][0]
        assert [t.is_legacy for t in cloacina.tenants.list() if t.name == "public"] == [True]
    finally:
        cloacina.tenants.drop("public", now=True)


def test_the_control_queue_is_nobodys_tenant(place: Place) -> None:
    with pytest.raises(InvalidTenantName, match="it is the control queue"):
        place.shop.cloacina.tenants.create("cloacina_control")


def test_a_tenant_that_differs_only_in_case_is_refused(place: Place, tenant: str) -> None:
    with pytest.raises(InvalidTenantName, match="differs only in case"):
        place.shop.cloacina.tenants.create(tenant.upper())
    with pytest.raises(UnknownTenant):
        place.shop.add.apply_async((1, 2), tenant=tenant.upper())


def test_a_tenant_is_known_as_soon_as_this_process_created_it(
    place: Place, new_tenant_name: Callable[[], str]
) -> None:
    name = new_tenant_name()
    with pytest.raises(UnknownTenant):
        place.shop.add.apply_async((1, 2), tenant=name)
    place.new_tenant(name)
    place.shop.add.apply_async((1, 2), tenant=name)
    place.shop.cloacina.tenants.drop(name, now=True)
    with pytest.raises(UnknownTenant):
        place.shop.add.apply_async((1, 2), tenant=name)


@pytest.mark.parametrize("name", ["tenant-acme", "tenant_größe", "tenant_" + "a" * 60])
def test_a_worker_refuses_a_queue_that_is_meant_as_a_tenant_and_cannot_be_one(
    place: Place, name: str
) -> None:
    worker = place.processes.worker(queues=[name], env={"CLOACINA_AUTO": None})
    if name == "tenant-acme":
        # It does not match the pattern of tenants' queues: an ordinary queue of the app.
        worker.wait_ready().end()
        assert name not in [tenant.name for tenant in place.shop.cloacina.tenants.list()]
        return
    assert worker.wait_exit() == 78
    assert "cannot start: invalid tenant name" in worker.log
