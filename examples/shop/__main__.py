"""Place some orders with two merchants, and show what came of them; workers must run (see README.md)."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table

os.environ.setdefault("CLOACINA_IMPORTS", "examples.shop.tasks")

from cloacina_celery import cloacina
from examples.shop.tasks import Base, place_order

ORDERS = [(1, "Ada", 12_00), (2, "Bo", 8_50), (3, "Cy", 2_000_00)]
TIMEOUT = 30


def main() -> None:
    """Place each order twice, as a double click does, with both merchants."""
    table = Table("tenant", "order", "customer", "amount", "outcome", "attempts")
    for tenant in ("tenant_acme", "tenant_globex"):
        cloacina.tenants.create(tenant)
        with cloacina.session(tenant) as session:
            Base.metadata.create_all(session.connection())
        charges = [place_order(tenant, *order) for order in ORDERS]
        again = [place_order(tenant, *order) for order in ORDERS]
        assert [charge.id for charge in again] == [charge.id for charge in charges]
        for (number, customer, cents), charge in zip(ORDERS, charges, strict=True):
            outcome = charge.get(timeout=TIMEOUT, propagate=False)
            attempts = cloacina.executions(tenant).get(charge.id).attempt
            table.add_row(tenant, str(number), customer, f"{cents / 100:.2f}", str(outcome), str(attempts))
    Console().print(table)


if __name__ == "__main__":
    main()
