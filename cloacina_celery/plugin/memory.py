"""What a process has learnt and may forget: which tenants exist, where its executions are, how big chords are."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar

from cloacina_celery.core.tenancy import KNOWN_FOR, Standing, TenantState
from cloacina_celery.core.tenant import is_tenant_name, validate_tenant_name
from cloacina_celery.errors import DatabaseUnavailable, UnknownTenant
from cloacina_celery.store.busy import MARK_INTERVAL

REMEMBERED = 10_000
"""Executions and chords that a process remembers; the oldest are forgotten first."""

UNKNOWN_FOR = 5.0
"""Seconds for which a name that is no tenant is not looked up again."""


class TenantDirectory:
    """Knows which tenants exist and how they stand; asks the catalog about names it has not seen.

    Args:
        look_up: asks the catalog for names; those that it has never heard of are missing in the answer.
    """

    def __init__(self, look_up: Callable[[Sequence[str]], Mapping[str, Standing]]) -> None:
        self._look_up = look_up
        self._known: dict[str, Standing] = {}
        self._fresh_until: dict[str, float] = {}
        self._looked_at = float("-inf")

    def knows(self, name: str) -> bool:
        """Tell whether a tenant exists; a yes is remembered, a no for a few seconds."""
        if name in self._known and self._known[name].exists:
            return True
        if self._fresh_until.get(name, 0.0) > time.monotonic():
            return False
        return self._look(name).exists

    def require(self, name: str) -> None:
        """Do nothing if a tenant exists.

        Raises:
            InvalidTenantName: no tenant can have this name.
            UnknownTenant: none has it, or it was removed.
        """
        validate_tenant_name(name, allow_legacy=True)
        if not self.knows(name):
            standing = self._known.get(name)
            raise UnknownTenant(
                name, removed=standing is not None, moved_to=standing.moved_to if standing else None
            )

    def standing_of(self, name: str) -> Standing:
        """Return how a tenant stands, as the catalog said a second ago at the most; an unknown one is removed."""
        if self._fresh_until.get(name, 0.0) > time.monotonic():
            return self._known.get(name) or _never_was(name)
        try:
            return self._look(name)
        except DatabaseUnavailable:
            # A submission that has its connection already need not fail for this: what was true lately must do.
            if name not in self._known:
                raise
            return self._known[name]

    def epoch_of(self, name: str) -> int:
        """Return a tenant's epoch, by what `standing_of` says."""
        return self.standing_of(name).epoch

    def look_again(self) -> None:
        """Ask the catalog about all tenants that are known, in one statement, once a second at the most."""
        now = time.monotonic()
        if now - self._looked_at < KNOWN_FOR:
            return
        names = list(self._known)
        found = self._look_up(names) if names else {}
        self._looked_at = now
        for name in names:
            self._note(name, found.get(name), now)

    def learn(self, names: Sequence[str]) -> None:
        """Ask the catalog about these names, in one statement, and remember what it says."""
        now = time.monotonic()
        found = self._look_up(names) if names else {}
        for name in names:
            self._note(name, found.get(name), now)

    def forget(self, name: str) -> None:
        """Look the tenant up again at its next use."""
        self._known.pop(name, None)
        self._fresh_until.pop(name, None)

    def _look(self, name: str) -> Standing:
        # From before the question: the answer may have waited, and is believed no longer for that.
        now = time.monotonic()
        if not is_tenant_name(name):
            return _never_was(name)
        return self._note(name, self._look_up([name]).get(name), now)

    def _note(self, name: str, found: Standing | None, now: float) -> Standing:
        if found is None:
            self._known.pop(name, None)
        else:
            self._known[name] = found
        exists = found is not None and found.exists
        self._fresh_until[name] = now + (KNOWN_FOR if exists else UNKNOWN_FOR)
        return found or _never_was(name)


def _never_was(name: str) -> Standing:
    return Standing(name=name, state=TenantState.REMOVED)


class BusyMarks:
    """Has a tenant marked as busy before it is given work, once in a while.

    Args:
        mark: marks a tenant in the catalog.
    """

    def __init__(self, mark: Callable[[str], None]) -> None:
        self._mark = mark
        self._marked_at: OrderedDict[str, float] = OrderedDict()

    def ensure(self, tenant: str) -> None:
        """Have the tenant marked, unless this process has done so lately."""
        now = time.monotonic()
        marked_at = self._marked_at.get(tenant)
        if marked_at is not None and now - marked_at < MARK_INTERVAL:
            return
        self._mark(tenant)
        self._marked_at[tenant] = now
        if len(self._marked_at) > REMEMBERED:
            self._marked_at.popitem(last=False)


class Locations:
    """Remembers which tenant this process submitted an execution to, for results made from the id alone."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, str] = OrderedDict()

    def remember(self, execution_id: str, tenant: str) -> None:
        """Remember an execution's tenant."""
        self._tenants[execution_id] = tenant
        if len(self._tenants) > REMEMBERED:
            self._tenants.popitem(last=False)

    def find(self, execution_id: str) -> str | None:
        """Return an execution's tenant, if this process submitted it."""
        return self._tenants.get(execution_id)


class ChordSizes:
    """Carries a chord's size from where Celery counts it to the submission of its last member, which comes next."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[str, int | None] = OrderedDict()

    def expect(self, group_id: str) -> None:
        """Note that a group's members are counted by their rows."""
        self._sizes[group_id] = None
        if len(self._sizes) > REMEMBERED:
            self._sizes.popitem(last=False)

    def is_expected(self, group_id: str) -> bool:
        """Tell whether `expect` was called for the group."""
        return group_id in self._sizes

    def put(self, group_id: str, size: int) -> None:
        """Note the size of an expected chord."""
        self._sizes[group_id] = size

    def take(self, group_id: str | None) -> int | None:
        """Return a chord's size, once."""
        if group_id is None or self._sizes.get(group_id) is None:
            return None
        return self._sizes.pop(group_id)


class Messages:
    """Remembers which of the messages that Celery built were durable tasks'; Celery's backend is told ids only."""

    def __init__(self) -> None:
        # Celery builds a message, tells its result backend, and sends it, in this order.
        self._last: ContextVar[tuple[str, bool]] = ContextVar("cloacina_last_message", default=("", False))
        self._plain: OrderedDict[str, None] = OrderedDict()

    def note(self, task_id: str, *, is_durable: bool) -> None:
        """Note a message that was built."""
        self._last.set((task_id, is_durable))
        if not is_durable:
            self._plain[task_id] = None
            if len(self._plain) > REMEMBERED:
                self._plain.popitem(last=False)

    def is_durable(self, task_id: str) -> bool:
        """Tell whether the last message of this context was this durable execution's."""
        return self._last.get() == (task_id, True)

    def was_plain(self, task_id: str) -> bool:
        """Tell whether this process sent a plain task of this id."""
        return task_id in self._plain
