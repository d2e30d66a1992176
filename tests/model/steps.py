"""Every step that can be taken in a world: by a worker, a reaper, the broker, the clock, a person, or a fault."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from cloacina_celery.core.lifecycle import TERMINAL_STATES, Recover, Retry, State, after_failure, after_loss
from cloacina_celery.core.protocol import EXPIRED, OF_WORKER, Ask, submitted
from cloacina_celery.core.retry import RetryPolicy
from tests.model.world import LEASE, LONG_AGO, STRANDED, Message, Reaper, Worker, World

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cloacina_celery.core.protocol import Row
    from tests.model.world import Past, Rules


class Step(NamedTuple):
    """One step, told in the glossary's words; ``by`` is what takes it."""

    told: str
    world: World
    by: str = "system"


ENDS = ("succeed", "fail", "retry", "release", "release all", "recover", "abandon", "cancel")
SETTLES = ("succeed", "fail", "abandon", "cancel")


def steps(world: World, rules: Rules) -> Iterator[Step]:
    """Yield each step that can be taken now."""
    yield from _submissions(world, rules)
    yield from _time(world)
    yield from _broker(world)
    for n in range(len(world.workers)):
        yield from _worker(world, rules, n)
    for n in range(len(world.reapers)):
        yield from _reaper(world, rules, n)
    yield from _people(world, rules)


def _put(items: tuple[object, ...], n: int, item: object) -> tuple[object, ...]:
    return (*items[:n], item, *items[n + 1 :])


def _rung(world: World, message: Message) -> World:
    return world._replace(messages=tuple(sorted((*world.messages, message))))


def _with_row(world: World, e: int, row: Row, move: str, attempt: int = 0, wrong: str = "") -> World:
    """Commit a move: the row, and what it adds to the past."""
    past: Past = world.past[e]
    if move == "claim":
        past = past._replace(claimed=(*past.claimed, row.attempt))
    was = world.rows[e]
    assert was is not None
    if move in ENDS and not (move == "cancel" and was.state is State.PENDING):
        past = past._replace(ended=(*past.ended, attempt or row.attempt))
    if move in SETTLES:
        past = past._replace(settled=past.settled + 1)
    if move == "succeed":
        past = past._replace(effects=(*past.effects, attempt))
    if move == "requeue":
        past = past._replace(requeues=past.requeues + 1)
    if wrong:
        past = past._replace(wrong=wrong)
    if row.state in TERMINAL_STATES:
        row = replace(row, run_at=0.0, rung_at=None)  # nobody looks at them any more
    return world._replace(rows=_put(world.rows, e, row), past=_put(world.past, e, past))


def _submissions(world: World, rules: Rules) -> Iterator[Step]:
    for e, row in enumerate(world.rows):
        if row is None and all(world.rows[:e]):
            new = submitted(Ask(now=0, max_recoveries=rules.max_recoveries))
            there = world._replace(rows=_put(world.rows, e, new))
            yield Step(f"{_name(world, e)} is submitted, and its message leaves", _rung(there, Message(e, 1)))
            if world.left.crashes:
                left = world.left._replace(crashes=world.left.crashes - 1)
                told = f"{_name(world, e)} is submitted, and its process dies before the message leaves"
                yield Step(told, there._replace(left=left), "fault")


def _time(world: World) -> Iterator[Step]:
    for e, row in enumerate(world.rows):
        if row is None or world.locks[e]:
            continue
        name = _name(world, e)
        if row.state is State.RUNNING and (row.lease_expires_at or 0) > 0:
            late = replace(row, lease_expires_at=-1.0)
            told = f"the lease of attempt {row.attempt} of {name} runs out"
            yield Step(told, world._replace(rows=_put(world.rows, e, late)), "time")
        if row.state is State.PENDING and row.run_at > 0:
            due = replace(row, run_at=0.0)
            yield Step(f"{name} becomes due", world._replace(rows=_put(world.rows, e, due)), "time")
        if row.state is State.PENDING and row.rung_at == 0:
            old = replace(row, rung_at=LONG_AGO)
            told = f"the last ring of {name} is long ago"
            yield Step(told, world._replace(rows=_put(world.rows, e, old)), "time")


