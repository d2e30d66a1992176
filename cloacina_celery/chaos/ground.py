"""The ground of a run: its servers, the proxies in front of them, and its own database where it may make one."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg2
from kombu import Connection
from sqlalchemy import make_url

from cloacina_celery import devservers
from cloacina_celery.chaos.proxy import Proxy

OWN_SERVERS = "servers of the run's own"
OWN_DATABASE = "a database of the run's own"
DATABASE_PROXY = "a proxy in front of Postgres"
BROKER_PROXY = "a proxy in front of the broker"

PROBE_TIMEOUT = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """Where a run takes place: the servers themselves, and the ways to them that faults can block."""

    database_url: str
    """Direct, for the observer."""
    broker_url: str
    database_proxy: Proxy | None = None
    broker_proxy: Proxy | None = None
    servers_folder: Path | None = None
    """The embedded servers' folder where both are embedded."""
    role: str | None = None
    """The role that the package connects as where the database is the run's own: limits bind it."""
    role_password: str = ""

    @property
    def package_database_url(self) -> str:
        """What the run's processes connect through."""
        url = make_url(self.database_url)
        if self.role is not None:
            url = url.set(username=self.role, password=self.role_password)
        own = url.render_as_string(hide_password=False)
        return self.database_proxy.url(own) if self.database_proxy else own

    @property
    def package_broker_url(self) -> str:
        """The same for the broker."""
        return self.broker_proxy.url(self.broker_url) if self.broker_proxy else self.broker_url

    @property
    def abilities(self) -> frozenset[str]:
        """What faults may ask for."""
        found = {
            OWN_SERVERS: self.servers_folder,
            OWN_DATABASE: self.role,
            DATABASE_PROXY: self.database_proxy,
            BROKER_PROXY: self.broker_proxy,
        }
        return frozenset(ability for ability, value in found.items() if value is not None)

    def connect(self) -> psycopg2.extensions.connection:
        """Open an autocommit connection that no fault blocks."""
        return _connect(self.database_url)

    def connect_as_package(self) -> psycopg2.extensions.connection:
        """Open one as the run's processes do, so that what it makes is theirs."""
        return _connect(self.package_database_url)

    def limit_connections(self, number: int) -> None:
        """Let the package have only so many connections to the run's own database; -1 takes the limit away."""
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute(f"ALTER ROLE {self.role} CONNECTION LIMIT {number}")
        connection.close()

    def crash_postgres(self) -> None:
        """Have the embedded Postgres end at once, with what it had not yet written, and start it again."""
        assert self.servers_folder is not None
        pid = int((self.servers_folder / "postgres" / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGQUIT)
        deadline = time.monotonic() + 30
        while devservers.is_running(self.servers_folder) and time.monotonic() < deadline:
            time.sleep(0.05)
        devservers.start(self.servers_folder)

    def restart_servers(self) -> None:
        """Restart both embedded servers."""
        devservers.stop(self.servers_folder)
        devservers.start(self.servers_folder)


@contextmanager
def own_ground(database_url: str, broker_url: str, folder: Path) -> Iterator[Ground]:
    """Yield a ground with a database of the run's own, on these servers or on embedded ones where a URL is empty."""
    with ExitStack() as stack:
        own = folder / "servers"
        is_embedded = not database_url and not broker_url
        if not database_url or not broker_url:
            servers = devservers.start(own)
            stack.callback(devservers.stop, own)
            database_url, broker_url = (
                database_url or servers.database_url,
                broker_url or servers.broker_url,
            )
        name = f"cloacina_chaos_{secrets.token_hex(4)}"
        password = secrets.token_hex(8)
        role = _make_role(database_url, name, password)
        if role is not None:
            stack.callback(_execute, database_url, f"DROP ROLE IF EXISTS {role}")
        owner = f" OWNER {role}" if role else ""
        _execute(database_url, f"CREATE DATABASE {name}{owner}")
        stack.callback(_execute, database_url, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        url = make_url(database_url).set(drivername="postgresql+psycopg2", database=name)
        yield stack.enter_context(
            proxied(
                Ground(
                    database_url=url.render_as_string(hide_password=False), broker_url=broker_url,
                    servers_folder=own if is_embedded else None, role=role, role_password=password,
                )
            )
        )  # fmt: skip


@contextmanager
def proxied(ground: Ground) -> Iterator[Ground]:
    """Yield the ground with proxies in front of its servers, where the run's processes get through them."""
    with ExitStack() as stack:
        ways: dict[str, Proxy | None] = {"database_proxy": None, "broker_proxy": None}
        for way, url, probe in (
            ("database_proxy", ground.database_url, _probe_database),
            ("broker_proxy", ground.broker_url, _probe_broker),
        ):
            try:
                proxy = stack.enter_context(Proxy.in_front_of(url))
                probe(proxy.url(url))
                ways[way] = proxy
            except Exception:  # noqa: BLE001, S112  # TLS, several hosts, a socket: then those faults are left out
                continue
        yield Ground(
            database_url=ground.database_url, broker_url=ground.broker_url,
            servers_folder=ground.servers_folder, role=ground.role, role_password=ground.role_password, **ways,
        )  # fmt: skip


def _probe_database(url: str) -> None:
    _connect(url, connect_timeout=PROBE_TIMEOUT).close()


def _probe_broker(url: str) -> None:
    with Connection(url, connect_timeout=PROBE_TIMEOUT) as connection:
        connection.ensure_connection(max_retries=1, timeout=PROBE_TIMEOUT)


def _make_role(database_url: str, name: str, password: str) -> str | None:
    try:
        _execute(database_url, f"CREATE ROLE {name} LOGIN PASSWORD '{password}'")
    except psycopg2.errors.InsufficientPrivilege:
        return None
    return name


def _connect(url: str, **options: object) -> psycopg2.extensions.connection:
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = psycopg2.connect(plain, **{"application_name": "chaos", **options})
    connection.autocommit = True
    return connection


def _execute(url: str, statement: str) -> None:
    connection = _connect(url)
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement)
    finally:
        connection.close()
