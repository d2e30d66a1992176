"""What a chaos run has done: orders of several kinds, drawn by the seed before anything runs."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from random import Random
from typing import Any

WITH_CALLBACK, HOLDS_GIL = "with a callback", "holds the GIL"
"""Kinds that the checker knows."""

CHAIN_LENGTH = 3
SHARES = {
    "plain": 60,
    "long": 4,
    "retried": 12,
    "delayed": 10,
    "chain": 6,
    "in a transaction": 8,
    WITH_CALLBACK: 5,
}
"""How often each kind is drawn; a chain counts as one draw of `CHAIN_LENGTH` executions."""

POISONED = 400
"""One of so many executions is a poison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One execution that has to be there in the end, and how."""

    id: str
    tenant: str
    kind: str
    order: dict[str, Any]
    expected: str = "succeeded"

    @property
    def ordered_failures(self) -> int:
        """How often it may fail by its order."""
        return int(self.order.get("failures", 0)) + bool(self.order.get("hangs"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is submitted by one call."""

    kind: str
    tenant: str
    steps: tuple[Planned, ...]
    options: dict[str, float] = field(default_factory=dict)
    """What ``apply_async`` is given with it: a countdown, a time limit."""


@dataclass(slots=True, kw_only=True)
class Plan:
    """All jobs of a run: those of the plan, and those that faults add."""

    tenants: list[str]
    random: Random
    waiting: list[Job] = field(default_factory=list)
    submitted: list[Job] = field(default_factory=list)

    @classmethod
    def draw(
        cls, random: Random, tenants: list[str], executions: int, kinds: list[str] | None = None
    ) -> Plan:
        """Draw jobs of that many executions, of all kinds or of these only."""
        plan = cls(tenants=tenants, random=random)
        shares = {kind: share for kind, share in SHARES.items() if kinds is None or kind in kinds}
        count = 0
        while count < executions:
            kind = random.choices(list(shares), weights=list(shares.values()))[0]
            if kinds is None and count % POISONED == POISONED // 2:
                kind = "poison"
            job = plan.job(kind, random.choice(tenants))
            plan.waiting.append(job)
            count += len(job.steps)
        return plan

    def job(
        self,
        kind: str,
        tenant: str,
        *,
        expected: str | None = None,
        options: dict[str, float] | None = None,
        **order: Any,
    ) -> Job:
        """Draw one job of a kind.

        Args:
            expected: the state that it has to end in, if not that of its kind.
            options: what ``apply_async`` is given with it.
            order: what its order says otherwise than one of its kind does.
        """
        random = self.random
        steps = tuple(
            Planned(
                id=str(uuid.UUID(int=random.getrandbits(128), version=4)),
                tenant=tenant,
                kind=kind,
                order={
                    "tenant": tenant,
                    "before": random.uniform(2.0, 5.0) if kind == "long" else random.uniform(0.0, 0.05),
                    "after": random.uniform(0.0, 0.05),
                    "failures": random.randint(1, 3) if kind == "retried" else 0,
                    "dies": "claimed" if kind == "poison" else None,
                    "is_poison": kind == "poison",
                    "holds_gil": 0.0,
                    "hangs": False,
                    "is_cancelled": False,
                    **order,
                },
                expected=expected or ("abandoned" if kind == "poison" else "succeeded"),
            )
            for _ in range(CHAIN_LENGTH if kind == "chain" else 1)
        )
        if kind == "delayed":
            options = {"countdown": random.uniform(0.5, 5.0)}
        return Job(kind=kind, tenant=tenant, steps=steps, options=options or {})

    def take(self, tenant: str | None = None, kinds: tuple[str, ...] | None = None) -> Job | None:
        """Take the next job that waits, of this tenant and of these kinds if they are given."""
        for number, job in enumerate(self.waiting):
            if (tenant is None or job.tenant == tenant) and (kinds is None or job.kind in kinds):
                return self.waiting.pop(number)
        return None

    @property
    def planned(self) -> dict[str, Planned]:
        """All executions that were submitted, by id."""
        return {step.id: step for job in self.submitted for step in job.steps}
