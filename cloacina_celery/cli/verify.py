"""``cloacina verify``: the chaos run on this system, with tenants of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloacina_celery.cli.output import command, console
from cloacina_celery.core.words import counted
from cloacina_celery.errors import SettingsError
from cloacina_celery.plugin.app import Cloacina
from cloacina_celery.store import catalog, removal, workers

if TYPE_CHECKING:
    from rich.console import Console

    from cloacina_celery.chaos.ground import Ground
    from cloacina_celery.chaos.perform import Names, Options

GUEST = "cloacina_celery.chaos.guest:app"
BROKER_VARIABLES = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL")
"""Celery reads them before any configuration."""


PREFIX = "verify_"
"""Begins the tenants' names: with ``tenant_``, a user's workers that serve ``tenant_*`` would take their messages."""


@click.command("verify")
@click.option("--seconds", type=float, default=60, show_default=True, help="Time in which faults strike.")
@click.option("--executions", type=int, default=500, show_default=True, help="How many are submitted.")
@click.option("--tenants", type=int, default=4, show_default=True, help="Tenants that it makes and drops.")
@click.option("--workers", type=int, default=2, show_default=True, help="Workers of two processes each.")
@click.option("--seed", type=int, help="Of the plan and the faults; drawn unless given.")
@click.option("--every", type=float, default=4, show_default=True, help="Mean seconds between faults.")
@click.option("--calm", type=float, default=1, show_default=True, help="Seconds before the first fault.")
@click.option("--fault", "faults", multiple=True, help="Only this kind of fault; repeatable.")
@click.option("--kind", "kinds", multiple=True, help="Only this kind of execution; repeatable.")
@click.option("--quick", is_flag=True, help="Short leases and sweeps instead of the app's own.")
@click.option("--keep", is_flag=True, help="Keep the logs of a clean run too.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@command
@click.pass_context
def verify(
    context: click.Context,
    /,
    cloacina: Cloacina,
    as_json: bool,
    yes: bool,
    seed: int | None,
    quick: bool,
    keep: bool,
    **chosen: Any,
) -> None:
    """Break things around tenants of its own for a while, then check that nothing was lost or doubled.

    It uses this app's database, broker and settings, and workers and beats that it starts itself. Everything it
    kills, cuts, locks or empties is its own. Exit code 0 means that the check found nothing.
    """
    if importlib.util.find_spec("psutil") is None:
        raise SettingsError("verify needs psutil: pip install 'cloacina-celery[verify]'")
    spec = context.find_root().params.get("app")
    if not isinstance(spec, str):
        raise SettingsError(
            "verify starts workers of its own: name the app, as in `celery -A proj cloacina verify`"
        )
    # Here, so that other commands do not wait for what only this one needs.
    from cloacina_celery.chaos.perform import Names, Options

    options = Options(
        seed=secrets.randbelow(10**6) if seed is None else seed, is_quick=quick, keeps_logs=keep, **chosen
    )
    names = Names.of(secrets.token_hex(3), options.tenants, PREFIX)
    database = cloacina.database.url.render_as_string()
    click.echo(
        f"verify makes the tenants {names.tenants[0]} to {names.tenants[-1]} in {database}, runs "
        f"{counted(options.executions, 'execution')} of its own in them on {counted(options.workers, 'worker')} "
        f"that it starts, breaks these for {options.seconds:g} s, and drops the tenants; nothing else is touched",
        err=as_json,
    )
    if not yes:
        click.confirm("Go on?", abort=True, err=True)
    is_clean = _verify(cloacina, spec, options, names, console(to_stderr=as_json))
    if as_json:
        click.echo(json.dumps({"clean": is_clean, "seed": options.seed}))
    if not is_clean:
        context.exit(1)


def _verify(cloacina: Cloacina, spec: str, options: Options, names: Names, out: Console) -> bool:
    from cloacina_celery.chaos.ground import Ground, proxied
    from cloacina_celery.chaos.perform import Subject, leave_folder, new_folder, perform

    app = cloacina.app
    direct = Ground(
        database_url=cloacina.database.url.render_as_string(hide_password=False),
        broker_url=app.connection_for_write().as_uri(include_password=True),
    )
    cloacina.database.dispose()
    folder: Path = new_folder(options, out)
    with proxied(direct) as ground:
        database_url = ground.package_database_url
        # The workers are given their tenants: none is made because its queue is consumed.
        settings = {"database_url": database_url, "auto_create": ""}
        environment = {"CHAOS_APP": spec}
        if ground.broker_proxy is not None:
            environment |= dict.fromkeys(BROKER_VARIABLES, ground.package_broker_url)

        def load() -> Any:
            from cloacina_celery.chaos.adopt import adopt

            return adopt(app, json.loads(os.environ["CHAOS_SETTINGS"]), names.tenants)

        subject = Subject(spec=GUEST, load=load, settings=settings, environment=environment)
        try:
            is_clean = perform(options, ground, names, subject, folder, out)
        finally:
            _clean_up(cloacina, direct, names)
    leave_folder(options, folder, out, is_clean=is_clean)
    return is_clean


def _clean_up(cloacina: Cloacina, direct: Ground, names: Names) -> None:
    cloacina.parts.kernel.override({"database_url": direct.database_url})
    for tenant in names.tenants:
        if catalog.exists(cloacina.database, tenant):
            cloacina.tenants.drop(tenant, now=True)
    with cloacina.database.statement() as cursor:
        workers.forget_all_of(cursor, names.tenants)
        removal.forget(cursor, names.tenants)
    cloacina.database.dispose()
