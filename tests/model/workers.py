"""What a worker does: receive, claim, run, settle, and ask where it got no answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloacina_celery.core.lifecycle import Retry, State, after_failure
from cloacina_celery.core.protocol import Ask
from cloacina_celery.core.retry import RetryPolicy
from tests.model.changes import Step, name_of, put, rung, with_row
from tests.model.world import LEASE, Message, Worker, World

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cloacina_celery.core.protocol import Row
    from tests.model.world import Rules


def of_worker(world: World, rules: Rules, n: int) -> Iterator[Step]:
    """Yield what one worker can do now, and how it dies."""
    me = world.workers[n]
    who = f"worker {chr(65 + n)}"

    def becomes(worker: Worker, place: World = world) -> World:
        return place._replace(workers=put(place.workers, n, worker))

    idle = Worker(me.id)
    if me.phase == "dead":
        yield Step(f"{who} is started again", becomes(Worker(me.id + len(world.workers))))
        return
    if me.phase == "idle":
        for message in dict.fromkeys(world.messages):
            rest = list(world.messages)
            rest.remove(message)
            told = f"{who} receives the message for attempt {message.attempt} of {name_of(world, message.execution)}"
            yield Step(
                told,
                becomes(me._replace(phase="holding", message=message), world._replace(messages=tuple(rest))),
            )
        return
    assert me.message is not None
    e = me.message.execution
    row, name, lock = world.rows[e], name_of(world, e), world.locks[e]
    assert row is not None
    mine = f"attempt {me.attempt} of {name}"
    if world.left.crashes:
        there = rung(world, me.message)
        there = there._replace(
            left=world.left._replace(crashes=world.left.crashes - 1),
            locks=put(world.locks, e, "") if lock == who else world.locks,
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
            there = with_row(world, e, after, "claim", wrong=wrong)
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
            there = with_row(world, e, after, "defer")._replace(left=left)
            told = f"{who} finds no room for attempt {me.message.attempt} of {name}, and lets it wait"
            yield Step(told, becomes(idle, there), "fault")
    if me.phase == "seeking" and not lock:
        after = rules.moves["find claim"].apply(row, Ask(now=0, attempt=me.attempt, lease_ttl=LEASE))
        if after is None or row.worker != me.id:  # who claimed it is in the claim's event
            yield Step(f"{who} does not find its claim of {mine}", becomes(idle))
        else:
            there = world._replace(rows=put(world.rows, e, after))
            yield Step(f"{who} finds its claim of {mine}", becomes(me._replace(phase="claimed"), there))
    if me.phase in ("claimed", "ran") and not lock:
        ask = Ask(now=0, attempt=me.attempt, worker=me.id, lease_ttl=LEASE)
        after = rules.moves["heartbeat"].apply(row, ask)
        if after is not None and after != row:
            told = f"{who} extends its lease of {mine}"
            yield Step(told, world._replace(rows=put(world.rows, e, after)))
        if world.left.stops:
            after = rules.moves["release all"].apply(row, ask)
            left = world.left._replace(stops=world.left.stops - 1)
            there = rung(world, me.message)._replace(left=left)
            if after is not None:
                wrong = (
                    ""
                    if row.worker == me.id
                    else f"{who} gave back what worker {chr(65 + (row.worker or 0) % len(world.workers))} holds"
                )
                there = with_row(there, e, after, "release all", wrong=wrong)
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
            becomes(Worker(me.id, "dead"), rung(world, me.message)),
        )
    if me.phase == "claimed":
        past = world.past[e]._replace(started=(*world.past[e].started, me.attempt))
        yield Step(
            f"{who} runs {mine} up to its settlement; its effects are not committed yet",
            becomes(me._replace(phase="ran"), world._replace(past=put(world.past, e, past))),
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
            there = world._replace(locks=put(world.locks, e, who))
            yield Step(told, becomes(me._replace(phase="written", outcome=move, written=after), there))
    if me.phase == "written":
        assert me.written is not None
        free = world._replace(locks=put(world.locks, e, ""))
        done = with_row(free, e, me.written, me.outcome, me.attempt)
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
                f"{who} gives back {name}", becomes(idle, with_row(world, e, after, "release", wrong=wrong))
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
