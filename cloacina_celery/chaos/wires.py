"""The wires of a proxy: the two connections of a client, and what is understood of what passes between them."""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import TypeAlias

Address: TypeAlias = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""

_RESET = struct.pack("ii", 1, 0)
_LENGTH = struct.Struct("!I")
_ENCRYPTION_REQUESTS = (80877103, 80877104)  # SSLRequest and GSSENCRequest
_PREPARE = re.compile(r"\s*PREPARE\s+(\w+)", re.IGNORECASE)
_EXECUTE = re.compile(r"\s*EXECUTE\s+(\w+)", re.IGNORECASE)
_WRITES = re.compile(r"\b(insert|update|delete|merge|create|drop|alter|truncate)\b", re.IGNORECASE)


class Link:
    """A client's connection and its server's."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.server = socket.socket()
        self.is_closed = False

    def connect(self, target: Address) -> None:
        """Connect to the server."""
        if isinstance(target, str):
            self.server.close()
            self.server = socket.socket(socket.AF_UNIX)
        self.server.connect(target)
        if not isinstance(target, str):
            self.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def reset(self) -> None:
        """End both connections by a reset, as a server that crashes does."""
        for end in (self.client, self.server):
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._end()

    def close(self) -> None:
        """End both connections in the ordinary way."""
        self._end()

    def _end(self) -> None:
        self.is_closed = True
        for end in (self.client, self.server):
            # Reading threads are woken by this; with the lingering off, the close below still sends a reset.
            with suppress(OSError):
                end.shutdown(socket.SHUT_RD)
            end.close()


class Losses:
    """Which commits' answers are to be lost, and which have been; by `lock`, who waits for one is woken."""

    def __init__(self, lock: threading.Condition) -> None:
        self._lock = lock
        self._left: int | None = 0
        self._matching = re.compile("")
        self._probability = 1.0
        self._random = random.Random(0)
        self.lost: list[str] = []

    @property
    def is_armed(self) -> bool:
        return self._left != 0

    def arm(
        self, count: int | None, matching: re.Pattern[str], probability: float, source: random.Random
    ) -> None:
        with self._lock:
            self._left, self._matching, self._probability = count, matching, probability
            self._random = source

    def take(self, texts: Iterable[str]) -> bool:
        """Decide about one commit that was done, and note it if its answer is to be lost."""
        text = ";\n".join(texts)
        with self._lock:
            if self._left == 0 or not _WRITES.search(text) or not self._matching.search(text):
                return False
            if self._random.random() >= self._probability:
                return False
            if self._left is not None:
                self._left -= 1
            self.lost.append(text)
            self._lock.notify_all()
            return True


class PlainWire:
    """Bytes as they come."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def from_client(self, data: bytes) -> None:
        self._link.server.sendall(data)

    def from_server(self, data: bytes) -> None:
        self._link.client.sendall(data)


class PostgresWire:
    """Postgres' protocol, version 3: https://www.postgresql.org/docs/current/protocol-message-formats.html."""

    def __init__(self, link: Link, losses: Losses) -> None:
        self._link = link
        self._losses = losses
        self._said = self._answered = self._held = b""
        self._is_started = False
        self._prepared: dict[str, str] = {}
        self._texts: list[str] = []
        self._is_undone = False

    def from_client(self, data: bytes) -> None:
        self._said += data
        while not self._is_started and len(self._said) >= 8:
            length, code = struct.unpack_from("!II", self._said)
            if len(self._said) < length:
                return
            first, self._said = self._said[:length], self._said[length:]
            if code in _ENCRYPTION_REQUESTS:
                self._link.client.sendall(b"N")
                continue
            self._is_started = True
            self._link.server.sendall(first)
        if self._is_started:
            messages, self._said = _messages(self._said)
            for message in messages:
                if message[:1] == b"Q":
                    self._note(message[5:-1].decode(errors="replace"))
                self._link.server.sendall(message)

    def _note(self, text: str) -> None:
        if prepare := _PREPARE.match(text):
            self._prepared[prepare[1]] = text
            return
        execute = _EXECUTE.match(text)
        self._texts.append(f"{text} -- {self._prepared.get(execute[1], '')}" if execute else text)

    def from_server(self, data: bytes) -> None:
        messages, self._answered = _messages(self._answered + data)
        for message in messages:
            kind = message[:1]
            self._held += message
            if kind == b"E" or (kind == b"C" and message[5:-1] == b"ROLLBACK"):
                self._is_undone = True
            if kind == b"Z":
                self._end_of_answer(is_in_transaction=message[5:6] != b"I")
            # While a loss is possible an answer is held back until the server is ready; libpq would report its
            # beginning as a success. In a COPY it is the client's turn before that.
            elif kind != b"G" and self._texts and self._losses.is_armed:
                continue
            self._link.client.sendall(self._held)
            self._held = b""

    def _end_of_answer(self, *, is_in_transaction: bool) -> None:
        is_undone, self._is_undone = self._is_undone, False
        if is_in_transaction:
            return
        texts, self._texts = self._texts, []
        if texts and not is_undone and self._losses.take(texts):
            self._link.reset()
            raise OSError("the commit's answer is lost")


def _messages(data: bytes) -> tuple[list[bytes], bytes]:
    """Split into whole messages and the beginning of the next."""
    messages = []
    while len(data) >= 5:
        end = 1 + _LENGTH.unpack_from(data, 1)[0]
        if len(data) < end:
            break
        messages.append(data[:end])
        data = data[end:]
    return messages, data
