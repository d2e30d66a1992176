"""The shop, by the two commands of its README."""

from __future__ import annotations

import sys

from tests.support.processes import Processes

IMPORTS = {"CLOACINA_IMPORTS": "examples.shop.tasks"}


def test_the_shop_charges_each_order_once_and_gives_up_on_a_declined_card(processes: Processes) -> None:
    worker = processes.worker("cloacina_celery", queues=["tenant_acme", "tenant_globex"], env=IMPORTS)
    beat = processes.beat("cloacina_celery", env=IMPORTS)
    worker.wait_ready()
    beat.wait_ready()

    shop = processes.start("shop", [sys.executable, "-m", "examples.shop"])

    assert shop.wait_exit() == 0
    rows = [
        [cell.strip() for cell in line.split("│")] for line in shop.log.splitlines() if "│ tenant_" in line
    ]
    outcomes = [
        (tenant, customer, outcome.split("-")[0], attempts)
        for _, tenant, _, customer, _, outcome, attempts, _ in rows
    ]
    assert outcomes == [
        (tenant, *outcome)
        for tenant in ("tenant_acme", "tenant_globex")
        for outcome in (("Ada", "receipt", "1"), ("Bo", "receipt", "2"), ("Cy", "2000.00 is over the", "1"))
    ]
