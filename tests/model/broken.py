"""Broken variants of the core: each takes one thing away, and has to be found out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cloacina_celery.core import protocol
from cloacina_celery.core.lifecycle import State
from cloacina_celery.core.protocol import FENCE, GUARDS, Guard
from tests.model.world import Budget, Rules

if TYPE_CHECKING:
    from cloacina_celery.core.protocol import Move

SETTLEMENTS = (protocol.Succeed, protocol.Retry, protocol.Fail)


def _with(guards: dict[type[Move], Guard]) -> Rules:
    return Rules(guards={**GUARDS, **guards})


FENCE_OFF = _with(dict.fromkeys(SETTLEMENTS, replace(FENCE, states=tuple(State), attempt=None)))
"""A settlement finds its row by the id alone."""

FENCE_WITHOUT_ATTEMPT = _with(dict.fromkeys(SETTLEMENTS, replace(FENCE, attempt=None)))
"""A settlement asks whether the row runs, and not whose run it is: what peers that fence by the state have."""

CLAIM_WITHOUT_ATTEMPT = Rules(claim_is_atomic=False)
"""A claim looks first, and writes then by the id alone."""

RELEASE_WITHOUT_OWNER = _with({protocol.ReleaseAll: Guard(states=(State.RUNNING,))})
"""A shutdown gives back what runs, whoever holds it."""

RECOVER_WITHOUT_STATE = Rules(
    guards={
        **GUARDS,
        protocol.Recover: Guard(states=tuple(State)),
        protocol.Abandon: Guard(states=tuple(State)),
    },
    reaper_locks=False,
)
"""A sweep neither locks what it has found nor looks again when it writes."""

RING_AGAIN_BUMPS = Rules(ring_again_bumps=True)
"""Ringing again counts as an attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A broken core, what goes wrong beside it, what is then found, and after how many steps."""

    rules: Rules
    budget: Budget
    found: str
    length: int


VARIANTS: dict[str, Variant] = {
    "the fence is off": Variant(
        rules=FENCE_OFF, budget=Budget(expiries=1), found="has settled what attempt 2 holds", length=10
    ),
    "the fence asks for the state alone": Variant(
        rules=FENCE_WITHOUT_ATTEMPT,
        budget=Budget(expiries=1),
        found="has settled what attempt 2 holds",
        length=10,
    ),
    "a claim is not atomic": Variant(
        rules=CLAIM_WITHOUT_ATTEMPT, budget=Budget(doubled_messages=1), found="was started twice", length=7
    ),
    "a release asks for no owner": Variant(
        rules=RELEASE_WITHOUT_OWNER, budget=Budget(shutdowns=1), found="gave back attempt 1", length=3
    ),
    "a recovery neither locks nor looks": Variant(
        rules=RECOVER_WITHOUT_STATE,
        budget=Budget(expiries=1),
        found="effects of attempts [1] are committed",
        length=7,
    ),
    "ringing again bumps the attempt": Variant(
        rules=RING_AGAIN_BUMPS, budget=Budget(lost_messages=1), found="do not explain", length=3
    ),
}
