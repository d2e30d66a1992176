"""``cloacina tenant ...``: create, list and drop tenants."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from cloacina_celery.cli.output import command, print_rows
from cloacina_celery.errors import UnknownTenant
from cloacina_celery.plugin.app import Cloacina
from cloacina_celery.store import catalog


@click.group()
def tenant() -> None:
    """Create, list and drop tenants."""


@tenant.command("create")
@click.argument("name")
@click.option("--legacy", is_flag=True, help="Allow 'public', an existing single-tenant deployment's schema.")
@command
def tenant_create(cloacina: Cloacina, name: str, legacy: bool, as_json: bool) -> None:
    """Create a tenant: schema, tables and queue. An existing one is left as it is."""
    is_new = cloacina.tenants.create(name, legacy=legacy)
    if as_json:
        click.echo(json.dumps({"name": name, "created": is_new}))
    else:
        click.echo(f"tenant {name} {'created' if is_new else 'exists already'}")


@tenant.command("list")
@command
def tenant_list(cloacina: Cloacina, as_json: bool) -> None:
    """List all tenants."""
    rows = [asdict(one) for one in cloacina.tenants.list()]
    print_rows(as_json, rows, ("name", "is_legacy", "created_at"), empty="no tenants yet")


@tenant.command("drop")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask: all data in the tenant's schema is lost.")
@command
def tenant_drop(cloacina: Cloacina, name: str, yes: bool, as_json: bool) -> None:
    """Drop a tenant with everything in its schema."""
    if not catalog.exists(cloacina.database, name):
        raise UnknownTenant(name)
    if not yes:
        click.confirm(f"Drop tenant {name} and all data in its schema?", abort=True, err=True)
    cloacina.tenants.drop(name)
    click.echo(json.dumps({"name": name, "dropped": True}) if as_json else f"tenant {name} dropped")
