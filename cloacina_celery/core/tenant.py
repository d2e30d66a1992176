"""Tenant names: what may be one, and how one is quoted in SQL."""

from __future__ import annotations

import hashlib
import re

from cloacina_celery.errors import InvalidTenantName

CATALOG_SCHEMA = "cloacina"
LEGACY_TENANT = "public"
MAX_BYTES = 63

RULE = (
    "use 1 to 63 ASCII letters, digits and underscores; not 'pg_...', 'information_schema', "
    "'cloacina' or 'public'"
)

_ALLOWED = re.compile(r"[A-Za-z0-9_]+", re.ASCII)
_RESERVED = {"information_schema", CATALOG_SCHEMA}


def validate_tenant_name(name: object, *, allow_legacy: bool = False) -> str:
    """Return ``name`` if it can be a tenant's schema and queue.

    ``public`` passes only with ``allow_legacy``, as the legacy tenant.

    Raises:
        InvalidTenantName: the rule it breaks is in the message.
    """
    if not isinstance(name, str):
        raise InvalidTenantName(name, f"a tenant's name is a string, not {type(name).__name__}; {RULE}")
    if not name:
        raise InvalidTenantName(name, f"it is empty; {RULE}")
    if not _ALLOWED.fullmatch(name):
        raise InvalidTenantName(name, f"it contains a character that is not allowed; {RULE}")
    if len(name) > MAX_BYTES:
        raise InvalidTenantName(name, f"it is {len(name)} bytes long, Postgres takes {MAX_BYTES}; {RULE}")
    folded = name.lower()
    if folded == LEGACY_TENANT:
        if name == LEGACY_TENANT and allow_legacy:
            return name
        raise InvalidTenantName(
            name,
            "'public' is the legacy tenant and is taken on purpose only: pass legacy=True (CLI: --legacy)",
        )
    if folded.startswith("pg_") or folded in _RESERVED:
        raise InvalidTenantName(name, f"it is reserved; {RULE}")
    return name


def is_tenant_name(name: object) -> bool:
    """Tell whether a tenant can have this name, ``public`` included."""
    try:
        validate_tenant_name(name, allow_legacy=True)
    except InvalidTenantName:
        return False
    return True


def quote(name: str) -> str:
    """Quote a tenant's name as a SQL identifier, after checking it once more.

    The check is repeated here so that no path can lead an unchecked string into a statement.
    """
    return f'"{validate_tenant_name(name, allow_legacy=True)}"'


def role_of(name: str, database: int) -> str:
    """Name a tenant's role: readable, and its own among all roles of the cluster, which databases share.

    Args:
        database: the database's oid, which no other one of the cluster has and a new one of its name has not.
    """
    validate_tenant_name(name)
    digest = hashlib.sha256(f"{database}/{name}".encode()).hexdigest()[:16]
    return f"cloacina_{name[:36]}_{digest}"


def login_of(role: str, token: str) -> str:
    """Name a login of a tenant that has this role; the token tells it from the others."""
    return f"{role[: MAX_BYTES - len(token) - 1]}_{token}"


def workers_of(database: int) -> str:
    """Name the group of all tenants' own logins of a database: what a worker needs of the tables that all share."""
    return f"cloacina_workers_{database}"


def group_of(database: int) -> str:
    """Name the group of all tenants' roles of a database: what it is granted, every tenant may do."""
    return f"cloacina_tenants_{database}"
