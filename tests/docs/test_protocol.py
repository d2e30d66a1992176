"""What docs/protocol.md lists is what the code has: states, events, headers, tables."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from cloacina_celery.core.lifecycle import State
from cloacina_celery.plugin import envelope
from tests.docs.markdown import table
from tests.support import ROOT

if TYPE_CHECKING:
    from types import ModuleType

    from psycopg2 import extensions

PROTOCOL = ROOT / "docs" / "protocol.md"
EVENT = re.compile(r"SELECT id, '(\w+)'")


def test_the_states_are_those_of_the_code() -> None:
    assert {row[0] for row in table(PROTOCOL, "state", "meaning")} == set(State)


def test_the_events_are_those_that_are_written() -> None:
    written = {
        kind
        for path in (ROOT / "cloacina_celery" / "store").glob("*.py")
        for kind in EVENT.findall(path.read_text(encoding="utf-8"))
    }
    assert {row[1] for row in table(PROTOCOL, "move", "event")} - {""} == written


def test_our_headers_are_all_there() -> None:
    ours = {value for name, value in vars(envelope).items() if name.endswith("_HEADER")}
    assert ours <= {row[0] for row in table(PROTOCOL, "header", "meaning")}


@pytest.mark.parametrize(
    "name",
    [
        "cloacina.tenants",
        "cloacina.workers",
        "cloacina.audit",
        "cloacina_executions",
        "cloacina_events",
        "cloacina_chords",
    ],
)
def test_a_tables_columns_are_those_of_the_migrated_schema(
    name: str, shop: ModuleType, tenant_name: str, observer: extensions.connection
) -> None:
    shop.cloacina.tenants.create(tenant_name)
    schema, _, relation = name.rpartition(".")
    with observer.cursor() as cursor:
        cursor.execute(
            "SELECT column_name, data_type FROM information_schema.columns "
            "WHERE table_schema = %s AND table_name = %s ORDER BY ordinal_position",
            (schema or tenant_name, relation),
        )
        columns = cursor.fetchall()
    assert [(row[0], row[1]) for row in table(PROTOCOL, name, "type", "meaning")] == columns


def test_no_table_is_left_out(shop: ModuleType, tenant_name: str, observer: extensions.connection) -> None:
    shop.cloacina.tenants.create(tenant_name)
    with observer.cursor() as cursor:
        cursor.execute(
            "SELECT table_schema, table_name FROM information_schema.tables WHERE table_schema IN ('cloacina', %s)",
            (tenant_name,),
        )
        tables = cursor.fetchall()
    text = PROTOCOL.read_text(encoding="utf-8")
    for schema, name in tables:
        assert f"{schema}.{name} |" in text or f"| {name} |" in text or f"`{name}`" in text, (schema, name)
