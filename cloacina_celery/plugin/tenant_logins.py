"""What operators and programs do with a tenant's own logins."""

from __future__ import annotations

import builtins
from math import isfinite

from cloacina_celery.core.tenant import validate_tenant_name
from cloacina_celery.errors import SettingsError
from cloacina_celery.plugin.tenant_base import TenantBase, operator
from cloacina_celery.store import logins
from cloacina_celery.store.logins import Credentials, Login


class TenantLogins(TenantBase):
    """Logins, issued, replaced and revoked while workers run."""

    def issue_login(
        self,
        name: str,
        *,
        username: str | None = None,
        password: str | None = None,
        overlap: float | None = None,
        by: str | None = None,
    ) -> Credentials:
        """Make a login that reaches this tenant and no other, and return its credentials, this once.

        The password goes to nobody else: the database is given what it checks it with.

        Args:
            username: by default one that is free.
            password: by default one of 43 random characters.
            overlap: seconds for which the tenant's earlier logins stay valid; ``None`` does not end them.

        Raises:
            IsolationRefused: the tenant has no role, or the name is taken.
            SettingsError: a name, password or time that cannot be one.
            UnknownTenant: there is none of this name, or it was removed.
        """
        validate_tenant_name(name, allow_legacy=True)
        if overlap is not None and not (isfinite(overlap) and overlap >= 0):
            raise SettingsError(f"an overlap is a number of seconds of at least 0, not {overlap!r}")
        return logins.issue(
            self._kernel.database,
            name,
            username=username,
            password=password,
            overlap=overlap,
            by=by or operator(),
        )

    def logins(self, name: str) -> builtins.list[Login]:
        """List a tenant's logins, oldest first, without what only their holders know.

        Raises:
            UnknownTenant: there never was one of this name.
        """
        self.get(name)
        with self._kernel.database.statement() as cursor:
            return logins.of_tenant(cursor, name)

    def revoke_login(self, name: str, username: str, *, by: str | None = None) -> bool:
        """End a login and its connections at once, and tell whether there was one; what it owns is the tenant's.

        Raises:
            IsolationRefused: a role of that name is there and is not this tenant's login.
            UnknownTenant: there is none of this name, or it was removed.
        """
        validate_tenant_name(name, allow_legacy=True)
        return logins.revoke(self._kernel.database, name, username, by=by or operator())
