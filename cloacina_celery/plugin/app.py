"""The plugin: ``Cloacina(app)`` makes an app's durable tasks durable, for every tenant of its database."""

from __future__ import annotations

import fnmatch
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Concatenate, Literal, overload

from celery import Celery
from sqlalchemy.orm import Session

from cloacina_celery.core.retry import RetryPolicy
from cloacina_celery.core.settings import MAX_INTEGER, Settings, check_names
from cloacina_celery.core.tenant import LEGACY_TENANT, validate_tenant_name
from cloacina_celery.errors import (
    InvalidPayload,
    InvalidTenantName,
    SettingsError,
    TenantMismatch,
    UnknownTenant,
)
from cloacina_celery.plugin import amqp, control
from cloacina_celery.plugin.api import Executions, Tenants, is_text
from cloacina_celery.plugin.envelope import TENANT_HEADER, Envelope
from cloacina_celery.plugin.results import DurableBackend, DurableResult
from cloacina_celery.plugin.settler import Settler
from cloacina_celery.plugin.submitter import Submitter, id_for_key
from cloacina_celery.plugin.task import DurableTask
from cloacina_celery.plugin.typing import P, R_co, TypedTask
from cloacina_celery.runtime.attempt import Attempt
from cloacina_celery.runtime.context import (
    bind_tenant,
    bind_unit,
    bound_tenant,
    current_attempt,
    require_tenant,
)
from cloacina_celery.runtime.keeper import Keeper
from cloacina_celery.runtime.reaper import Reaper
from cloacina_celery.runtime.threads import let_threads_inherit
from cloacina_celery.runtime.units import SessionUnit
from cloacina_celery.store import catalog, executions, migrate, queries
from cloacina_celery.store.database import Cursor, Database, InvalidSchemaName, UndefinedTable
from cloacina_celery.store.recovery import Recovered
from cloacina_celery.store.sessions import TenantSession

if TYPE_CHECKING:
    from collections.abc import Sequence

REMEMBERED = 10_000
"""Execution ids whose tenant this process remembers, for results made from the id alone."""

UNKNOWN_FOR = 5.0
"""Seconds for which a name that is no tenant is not looked up again."""


