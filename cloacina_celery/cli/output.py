"""What the commands share: the app's plugin, errors in one line, tables for people and JSON for programs."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from cloacina_celery.errors import CloacinaError, SettingsError, TenantUnfinished
from cloacina_celery.store.driver_errors import refusals_in_words

TRY_AGAIN = 75
"""The exit code that says: something is left, and the same command ends it later. It is EX_TEMPFAIL of sysexits."""

WIDE = 200
"""Columns of a table that goes into a pipe: there is no screen to fit, and an id cut short is of no use."""


def console(*, to_stderr: bool = False) -> Console:
    """Make the console that people read."""
    stream = sys.stderr if to_stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDE, highlight=False)


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the plugin of the app and ``--json``; what is refused ends it with one line, or one object.

    It exits with 1 then, and with `TRY_AGAIN` where running the same command again is what mends it.
    """

    @click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
    @click.pass_context
    @functools.wraps(function)
    def wrapper(context: click.Context, *args: Any, **kwargs: Any) -> Any:
        try:
            app = context.obj.app
            cloacina = getattr(app, "cloacina", None)
            if cloacina is None:
                raise SettingsError(f"app {app.main!r} has no plugin: write Cloacina(app, database_url=...)")
            with refusals_in_words():
                return function(cloacina, *args, **kwargs)
        except CloacinaError as error:
            if kwargs["as_json"]:
                click.echo(json.dumps({"error": type(error).__name__, "message": str(error)}))
            fail(str(error), exit_code=TRY_AGAIN if isinstance(error, TenantUnfinished) else 1)

    return wrapper


def fail(message: str, *, exit_code: int = 1) -> NoReturn:
    """End a command whose output is printed already."""
    raise _Failure(message, exit_code) from None


class _Failure(click.ClickException):
    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        # Click reads it here; that its class has one of the name is its default.
        vars(self)["exit_code"] = exit_code


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
    if isinstance(value, float):
        return _seconds(value)
    return str(value)


def _seconds(value: float) -> str:
    """Say a time that has passed in its greatest two units."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(int(value), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else str(value)
