"""``celery -A app cloacina ...``: tenants, schemas and executions for people (tables) and programs (--json)."""

from __future__ import annotations

import click

from cloacina_celery.cli import limits as _limits  # noqa: F401  # adds its command to `tenant`
from cloacina_celery.cli.doctor import doctor, probe
from cloacina_celery.cli.executions import execution
from cloacina_celery.cli.isolation import tenant_isolate
from cloacina_celery.cli.logins import tenant_login, tenant_logins, tenant_revoke
from cloacina_celery.cli.overview import status, sweep
from cloacina_celery.cli.schemas import schema
from cloacina_celery.cli.tenant_moves import tenant_adopt, tenant_export, tenant_import, tenant_rename
from cloacina_celery.cli.tenants import tenant
from cloacina_celery.cli.verify import verify

__all__ = ["cloacina"]


@click.group()
def cloacina() -> None:
    """Durable tasks of many tenants: look at them and act on them."""


for command in (
    tenant_rename, tenant_adopt, tenant_export, tenant_import,
    tenant_isolate, tenant_login, tenant_logins, tenant_revoke,
):  # fmt: skip
    tenant.add_command(command)

for command in (tenant, schema, execution, sweep, status, doctor, probe, verify):
    cloacina.add_command(command)
