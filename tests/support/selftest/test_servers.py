"""Promises of the database and broker fixtures."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from kombu import Connection as BrokerConnection
from kombu import Queue
from psycopg2 import errors, extensions, sql
from sqlalchemy import create_engine, make_url, text

from tests.support import brokers, shop_tables
from tests.support.databases import LOCK_CLASS, Databases, connect

if TYPE_CHECKING:
    from collections.abc import Callable


def names_of_databases(url: str) -> set[str]:
    conn = connect(url)
    try:
        with conn.cursor() as cursor:
            cursor.execute("SELECT datname FROM pg_database")
            return {row[0] for row in cursor.fetchall()}
    finally:
        conn.close()


@pytest.mark.parametrize("turn", ["first", "second"])
def test_every_test_has_an_empty_database(database_url: str, turn: str) -> None:
    engine = create_engine(database_url)
    with engine.begin() as connection:
        assert engine.driver == "psycopg2"
        connection.execute(text("CREATE TABLE public.mine (turn text)"))
    engine.dispose()


def test_a_database_is_dropped_though_somebody_is_in_it(
    session_databases: Databases, database_server: str
) -> None:
    with session_databases.fresh() as url:
        name = make_url(url).database
        assert name in names_of_databases(database_server)
        left_open = connect(url)
    assert name not in names_of_databases(database_server)
    left_open.close()


def test_only_what_a_killed_session_left_is_dropped(
    session_databases: Databases, database_server: str
) -> None:
    admin = connect(database_server)
    dead, living = "cloacina_test_gw7_1_00000001_3", "cloacina_test_gw7_1_00000002_3"
    try:
        with admin.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(%s, 2)", (LOCK_CLASS,))
            for name in (dead, living):
                cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        with session_databases.fresh() as url:
            Databases(database_server, "gw8").close()
            present = names_of_databases(database_server)
        assert dead not in present
        assert {living, make_url(url).database} <= present
    finally:
        with admin.cursor() as cursor:
            for name in (dead, living):
                cursor.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(name)))
        admin.close()


@pytest.mark.parametrize("turn", ["first", "second"])
def test_every_test_has_an_empty_redis(broker_url: str, turn: str) -> None:
    with brokers.redis_client(broker_url) as client:
        assert client.keys() == [brokers.MARK.encode()]
        client.set("mine", turn)


def test_a_redis_database_has_one_owner_and_strangers_keys_stay(
    claimed_redis_url: str, redis_url: str
) -> None:
    with brokers.claimed_redis(redis_url) as second:
        assert second != claimed_redis_url
        assert brokers.may_be_emptied(second)
        with brokers.redis_client(second) as client:
            client.set("somebody", "else's")
            assert not brokers.may_be_emptied(second)
            brokers.empty_redis(second)
            assert brokers.may_be_emptied(second)
            assert not client.exists("somebody")


@pytest.mark.parametrize(
    ("url", "number_8"),
    [
        ("redis://:word@there:7000/0?ssl=1", "redis://:word@there:7000/8?ssl=1"),
        ("redis://there", "redis://there/8"),
        ("redis+socket:///run/redis.sock?virtual_host=0", "redis+socket:///run/redis.sock?virtual_host=8"),
    ],
)
def test_a_redis_url_is_moved_to_another_database(url: str, number_8: str) -> None:
    assert brokers.redis_url_of(url, 8) == number_8


def test_the_queues_of_a_tests_tenants_are_deleted(amqp_url: str, new_tenant_name: Callable[[], str]) -> None:
    name, missing = new_tenant_name(), new_tenant_name()
    assert name != missing
    with BrokerConnection(amqp_url) as connection:
        queue = Queue(name, channel=connection.default_channel)
        queue.declare()
        brokers.delete_queues(amqp_url, [name, missing])
        with pytest.raises(connection.channel_errors, match="NOT_FOUND"):
            queue.queue_declare(passive=True)


def test_a_broker_that_does_not_answer_is_known() -> None:
    url = "amqp://guest:secret@127.0.0.1:1//"
    assert not brokers.broker_answers(url)
    assert "secret" not in brokers.without_password(url)


def test_the_shops_tables_need_a_tenant_and_take_a_second_call(
    observer: extensions.connection, database_url: str, tenant_name: str
) -> None:
    with pytest.raises(errors.InvalidSchemaName):
        shop_tables.prepare_shop(database_url, tenant_name)
    with observer.cursor() as cursor:
        cursor.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(tenant_name)))
    shop_tables.prepare_shop(database_url, tenant_name)
    shop_tables.prepare_shop(database_url, tenant_name)
    assert shop_tables.notes(observer, tenant_name) == []

    shop_tables.record_run(
        observer, tenant_name, "k", execution_id="e", attempt=1, is_recovery=False, pid=os.getpid()
    )
    (run,) = shop_tables.wait_for_runs(observer, tenant_name, "k", 1)
    assert (run.execution_id, run.attempt, run.is_recovery, run.pid) == ("e", 1, False, os.getpid())
    assert shop_tables.runs(observer, tenant_name, "other") == []

    assert not shop_tables.gate_is_open(observer, tenant_name, "k")
    shop_tables.open_gate(observer, tenant_name, "k")
    shop_tables.open_gate(observer, tenant_name, "k")
    assert shop_tables.gate_is_open(observer, tenant_name, "k")
