"""Settings, validated together: a wrong or unknown one is an error that names the nearest right one."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

from cloacina_celery.errors import SettingsError

PREFIX = "cloacina_"
MAX_INTEGER = 2**31 - 1
"""The largest number that a row's counts can hold."""

ISOLATION_LEVELS = ("auto", "schema", "role", "login")

ENVIRONMENT = {"database_url": "CLOACINA_DATABASE_URL", "database_url_file": "CLOACINA_DATABASE_URL_FILE"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The plugin's settings; on a Celery app each is ``app.conf.cloacina_<name>``. Durations are seconds.

    Raises:
        SettingsError: a value out of range, or two that do not fit together.
    """

    database_url: str = ""
    database_url_file: str = ""
    """A file with the URL in it, read anew for each connection: whoever replaces it replaces the credentials."""
    auto_create: str = "tenant_*"
    """Queues of a starting worker that become tenants if they are none yet: shell patterns, comma-separated."""
    isolation: str = "auto"
    """How tenants are kept apart: ``schema``, ``role``, ``login`` (workers run on their tenant's own login alone), or
    ``auto``, which is ``role`` where the login may create roles."""
    control_queue: str = "cloacina_control"
    """The queue over which beat reaches the reaper; every worker of the app consumes it."""
    max_recoveries: int = 3
    enable_recovery: bool = True
    lease_ttl: float = 15.0
    heartbeat_interval: float = 5.0
    liveness: str = "lock"
    """``lock``: a worker's death is seen by its advisory lock; ``lease``: by its leases alone (for poolers)."""
    liveness_grace: float = 2.0
    poll_interval: float = 0.5
    sweep_interval: float = 10.0
    stranded_after: float = 10.0
    sweep_batch: int = 500
    recovery_rate: float = 20.0
    """Lost executions of one tenant that are sent out again per second, beyond the burst."""
    recovery_burst: int = 50
    """How many of them are sent out again at once."""
    retain_succeeded: float = 7 * 86_400.0
    """Seconds for which succeeded executions are kept; 0 is for ever."""
    retain_failed: float = 30 * 86_400.0
    """The same for failed, abandoned and cancelled ones."""
    publish_timeout: float = 1.0
    """Seconds for which a submission waits for each answer of the broker before its message is left to a poll."""
    pool_size: int = 5
    prepared_statements: bool = True

    def __post_init__(self) -> None:
        for spec in fields(self):
            _check_type(spec.name, spec.type, getattr(self, spec.name))
        for name in (
            "lease_ttl",
            "heartbeat_interval",
            "poll_interval",
            "sweep_interval",
            "stranded_after",
            "publish_timeout",
            "pool_size",
            "sweep_batch",
            "recovery_rate",
            "recovery_burst",
        ):
            if getattr(self, name) <= 0:
                raise SettingsError(f"{PREFIX}{name} must be greater than 0, not {getattr(self, name)}")
        for name in ("max_recoveries", "liveness_grace", "retain_succeeded", "retain_failed"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{PREFIX}{name} must be at least 0, not {getattr(self, name)}")
        if self.max_recoveries > MAX_INTEGER:
            raise SettingsError(
                f"{PREFIX}max_recoveries must be at most {MAX_INTEGER}, not {self.max_recoveries}"
            )
        if self.heartbeat_interval * 3 > self.lease_ttl:
            raise SettingsError(
                f"{PREFIX}heartbeat_interval ({self.heartbeat_interval} s) must fit three times into "
                f"{PREFIX}lease_ttl ({self.lease_ttl} s), or one late heartbeat loses a healthy task: "
                f"set {PREFIX}heartbeat_interval to at most {self.lease_ttl / 3:g}"
            )
        if self.liveness not in ("lock", "lease"):
            raise SettingsError(f"{PREFIX}liveness is 'lock' or 'lease', not {self.liveness!r}")
        if self.isolation not in ISOLATION_LEVELS:
            raise SettingsError(
                f"{PREFIX}isolation is one of {', '.join(map(repr, ISOLATION_LEVELS))}, not {self.isolation!r}"
            )
        if self.database_url and self.database_url_file:
            raise SettingsError(
                f"{PREFIX}database_url and {PREFIX}database_url_file are both set: set one of them "
                f"(the environment's {' and '.join(ENVIRONMENT.values())} count too)"
            )
        if not self.control_queue:
            raise SettingsError(f"{PREFIX}control_queue must not be empty")

    @classmethod
    def from_mapping(cls, conf: Mapping[str, Any], **overrides: Any) -> Settings:
        """Read the ``cloacina_*`` keys of a Celery configuration; ``overrides`` win, the environment fills in.

        Raises:
            SettingsError: also for a ``cloacina_*`` key that does not exist.
        """
        known = {spec.name for spec in fields(cls)}
        values: dict[str, Any] = {}
        for key in conf:
            # Under Celery's namespace="CELERY" the keys are CELERY_CLOACINA_..., and only look-ups know that.
            _, found, name = key.lower().partition(PREFIX)
            if found and (key.startswith(PREFIX) or key.isupper()):
                _refuse_unknown(name, known, PREFIX)
                value = conf.get(PREFIX + name)
                if value is not None:
                    values[name] = value
        for name in overrides:
            _refuse_unknown(name, known, "")
        values.update({name: value for name, value in overrides.items() if value is not None})
        for name, variable in ENVIRONMENT.items():
            if not values.get(name) and os.environ.get(variable):
                values[name] = os.environ[variable]
        return cls(**values)


def check_names(names: Iterable[str]) -> None:
    """Do nothing if all of them are names of settings.

    Raises:
        SettingsError: one is not.
    """
    known = {spec.name for spec in fields(Settings)}
    for name in names:
        _refuse_unknown(name, known, "")


def _refuse_unknown(name: str, known: set[str], prefix: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(sorted(known))}"
    raise SettingsError(f"unknown setting {prefix}{name}: {hint}")


def _check_type(name: str, annotation: Any, value: object) -> None:
    expected = {"str": str, "int": int, "float": (int, float), "bool": bool}[str(annotation)]
    if (isinstance(value, bool) and annotation != "bool") or not isinstance(value, expected):  # type: ignore[arg-type]
        raise SettingsError(f"{PREFIX}{name} is of type {annotation}, not {value!r}")
    if isinstance(value, float) and not isfinite(value):
        raise SettingsError(f"{PREFIX}{name} is a finite number, not {value!r}")
