"""The plugin: ``Cloacina(app)`` makes an app's durable tasks durable, for every tenant of its database."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Concatenate, Literal, overload

from celery import Celery
from sqlalchemy.orm import Session

from cloacina_celery.core.retry import RetryPolicy
from cloacina_celery.core.settings import MAX_INTEGER, Settings, check_names
from cloacina_celery.core.tenant import validate_tenant_name
from cloacina_celery.errors import InvalidPayload, SettingsError, TenantMismatch
from cloacina_celery.plugin import amqp, control
from cloacina_celery.plugin.api import Executions, is_text
from cloacina_celery.plugin.bulk import submit_many
from cloacina_celery.plugin.parts import Parts
from cloacina_celery.plugin.results import DurableResult
from cloacina_celery.plugin.submitter import id_for_key
from cloacina_celery.plugin.task import DurableTask
from cloacina_celery.plugin.tenants import Tenants
from cloacina_celery.plugin.typing import P, R_co, TypedTask
from cloacina_celery.runtime.attempt import Attempt
from cloacina_celery.runtime.context import (
    bind_tenant,
    bind_unit,
    bound_tenant,
    current_attempt,
    require_tenant,
)
from cloacina_celery.runtime.threads import let_threads_inherit
from cloacina_celery.runtime.units import SessionUnit
from cloacina_celery.store.database import Database
from cloacina_celery.store.sessions import TenantSession


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
        self.parts = Parts.make({"database_url": database_url, **settings})
        self.tenants = Tenants(self.parts)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Celery) -> None:
        """Install on an app.

        Raises:
            SettingsError: it is no Celery app, another plugin instance is installed on it, or this one on another.
        """
        if not isinstance(app, Celery):
            raise SettingsError(f"Cloacina is installed on a Celery app, not on {app!r}: write Cloacina(app)")
        kernel = self.parts.kernel
        if kernel.is_installed and kernel.app is app:
            return
        if kernel.is_installed or getattr(app, "cloacina", None) is not None:
            raise SettingsError(
                f"app {app.main!r} and Cloacina are one to one: one of them has a partner already"
            )
        kernel.install_on(app)
        app.cloacina = self
        app.backend_cls = "cloacina_celery.plugin.app_backend:AppBackend"
        app._backend_cache = None
        amqp.install(app, self.parts)
        control.install(app, self.parts)
        let_threads_inherit()

    @property
    def app(self) -> Celery:
        """The app that this is installed on.

        Raises:
            SettingsError: there is none yet.
        """
        return self.parts.kernel.app

    @property
    def settings(self) -> Settings:
        """The validated settings, read at first use.

        Raises:
            SettingsError: one is wrong; the message names it.
        """
        return self.parts.kernel.settings

    @property
    def database(self) -> Database:
        """The database of all tenants.

        Raises:
            SettingsError: no URL is set anywhere.
        """
        return self.parts.kernel.database

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
        if attempt is not None:
            raise TenantMismatch(
                f"a task of tenant {attempt.tenant!r} opened a session of tenant {tenant or bound_tenant()!r}: "
                "submit a task for that tenant instead"
            )
        return self._own_session(require_tenant("session()") if tenant is None else tenant)

    @contextmanager
    def _own_session(self, tenant: str) -> Iterator[Session]:
        self.parts.kernel.tenants.require(tenant)
        with (
            bind_tenant(tenant),
            TenantSession(self.database, tenant) as session,
            bind_unit(SessionUnit(session, tenant)),
        ):
            yield session
            # Not by session.begin(): with that, a commit in the middle of the block would end the block's session.
            session.commit()

    def submit_many(
        self, calls: Iterable[Any], *, tenant: str | None = None, session: Session | None = None
    ) -> list[DurableResult]:
        """Submit many calls in one transaction, all of them or none, and return their results in the same order.

        Args:
            calls: signatures of durable tasks, such as ``charge.s(42)``. What `DurableTask.apply_async` takes can
                be ``set``; of two calls with one ``idempotency_key``, here or elsewhere, the second gets the first
                one's result object.
            tenant: by default the bound one.
            session: a SQLAlchemy session whose transaction the rows join; an open ``cloacina.session()`` is joined
                by itself.

        Raises:
            TenantNotBound, UnknownTenant: there is no such tenant.
            InvalidPayload: one of the calls is not a durable task's, or JSON cannot carry its arguments.
            DatabaseUnavailable: the database did not answer; with idempotency keys, calling again is safe.
        """
        name = require_tenant("submit_many()") if tenant is None else tenant
        self.parts.kernel.tenants.require(name)
        return submit_many(self.parts.kernel, calls, name, session)

    def executions(self, tenant: str | None = None) -> Executions:
        """Return the executions of a tenant, to look at and to act on."""
        name = require_tenant("executions()") if tenant is None else tenant
        self.parts.kernel.tenants.require(name)
        return Executions(self.parts, name)

    def execution_id(self, idempotency_key: str, *, tenant: str | None = None) -> str:
        """Return the id that the execution of this key has in the tenant, whether it exists yet or not."""
        name = require_tenant("execution_id()") if tenant is None else tenant
        validate_tenant_name(name, allow_legacy=True)
        return id_for_key(self.parts.kernel.tenants.standing_of(name), idempotency_key)

    def result(self, execution_id: str, *, tenant: str | None = None) -> Any:
        """Return the result object of an execution by its id.

        Raises:
            InvalidPayload: it cannot be an execution's id.
        """
        if not is_text(execution_id):
            raise InvalidPayload(f"an execution's id is a non-empty string, not {execution_id!r}")
        name = require_tenant("result()") if tenant is None else tenant
        backend = self.parts.backends.of(validate_tenant_name(name, allow_legacy=True))
        return DurableResult(execution_id, backend=backend, app=self.app)

    def sweep(self) -> int:
        """Sweep all tenants now, in this process; return how many executions were touched."""
        return self.parts.recovery.reaper().sweep_all()

    def __repr__(self) -> str:
        return f"<Cloacina on {self.app.main if self.parts.kernel.is_installed else 'no app'}>"


def _check_task_options(retry: object, max_recoveries: object) -> None:
    if retry is not None and not isinstance(retry, RetryPolicy):
        raise SettingsError(f"retry= takes a RetryPolicy, not {retry!r}")
    if max_recoveries is not None and (
        not isinstance(max_recoveries, int)
        or isinstance(max_recoveries, bool)
        or not 0 <= max_recoveries <= MAX_INTEGER
    ):
        raise SettingsError(f"max_recoveries= takes a whole number of at least 0, not {max_recoveries!r}")
