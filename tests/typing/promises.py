"""A user's module, which mypy reads and nobody runs.

Where a line ends with `# type:` its expression has exactly that type; where it ends with `# error:` mypy
refuses it for that reason. Every other line must pass.
"""

from __future__ import annotations

from typing import Any, reveal_type

from celery import Celery
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from cloacina_celery import Cloacina, DurableTask, RetryPolicy, Runner

app = Celery("shop")
cloacina = Cloacina(app, database_url="postgresql://localhost/shop")


@cloacina.task
def charge(order_id: int, note: str = "") -> str:
    return f"{order_id} {note}"


@cloacina.task(
    name="shop.refund",
    time_limit=60,
    max_recoveries=1,
    retry=RetryPolicy(max_attempts=5, retry_on=(OSError,)),
)
def refund(order_id: int) -> float:
    return float(order_id)


@cloacina.task(bind=True)
def ship(self: DurableTask, order_id: int) -> list[str]:
    return [str(order_id)]


@cloacina.task()
def forget(order_id: int) -> None: ...


# A decorated function is called and delayed with its own arguments.
reveal_type(charge(1))  # type: str
reveal_type(charge.name)  # type: str
reveal_type(charge.delay(1, note="x").get(timeout=5))  # type: str
reveal_type(refund.delay(order_id=1).get())  # type: float
reveal_type(ship.delay(1).get())  # type: list[str]
reveal_type(refund.delay(1).state)  # type: str
reveal_type(refund.delay(1).successful())  # type: bool
forget.delay(1).get()
charge.delay("one")  # error: arg-type
charge.delay()  # error: call-arg
charge.delay(1, nota="x")  # error: call-arg
charge.si("one")  # error: arg-type
ship.delay(1, 2)  # error: call-arg
charge(order=1)  # error: call-arg

# Ours among the options of apply_async are typed, Celery's others pass.
reveal_type(charge.apply_async((1,), tenant="tenant_acme", idempotency_key="order-1").get())  # type: str
charge.apply_async((1,), countdown=30, priority=3, argsrepr="hidden")
charge.apply_async((1,), session=Session())
charge.apply_async((1,), session=scoped_session(sessionmaker()))
charge.apply_async((1,), session="tenant_acme")  # error: arg-type
charge.apply_async((1,), tenant=7)  # error: arg-type
charge.apply_async((1,), idempotency_key=7)  # error: arg-type

# The decorator refuses what it does not take.
cloacina.task(retry=3)  # error: call-overload
RetryPolicy(max_atempts=3)  # error: call-arg
RetryPolicy(backoff="quadratic")  # error: arg-type
RetryPolicy(3)  # error: call-arg

# Signatures are Celery's, and Celery has no types.
(charge.s(1) | refund.s()).apply_async()

with cloacina.tenant("tenant_acme"):
    reveal_type(cloacina.current_tenant())  # type: str
with cloacina.session("tenant_acme") as session:
    reveal_type(session)  # type: sqlalchemy.orm.session.Session
with Runner.with_schema(
    "postgresql://localhost/shop", "tenant_acme", app=app, max_concurrent_tasks=10
) as runner:
    reveal_type(runner)  # type: cloacina_celery.runner.Runner

execution = cloacina.current_execution()
print(execution.attempt)  # error: union-attr
if execution is not None:
    reveal_type(execution.id)  # type: str
    reveal_type(execution.attempt)  # type: int
    reveal_type(execution.is_recovery)  # type: bool
    reveal_type(execution.is_cancelled)  # type: bool

reveal_type(cloacina.executions("tenant_acme").get("x").state)  # type: cloacina_celery.core.lifecycle.State
reveal_type(cloacina.tenants.list()[0].name)  # type: str
reveal_type(cloacina.tenants.create("tenant_acme"))  # type: bool


# A task that exists already stays what it was to the checker.
@app.task(base=DurableTask)
def audit(order_id: int) -> None: ...


leftover: Any = audit.delay(1)
