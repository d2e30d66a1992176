"""The SQL in the documents runs on a tenant as the migrations make it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.docs.markdown import Block, blocks, documents

if TYPE_CHECKING:
    from types import ModuleType

    from psycopg2 import extensions

SQL_BLOCKS = [block for document in documents() for block in blocks(document) if block.language == "sql"]
WRITTEN_TENANT = "tenant_acme"


@pytest.mark.parametrize("block", SQL_BLOCKS, ids=lambda block: block.where)
def test_a_statement_runs(block: Block, shop: ModuleType, observer: extensions.connection) -> None:
    shop.cloacina.tenants.create(WRITTEN_TENANT)
    with observer.cursor() as cursor:
        cursor.execute(block.code)


def test_the_statement_that_deletes_what_is_old_deletes_that_with_its_events_and_nothing_else(
    shop: ModuleType, observer: extensions.connection
) -> None:
    shop.cloacina.tenants.create(WRITTEN_TENANT)
    old, young, running = (shop.add.apply_async((1, 1), tenant=WRITTEN_TENANT).id for _ in range(3))
    for id_ in (old, young):
        shop.cloacina.executions(WRITTEN_TENANT).cancel(id_)
    with observer.cursor() as cursor:
        cursor.execute(
            "UPDATE tenant_acme.cloacina_executions SET settled_at = now() - interval '31 days' WHERE id = %s",
            (old,),
        )
        for block in SQL_BLOCKS:
            if "DELETE" in block.code:
                cursor.execute(block.code)
        cursor.execute("SELECT DISTINCT execution_id FROM tenant_acme.cloacina_events")
        with_events = {row[0] for row in cursor.fetchall()}
    left = {execution.id for execution in shop.cloacina.executions(WRITTEN_TENANT).list()}
    assert left == with_events == {young, running}
