"""Verbs that bring a tenant under another name, or elsewhere."""

from __future__ import annotations

from pathlib import Path

from cloacina_celery.core.tenancy import Verb
from cloacina_celery.core.tenant import LEGACY_TENANT, validate_tenant_name
from cloacina_celery.errors import InvalidTenantName
from cloacina_celery.plugin.envelope import Envelope
from cloacina_celery.plugin.tenant_base import TenantBase, operator
from cloacina_celery.store import archives, moves, tenancy
from cloacina_celery.store.moves import Inventory


class TenantMoves(TenantBase):
    """Rename, adopt, export and import."""

    def rename(self, old: str, new: str, *, by: str | None = None) -> bool:
        """Give a suspended tenant another name, as schema and as queue, and tell whether that was still to do.

        Its rows, settings, limits and idempotency keys come with it; workers that run take the new queue instead
        of the old one; it stays suspended until `resume`.

        Raises:
            InvalidTenantName: the new name cannot be a tenant's, or ``old`` is ``public``.
            IsolationRefused: it has a role, which the login may not rename.
            TenantStateRefused: it is not suspended, something runs in it, or the new name is in use.
            TenantUnfinished: it is moved, and the old queue is not gone yet; do it again.
            UnknownTenant: there is none of the old name.
        """
        if old == LEGACY_TENANT:
            raise InvalidTenantName(
                old, "'public' is renamed by no one: `tenant adopt` moves our tables out of it"
            )
        return self._move(old, new, Verb.RENAME, by=by or operator())

    def adopt(self, new: str, *, source: str = LEGACY_TENANT, by: str | None = None) -> bool:
        """Move our tables out of ``public`` into a schema of their own, and tell whether that was still to do.

        The legacy tenant is suspended first, and the new one until `resume`. What else is in ``public`` stays.

        Raises:
            InvalidTenantName: the new name cannot be a tenant's, or the source is not ``public``.
            TenantStateRefused: something runs, or the new name is in use.
            TenantUnfinished: it is moved, and the old queue is not gone yet; do it again.
            UnknownTenant: ``public`` is no tenant.
        """
        self._check_adoption(new, source)
        by = by or operator()
        if self.get(source).standing.exists:
            tenancy.suspend(self._kernel.database, source, by=by)
            self._kernel.tenants.forget(source)
        return self._move(source, new, Verb.ADOPT, by=by)

    def plan_adoption(self, new: str, *, source: str = LEGACY_TENANT) -> Inventory:
        """Say what `adopt` would move, and change nothing.

        Raises:
            InvalidTenantName, TenantStateRefused: as `adopt`, but for what runs.
            UnknownTenant: ``public`` is no tenant.
        """
        self._check_adoption(new, source)
        self.get(source).standing.require()
        return moves.plan(self._kernel.database, source, new)

    def export(
        self, name: str, path: Path | str, *, programs: Path | None = None, by: str | None = None
    ) -> None:
        """Write a tenant's schema to a file in pg_dump's custom format, as it is at one moment.

        Args:
            programs: the folder of pg_dump; by default it is looked for on the PATH.

        Raises:
            ArchiveRefused: pg_dump is missing, older than the server, or fails.
            InvalidTenantName: it is ``public``, whose schema is not the tenant's alone.
            UnknownTenant: there is none of this name, or it was removed.
        """
        validate_tenant_name(name, allow_legacy=True)
        archives.export(
            self._kernel.database, name, Path(path).absolute(), programs=programs, by=by or operator()
        )

    def import_(
        self,
        path: Path | str,
        name: str | None = None,
        *,
        programs: Path | None = None,
        by: str | None = None,
    ) -> str:
        """Bring an exported tenant in, all of it or nothing, and return its name; it is suspended until `resume`.

        Rows, history and idempotency keys are as they were; what ran then waits to run again.

        Args:
            name: what it is to be called here; by default as it was there.
            programs: the folder of pg_restore; by default it is looked for on the PATH.

        Raises:
            ArchiveRefused: pg_restore is missing, the file is no archive of a tenant, or the database refuses it.
            SchemaMismatch: it was written by a newer version.
            TenantStateRefused: the name is in use.
        """
        path = Path(path).absolute()
        old = archives.schema_in(path, programs=programs)
        new = old if name is None else name
        self._check_name(new)
        archives.import_(
            self._kernel.database, path, new, by=by or operator(), programs=programs,
            rewrite=lambda message: Envelope.load(message).moved(old, new).dump("an imported execution"),
        )  # fmt: skip
        self._queues.declare(new)
        self._changed(new, "suspended", by=by or operator(), is_change=True)
        return new

    def _check_adoption(self, new: str, source: str) -> None:
        if source != LEGACY_TENANT:
            raise InvalidTenantName(
                source, "only 'public' is adopted from: `tenant rename` moves other tenants"
            )
        self._check_name(new)

    def _move(self, old: str, new: str, verb: Verb, *, by: str) -> bool:
        self._check_name(new)
        before = self.get(old)
        moves.move(
            self._kernel.database, old, new, verb, by=by,
            rewrite=lambda message: Envelope.load(message).moved(old, new).dump("a moved execution"),
        )  # fmt: skip
        self._kernel.tenants.forget(new)
        self._queues.declare(new)
        self._queues.hand_over(old, new)
        self._finish(old, verb, by=by)
        return before.standing.exists or before.unfinished is not None
