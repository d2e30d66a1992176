"""The way from one customer to many, as the example walks it."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psycopg2 import extensions

    from tests.support.processes import Processes

TIMEOUT = 100.0


def test_public_becomes_a_tenant_while_others_work_and_no_entry_is_lost_or_doubled(
    processes: Processes, observer: extensions.connection
) -> None:
    example = processes.start("example", [sys.executable, "-m", "examples.one_to_many"])

    assert example.wait_exit(TIMEOUT) == 0
    assert "would stay in public: book_entries, greetings" in example.log
    assert "tenant tenant_first adopted from public" in example.log
    for tenant, entries in {"tenant_first": 180, "tenant_north": 110, "tenant_south": 80}.items():
        assert re.search(rf"│ {tenant} +│ {entries} +│ {entries} +│", example.log)
    with observer.cursor() as cursor:
        cursor.execute("SELECT name, state FROM cloacina.tenants WHERE state <> 'removed'")
        assert cursor.fetchall() == []


def test_the_example_leaves_a_public_alone_that_is_somebodys(processes: Processes) -> None:
    made = processes.cli("cloacina", "tenant", "create", "public", "--legacy", app="tests.support.shop:app")
    assert made.returncode == 0

    example = processes.start("example", [sys.executable, "-m", "examples.one_to_many"])

    assert example.wait_exit(TIMEOUT) == 1
    assert "there is a tenant public already" in example.log