class Cloacina:
    """Durable work for many tenants on a Celery app.

    ``Cloacina(app)`` installs at once; ``Cloacina()`` waits for `init_app`. No server is needed before the
    first call that uses one.

    Args:
        app: the Celery app.
        database_url: the Postgres database of all tenants; else ``app.conf.cloacina_database_url``, else the
            environment's ``CLOACINA_DATABASE_URL``.
        settings: any other setting, by its name without the ``cloacina_`` prefix.

    Raises:
        SettingsError: a setting is unknown, of the wrong kind, or does not fit another.
    """

    def __init__(
        self, app: Celery | None = None, *, database_url: str | None = None, **settings: Any
    ) -> None:
        check_names(settings)
        self._overrides: dict[str, Any] = {"database_url": database_url, **settings}
        self._app: Celery | None = None
        self._settings: Settings | None = None
        self._database: Database | None = None
        self._backends: dict[str | None, DurableBackend] = {}
        self._known: set[str] = set()
        self._unknown_until: dict[str, float] = {}
        self._locations: OrderedDict[str, str] = OrderedDict()
        self._policies: dict[str, str] = {}
        self._chord_sizes: OrderedDict[str, int | None] = OrderedDict()
        self.keeper: Keeper | None = None
        self.worker_id = 0
        self.submitter = Submitter(self)
        self.settler = Settler(self)
        self.tenants = Tenants(self)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Celery) -> None:
        """Install on an app.

        Raises:
            SettingsError: it is no Celery app, another plugin instance is installed on it, or this one on another.
        """
        if not isinstance(app, Celery):
            raise SettingsError(f"Cloacina is installed on a Celery app, not on {app!r}: write Cloacina(app)")
        if self._app is app:
            return
        if self._app is not None or getattr(app, "cloacina", None) is not None:
            raise SettingsError(
                f"app {app.main!r} and Cloacina are one to one: one of them has a partner already"
            )
        self._app = app
        app.cloacina = self
        amqp.install(app, self)
        app.backend_cls = "cloacina_celery.plugin.results:AppBackend"
        app._backend_cache = None
        control.install(app, self)
        let_threads_inherit()

    @property
    def app(self) -> Celery:
        """The app that this is installed on.

        Raises:
            SettingsError: there is none yet.
        """
        if self._app is None:
            raise SettingsError("this Cloacina is installed on no app yet: call init_app(app)")
        return self._app

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
        """The database of all tenants."""
        if self._database is None:
            settings = self.settings
            if not settings.database_url:
                raise SettingsError(
                    "no database: pass Cloacina(app, database_url='postgresql://...'), or set "
                    "app.conf.cloacina_database_url or the environment's CLOACINA_DATABASE_URL"
                )
            self._database = Database(
                settings.database_url,
                pool_size=settings.pool_size,
                prepared_statements=settings.prepared_statements,
            )
        return self._database

    # What users call

    @overload
    def task(self, function: Callable[P, R_co], /) -> TypedTask[P, R_co]: ...

    @overload
    def task(
        self,
        *,
        bind: Literal[True],
        retry: RetryPolicy | None = None,
        max_recoveries: int | None = None,
        **options: Any,
    ) -> Callable[[Callable[Concatenate[Any, P], R_co]], TypedTask[P, R_co]]: ...

    @overload
    def task(
        self,
        *,
        bind: Literal[False] = False,
        retry: RetryPolicy | None = None,
        max_recoveries: int | None = None,
        **options: Any,
    ) -> Callable[[Callable[P, R_co]], TypedTask[P, R_co]]: ...

    def task(
        self, *args: Any, retry: RetryPolicy | None = None, max_recoveries: int | None = None, **options: Any
    ) -> Any:
        """Make a function a durable task; everything that ``app.task`` takes works too.

        Args:
            retry: the policy of failed attempts; by default three attempts with exponential backoff.
            max_recoveries: how often a run that was lost with its worker is started again.

        Raises:
            SettingsError: ``base`` is not a `DurableTask`, or an argument is of the wrong kind.
        """
        options.setdefault("base", DurableTask)
        base = options["base"]
        if not isinstance(base, type) or not issubclass(base, DurableTask):
            name = base.__name__ if isinstance(base, type) else repr(base)
            raise SettingsError(f"base={name} of a durable task must derive from DurableTask")
        _check_task_options(retry, max_recoveries)
        if retry is None and not options.get("autoretry_for"):
            retry = RetryPolicy()
        return self.app.task(*args, cloacina_retry=retry, max_recoveries=max_recoveries, **options)

    @contextmanager
    def tenant(self, name: str) -> Iterator[None]:
        """Bind a tenant for the block: its tasks are submitted for it, its sessions opened in its schema."""
        validate_tenant_name(name, allow_legacy=True)
        with bind_tenant(name):
            yield

    def current_tenant(self) -> str:
        """Return the bound tenant.

        Raises:
            TenantNotBound: there is none.
        """
        return require_tenant("current_tenant()")

    def current_execution(self) -> Attempt | None:
        """Return the attempt that this code runs in; ``None`` outside a durable task."""
        return current_attempt()

    def session(self, tenant: str | None = None) -> AbstractContextManager[Session]:
        """Open a SQLAlchemy session in a tenant's schema.

        In a durable task it is the attempt's own: what it writes commits together with the settlement, fenced,
        or not at all. Elsewhere it commits at the end of the block. Tasks submitted in the block join it.

        Raises:
            TenantNotBound: no tenant is named or bound.
            TenantMismatch: a durable task named another tenant than its own.
        """
        attempt = current_attempt()
        if attempt is not None and attempt.tenant == (bound_tenant() if tenant is None else tenant):
            return attempt.open_session()
        if attempt is not None and tenant is not None:
            raise TenantMismatch(
                f"a task of tenant {attempt.tenant!r} opened a session of tenant {tenant!r}: submit a task for "
                "that tenant instead"
            )
        return self._own_session(require_tenant("session()") if tenant is None else tenant)

    @contextmanager
    def _own_session(self, tenant: str) -> Iterator[Session]:
        self.require_known(tenant)
        with (
            bind_tenant(tenant),
            TenantSession(self.database, tenant) as session,
            bind_unit(SessionUnit(session, tenant)),
        ):
            yield session
            # Not by session.begin(): with that, a commit in the middle of the block would end the block's session.
            session.commit()

    def executions(self, tenant: str | None = None) -> Executions:
        """Return the executions of a tenant, to look at and to act on."""
        name = require_tenant("executions()") if tenant is None else tenant
        self.require_known(name)
        return Executions(self, name)

    def execution_id(self, idempotency_key: str, *, tenant: str | None = None) -> str:
        """Return the id that the execution of this key has in the tenant, whether it exists yet or not."""
        name = require_tenant("execution_id()") if tenant is None else tenant
        return id_for_key(validate_tenant_name(name, allow_legacy=True), idempotency_key)

    def result(self, execution_id: str, *, tenant: str | None = None) -> Any:
        """Return the result object of an execution by its id.

        Raises:
            InvalidPayload: it cannot be an execution's id.
        """
        if not is_text(execution_id):
            raise InvalidPayload(f"an execution's id is a non-empty string, not {execution_id!r}")
        name = require_tenant("result()") if tenant is None else tenant
        backend = self.backend_for(validate_tenant_name(name, allow_legacy=True))
        return DurableResult(execution_id, backend=backend, app=self.app)

    def sweep(self) -> int:
        """Sweep all tenants now, in this process; return how many executions were touched."""
        return self.reaper().sweep_all()

    # What the parts of the plugin ask

    def is_durable(self, name: str, options: dict[str, Any]) -> bool:
        """Tell whether a message is a durable call: by its task, or by the tenant it was sent for."""
        task = self.app._tasks.get(name)
        return isinstance(task, DurableTask) or (task is None and options.get("tenant") is not None)

    def knows(self, tenant: str) -> bool:
        """Tell whether the catalog knows the tenant; the answer is remembered, a no for a few seconds."""
        if tenant in self._known:
            return True
        if self._unknown_until.get(tenant, 0.0) > time.monotonic():
            return False
        try:
            validate_tenant_name(tenant, allow_legacy=True)
        except InvalidTenantName:
            return False
        if catalog.exists(self.database, tenant):
            self._known.add(tenant)
            self._unknown_until.pop(tenant, None)
            return True
        self._unknown_until[tenant] = time.monotonic() + UNKNOWN_FOR
        return False

    def require_known(self, tenant: str) -> None:
        """Do nothing if the catalog knows the tenant.

        Raises:
            InvalidTenantName: no tenant can have this name.
            UnknownTenant: none has it.
        """
        validate_tenant_name(tenant, allow_legacy=True)
        if not self.knows(tenant):
            raise UnknownTenant(tenant)

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
            self.forget_tenant(tenant)
            raise UnknownTenant(tenant) from error

    def learn_tenant(self, tenant: str) -> None:
        """Remember that the tenant exists."""
        self._known.add(tenant)
        self._unknown_until.pop(tenant, None)

    def forget_tenant(self, tenant: str) -> None:
        """Look the tenant up again at its next use."""
        self._known.discard(tenant)

    def remember(self, execution_id: str, tenant: str) -> None:
        """Remember where an execution was submitted to."""
        self._locations[execution_id] = tenant
        if len(self._locations) > REMEMBERED:
            self._locations.popitem(last=False)

    def locate(self, execution_id: str) -> str | None:
        """Return the tenant that this process submitted an execution to."""
        return self._locations.get(execution_id)

    def backend_for(self, tenant: str | None) -> DurableBackend:
        """Return the result backend of one tenant, or the one that finds out."""
        backend = self._backends.get(tenant)
        if backend is None:
            backend = self._backends[tenant] = DurableBackend(self.app, cloacina=self, tenant=tenant)
        return backend

    def policy_of(self, task: Any) -> RetryPolicy:
        """Return the retry policy that new executions of a task are given."""
        return (
            DurableTask.retry_policy_of(task)
            if isinstance(task, DurableTask)
            else RetryPolicy(max_attempts=1)
        )

    def stored_policy_of(self, task: Any) -> str | None:
        """Return the policy as a row keeps it; ``None`` where the task's code is elsewhere."""
        if not isinstance(task, DurableTask):
            return None
        stored = self._policies.get(task.name)
        if stored is None:
            stored = self._policies[task.name] = json.dumps(self.policy_of(task).to_stored())
        return stored

    def max_recoveries_of(self, task: Any) -> int:
        """Return the recovery budget that new executions of a task are given."""
        own = getattr(task, "max_recoveries", None)
        return self.settings.max_recoveries if own is None else int(own)

    def expect_chord(self, group_id: str) -> None:
        """Note that a group's members are counted by their rows."""
        self._chord_sizes[group_id] = None
        if len(self._chord_sizes) > REMEMBERED:
            self._chord_sizes.popitem(last=False)

    def is_expected_chord(self, group_id: str) -> bool:
        """Tell whether `expect_chord` was called for the group."""
        return group_id in self._chord_sizes

    def set_chord_size(self, group_id: str, size: int) -> None:
        """Note the size of a chord; the submission of its last member, which comes next, enters it."""
        self._chord_sizes[group_id] = size

    def take_chord_size(self, group_id: str | None) -> int | None:
        """Return a chord's size once."""
        if group_id is None or self._chord_sizes.get(group_id) is None:
            return None
        return self._chord_sizes.pop(group_id)

    @property
    def send(self) -> Callable[..., Any]:
        """Celery's own sender, under ours."""
        plain: Callable[..., Any] = self.app.amqp.plain_task_sender
        return plain

    # What workers need

    def open_tenants(self, queues: Sequence[str]) -> list[str]:
        """Make the tenants of a starting worker's queues exist, and return them.

        A queue is a tenant's if the catalog knows it, or if its name matches ``cloacina_auto_create``: then the
        first start creates it.

        Raises:
            InvalidTenantName: a name matches but cannot be a tenant's.
            SchemaMismatch: a tenant is at a revision that this version cannot work with.
        """
        migrate.ensure_catalog(self.database)
        patterns = [pattern.strip() for pattern in self.settings.auto_create.split(",") if pattern.strip()]
        ordinary = {self.app.conf.task_default_queue, self.settings.control_queue}
        opened = []
        for queue in queues:
            if self.knows(queue):
                catalog.create(self.database, queue, legacy=queue == LEGACY_TENANT)
            elif queue in ordinary or not any(fnmatch.fnmatchcase(queue, pattern) for pattern in patterns):
                continue
            else:
                self.tenants.create(queue)
            opened.append(queue)
        return opened

    def reaper(self) -> Reaper:
        """Make a reaper that publishes through this app."""
        return Reaper(
            self.database,
            self.settings,
            publish=self.submitter.publish_rings,
            can_publish=self.submitter.can_publish,
            queue_depth=self.submitter.queue_depth,
            on_abandoned=self._on_abandoned,
        )

    def attempt_lost(self, tenant: str, execution_id: str, attempt: int, *, reason: str) -> None:
        """Recover an attempt whose process the worker saw die."""
        self._ask_keeper(lambda: self.reaper().recover_attempt(tenant, execution_id, attempt, reason=reason))

    def attempt_timed_out(
        self, tenant: str, execution_id: str, attempt: int, *, error: Exception, request: Any
    ) -> None:
        """Settle an attempt that the worker killed for its time limit."""
        self._ask_keeper(lambda: self.settler.settle_timed_out(tenant, execution_id, attempt, error, request))

    def attempt_cancelled_by_worker(self, tenant: str, execution_id: str, attempt: int) -> None:
        """Give back an attempt that the worker ended for its own reasons: a shutdown, a lost broker."""

        def release() -> None:
            with self.database.statement() as cursor:
                executions.release_attempt(
                    cursor, tenant, execution_id, attempt, reason="ended by its worker"
                )

        self._ask_keeper(release)

    def on_revoked(self, execution_id: str, reason: str, request: Any) -> None:
        """Cancel the row of a revoked or expired task."""
        headers = getattr(request, "headers", None) or {}
        tenant = (
            headers.get(TENANT_HEADER) or getattr(request, TENANT_HEADER, None) or self.locate(execution_id)
        )
        if tenant is None:
            return

        def cancel() -> None:
            with self.database.statement() as cursor:
                queries.cancel(cursor, tenant, execution_id, reason=reason)

        self._ask_keeper(cancel)

    def _ask_keeper(self, work: Callable[[], object]) -> None:
        # The worker's event loop must not wait for the database; where there is no keeper there is no loop.
        if self.keeper is not None:
            self.keeper.ask(work)
        else:
            work()

    def _on_abandoned(self, tenant: str, recovered: Recovered) -> None:
        envelope = Envelope.load(recovered.message)
        request = control.context_of(envelope)
        with bind_tenant(tenant):
            backend = self.backend_for(tenant)
            error = backend.exception_to_python(recovered.error)
            backend.after_failure(request, error, None)

    def __repr__(self) -> str:
        return f"<Cloacina on {self._app.main if self._app else 'no app'}>"


def _check_task_options(retry: object, max_recoveries: object) -> None:
    if retry is not None and not isinstance(retry, RetryPolicy):
        raise SettingsError(f"retry= takes a RetryPolicy, not {retry!r}")
    if max_recoveries is not None and (
        not isinstance(max_recoveries, int)
        or isinstance(max_recoveries, bool)
        or not 0 <= max_recoveries <= MAX_INTEGER
    ):
        raise SettingsError(f"max_recoveries= takes a whole number of at least 0, not {max_recoveries!r}")
