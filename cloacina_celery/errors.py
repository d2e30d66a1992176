"""Every error this package raises on purpose: each names the thing that is wrong and how to mend it."""

from __future__ import annotations

__all__ = [
    "ArchiveRefused",
    "CloacinaError",
    "DatabaseRefused",
    "DatabaseUnavailable",
    "ExecutionNotFound",
    "InvalidPayload",
    "InvalidTenantName",
    "IsolationRefused",
    "LeaseLost",
    "MessageRefused",
    "SchemaMismatch",
    "SettingsError",
    "SubmitRefused",
    "TenantMismatch",
    "TenantNotBound",
    "TenantStateRefused",
    "TenantUnfinished",
    "TransitionRefused",
    "UnknownTenant",
]


class CloacinaError(Exception):
    """The base of all errors of this package."""


class SettingsError(CloacinaError):
    """A setting is missing, unknown, or contradicts another."""


class InvalidTenantName(CloacinaError):
    """A name cannot be a tenant's: it breaks the naming rule, or is reserved or taken."""

    def __init__(self, name: object, rule: str) -> None:
        self.name = name
        self.rule = rule
        super().__init__(f"invalid tenant name {name!r}: {rule}")


class TenantNotBound(CloacinaError):
    """Work that needs a tenant was asked for where none is bound."""

    def __init__(self, wanted_for: str) -> None:
        self.wanted_for = wanted_for
        super().__init__(
            f"no tenant is bound for {wanted_for}: bind one with `with cloacina.tenant('tenant_x'):` "
            "or pass tenant='tenant_x'. There is no default tenant."
        )


class UnknownTenant(CloacinaError):
    """The catalog does not know this tenant, or knows only that it was removed."""

    def __init__(self, tenant: str, *, removed: bool = False, moved_to: str | None = None) -> None:
        self.tenant = tenant
        option = " --legacy" if tenant == "public" else ""
        create = f"`celery -A <app> cloacina tenant create {tenant}{option}` or cloacina.tenants.create(...)"
        if moved_to is not None:
            message = f"tenant {tenant!r} was moved to {moved_to!r}: use that name"
        elif removed:
            message = (
                f"tenant {tenant!r} was removed, and comes back by itself no more: if it should, {create}"
            )
        else:
            message = (
                f"unknown tenant {tenant!r}: see `celery -A <app> cloacina tenant list` for those that exist, or "
                f"create it with {create}"
            )
        super().__init__(message)


class TenantStateRefused(CloacinaError):
    """A tenant is in a state from which the requested verb does not lead on."""

    def __init__(self, tenant: str, state: str, verb: str, hint: str) -> None:
        self.tenant = tenant
        self.state = state
        self.verb = verb
        super().__init__(f"cannot {verb} tenant {tenant}: it is {state}; {hint}")


class TenantUnfinished(CloacinaError):
    """A verb has begun and could not be ended: what it did stays, and doing it again ends it."""

    def __init__(self, tenant: str, verb: str, why: str) -> None:
        self.tenant = tenant
        self.verb = verb
        super().__init__(f"{verb} of tenant {tenant} is not finished: {why}. Then run it again")


class ArchiveRefused(CloacinaError):
    """A tenant's archive could not be written or brought in; nothing of it is half there."""


class SubmitRefused(CloacinaError):
    """A tenant takes no new work: it drains, or was suspended with submissions refused."""

    def __init__(self, tenant: str, state: str) -> None:
        self.tenant = tenant
        self.state = state
        super().__init__(
            f"tenant {tenant!r} is {state} and takes no new work; nothing was submitted. "
            f"`celery -A <app> cloacina tenant resume {tenant}` opens it again"
        )


class IsolationRefused(CloacinaError):
    """A tenant cannot be kept apart from the others as was asked, or its session cannot take its role."""

    def __init__(self, tenant: str, reason: str) -> None:
        self.tenant = tenant
        self.reason = reason
        super().__init__(f"tenant {tenant!r}: {reason}")


class TenantMismatch(CloacinaError):
    """Two statements about the tenant of one call contradict each other."""


class SchemaMismatch(CloacinaError):
    """A schema is at a revision that this version of the package cannot work with."""

    def __init__(self, schema: str, found: str | None, wanted: str, command: str) -> None:
        self.schema = schema
        self.found = found
        self.wanted = wanted
        super().__init__(
            f"schema {schema!r} is at revision {found or 'none'}, this version of cloacina_celery works "
            f"with {wanted}: {command}"
        )


class InvalidPayload(CloacinaError):
    """Arguments, a result or an option cannot be carried by an execution's row."""


class MessageRefused(CloacinaError):
    """A message from the broker was refused before any user code ran."""


class LeaseLost(CloacinaError):
    """This attempt no longer holds its execution: another attempt does, or an operator ended it.

    The attempt's transaction has been rolled back; nothing it did in the tenant's database remains.
    """

    def __init__(self, tenant: str, execution_id: str, attempt: int) -> None:
        self.tenant = tenant
        self.execution_id = execution_id
        self.attempt = attempt
        super().__init__(
            f"attempt {attempt} of execution {execution_id} in {tenant} lost its lease; "
            "its effects were rolled back"
        )


class ExecutionNotFound(CloacinaError):
    """No execution with this id exists in the tenant."""

    def __init__(self, tenant: str, execution_id: str) -> None:
        self.tenant = tenant
        self.execution_id = execution_id
        super().__init__(f"no execution {execution_id!r} in tenant {tenant!r}")


class TransitionRefused(CloacinaError):
    """An execution is in a state from which the requested transition does not exist."""

    def __init__(self, execution_id: str, state: str, verb: str, hint: str) -> None:
        self.execution_id = execution_id
        self.state = state
        super().__init__(f"cannot {verb} execution {execution_id}: it is {state}; {hint}")


class DatabaseUnavailable(CloacinaError):
    """The database did not answer; whether the last statement was committed is not known."""


class DatabaseRefused(CloacinaError):
    """The database understood a statement and does not do it: a privilege, a table or a lock is missing."""
