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
