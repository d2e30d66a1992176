"""Doubt: when a reaper may believe what it sees of other workers, decided from facts alone.

A worker that gives no sign may be dead, or the reaper may be the one that saw nothing: its database was away, it
was frozen, the clock was set. Then every healthy worker looks dead for a moment, and whoever judges first
takes their work from them. So a reaper that has a reason to doubt its view waits until the others had the
chance to show themselves. What is known at first hand (a child that died, a shutdown) needs no such judgement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

CLOCK_TOLERANCE = 2.0
"""Seconds by which the database's clock may run away from ours between two looks: more is a jump."""

RECONNECT_MARGIN = 2.5
"""Seconds that a healthy worker may need beyond its heartbeat's interval: its longest pause between two tries to
reach the database, and a look."""

CROWD = 5
"""Fewer workers than this may die at the same time without a doubt: a small system shall recover in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promises:
    """What healthy workers keep to; all in seconds.

    ``grace`` is for how long a worker may be without its liveness lock, the others are those of its leases.
    """

    grace: float
    heartbeat_interval: float
    lease_ttl: float

    @property
    def catch_up(self) -> float:
        """How long after an interruption every healthy worker has given a sign again."""
        return self.heartbeat_interval + RECONNECT_MARGIN

    @property
    def harmless_gap(self) -> float:
        """For how long all of them may be held up together without any lease running out."""
        return self.lease_ttl - 2 * self.heartbeat_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The facts of one successful look into the register.

    Args:
        asked_at, answered_at: before and after the query, on our own monotonic clock, in seconds.
        database_at: the database's clock in between, in seconds.
        known: workers that have not signed off.
        silent: those of them that have given no sign for longer than they promised.
        reached_at: when we last heard from the database before this look, on our own clock; ``None`` if never.
        has_failed: whether we failed to reach it since then.
    """

    asked_at: float
    answered_at: float
    database_at: float
    known: int
    silent: int
    reached_at: float | None = None
    has_failed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """No worker and no lease is judged before ``until``, on our own monotonic clock."""

    reason: str
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a reaper may judge after a look.

    Args:
        watching_since: when its first look was answered.
        last: the look before.
        pause: why it judges nothing for now.
        is_crowd_known: whether so many silent workers have been doubted already.
    """

    watching_since: float
    last: Look
    pause: Pause | None = None
    is_crowd_known: bool = False

    @property
    def judges_locks(self) -> bool:
        """Whether a worker without its liveness lock is dead. A reaper that has just started may say so."""
        return self.pause is None

    def judges_leases(self, promises: Promises) -> bool:
        """Whether a lease that ran out is lost: only who has watched for a while knows that its holder is silent."""
        watched = self.last.answered_at - self.watching_since
        return self.pause is None and watched >= promises.catch_up


def after_look(before: Outlook | None, look: Look, promises: Promises) -> Outlook:
    """Decide what may be judged after a look, from the outlook before it.

    A doubt that comes while another one is in force lengthens it. A reaper that is late each time still judges
    once after each pause: else it never would.
    """
    at = look.answered_at
    pause = before.pause if before else None
    served = pause is not None and at >= pause.until
    if served:
        pause = None
    doubts = [] if before is None else _doubts(before.last, look, promises, is_served=served)
    is_crowd = look.silent >= CROWD and 2 * look.silent > look.known
    if is_crowd and not (before and before.is_crowd_known):
        doubts.append(
            Pause(
                reason=f"{look.silent} of {look.known} workers fell silent at the same time",
                until=at + promises.lease_ttl,
            )
        )
    for doubt in doubts:
        if pause is None or doubt.until > pause.until:
            pause = doubt
    if before is None:
        return Outlook(watching_since=at, last=look, pause=pause, is_crowd_known=is_crowd)
    return replace(before, last=look, pause=pause, is_crowd_known=is_crowd)


def _doubts(last: Look, look: Look, promises: Promises, *, is_served: bool) -> list[Pause]:
    until = look.answered_at + promises.catch_up
    reached_at = last.answered_at if look.reached_at is None else max(look.reached_at, last.answered_at)
    gap = look.answered_at - reached_at
    doubts = []
    if look.has_failed and gap > promises.grace / 2:
        doubts.append(Pause(reason=f"the database was out of reach for {gap:.1f} s", until=until))
    elif gap > promises.harmless_gap and not is_served:
        doubts.append(Pause(reason=f"this look came {gap:.1f} s after the one before", until=until))
    jump = _jump(last, look)
    if abs(jump) > CLOCK_TOLERANCE:
        doubts.append(Pause(reason=f"the database's clock jumped by {jump:+.1f} s", until=until))
    return doubts


def _jump(last: Look, look: Look) -> float:
    """Compute by how much the database's clock went astray at the least: when in a query it was read is not known."""
    passed = look.database_at - last.database_at
    shortest = look.asked_at - last.answered_at
    longest = look.answered_at - last.asked_at
    return passed - min(max(passed, shortest), longest)
