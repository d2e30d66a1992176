"""A proxy on the loopback in front of a real server, which can refuse, hang, cut, and lose a commit's answer.

It is what stands between two ends in a fault test: both are real, and only the wire misbehaves.
"""

from __future__ import annotations

import random
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Self

from sqlalchemy.engine import URL, make_url

from cloacina_celery.chaos.wires import Address, Link, Losses, PlainWire, PostgresWire

_CHUNK = 65_536
_DEFAULT_PORTS = {"postgresql": 5432, "postgres": 5432, "redis": 6379, "amqp": 5672, "pyamqp": 5672}


class Mode(Enum):
    """What the proxy does with what reaches it."""

    FORWARD = "forward"
    REFUSE = "refuse"
    """The port is closed, and open connections have been reset."""
    HANG = "hang"
    """Connections are accepted and stay silent; what is on its way waits until the mode ends."""


class Proxy:
    """Forward a port of 127.0.0.1 to a server, and misbehave when told to; all methods may be called by any thread.

    In front of Postgres it follows the protocol far enough to know when a transaction has really committed: see
    `lose_commits`. It reads simple queries, which are all that psycopg2 sends, and declines encryption.

    Args:
        target: the server.
        is_postgres: whether the server speaks Postgres' protocol.
        port: the port to listen on; 0 takes a free one, which stays the same for the proxy's life.
    """

    def __init__(self, target: Address, *, is_postgres: bool = False, port: int = 0) -> None:
        self.target = target
        self.port = port
        self._is_postgres = is_postgres
        self._lock = threading.Condition()
        self._mode = Mode.FORWARD
        self._listener: socket.socket | None = None
        self._links: set[Link] = set()
        self._losses = Losses(self._lock)
        self._listen()

    @classmethod
    def in_front_of(cls, url: str) -> Proxy:
        """Stand in front of the server that a URL names: Postgres', Redis' or RabbitMQ's."""
        parsed = make_url(url)
        scheme = parsed.drivername.partition("+")[0]
        return cls(
            _address_of(parsed, _DEFAULT_PORTS.get(scheme, 0)), is_postgres=scheme.startswith("postgres")
        )

    def url(self, url: str) -> str:
        """Return the URL with the proxy in the place of its server."""
        parsed = make_url(url)
        query = {name: value for name, value in parsed.query.items() if name not in ("host", "port")}
        through = parsed.set(host="127.0.0.1", port=self.port, query=query)
        return through.render_as_string(hide_password=False)

    @property
    def mode(self) -> Mode:
        """What the proxy does at present."""
        return self._mode

    def forward(self) -> None:
        """Behave from now on; what waited because of `hang` goes on its way."""
        self._enter(Mode.FORWARD)

    def refuse(self) -> None:
        """Close the port and reset every connection."""
        self._enter(Mode.REFUSE)
        self.cut()

    def hang(self) -> None:
        """Accept connections and say nothing; those that are open fall silent both ways."""
        self._enter(Mode.HANG)

    def cut(self) -> int:
        """Reset all connections at both ends, and say how many there were."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.reset()
        return len(links)

    def lose_commits(
        self, count: int | None = 1, *, matching: str = "", probability: float = 1.0, seed: int = 0
    ) -> None:
        """Have the next commits done by the server, and their clients reset without an answer.

        A commit is a `COMMIT` that the server confirmed, or a writing statement outside of a transaction. It is
        lost only after the server said that it is ready again: the commit has been done, whatever the client
        makes of it.

        Args:
            count: how many; `None` for all from now on, 0 for none any more.
            matching: a regular expression that the transaction's text must contain; prepared statements count with
                the text that they were prepared from.
            probability: the share of the commits that match which are lost, drawn from `seed`.
        """
        self._losses.arm(
            count, re.compile(matching, re.DOTALL | re.IGNORECASE), probability, random.Random(seed)
        )

    @property
    def lost_commits(self) -> list[str]:
        """The text of each transaction that was committed and whose answer was lost, oldest first."""
        with self._lock:
            return list(self._losses.lost)

    def wait_for_lost_commits(self, count: int = 1, *, timeout: float = 10.0) -> list[str]:
        """Wait until so many answers have been lost since the proxy's start, and return their transactions' text.

        Raises:
            TimeoutError: they were not, within `timeout` seconds.
        """
        with self._lock:
            if not self._lock.wait_for(lambda: len(self._losses.lost) >= count, timeout=timeout):
                raise TimeoutError(
                    f"{len(self._losses.lost)} of {count} commits were lost within {timeout:g} s"
                )
            return list(self._losses.lost)

    @property
    def connection_count(self) -> int:
        """The number of connections that are open."""
        with self._lock:
            return len(self._links)

    def close(self) -> None:
        """Close the port and reset every connection, for good."""
        self.refuse()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enter(self, mode: Mode) -> None:
        with self._lock:
            self._mode = mode
            self._lock.notify_all()
        if mode is Mode.REFUSE:
            self._stop_listening()
        else:
            self._listen()

    def _listen(self) -> None:
        with self._lock:
            if self._listener is not None:
                return
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self.port))
            listener.listen(128)
            self.port = listener.getsockname()[1]
            self._listener = listener
        _in_thread("proxy-listener", lambda: self._accept(listener))

    def _stop_listening(self) -> None:
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            # A thread blocked in accept() is woken by a shutdown and not by a close.
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = Link(client)
            with self._lock:
                if self._mode is Mode.REFUSE:
                    link.reset()
                    continue
                self._links.add(link)
            _in_thread("proxy-client", partial(self._serve, link))

    def _serve(self, link: Link) -> None:
        try:
            self._wait_for_turn(link)
            link.connect(self.target)
            wire = PostgresWire(link, self._losses) if self._is_postgres else PlainWire(link)
            _in_thread("proxy-server", lambda: self._pump(link, link.server, wire.from_server))
            self._pump(link, link.client, wire.from_client)
        except OSError:
            self._drop(link)

    def _pump(self, link: Link, source: socket.socket, take: Callable[[bytes], None]) -> None:
        try:
            while data := source.recv(_CHUNK):
                self._wait_for_turn(link)
                take(data)
            link.close()
        except OSError:
            link.reset()
        finally:
            self._drop(link)

    def _wait_for_turn(self, link: Link) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._mode is not Mode.HANG or link.is_closed)
        if link.is_closed:
            raise OSError("reset meanwhile")

    def _drop(self, link: Link) -> None:
        link.close()
        with self._lock:
            self._links.discard(link)
            self._lock.notify_all()


def _address_of(url: URL, default_port: int) -> Address:
    hosts = url.query.get("host", url.host) or "127.0.0.1"
    ports = url.query.get("port", url.port) or default_port
    host, port = (value if isinstance(value, (str, int)) else value[0] for value in (hosts, ports))
    if isinstance(host, str) and host.startswith("/"):
        return str(Path(host) / f".s.PGSQL.{port}")
    return str(host), int(port)


def _in_thread(name: str, work: Callable[[], object]) -> None:
    threading.Thread(target=work, name=name, daemon=True).start()
