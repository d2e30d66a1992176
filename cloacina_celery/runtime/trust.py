"""The trust window: how long an attempt may believe in its lease without having asked the database.

A worker's main process extends the leases, and its children run the tasks. Until when each lease was extended is
written on a board in memory that they share, so that a child whose main process was frozen, or had no answer from
the database, knows that its execution may be somebody else's by now. A leader that trusts itself less long than
its lease, on a monotonic clock read before the query, is River's.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Iterable
from hashlib import blake2b

Held = tuple[str, str, int]
"""A running attempt: tenant, execution id, attempt."""

CAPACITY = 8192
"""Attempts that the board has room for; a worker that runs more trusts all of them as long as the last beat."""

READS = 100
"""How often a reader tries to find the board at rest; a writer that died over it leaves nothing to trust."""

_TURN = struct.Struct("=Q")
_SIZE = struct.Struct("=Qd")
_ENTRY = struct.Struct("=8sd")
_ENTRIES_AT = _TURN.size + _SIZE.size


def steady_clock() -> float:
    """Read seconds that never go back, are the same in all processes of the machine, and count its sleep."""
    # CLOCK_MONOTONIC stands still while a machine is suspended, and the database's clock does not.
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class LeaseBoard:
    """Tells all processes of a worker until when its attempts are trusted. One writes; make it before a fork."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _ENTRIES_AT + CAPACITY * _ENTRY.size)
        self._turn = 0

    def write(self, trusted: Iterable[tuple[Held, float]]) -> None:
        """Replace what the board says: attempts, and until when (see `steady_clock`) each is trusted."""
        entries = [(_key(held), until) for held, until in trusted]
        shown = entries[:CAPACITY]
        rest = min((until for _, until in entries[CAPACITY:]), default=0.0)
        # An odd turn tells readers that the entries are being written (a seqlock).
        self._turn += 1
        _TURN.pack_into(self._memory, 0, self._turn)
        _SIZE.pack_into(self._memory, _TURN.size, len(shown), rest)
        packed = b"".join(_ENTRY.pack(*entry) for entry in shown)
        self._memory[_ENTRIES_AT : _ENTRIES_AT + len(packed)] = packed
        self._turn += 1
        _TURN.pack_into(self._memory, 0, self._turn)

    def read(self, held: Held) -> float:
        """Return until when an attempt is trusted; 0 if the board does not know it."""
        key = _key(held)
        for _ in range(READS):
            (turn,) = _TURN.unpack_from(self._memory, 0)
            count, rest = _SIZE.unpack_from(self._memory, _TURN.size)
            packed = self._memory[_ENTRIES_AT : _ENTRIES_AT + min(count, CAPACITY) * _ENTRY.size]
            if turn % 2 == 0 and _TURN.unpack_from(self._memory, 0)[0] == turn:
                found: float = next(
                    (until for known, until in _ENTRY.iter_unpack(packed) if known == key), rest
                )
                return found
            time.sleep(0)
        return 0.0


def _key(held: Held) -> bytes:
    return blake2b("\0".join(map(str, held)).encode(), digest_size=8).digest()
