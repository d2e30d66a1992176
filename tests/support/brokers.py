"""A Redis database that is ours alone, emptied before each test, and a RabbitMQ if one answers.

A Redis server has sixteen databases and no owner for any. So a pytest process claims a number with a file
lock, which keeps apart all test runs of this machine and ends with the process that holds it; and it takes
only a database that is empty or carries our mark, so that what somebody else keeps there is never emptied.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import pytest
from kombu import Connection as BrokerConnection
from kombu import Queue
from redis import Redis

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from celery import Celery

DATABASE_NUMBERS = range(8, 16)
"""Redis databases that tests may claim: the upper half, as people begin at 0."""

KINDS = ("redis", "rabbitmq", "rabbitmq-quorum")
"""The brokers that a test can ask for: RabbitMQ with classic queues, and with quorum queues."""

EACH_KIND = pytest.mark.parametrize("broker_url", KINDS, indirect=True)
"""Have a test run once on each kind of broker."""

EACH_RABBITMQ = pytest.mark.parametrize("broker_url", KINDS[1:], indirect=True)
"""Have a test run with classic and with quorum queues."""

MARK = "cloacina:test"
"""The key that says a Redis database is a test run's and may be emptied."""


def redis_url_of(url: str, number: int) -> str:
    """Return the URL of another numbered database of the same Redis, over TCP or over a socket."""
    parts = urlsplit(url)
    if "+socket" not in parts.scheme:
        return urlunsplit(parts._replace(path=f"/{number}"))
    query = dict(parse_qsl(parts.query)) | {"virtual_host": str(number)}
    # Not urlunsplit: it writes no // before an empty host, and kombu wants one.
    return f"{parts.scheme}://{parts.netloc}{parts.path}?{urlencode(query)}"


def redis_client(url: str) -> Redis:
    """Open a client for a broker URL as kombu writes it."""
    parts = urlsplit(url)
    if "+socket" not in parts.scheme:
        return Redis.from_url(url)
    number = dict(parse_qsl(parts.query)).get("virtual_host", "0")
    return Redis(unix_socket_path=parts.path, db=int(number), password=parts.password)


@contextmanager
def claimed_redis(server_url: str) -> Iterator[str]:
    """Yield the URL of a Redis database that no other test run of this machine uses, and leave it empty.

    Raises:
        RuntimeError: all of them are taken, or hold what is not ours.
    """
    for number in DATABASE_NUMBERS:
        url = redis_url_of(server_url, number)
        with _file_lock(f"redis-{_server_of(server_url)}-{number}") as is_ours:
            if not is_ours:
                continue
            if not may_be_emptied(url):
                continue
            try:
                yield url
            finally:
                with redis_client(url) as client:
                    client.flushdb()
            return
    raise RuntimeError(
        f"no Redis database of {DATABASE_NUMBERS.start} to {DATABASE_NUMBERS.stop - 1} is free for tests:"
        " each is in use by another run or holds keys which are not a test's"
    )


def may_be_emptied(url: str) -> bool:
    """Whether a Redis database holds nothing, or what a test run left in it."""
    with redis_client(url) as client:
        return not client.dbsize() or bool(client.exists(MARK))


def empty_redis(url: str) -> None:
    """Empty a claimed database, leaving only the mark that it is ours."""
    with redis_client(url) as client:
        client.pipeline(transaction=True).flushdb().set(MARK, os.getpid()).execute()


def broker_answers(url: str) -> bool:
    """Say whether a broker takes a connection at this URL within two seconds."""
    with BrokerConnection(url, connect_timeout=2) as connection:
        try:
            connection.connect()
        except (*connection.connection_errors, OSError):
            return False
        return True


def without_password(url: str) -> str:
    """Return a broker URL as it may be printed."""
    with BrokerConnection(url) as connection:
        return str(connection.as_uri())


def configure_queues(app: Celery) -> None:
    """Give an app of the tests the queues that the environment says, as the fixture `broker_environment` does."""
    app.conf.task_default_queue_type = os.environ.get("CLOACINA_TEST_QUEUE_TYPE", "classic")
    if "CLOACINA_TEST_CONTROL_QUEUE" in os.environ:
        app.conf.cloacina_control_queue = os.environ["CLOACINA_TEST_CONTROL_QUEUE"]
        app.conf.task_default_queue = os.environ["CLOACINA_TEST_DEFAULT_QUEUE"]


def delete_queues(url: str, names: Sequence[str]) -> None:
    """Delete the queues of a test's tenants from RabbitMQ; missing ones are no error."""
    with BrokerConnection(url) as connection:
        for name in names:
            Queue(name, channel=connection.default_channel).delete()


@contextmanager
def _file_lock(name: str) -> Iterator[bool]:
    path = Path(tempfile.gettempdir()) / f"cloacina-test-{os.getuid()}-{name}.lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _server_of(url: str) -> str:
    parts = urlsplit(url)
    place = f"{parts.hostname}-{parts.port or 6379}" if parts.hostname else parts.path
    return "".join(character if character.isalnum() else "-" for character in place)
