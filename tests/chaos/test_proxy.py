"""The proxy in front of real servers: what it loses was really done, and what it says it does happens."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import psycopg2
import pytest
import redis

from cloacina_celery.chaos.proxy import Proxy
from tests.support import databases
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg2 import extensions


@pytest.fixture
def through(proxied_database: Proxy, database_url: str) -> Iterator[extensions.connection]:
    """A connection to the test's database through the proxy, with a table `marks` in it."""
    conn = databases.connect(proxied_database.url(database_url))
    conn.cursor().execute("CREATE TABLE marks (name text)")
    yield conn
    conn.close()


def marks(observer: extensions.connection) -> list[str]:
    with observer.cursor() as cursor:
        cursor.execute("SELECT name FROM marks ORDER BY name")
        return [name for (name,) in cursor.fetchall()]


def test_a_lost_commit_is_done_and_its_client_is_told_that_the_connection_broke(
    proxied_database: Proxy, through: extensions.connection, observer: extensions.connection
) -> None:
    through.autocommit = False
    cursor = through.cursor()
    cursor.execute("INSERT INTO marks VALUES ('a')")
    proxied_database.lose_commits()

    with pytest.raises(psycopg2.OperationalError):
        through.commit()

    assert through.closed
    assert marks(observer) == ["a"]
    (text,) = proxied_database.wait_for_lost_commits()
    assert "INSERT INTO marks" in text
    assert "COMMIT" in text


def test_a_statement_that_commits_by_itself_is_lost_as_a_whole(
    proxied_database: Proxy, through: extensions.connection, observer: extensions.connection
) -> None:
    proxied_database.lose_commits()

    with pytest.raises(psycopg2.OperationalError):
        through.cursor().execute("INSERT INTO marks VALUES ('a') RETURNING name")

    assert marks(observer) == ["a"]


def test_only_commits_that_write_and_match_are_lost_and_prepared_text_counts(
    proxied_database: Proxy, through: extensions.connection, observer: extensions.connection
) -> None:
    cursor = through.cursor()
    cursor.execute("PREPARE one AS INSERT INTO marks VALUES ($1 || '!')")
    proxied_database.lose_commits(matching=r"INTO marks .* '!'")

    cursor.execute("SELECT 'INTO marks', '!'")
    cursor.execute("INSERT INTO marks VALUES ('a')")
    with pytest.raises(psycopg2.OperationalError):
        cursor.execute("EXECUTE one('b')")

    assert marks(observer) == ["a", "b!"]


def test_what_was_rolled_back_or_refused_is_not_taken_for_a_commit(
    proxied_database: Proxy, through: extensions.connection, observer: extensions.connection
) -> None:
    proxied_database.lose_commits()
    cursor = through.cursor()
    with pytest.raises(psycopg2.errors.DivisionByZero):
        cursor.execute("INSERT INTO marks VALUES ('a' || 1 / 0)")
    cursor.execute("BEGIN; INSERT INTO marks VALUES ('b')")
    cursor.execute("ROLLBACK")
    cursor.execute("BEGIN; INSERT INTO marks VALUES ('c')")
    with pytest.raises(psycopg2.errors.DivisionByZero):
        cursor.execute("SELECT 1 / 0")
    cursor.execute("COMMIT")

    assert proxied_database.lost_commits == []
    assert marks(observer) == []


def test_a_savepoint_that_was_rolled_back_does_not_hide_the_commit_around_it(
    proxied_database: Proxy, through: extensions.connection, observer: extensions.connection
) -> None:
    proxied_database.lose_commits()
    cursor = through.cursor()
    for text in ("BEGIN", "INSERT INTO marks VALUES ('a')", "SAVEPOINT s", "ROLLBACK TO s"):
        cursor.execute(text)
    with pytest.raises(psycopg2.OperationalError):
        cursor.execute("COMMIT")

    assert marks(observer) == ["a"]


def test_a_seeded_share_of_the_commits_is_lost(
    proxied_database: Proxy,
    through: extensions.connection,
    database_url: str,
    observer: extensions.connection,
) -> None:
    proxied_database.lose_commits(None, probability=0.5, seed=1)
    lost = 0
    for number in range(20):
        conn = databases.connect(proxied_database.url(database_url))
        try:
            conn.cursor().execute("INSERT INTO marks VALUES (%s)", (f"{number:02}",))
        except psycopg2.OperationalError:
            lost += 1
        conn.close()

    assert lost == len(proxied_database.lost_commits)
    assert 4 < lost < 16
    assert len(marks(observer)) == 20


def test_refusing_resets_what_is_open_and_closes_the_port_until_it_forwards_again(
    proxied_database: Proxy, through: extensions.connection, database_url: str
) -> None:
    proxied_database.refuse()
    with pytest.raises(psycopg2.OperationalError):
        through.cursor().execute("SELECT 1")
    with pytest.raises(psycopg2.OperationalError, match="refused"):
        databases.connect(proxied_database.url(database_url))

    proxied_database.forward()
    databases.connect(proxied_database.url(database_url)).close()


def test_a_hanging_server_answers_once_it_hangs_no_more(
    proxied_database: Proxy, through: extensions.connection, database_url: str
) -> None:
    proxied_database.hang()
    with pytest.raises(psycopg2.OperationalError, match="timeout expired"):
        psycopg2.connect(proxied_database.url(database_url).replace("+psycopg2", ""), connect_timeout=2)
    answers: list[int] = []

    def ask() -> None:
        cursor = through.cursor()
        cursor.execute("SELECT 7")
        answers.extend(cursor.fetchone())

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(0.3)
    assert asking.is_alive()
    proxied_database.forward()
    asking.join(10)
    assert answers == [7]


def test_it_stands_in_front_of_redis_too_and_lets_go_of_what_ended(redis_url: str) -> None:
    with Proxy.in_front_of(redis_url) as proxy:
        client = redis.Redis.from_url(proxy.url(redis_url))
        assert client.ping()
        assert proxy.connection_count == 1
        client.close()
        eventually(lambda: proxy.connection_count == 0, why="the closed connection forgotten")
        assert client.ping()
        assert proxy.cut() == 1
        client.close()
