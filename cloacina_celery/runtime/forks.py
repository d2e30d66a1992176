"""No fork in the middle of a send.

A worker's keeper sends from a thread, and under prefork the main thread forks children whenever one is to be
replaced. A child has the locks of its parent as they stood at the fork: one that a thread held which the child
does not have stays locked for ever. kombu has such locks (each of its cached properties is one), so a child
forked while the keeper was opening a channel would hang at its own first send, its execution settled, its slot
lost, and the worker unable to shut down.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

PATIENCE = 2.0
"""Seconds for which a fork waits: beyond that, a worker that stands still is worse than the risk."""


class _Gate:
    """Many may be inside at once; a fork waits until nobody is, and nobody enters while it happens."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew: in a child, whoever was inside does not exist."""
        self._changed = threading.Condition(threading.Lock())
        self._inside = 0
        self._is_held_for_fork = False

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Be inside for the block."""
        with self._changed:
            self._inside += 1
        changed = self._changed
        try:
            yield
        finally:
            # A fork in the block itself leaves the child with a gate that it has not entered.
            if changed is self._changed:
                with changed:
                    self._inside -= 1
                    changed.notify_all()

    def before_fork(self) -> None:
        """Wait until nobody is inside, and keep it so."""
        deadline = time.monotonic() + PATIENCE
        if self._changed.acquire(timeout=PATIENCE):
            self._is_held_for_fork = True
            self._changed.wait_for(lambda: not self._inside, timeout=max(deadline - time.monotonic(), 0.0))

    def after_fork_in_parent(self) -> None:
        """Let others in again."""
        if self._is_held_for_fork:
            self._is_held_for_fork = False
            self._changed.release()


_gate = _Gate()
os.register_at_fork(
    before=_gate.before_fork, after_in_parent=_gate.after_fork_in_parent, after_in_child=_gate.reset
)


def without_fork() -> AbstractContextManager[None]:
    """Have this process fork no child while the block runs."""
    return _gate.enter()
