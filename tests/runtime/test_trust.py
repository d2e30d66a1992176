"""The board of leases: what one process writes, its children read, and a torn state is never seen."""

from __future__ import annotations

import os
import time

import pytest

from cloacina_celery.runtime import trust
from cloacina_celery.runtime.trust import CAPACITY, Held, LeaseBoard, steady_clock


def held(number: int) -> Held:
    return ("tenant_one", f"e-{number}", 1)


def test_a_board_tells_until_when_each_attempt_is_trusted() -> None:
    board = LeaseBoard()
    board.write([(held(1), 10.0), (held(2), 20.0)])
    assert [board.read(held(n)) for n in (1, 2, 3)] == [10.0, 20.0, 0.0]


@pytest.mark.parametrize("other", [("tenant_two", "e-1", 1), ("tenant_one", "e-1", 2)])
def test_another_tenants_execution_and_a_later_attempt_are_others(other: Held) -> None:
    board = LeaseBoard()
    board.write([(held(1), 10.0)])
    assert board.read(other) == 0.0


def test_what_is_not_written_again_is_forgotten() -> None:
    board = LeaseBoard()
    board.write([(held(1), 10.0)])
    board.write([])
    assert board.read(held(1)) == 0.0


def test_what_has_no_room_is_trusted_as_long_as_the_least_of_it() -> None:
    board = LeaseBoard()
    board.write([(held(n), 100.0 + n) for n in range(CAPACITY + 2)])
    assert board.read(held(CAPACITY - 1)) == 100.0 + CAPACITY - 1
    assert board.read(held(CAPACITY + 1)) == 100.0 + CAPACITY


def test_a_child_reads_what_its_parent_writes_after_the_fork() -> None:
    board = LeaseBoard()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(told, 1)
        os._exit(int(board.read(held(1))))
    board.write([(held(1), 42.0)])
    os.write(tell, b".")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42


def test_a_reader_never_sees_half_of_what_is_being_written() -> None:
    # The entries move at each write: a reader that mixed two of them would miss the one it looks for.
    board = LeaseBoard()
    filler = [(held(n), 1.0) for n in range(2000)]
    turns = [[(held(-1), 1.0), *filler], [*filler, (held(-1), 2.0)]]
    board.write(turns[0])
    child = os.fork()
    if child == 0:
        deadline = time.monotonic() + 1.0
        seen = {board.read(held(-1)) for _ in iter(lambda: time.monotonic() < deadline, False)}
        os._exit(7 if seen <= {1.0, 2.0} and len(seen) == 2 else 1)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        for turn in turns:
            board.write(turn)
    assert board.read(held(-1)) in (1.0, 2.0)


def test_a_writer_that_died_over_the_board_leaves_nothing_to_trust() -> None:
    board = LeaseBoard()
    board.write([(held(1), 10.0)])
    trust._TURN.pack_into(board._memory, 0, 3)
    assert board.read(held(1)) == 0.0


def test_the_clock_does_not_go_back_and_is_the_same_in_a_child() -> None:
    before = steady_clock()
    child = os.fork()
    if child == 0:
        os._exit(int(0 <= steady_clock() - before < 5))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert steady_clock() >= before