def _broker(world: World) -> Iterator[Step]:
    for message in dict.fromkeys(world.messages):
        rest = list(world.messages)
        rest.remove(message)
        what = f"the message for attempt {message.attempt} of {_name(world, message.execution)}"
        yield Step(f"the broker loses {what}", world._replace(messages=tuple(rest)), "fault")
        if world.left.doubles:
            left = world.left._replace(doubles=world.left.doubles - 1)
            yield Step(f"the broker doubles {what}", _rung(world, message)._replace(left=left), "fault")


def _worker(world: World, rules: Rules, n: int) -> Iterator[Step]:
    me = world.workers[n]
    who = f"worker {chr(65 + n)}"

    def becomes(worker: Worker, place: World = world) -> World:
        return place._replace(workers=_put(place.workers, n, worker))

    idle = Worker(me.id)
    if me.phase == "dead":
        yield Step(f"{who} is started again", becomes(Worker(me.id + len(world.workers))))
        return
    if me.phase == "idle":
        for message in dict.fromkeys(world.messages):
            rest = list(world.messages)
            rest.remove(message)
            told = f"{who} receives the message for attempt {message.attempt} of {_name(world, message.execution)}"
            yield Step(
                told,
                becomes(me._replace(phase="holding", message=message), world._replace(messages=tuple(rest))),
            )
        return
    assert me.message is not None
    e = me.message.execution
    row, name, lock = world.rows[e], _name(world, e), world.locks[e]
    assert row is not None
    mine = f"attempt {me.attempt} of {name}"
    if world.left.crashes:
        there = _rung(world, me.message)
        there = there._replace(
            left=world.left._replace(crashes=world.left.crashes - 1),
            locks=_put(world.locks, e, "") if lock == who else world.locks,
        )
        yield Step(
            f"{who} dies; its message goes back to the queue", becomes(Worker(me.id, "dead"), there), "fault"
        )
    if me.phase == "holding" and not lock:
        after = rules.moves["claim"].apply(
            row, Ask(now=0, attempt=me.message.attempt, worker=me.id, lease_ttl=LEASE)
        )
        if after is None:
            yield Step(
                f"{who} declines the message for attempt {me.message.attempt} of {name}", becomes(idle)
            )
        else:
            wrong = (
                ""
                if after.attempt == me.message.attempt
                else f"a message for attempt {me.message.attempt} claimed attempt {after.attempt}"
            )
            there = _with_row(world, e, after, "claim", wrong=wrong)
            told = f"{who} claims attempt {after.attempt} of {name}"
            yield Step(told, becomes(me._replace(phase="claimed", attempt=after.attempt), there))
            if world.left.cuts:
                left = world.left._replace(cuts=world.left.cuts - 1)
                seeking = me._replace(phase="seeking", attempt=after.attempt)
                yield Step(
                    f"{told}, and gets no answer", becomes(seeking, there._replace(left=left)), "fault"
                )
        after = rules.moves["defer"].apply(row, Ask(now=0, attempt=me.message.attempt))
        if after is not None and world.left.defers:
            left = world.left._replace(defers=world.left.defers - 1)
            there = _with_row(world, e, after, "defer")._replace(left=left)
            told = f"{who} finds no room for attempt {me.message.attempt} of {name}, and lets it wait"
            yield Step(told, becomes(idle, there), "fault")
    if me.phase == "seeking" and not lock:
        after = rules.moves["find claim"].apply(row, Ask(now=0, attempt=me.attempt, lease_ttl=LEASE))
        if after is None or row.worker != me.id:  # who claimed it is in the claim's event
            yield Step(f"{who} does not find its claim of {mine}", becomes(idle))
        else:
            there = world._replace(rows=_put(world.rows, e, after))
            yield Step(f"{who} finds its claim of {mine}", becomes(me._replace(phase="claimed"), there))
    if me.phase in ("claimed", "ran") and not lock:
        ask = Ask(now=0, attempt=me.attempt, worker=me.id, lease_ttl=LEASE)
        after = rules.moves["heartbeat"].apply(row, ask)
        if after is not None and after != row:
            told = f"{who} extends its lease of {mine}"
            yield Step(told, world._replace(rows=_put(world.rows, e, after)))
        if world.left.stops:
            after = rules.moves["release all"].apply(row, ask)
            left = world.left._replace(stops=world.left.stops - 1)
            there = _rung(world, me.message)._replace(left=left)
            if after is not None:
                wrong = (
                    ""
                    if row.worker == me.id
                    else f"{who} gave back what worker {chr(65 + (row.worker or 0) % len(world.workers))} holds"
                )
                there = _with_row(there, e, after, "release all", wrong=wrong)
                ring = Message(e, after.attempt + 1)
                yield Step(
                    f"{who} is shut down and gives back {name}",
                    becomes(Worker(me.id, "ringing", ring), there),
                )
            else:
                yield Step(f"{who} is shut down and holds nothing", becomes(Worker(me.id, "dead"), there))
    if me.phase == "ringing":
        yield Step(
            f"{who} rings for attempt {me.message.attempt} of {name} and ends",
            becomes(Worker(me.id, "dead"), _rung(world, me.message)),
        )
    if me.phase == "claimed":
        past = world.past[e]._replace(started=(*world.past[e].started, me.attempt))
        yield Step(
            f"{who} runs {mine} up to its settlement; its effects are not committed yet",
            becomes(me._replace(phase="ran"), world._replace(past=_put(world.past, e, past))),
        )
    if me.phase == "ran" and not lock:
        for outcome in ("succeed", "raise"):
            move, delay = _settlement(row, rules, outcome)
            after = rules.moves[move].apply(row, Ask(now=0, attempt=me.attempt, delay=delay))
            if after is None:
                told = f"{who} finds its fence closed for {mine} and rolls back"
                yield Step(told, becomes(idle))
                break
            told = f"{who} writes the settlement of {mine} ({move})"
            there = world._replace(locks=_put(world.locks, e, who))
            yield Step(told, becomes(me._replace(phase="written", outcome=move, written=after), there))
    if me.phase == "written":
        assert me.written is not None
        free = world._replace(locks=_put(world.locks, e, ""))
        done = _with_row(free, e, me.written, me.outcome, me.attempt)
        yield Step(f"{who} commits {mine} ({me.outcome})", becomes(idle, done))
        if world.left.cuts:
            left = world.left._replace(cuts=world.left.cuts - 1)
            asking = me._replace(phase="asking", written=None, outcome="")
            for there, what in ((done, "was done"), (free, "was not done")):
                told = f"{who} gets no answer to its commit of {mine}, which {what}"
                yield Step(told, becomes(asking, there._replace(left=left)), "fault")
    if me.phase == "asking" and not lock:
        if row.state is State.RUNNING and row.attempt == me.attempt:
            yield Step(
                f"{who} reads the row: {mine} is not settled", becomes(me._replace(phase="giving back"))
            )
        else:
            yield Step(f"{who} reads the row: {mine} is over", becomes(idle))
    if me.phase == "giving back" and not lock:
        after = rules.moves["release"].apply(row, Ask(now=0, attempt=me.attempt))
        if after is None:
            yield Step(f"{who} finds its fence closed for {mine}", becomes(idle))
        else:
            wrong = (
                ""
                if row.attempt == me.attempt
                else f"{who} gave back attempt {row.attempt}, which is another's"
            )
            yield Step(
                f"{who} gives back {name}", becomes(idle, _with_row(world, e, after, "release", wrong=wrong))
            )


