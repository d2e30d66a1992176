"""What a reaper does: find what is lost, due, waiting or stranded, move it on, and ring."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from cloacina_celery.core.lifecycle import Recover, State, after_loss
from cloacina_celery.core.protocol import EXPIRED, OF_WORKER, Ask
from tests.model.changes import Step, name_of, put, rung, with_row
from tests.model.world import STRANDED, Message, Reaper, World

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.model.world import Rules


def of_reaper(world: World, rules: Rules, n: int) -> Iterator[Step]:
    """Yield what one reaper can do now, and how it dies."""
    me = world.reapers[n]
    who = f"reaper {n + 1}"

    def becomes(reaper: Reaper, place: World = world) -> World:
        return place._replace(reapers=put(place.reapers, n, reaper))

    if me.phase == "idle":
        alive = {worker.id for worker in world.workers if worker.phase != "dead"}
        for e, row in enumerate(world.rows):
            if row is None or (world.locks[e] and rules.sweep_locks):
                continue
            name = name_of(world, e)
            found = EXPIRED.admits(row, Ask(now=0)) or (
                row.worker not in alive and OF_WORKER.admits(row, Ask(now=0, worker=row.worker))
            )
            if found:
                there = world._replace(locks=put(world.locks, e, who)) if rules.sweep_locks else world
                told = f"{who} finds attempt {row.attempt} of {name} lost"
                yield Step(told, becomes(Reaper("locked", e, seen=row), there))
            if world.locks[e]:
                continue
            after = rules.moves["ring"].apply(row, Ask(now=0))
            if after is not None:
                there = world._replace(rows=put(world.rows, e, after))
                yield Step(
                    f"{who} takes {name} to ring for it", becomes(Reaper("ringing", e, seen=after), there)
                )
            after = rules.moves["ring waiting"].apply(row, Ask(now=0))
            if after is not None:
                there = world._replace(rows=put(world.rows, e, after))
                told = f"{who} has room for {name} and takes it to ring for it"
                yield Step(told, becomes(Reaper("ringing", e, seen=after), there))
            after = rules.moves["ring again"].apply(row, Ask(now=0, stranded_after=STRANDED))
            if after is not None and _missing(world):
                there = with_row(world, e, after, "ring again")
                told = f"{who} misses a message and takes {name} to ring again"
                yield Step(told, becomes(Reaper("ringing", e, seen=after), there))
        return
    e, name = me.execution, name_of(world, me.execution)
    row = world.rows[e]
    assert row is not None
    free = world._replace(locks=put(world.locks, e, "")) if world.locks[e] == who else world
    if world.left.crashes:
        left = world.left._replace(crashes=world.left.crashes - 1)
        yield Step(f"{who} dies", becomes(Reaper(), free._replace(left=left)), "fault")
    if me.phase == "locked" and world.locks[e] in ("", who):
        assert me.seen is not None
        decision = after_loss(recoveries=me.seen.recoveries, max_recoveries=me.seen.max_recoveries)
        move, delay = ("recover", decision.delay) if isinstance(decision, Recover) else ("abandon", 0.0)
        after = rules.moves[move].apply(row, Ask(now=0, attempt=me.seen.attempt, delay=delay))
        if after is None:
            yield Step(f"{who} finds {name} moved on", becomes(Reaper(), free))
        else:
            there = world._replace(locks=put(world.locks, e, who))
            told = f"{who} writes that attempt {me.seen.attempt} of {name} is lost ({move})"
            yield Step(told, becomes(me._replace(phase="written", written=after, move=move), there))
    if me.phase == "written":
        assert me.written is not None
        assert me.seen is not None
        done = with_row(free, e, me.written, me.move, me.seen.attempt)
        rings = me.written.state is State.PENDING and me.written.rung_at is not None
        then = Reaper("ringing", e, seen=me.written) if rings else Reaper()
        yield Step(
            f"{who} commits that attempt {me.seen.attempt} of {name} is lost ({me.move})", becomes(then, done)
        )
    if me.phase == "ringing":
        assert me.seen is not None
        ring = Message(e, me.seen.attempt + 1)
        yield Step(f"{who} rings for attempt {ring.attempt} of {name}", becomes(Reaper(), rung(world, ring)))


def _missing(world: World) -> bool:
    """Compare as the reaper does: rung rows with the messages in the queue and in the hands of living workers."""
    rung = sum(
        row is not None and row.state is State.PENDING and row.rung_at not in (None, inf)
        for row in world.rows
    )
    held = sum(worker.phase == "holding" for worker in world.workers)
    return rung > len(world.messages) + held
