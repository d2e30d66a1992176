"""What can happen next in a world: the steps of its workers and reapers, of time, and of misfortune."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from cloacina_celery.core import protocol
from cloacina_celery.core.lifecycle import TERMINAL_STATES, Abandon, Fail, State, after_failure, after_loss
from cloacina_celery.core.lifecycle import Recover as Lost
from cloacina_celery.core.protocol import HELD, ORPHANED, Guard, Move, Row
from tests.model.world import (
    FUTURE,
    MAX_RECOVERIES,
    NOW,
    PAST,
    POLICY,
    Reaper,
    Rules,
    Step,
    Worker,
    World,
    held_by,
    name_of,
    rested,
    spent,
    with_crashed,
    with_message,
    with_reaper,
    with_row,
    with_worker,
    without_message,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


def steps(world: World, rules: Rules) -> Iterator[Step]:
    """List everything that can happen next."""
    for number in range(len(world.workers)):
        yield from _of_worker(world, rules, number)
    for number in range(len(world.reapers)):
        yield from _of_reaper(world, rules, number)
    yield from _of_time(world, rules)
    yield from _of_misfortune(world, rules)


# Workers


def _of_worker(world: World, rules: Rules, number: int) -> Iterator[Step]:
    worker = world.workers[number]
    name = f"worker {worker.id}"
    match worker.phase:
        case "idle":
            for message in dict.fromkeys(world.messages):
                execution, attempt = message
                taken = with_worker(
                    without_message(world, message), number, phase="has", execution=execution, attempt=attempt
                )
                yield f"{name} takes the message for attempt {attempt} of {name_of(execution)}", taken, ""
        case "has":
            yield from _claims(world, rules, number, name)
        case "claims":  # only where a claim looks first and writes then
            yield from _runs(world, number, _forced_claim(world, worker), name)
        case "runs":
            yield from _comes_to_an_end(world, rules, number, name)
        case "settles":
            yield from _commits(world, rules, number, name)
    if world.budget.shutdowns and worker.phase != "settles":
        yield from _shuts_down(world, rules, number, name)
    if world.budget.crashes:
        crashed = spent(with_crashed(world, number), crashes=1)
        yield f"{name} crashes", crashed, ""


def _claims(world: World, rules: Rules, number: int, name: str) -> Iterator[Step]:
    worker = world.workers[number]
    if world.holders[worker.execution]:
        return
    what = f"attempt {worker.attempt} of {name_of(worker.execution)}"
    claim = protocol.Claim(worker.attempt, worker.id, FUTURE - NOW)
    row = _moved(world.rows[worker.execution], claim, rules)
    if row is None:
        yield f"{name} is declined {what}", rested(world, number), ""
        return
    if not rules.claim_is_atomic:
        yield f"{name} sees that {what} is free", with_worker(world, number, phase="claims"), ""
        return
    yield from _runs(world, number, row, name)
    if world.budget.lost_answers:
        lost = spent(rested(with_row(world, worker.execution, row), number), lost_answers=1)
        yield f"{name} claims {what}, and the answer is lost", lost, ""


def _forced_claim(world: World, worker: Worker) -> Row:
    row = world.rows[worker.execution]
    changed = protocol.after(
        row, protocol.Claim(worker.attempt, worker.id, FUTURE - NOW), now=NOW,
        guards={protocol.Claim: Guard(states=tuple(State))},
    )  # fmt: skip
    assert changed is not None
    return replace(changed, attempt=worker.attempt)


def _runs(world: World, number: int, row: Row, name: str) -> Iterator[Step]:
    worker = world.workers[number]
    started = with_worker(with_row(world, worker.execution, row), number, phase="runs")
    started = started._replace(runs=tuple(sorted((*world.runs, (worker.execution, worker.attempt)))))
    yield (
        f"{name} claims attempt {worker.attempt} of {name_of(worker.execution)} and starts its code",
        started,
        "",
    )


def _comes_to_an_end(world: World, rules: Rules, number: int, name: str) -> Iterator[Step]:
    worker = world.workers[number]
    row = world.rows[worker.execution]
    if world.holders[worker.execution]:
        return
    beat = _moved(row, protocol.Heartbeat(worker.attempt, FUTURE - NOW), rules)
    if beat is not None and beat != row:
        yield f"{name} extends its lease", with_row(world, worker.execution, beat), ""
    what = f"attempt {worker.attempt} of {name_of(worker.execution)}"
    for outcome, says in (("succeed", "returned"), ("fail", "raised")):
        if _moved(row, _settlement(row, worker.attempt, outcome), rules) is None:
            yield (
                f"{name} is refused the settlement of {what}, which {says}, and rolls back",
                rested(world, number),
                "",
            )
            return
        settling = with_worker(
            held_by(world, worker.execution, name), number, phase="settles", outcome=outcome
        )
        yield f"{name} writes that {what} {says}", settling, ""


def _settlement(row: Row, attempt: int, outcome: str) -> Move:
    if outcome == "succeed":
        return protocol.Succeed(attempt)
    decision = after_failure(POLICY, failures=row.failures, error=("builtins.Exception",), random=0.0)
    return protocol.Fail(attempt) if isinstance(decision, Fail) else protocol.Retry(attempt, decision.delay)


def _commits(world: World, rules: Rules, number: int, name: str) -> Iterator[Step]:
    worker = world.workers[number]
    row = world.rows[worker.execution]
    move = _settlement(row, worker.attempt, worker.outcome)
    changed = _moved(row, move, rules)
    assert changed is not None, "the row was locked since its guard was asked"
    settled = rested(held_by(with_row(world, worker.execution, changed), worker.execution, ""), number)
    if worker.outcome == "succeed":
        settled = settled._replace(
            effects=tuple(sorted((*world.effects, (worker.execution, worker.attempt))))
        )
    if changed.state in TERMINAL_STATES:
        settled = settled._replace(settled=(*world.settled, (worker.execution, worker.attempt)))
    what = f"attempt {worker.attempt} of {name_of(worker.execution)}"
    wrong = ""
    if row.state is State.RUNNING and row.attempt != worker.attempt:
        wrong = f"{what} has settled what attempt {row.attempt} holds"
    yield f"{name} commits {what}: {name_of(worker.execution)} is {changed.state}", settled, wrong


def _shuts_down(world: World, rules: Rules, number: int, name: str) -> Iterator[Step]:
    worker = world.workers[number]
    gone = with_crashed(world, number)
    wrong = ""
    for execution, row in enumerate(world.rows):
        if world.holders[execution]:
            continue
        changed = _moved(row, protocol.ReleaseAll(worker.id), rules)
        if changed is not None:
            gone = with_row(gone, execution, changed)
            if row.worker != worker.id:
                what = f"attempt {row.attempt} of {name_of(execution)}"
                wrong = f"{name} gave back {what}, which worker {row.worker} holds"
            gone = gone._replace(messages=with_message(gone.messages, (execution, changed.attempt + 1)))
    if worker.phase == "has":
        gone = gone._replace(messages=with_message(gone.messages, (worker.execution, worker.attempt)))
    yield f"{name} shuts down and gives back what it holds", spent(gone, shutdowns=1), wrong


# Reapers


def _of_reaper(world: World, rules: Rules, number: int) -> Iterator[Step]:
    reaper = world.reapers[number]
    name = f"reaper {number}"
    match reaper.phase:
        case "idle":
            yield from _looks(world, rules, number, name)
        case "looked":
            yield from _recovers(world, rules, number, name)
        case "publishes":
            sent = with_reaper(world, number, Reaper())
            sent = sent._replace(messages=with_message(world.messages, (reaper.execution, reaper.attempt)))
            yield (
                f"{name} sends the message for attempt {reaper.attempt} of {name_of(reaper.execution)}",
                sent,
                "",
            )
    if reaper.phase != "idle" and world.budget.crashes:
        crashed = with_reaper(world, number, Reaper())
        if rules.reaper_locks and reaper.phase == "looked":
            crashed = held_by(crashed, reaper.execution, "")
        yield f"{name} crashes", spent(crashed, crashes=1), ""


def _looks(world: World, rules: Rules, number: int, name: str) -> Iterator[Step]:
    living = {worker.id for worker in world.workers}
    for execution, row in enumerate(world.rows):
        if world.holders[execution]:
            continue
        is_expired = ORPHANED.admits(row, now=NOW)
        is_dead = row.worker not in living and HELD.admits(row, now=NOW, worker=row.worker)
        if is_expired or is_dead:
            why = "the lease ran out" if is_expired else f"worker {row.worker} is dead"
            looked = with_reaper(world, number, Reaper("looked", execution, row.attempt))
            if rules.reaper_locks:
                looked = held_by(looked, execution, name)
            yield f"{name} finds attempt {row.attempt} of {name_of(execution)} lost: {why}", looked, ""
        due = _moved(row, protocol.RingDue(), rules)
        if due is not None:
            rung = with_reaper(
                with_row(world, execution, due), number, Reaper("publishes", execution, row.attempt + 1)
            )
            yield f"{name} finds {name_of(execution)} due", rung, ""
        again = _moved(row, protocol.RingAgain(), rules)
        if again is not None and _is_stranded(world, execution):
            if rules.ring_again_bumps:
                again = replace(again, attempt=row.attempt + 1)
            stranded = Reaper("publishes", execution, again.attempt + 1)
            rung = with_reaper(with_row(world, execution, again), number, stranded)
            yield (
                f"{name} finds the message for attempt {row.attempt + 1} of {name_of(execution)} missing",
                rung,
                "",
            )


def _is_stranded(world: World, execution: int) -> bool:
    """Tell whether a rung row's message is in no queue and in no worker's hands, as the reaper finds by counting."""
    message = (execution, world.rows[execution].attempt + 1)
    return message not in world.messages and not any(
        worker.phase in ("has", "claims") and worker[2:4] == message for worker in world.workers
    )


def _recovers(world: World, rules: Rules, number: int, name: str) -> Iterator[Step]:
    reaper = world.reapers[number]
    row = world.rows[reaper.execution]
    if not rules.reaper_locks and world.holders[reaper.execution]:
        return  # its write waits for whoever writes the row
    decision = after_loss(recoveries=row.recoveries, max_recoveries=MAX_RECOVERIES)
    move: protocol.Abandon | protocol.Recover
    match decision:
        case Abandon():
            move = protocol.Abandon(reaper.attempt)
        case Lost(delay=delay):
            move = protocol.Recover(reaper.attempt, delay)
    changed = _moved(row, move, rules)
    free = held_by(world, reaper.execution, "") if rules.reaper_locks else world
    if changed is None:
        yield (
            f"{name} is refused the recovery of {name_of(reaper.execution)}",
            with_reaper(free, number, Reaper()),
            "",
        )
        return
    done = with_row(free, reaper.execution, changed)
    what = f"{name} commits: {name_of(reaper.execution)} is {changed.state}"
    if isinstance(move, protocol.Abandon):
        done = done._replace(settled=(*world.settled, (reaper.execution, reaper.attempt)))
        yield what, with_reaper(done, number, Reaper()), ""
        return
    is_sent = Reaper("publishes", reaper.execution, changed.attempt + 1) if move.delay == 0 else Reaper()
    yield what, with_reaper(done, number, is_sent), ""


# Time and misfortune


def _of_time(world: World, rules: Rules) -> Iterator[Step]:
    for execution, row in enumerate(world.rows):
        if row.state is State.PENDING and row.run_at == FUTURE:
            due = with_row(world, execution, replace(row, run_at=NOW))
            yield f"time passes: {name_of(execution)} is due", due, ""
        if world.budget.expiries and row.state is State.RUNNING and row.lease_expires_at == FUTURE:
            expired = with_row(world, execution, replace(row, lease_expires_at=PAST))
            yield f"time passes: the lease of {name_of(execution)} runs out", spent(expired, expiries=1), ""
        elif row.state is State.RUNNING and row.lease_expires_at == FUTURE and not _is_run(world, execution):
            # Time never ends: a run that nobody works on any more runs out however often that has been.
            expired = with_row(world, execution, replace(row, lease_expires_at=PAST))
            yield f"time passes: the lease of {name_of(execution)}, which nobody runs, runs out", expired, ""


def _is_run(world: World, execution: int) -> bool:
    run = (execution, world.rows[execution].attempt)
    return any(worker.phase in ("runs", "settles") and worker[2:4] == run for worker in world.workers)


def _of_misfortune(world: World, rules: Rules) -> Iterator[Step]:
    for message in dict.fromkeys(world.messages):
        what = f"the message for attempt {message[1]} of {name_of(message[0])}"
        if world.budget.lost_messages:
            yield f"the broker loses {what}", spent(without_message(world, message), lost_messages=1), ""
        if world.budget.doubled_messages:
            doubled = world._replace(messages=with_message(world.messages, message))
            yield f"the broker doubles {what}", spent(doubled, doubled_messages=1), ""
    if world.budget.cancels:
        for execution, row in enumerate(world.rows):
            changed = None if world.holders[execution] else _moved(row, protocol.Cancel(), rules)
            if changed is not None:
                cancelled = spent(with_row(world, execution, changed), cancels=1)
                cancelled = cancelled._replace(settled=(*world.settled, (execution, row.attempt)))
                yield f"somebody cancels {name_of(execution)}", cancelled, ""


@cache
def _moved(row: Row, move: Move, rules: Rules) -> Row | None:
    # Few rows and moves are different, and a world has many of each.
    return protocol.after(row, move, now=NOW, guards=rules.guards)