POLICIES = {n: RetryPolicy(max_attempts=n, jitter=False) for n in (1, 2, 3)}


def _settlement(row: Row, rules: Rules, outcome: str) -> tuple[str, float]:
    """Choose the move that follows the outcome, as the store does: by the core's decision."""
    if outcome == "succeed":
        return "succeed", 0.0
    decision = after_failure(
        POLICIES[rules.max_attempts], failures=row.failures, error=("OSError", "Exception"), random=0.0
    )
    return ("retry", decision.delay) if isinstance(decision, Retry) else ("fail", 0.0)


def _reaper(world: World, rules: Rules, n: int) -> Iterator[Step]:
    me = world.reapers[n]
    who = f"reaper {n + 1}"

    def becomes(reaper: Reaper, place: World = world) -> World:
        return place._replace(reapers=_put(place.reapers, n, reaper))

    if me.phase == "idle":
        alive = {worker.id for worker in world.workers if worker.phase != "dead"}
        for e, row in enumerate(world.rows):
            if row is None or (world.locks[e] and rules.sweep_locks):
                continue
            name = _name(world, e)
            found = EXPIRED.admits(row, Ask(now=0)) or (
                row.worker not in alive and OF_WORKER.admits(row, Ask(now=0, worker=row.worker))
            )
            if found:
                there = world._replace(locks=_put(world.locks, e, who)) if rules.sweep_locks else world
                told = f"{who} finds attempt {row.attempt} of {name} lost"
                yield Step(told, becomes(Reaper("locked", e, seen=row), there))
            if world.locks[e]:
                continue
            after = rules.moves["ring"].apply(row, Ask(now=0))
            if after is not None:
                there = world._replace(rows=_put(world.rows, e, after))
                yield Step(
                    f"{who} takes {name} to ring for it", becomes(Reaper("ringing", e, seen=after), there)
                )
            after = rules.moves["ring waiting"].apply(row, Ask(now=0))
            if after is not None:
                there = world._replace(rows=_put(world.rows, e, after))
                told = f"{who} has room for {name} and takes it to ring for it"
                yield Step(told, becomes(Reaper("ringing", e, seen=after), there))
            after = rules.moves["ring again"].apply(row, Ask(now=0, stranded_after=STRANDED))
            if after is not None and _missing(world):
                there = _with_row(world, e, after, "ring again")
                told = f"{who} misses a message and takes {name} to ring again"
                yield Step(told, becomes(Reaper("ringing", e, seen=after), there))
        return
    e, name = me.execution, _name(world, me.execution)
    row = world.rows[e]
    assert row is not None
    free = world._replace(locks=_put(world.locks, e, "")) if world.locks[e] == who else world
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
            there = world._replace(locks=_put(world.locks, e, who))
            told = f"{who} writes that attempt {me.seen.attempt} of {name} is lost ({move})"
            yield Step(told, becomes(me._replace(phase="written", written=after, move=move), there))
    if me.phase == "written":
        assert me.written is not None
        assert me.seen is not None
        done = _with_row(free, e, me.written, me.move, me.seen.attempt)
        rings = me.written.state is State.PENDING and me.written.rung_at is not None
        then = Reaper("ringing", e, seen=me.written) if rings else Reaper()
        yield Step(
            f"{who} commits that attempt {me.seen.attempt} of {name} is lost ({me.move})", becomes(then, done)
        )
    if me.phase == "ringing":
        assert me.seen is not None
        ring = Message(e, me.seen.attempt + 1)
        yield Step(f"{who} rings for attempt {ring.attempt} of {name}", becomes(Reaper(), _rung(world, ring)))


def _missing(world: World) -> bool:
    """Compare as the reaper does: rung rows with the messages in the queue and in the hands of living workers."""
    rung = sum(
        row is not None and row.state is State.PENDING and row.rung_at not in (None, inf)
        for row in world.rows
    )
    held = sum(worker.phase == "holding" for worker in world.workers)
    return rung > len(world.messages) + held


def _people(world: World, rules: Rules) -> Iterator[Step]:
    for e, row in enumerate(world.rows):
        if row is None or world.locks[e]:
            continue
        for move, budget in (("cancel", world.left.cancels), ("requeue", world.left.requeues)):
            after = rules.moves[move].apply(row, Ask(now=0)) if budget else None
            if after is None:
                continue
            there = _with_row(world, e, after, move)._replace(
                left=world.left._replace(**{f"{move}s": budget - 1})
            )
            if move == "requeue":
                # The past that counts is the one since then.
                there = _rung(there, Message(e, after.attempt + 1))
            yield Step(f"somebody {move}s {_name(world, e)}", there, "person")


def _name(world: World, e: int) -> str:
    return "the execution" if len(world.rows) == 1 else f"execution {e + 1}"
