"""The shop's tables, the durable tasks on them, and how an order is placed."""

from __future__ import annotations

from celery.result import AsyncResult
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from cloacina_celery import RetryPolicy, cloacina
from examples.shop import bank


class Base(DeclarativeBase):
    """No table names its schema: the session that uses it does."""


class Order(Base):
    """One order of one merchant's customer."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    cents: Mapped[int]
    receipt: Mapped[str | None]
    is_mailed: Mapped[bool] = mapped_column(default=False)


PATIENCE = RetryPolicy(
    max_attempts=5,
    initial_delay=0.2,
    backoff="exponential",
    max_delay=5,
    retry_on=(bank.BankUnreachable,),
    give_up_on=(bank.CardDeclined,),
)


@cloacina.task(name="shop.charge", retry=PATIENCE, throws=(bank.CardDeclined,))
def charge(order_id: int) -> str:
    """Have the bank charge an order, note the receipt, and see to the mail.

    The bank is outside of our transaction: should this worker die after the bank has charged and before we
    commit, the task runs again. The execution's id, which stays the same, tells the bank that this is no new
    charge.
    """
    execution = cloacina.current_execution()
    assert execution is not None  # as it would be where this is called as a plain function
    with cloacina.session() as session:
        order = session.get_one(Order, order_id)
        is_line_down = execution.attempt == 1 and order.customer == "Bo"
        order.receipt = bank.charge(order.cents, key=execution.id, is_line_down=is_line_down)
        # Leaves when the receipt is committed, and not without it.
        mail.delay(order_id)
        return order.receipt


@cloacina.task(name="shop.mail")
def mail(order_id: int) -> None:
    """Thank for an order."""
    with cloacina.session() as session:
        session.get_one(Order, order_id).is_mailed = True


def place_order(tenant: str, number: int, customer: str, cents: int) -> AsyncResult:
    """Enter an order and its charge in one transaction; placed again, both are the same."""
    with cloacina.session(tenant) as session:
        session.merge(Order(id=number, customer=customer, cents=cents))
        return charge.apply_async((number,), idempotency_key=f"order-{number}")
