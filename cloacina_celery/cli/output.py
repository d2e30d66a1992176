"""What the commands share: the app's plugin, errors in one line, tables for people and JSON for programs."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import click
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from cloacina_celery.errors import CloacinaError, SettingsError

WIDE = 200
"""Columns of a table that goes into a pipe: there is no screen to fit, and an id cut short is of no use."""


def console(*, to_stderr: bool = False) -> Console:
    """Make the console that people read."""
    stream = sys.stderr if to_stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDE, highlight=False)


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the plugin of the app and ``--json``; errors of ours end it with one line and exit code 1."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
    @click.pass_context
    @functools.wraps(function)
    def wrapper(context: click.Context, *args: Any, **kwargs: Any) -> Any:
        try:
            app = context.obj.app
            cloacina = getattr(app, "cloacina", None)
            if cloacina is None:
                raise SettingsError(f"app {app.main!r} has no plugin: write Cloacina(app, database_url=...)")
            return function(cloacina, *args, **kwargs)
        except CloacinaError as error:
            raise click.ClickException(str(error)) from None

    return wrapper


def print_rows(as_json: bool, rows: Sequence[dict[str, Any]], columns: Iterable[str], *, empty: str) -> None:
    if as_json:
        click.echo(json.dumps(rows, default=plain, indent=2))
        return
    if not rows:
        click.echo(empty)
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(cell(row.get(column)) for column in columns))
    console().print(table)


@contextmanager
def progress(what: str, total: int, *, as_json: bool) -> Iterator[Callable[[], None]]:
    """Show how far a long command is, where somebody looks; yield a function that counts one more."""
    console = Console(stderr=True)
    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=console,
        disable=as_json or not console.is_terminal or total < 2,
    ) as bar:  # fmt: skip
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return str(value)


def plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else str(value)
