"""``cloacina tenant login``, ``logins`` and ``revoke``: a tenant's own way into the database."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import IO

import click

from cloacina_celery.cli.output import command, print_rows
from cloacina_celery.cli.tenants import by_option, say
from cloacina_celery.errors import CloacinaError
from cloacina_celery.plugin.app import Cloacina


@click.command("login")
@click.argument("name")
@click.option("--username", help="By default one that is free.")
@click.option(
    "--password-file",
    type=click.File(),
    help="Where the password stands, '-' for standard input. By default it is 43 random characters.",
)
@click.option(
    "--overlap",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="End the tenant's earlier logins after so long. By default they stay.",
)
@by_option
@command
def tenant_login(
    cloacina: Cloacina,
    name: str,
    username: str | None,
    password_file: IO[str] | None,
    overlap: float | None,
    by: str | None,
    as_json: bool,
) -> None:
    """Make a login that reaches this tenant and no other, and print its URL. It is shown this once."""
    password = None if password_file is None else password_file.read().rstrip("\r\n")
    made = cloacina.tenants.issue_login(name, username=username, password=password, overlap=overlap, by=by)
    if as_json:
        click.echo(json.dumps(asdict(made)))
        return
    # The URL alone goes to standard output, so that it can go straight into a file or a secret.
    click.echo(made.database_url)
    click.echo(f"tenant {name}: this URL is shown once and kept nowhere", file=sys.stderr)


@click.command("logins")
@click.argument("name")
@command
def tenant_logins(cloacina: Cloacina, name: str, as_json: bool) -> None:
    """List a tenant's logins."""
    rows = [asdict(login) for login in cloacina.tenants.logins(name)]
    columns = ("username", "created_at", "created_by", "valid_until")
    print_rows(as_json, rows, columns, empty=f"tenant {name} has no login of its own")


@click.command("revoke")
@click.argument("name")
@click.argument("username")
@by_option
@command
def tenant_revoke(cloacina: Cloacina, name: str, username: str, by: str | None, as_json: bool) -> None:
    """End one of a tenant's logins, and its connections, at once."""
    if not cloacina.tenants.revoke_login(name, username, by=by):
        raise CloacinaError(
            f"tenant {name} has no login {username!r}: see `celery -A <app> cloacina tenant logins {name}`"
        )
    say(as_json, name, f"has no login {username} any more", revoked=username)
