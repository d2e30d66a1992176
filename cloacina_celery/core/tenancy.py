"""The states of a tenant and the verbs that lead between them: pure functions of the catalog's row."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cloacina_celery.errors import SubmitRefused, TenantStateRefused, UnknownTenant

FIRST_EPOCH = 1
"""Also what a message without an epoch means: it was sent before there was a second one."""

KNOWN_FOR = 1.0
"""Seconds for which a process that submits believes what it read of a tenant."""


class TenantState(StrEnum):
    """Where a tenant is; removed is a tombstone, which only an explicit create leaves."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    DRAINING = "draining"
    REMOVED = "removed"


STARTING_STATES = frozenset({TenantState.ACTIVE, TenantState.DRAINING})
"""States in which executions start."""


class Verb(StrEnum):
    """What an operator does to a tenant."""

    CREATE = "create"
    SUSPEND = "suspend"
    RESUME = "resume"
    DRAIN = "drain"
    DROP = "drop"
    SET = "set"
    LIMIT = "limit"
    RENAME = "rename"
    ADOPT = "adopt"
    EXPORT = "export"
    IMPORT = "import"
    LOGIN = "login"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the catalog says of a tenant to those that work for it.

    ``epoch`` grows each time the name is created anew. ``unfinished`` is a verb whose last steps are still to be done.
    """

    name: str
    state: TenantState = TenantState.ACTIVE
    epoch: int = FIRST_EPOCH
    refuses_submits: bool = False
    unfinished: Verb | None = None
    moved_to: str | None = None
    inherited_key_space: str | None = None

    @property
    def key_space(self) -> str:
        """What idempotency keys are counted by: of each name's each epoch another, and kept when a tenant moves."""
        # No tenant's name has a slash in it, so no two of these read alike.
        own = self.name if self.epoch == FIRST_EPOCH else f"{self.name}//{self.epoch}"
        return self.inherited_key_space or own

    @property
    def exists(self) -> bool:
        """Whether there is a schema behind the name."""
        return self.state is not TenantState.REMOVED

    def require(self) -> None:
        """Do nothing if the tenant exists.

        Raises:
            UnknownTenant: it was removed.
        """
        if not self.exists:
            raise UnknownTenant(self.name, removed=True, moved_to=self.moved_to)

    def admit(self) -> None:
        """Do nothing if work may be submitted from outside the tenant's own tasks.

        Raises:
            SubmitRefused: it drains, or was suspended so.
            UnknownTenant: it was removed.
        """
        self.require()
        if self.state is TenantState.DRAINING or self.refuses_submits:
            raise SubmitRefused(self.name, self.state)


_LEADS_TO = {
    Verb.SUSPEND: TenantState.SUSPENDED,
    Verb.RESUME: TenantState.ACTIVE,
    Verb.DRAIN: TenantState.DRAINING,
    Verb.DROP: TenantState.REMOVED,
    Verb.RENAME: TenantState.REMOVED,
    Verb.ADOPT: TenantState.REMOVED,
}
_NEEDS_SUSPENSION = (Verb.RENAME, Verb.ADOPT)


def after(verb: Verb, standing: Standing) -> TenantState:
    """Tell the state that a tenant is in after a verb acted on it; for one that moves no state, that is the same.

    Raises:
        TenantStateRefused: the verb does not lead on from here; the message names what does.
        UnknownTenant: there is nothing left of the tenant that the verb could act on.
    """
    state, name = standing.state, standing.name
    if not standing.exists:
        _require_finished(verb, standing)
        if verb is Verb.DROP or standing.unfinished is not None:
            return state
        raise UnknownTenant(name, removed=True, moved_to=standing.moved_to)
    if verb in _NEEDS_SUSPENSION and state is not TenantState.SUSPENDED:
        raise TenantStateRefused(name, state, verb, f"run `tenant suspend {name}` first")
    return _LEADS_TO.get(verb, state)


def entering(verb: Verb, standing: Standing) -> TenantState:
    """Tell the state in which a verb brings a tenant into being, where the name never was or is a tombstone.

    What comes from elsewhere is suspended at first: its workers and tables may have to follow.

    Raises:
        TenantStateRefused: the name is in use.
    """
    if standing.exists:
        raise TenantStateRefused(
            standing.name, standing.state, verb, "choose another name, or drop the tenant that has this one"
        )
    if standing.unfinished is not verb or verb is not Verb.IMPORT:
        _require_finished(Verb.CREATE, standing)
    return TenantState.ACTIVE if verb is Verb.CREATE else TenantState.SUSPENDED


def _require_finished(verb: Verb, standing: Standing) -> None:
    if standing.unfinished is not None and verb is not standing.unfinished:
        raise TenantStateRefused(
            standing.name,
            "not quite removed",
            verb,
            f"run `tenant {standing.unfinished}` once more to end what it began",
        )
