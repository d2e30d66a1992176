"""Isolation outside of tasks: sessions of several tenants on the same pooled connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from cloacina_celery import TenantNotBound

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from tests.plugin.conftest import Place


def where(session: Session) -> tuple[str, str]:
    row = session.execute(text("SELECT current_setting('search_path'), current_schema()")).one()
    return (row[0], row[1])


def test_a_session_is_in_its_tenant_from_the_first_statement_to_the_last(place: Place, tenant: str) -> None:
    here = (f'"{tenant}"', tenant)
    with place.shop.cloacina.session(tenant) as session:
        assert where(session) == here
        session.commit()
        assert where(session) == here
        with session.begin_nested():
            assert where(session) == here
        session.rollback()
        assert where(session) == here
        savepoint = session.begin_nested()
        session.execute(text("SET LOCAL search_path = public"))
        savepoint.rollback()
        assert where(session) == here


def test_a_failed_statement_in_a_savepoint_leaves_the_session_in_its_tenant(
    place: Place, tenant: str
) -> None:
    with place.shop.cloacina.session(tenant) as session:
        with pytest.raises(DBAPIError), session.begin_nested():
            session.execute(text("SELECT * FROM missing"))
        assert where(session) == (f'"{tenant}"', tenant)


def test_the_path_is_the_transactions_and_dies_with_it_before_anybody_cleans_up(
    place: Place, tenant: str
) -> None:
    with place.shop.cloacina.session(tenant) as session:
        assert where(session)[0] == f'"{tenant}"'
        # Behind SQLAlchemy's back, so that neither the pool nor our hook at a transaction's begin has a say.
        session.execute(text("COMMIT"))
        assert session.execute(text("SHOW search_path")).scalar_one() == ""


def test_plain_table_names_mean_the_tenants_tables(place: Place, tenant: str, other_tenant: str) -> None:
    for name in (tenant, other_tenant):
        with place.shop.cloacina.session(name) as session:
            session.execute(text("INSERT INTO notes (text, attempt) VALUES (:name, 0)"), {"name": name})
    for name in (tenant, other_tenant):
        with place.shop.cloacina.session(name) as session:
            assert session.execute(text("SELECT text FROM notes")).scalars().all() == [name]


def test_a_session_takes_the_bound_tenant_and_the_named_one_before_it(
    place: Place, tenant: str, other_tenant: str
) -> None:
    cloacina = place.shop.cloacina
    with cloacina.tenant(tenant):
        with cloacina.session() as session:
            assert where(session)[1] == tenant
        with cloacina.session(other_tenant) as session:
            assert where(session)[1] == other_tenant
            assert cloacina.current_tenant() == other_tenant
        assert cloacina.current_tenant() == tenant


def test_sessions_of_two_tenants_may_be_open_at_once(place: Place, tenant: str, other_tenant: str) -> None:
    cloacina = place.shop.cloacina
    with cloacina.session(tenant) as one:
        with cloacina.session(other_tenant) as other:
            assert (where(one)[1], where(other)[1]) == (tenant, other_tenant)
            inner = place.shop.add.delay(1, 2)
        outer = place.shop.add.delay(3, 4)
        assert where(one)[1] == tenant
    assert [dict(place.rows(name)) for name in (tenant, other_tenant)] == [
        {outer.id: "pending"}, {inner.id: "pending"},
    ]  # fmt: skip


def test_no_tenant_bound_is_an_error_and_never_public(place: Place) -> None:
    cloacina = place.shop.cloacina

    def open_session() -> Any:
        with cloacina.session() as session:
            return where(session)

    for call in (open_session, cloacina.current_tenant, cloacina.executions, lambda: cloacina.result("e-1"),
                 lambda: cloacina.execution_id("k")):  # fmt: skip
        with pytest.raises(TenantNotBound, match=r"bind one with `with cloacina\.tenant"):
            call()


def test_raw_sql_on_the_plugins_engine_finds_no_table_without_a_schema(place: Place, tenant: str) -> None:
    with place.observer.cursor() as cursor:
        cursor.execute("CREATE TABLE IF NOT EXISTS public.notes (text text)")
    with place.shop.cloacina.session(tenant) as session:
        session.execute(text("SELECT 1 FROM notes"))
    with (
        place.shop.cloacina.database.engine.connect() as connection,
        pytest.raises(DBAPIError, match='relation "notes" does not exist'),
    ):
        connection.execute(text("SELECT 1 FROM notes"))


def test_a_session_of_a_tenant_whose_schema_is_gone_finds_nothing_and_not_public(
    place: Place, tenant: str
) -> None:
    with place.observer.cursor() as cursor:
        cursor.execute("CREATE TABLE IF NOT EXISTS public.notes (text text)")
        cursor.execute(f"DROP SCHEMA {tenant} CASCADE")

    def read() -> None:
        with place.shop.cloacina.session(tenant) as session:
            session.execute(text("SELECT 1 FROM notes"))

    with pytest.raises(DBAPIError, match='relation "notes" does not exist'):
        read()
