"""``cloacina tenant rename``, ``adopt``, ``export`` and ``import``: bring a tenant under another name or elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cloacina_celery.cli.output import command, plain, print_rows
from cloacina_celery.cli.tenants import by_option, say
from cloacina_celery.core.tenant import LEGACY_TENANT
from cloacina_celery.plugin.app import Cloacina
from cloacina_celery.store.moves import Inventory

FILE = click.Path(dir_okay=False, path_type=Path)


def programs_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--programs``."""
    return click.option(
        "--programs",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="The folder of pg_dump and pg_restore. By default they are looked for on the PATH.",
    )(function)


@click.command("rename")
@click.argument("old")
@click.argument("new")
@by_option
@command
def tenant_rename(cloacina: Cloacina, old: str, new: str, by: str | None, as_json: bool) -> None:
    """Give a suspended tenant another name: schema, queue and all. It stays suspended."""
    is_change = cloacina.tenants.rename(old, new, by=by)
    words = (
        f"{'renamed' if is_change else 'was renamed already'} to {new}; `tenant resume {new}` lets it work"
    )
    say(as_json, old, words, renamed=is_change, to=new)


@click.command("adopt")
@click.argument("name")
@click.option("--from", "source", default=LEGACY_TENANT, show_default=True, help="The legacy tenant.")
@click.option("--dry-run", is_flag=True, help="Say what would move, and change nothing.")
@by_option
@command
def tenant_adopt(
    cloacina: Cloacina, name: str, source: str, dry_run: bool, by: str | None, as_json: bool
) -> None:
    """Move our tables out of 'public' into a schema of their own. Everything else in there stays."""
    if dry_run:
        _print_plan(cloacina.tenants.plan_adoption(name, source=source), source, name, as_json)
        return
    is_change = cloacina.tenants.adopt(name, source=source, by=by)
    words = f"{'adopted' if is_change else 'was adopted already'} from {source}; `tenant resume {name}` lets it work"
    say(as_json, name, words, adopted=is_change, source=source)


@click.command("export")
@click.argument("name")
@click.argument("file", type=FILE)
@programs_option
@by_option
@command
def tenant_export(
    cloacina: Cloacina, name: str, file: Path, programs: Path | None, by: str | None, as_json: bool
) -> None:
    """Write a tenant's schema to a file, by pg_dump, as it is at one moment."""
    cloacina.tenants.export(name, file, programs=programs, by=by)
    say(as_json, name, f"exported to {file}", file=str(file), bytes=file.stat().st_size)


@click.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--as", "name", help="What it is called here. By default as it was there.")
@programs_option
@by_option
@command
def tenant_import(
    cloacina: Cloacina, file: Path, name: str | None, programs: Path | None, by: str | None, as_json: bool
) -> None:
    """Bring an exported tenant in, all of it or nothing. It is suspended until it is resumed."""
    found = cloacina.tenants.import_(file, name, programs=programs, by=by)
    say(as_json, found, f"imported; `tenant resume {found}` lets it work", imported=True)


def _print_plan(plan: Inventory, source: str, name: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(plan), default=plain, indent=2))
        return
    click.echo(f"from {source} to {name} would move:")
    rows = [{"table": table, "rows": count} for table, count in plan.moves.items()]
    print_rows(False, rows, ("table", "rows"), empty="nothing")
    click.echo(f"{plan.left}; what runs must end, or be given back, first")
    click.echo(f"would stay in {source}: {', '.join(plan.stays) or 'nothing else is there'}")
