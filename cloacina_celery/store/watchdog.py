"""A bound on how long a block may wait for the server, which holds even where the server is frozen."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg2.extensions


@contextmanager
def cut_after(connection: psycopg2.extensions.connection, seconds: float) -> Iterator[None]:
    """Break the connection if the block takes longer than this, so that whatever waits for an answer gets an error.

    A statement_timeout is the server's, and one that is stopped does not keep it; TCP's timeouts are the kernels',
    and the kernel under a stopped server goes on to acknowledge what it is sent.
    """
    # A descriptor of its own: that of a connection which is closed meanwhile may be somebody else's by then.
    wire = socket.socket(fileno=os.dup(connection.fileno()))
    timer = threading.Timer(seconds, _shut_down, [wire])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        wire.close()


def _shut_down(wire: socket.socket) -> None:
    with suppress(OSError):
        wire.shutdown(socket.SHUT_RDWR)
