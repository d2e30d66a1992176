"""The states of an execution and the decisions that move it between them: pure functions of the row."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cloacina_celery.core.retry import MAX_RETRY_AFTER, RetryPolicy


class State(StrEnum):
    """Where an execution is; the terminal states absorb, only an operator's requeue leaves them."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    ABANDONED = "abandoned"
    CANCELLED = "cancelled"


TERMINAL_STATES = frozenset({State.SUCCEEDED, State.FAILED, State.ABANDONED, State.CANCELLED})

RECOVERY_DELAY_BASE = 1.0
RECOVERY_DELAY_CAP = 60.0

TRUST_SHARE = 0.9
"""The share of a lease for which its holder trusts it: it must doubt before the database gives the row away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Run again because the code failed; ``delay`` is in seconds."""

    delay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    """End as failed."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recover:
    """Run again because the worker vanished; ``delay`` is in seconds."""

    delay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """End as abandoned: the recovery budget is spent."""

    reason: str


def trust_window(lease_ttl: float) -> float:
    """Compute the seconds for which a holder trusts its lease, from before the query that opened or extended it."""
    return lease_ttl * TRUST_SHARE


def after_failure(
    policy: RetryPolicy,
    *,
    failures: int,
    error: tuple[str, ...],
    random: float,
    retry_after: float | None = None,
) -> Retry | Fail:
    """Decide what follows a run that raised.

    Args:
        policy: the one stored in the row.
        failures: failed runs before this one.
        error: the exception's lineage (see `core.retry.lineage`).
        random: drawn from [0, 1) by the caller.
        retry_after: seconds that the exception itself asked for; it may exceed the policy's cap, since the
            other side knows better than we do when it can answer again.
    """
    if not policy.retries_error(error):
        return Fail(reason=f"{error[0]} is not retried by the policy")
    failed = failures + 1
    if failed >= policy.max_attempts:
        return Fail(reason=f"failure {failed} of at most {policy.max_attempts}")
    delay = policy.delay(failed, random)
    if retry_after is not None:
        delay = max(delay, min(retry_after, MAX_RETRY_AFTER))
    return Retry(delay=delay)


def after_loss(*, recoveries: int, max_recoveries: int) -> Recover | Abandon:
    """Decide what follows a run whose worker vanished.

    The first recovery is at once, since most deaths are a deploy or a machine's and not the task's;
    the following ones wait, so that a task which kills its worker does not kill one a second.
    """
    if recoveries >= max_recoveries:
        return Abandon(
            reason=f"lost {recoveries + 1} times, and at most {max_recoveries} recoveries are allowed"
        )
    if recoveries == 0:
        return Recover(delay=0.0)
    return Recover(delay=min(RECOVERY_DELAY_BASE * 2.0 ** min(recoveries - 1, 16), RECOVERY_DELAY_CAP))
