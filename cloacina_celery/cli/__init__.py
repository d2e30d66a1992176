"""``celery -A app cloacina ...``: tenants, schemas and executions for people (tables) and programs (--json)."""

from __future__ import annotations

import click

from cloacina_celery.cli.executions import execution
from cloacina_celery.cli.isolation import tenant_isolate
from cloacina_celery.cli.overview import status, sweep
from cloacina_celery.cli.schemas import schema
from cloacina_celery.cli.tenants import tenant

__all__ = ["cloacina"]


@click.group()
def cloacina() -> None:
    """Durable tasks of many tenants: look at them and act on them."""


tenant.add_command(tenant_isolate)
for command in (tenant, schema, execution, sweep, status):
    cloacina.add_command(command)
