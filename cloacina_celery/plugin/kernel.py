"""What all parts of the plugin share: the app, its settings and database, and what this process has learnt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from celery import Celery

from cloacina_celery.core.retry import RetryPolicy
from cloacina_celery.core.settings import Settings
from cloacina_celery.core.tenancy import Standing
from cloacina_celery.errors import SettingsError, UnknownTenant
from cloacina_celery.plugin.memory import BusyMarks, ChordSizes, Locations, Messages, TenantDirectory
from cloacina_celery.runtime.keeper import Keeper
from cloacina_celery.runtime.trust import LeaseBoard
from cloacina_celery.store import busy, catalog
from cloacina_celery.store.database import Cursor, Database
from cloacina_celery.store.driver_errors import InvalidSchemaName, UndefinedTable

NO_RETRY = RetryPolicy(max_attempts=1)


class Kernel:
    """One app's settings, database and memory.

    Args:
        overrides: settings given in code, which win over the app's configuration.
    """

    def __init__(self, overrides: dict[str, Any]) -> None:
        self._overrides = overrides
        self._app: Celery | None = None
        self._settings: Settings | None = None
        self._database: Database | None = None
        self._policies: dict[str, str] = {}
        self.tenants = TenantDirectory(self._standings)
        self.busy_marks = BusyMarks(self._mark_busy)
        self.locations = Locations()
        self.chord_sizes = ChordSizes()
        self.messages = Messages()
        self.keeper: Keeper | None = None
        self.worker_id = 0
        self.own_tenant: str | None = None
        self.boards: dict[int, LeaseBoard] = {}
        self.excluded_queues: tuple[str, ...] = ()
        self.weights: Mapping[str, int] = {}

    @property
    def app(self) -> Celery:
        """The app that the plugin is installed on.

        Raises:
            SettingsError: there is none yet.
        """
        if self._app is None:
            raise SettingsError("this Cloacina is installed on no app yet: call init_app(app)")
        return self._app

    @property
    def is_installed(self) -> bool:
        """Whether there is an app."""
        return self._app is not None

    def install_on(self, app: Celery) -> None:
        """Take the app."""
        self._app = app

    def override(self, settings: dict[str, Any]) -> None:
        """Have settings win over the app's own from now on; the database is opened anew with them."""
        self._overrides = {**self._overrides, **settings}
        self._settings, self._database = None, None

    @property
    def settings(self) -> Settings:
        """The validated settings, read at first use.

        Raises:
            SettingsError: one is wrong; the message names it.
        """
        if self._settings is None:
            self._settings = Settings.from_mapping(self.app.conf, **self._overrides)
        return self._settings

    @property
    def database(self) -> Database:
        """The database of all tenants.

        Raises:
            SettingsError: no URL is set anywhere.
        """
        if self._database is None:
            settings = self.settings
            if not settings.database_url and not settings.database_url_file:
                raise SettingsError(
                    "no database: pass Cloacina(app, database_url='postgresql://...'), or set "
                    "app.conf.cloacina_database_url or the environment's CLOACINA_DATABASE_URL"
                )
            self._database = Database(
                settings.database_url,
                url_file=settings.database_url_file,
                pool_size=settings.pool_size,
                prepared_statements=settings.prepared_statements,
                isolation=settings.isolation,
            )
        return self._database

    def _standings(self, names: Sequence[str]) -> dict[str, Standing]:
        found = catalog.find_all(self.database, names)
        return {name: tenant.standing for name, tenant in found.items()}

    @contextmanager
    def rows(self, tenant: str) -> Iterator[Cursor]:
        """Lend a cursor for statements on one tenant's rows, each of which commits by itself.

        Raises:
            UnknownTenant: another process has dropped the tenant since we looked.
        """
        try:
            with self.database.statement() as cursor:
                yield cursor
        except (UndefinedTable, InvalidSchemaName) as error:
            self.tenants.forget(tenant)
            raise UnknownTenant(tenant) from error

    def _mark_busy(self, tenant: str) -> None:
        with self.database.statement() as cursor:
            busy.mark(cursor, tenant)

    @property
    def send(self) -> Callable[..., Any]:
        """Celery's own sender, under ours."""
        plain: Callable[..., Any] = self.app.amqp.plain_task_sender
        return plain

    def policy_of(self, task: Any) -> RetryPolicy:
        """Return the retry policy that new executions of a task are given."""
        policy: RetryPolicy | None = getattr(task, "effective_retry_policy", None)
        return NO_RETRY if policy is None else policy

    def stored_policy_of(self, task: Any) -> str | None:
        """Return the policy as a row keeps it; ``None`` where the task's code is elsewhere."""
        if getattr(task, "effective_retry_policy", None) is None:
            return None
        stored = self._policies.get(task.name)
        if stored is None:
            stored = self._policies[task.name] = json.dumps(self.policy_of(task).to_stored())
        return stored

    def max_recoveries_of(self, task: Any) -> int:
        """Return the recovery budget that new executions of a task are given."""
        own = getattr(task, "max_recoveries", None)
        return self.settings.max_recoveries if own is None else int(own)

    def in_background(self, work: Callable[[], object]) -> None:
        """Do ``work`` off the worker's event loop, which must not wait for the database."""
        if self.keeper is not None:
            self.keeper.ask(work)
        else:
            work()
