"""The packaged app: what `celery -A cloacina_celery` runs, configured by the environment alone.

CLOACINA_DATABASE_URL and CLOACINA_BROKER_URL name the servers; where neither is set, the embedded
development servers are used, and said so. CLOACINA_IMPORTS names the modules that define tasks, separated by
commas; they get the app by `from cloacina_celery import app, cloacina`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from celery import Celery

from cloacina_celery import devservers
from cloacina_celery.errors import SettingsError
from cloacina_celery.plugin.app import Cloacina

__all__ = ["build"]

DATABASE = "CLOACINA_DATABASE_URL"
BROKER = "CLOACINA_BROKER_URL"
DATABASE_FILE = "CLOACINA_DATABASE_URL_FILE"
IMPORTS = "CLOACINA_IMPORTS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the environment asks for; no URLs mean the embedded servers."""

    database_url: str | None
    database_url_file: str | None
    broker_url: str | None
    imports: tuple[str, ...]

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> Environment:
        """Read the variables; raises `SettingsError` where they do not fit together."""
        database_url, broker_url = variables.get(DATABASE) or None, variables.get(BROKER) or None
        database_url_file = variables.get(DATABASE_FILE) or None
        if ((database_url or database_url_file) is None) != (broker_url is None):
            given, missing = (BROKER, DATABASE) if broker_url else (DATABASE, BROKER)
            raise SettingsError(
                f"{given} is set and {missing} is not: set both, "
                "or neither to use the embedded development servers"
            )
        imports = tuple(name.strip() for name in variables.get(IMPORTS, "").split(",") if name.strip())
        for name in imports:
            if not all(part.isidentifier() for part in name.split(".")):
                raise SettingsError(
                    f"{IMPORTS} names {name!r}, which is no module: write module names separated by commas, "
                    "such as shop.orders,shop.mails"
                )
        return cls(
            database_url=database_url,
            database_url_file=database_url_file,
            broker_url=broker_url,
            imports=imports,
        )


def build() -> tuple[Celery, Cloacina]:
    """Make the app and the plugin installed on it; starts the embedded servers where no URL is set."""
    environment = Environment.of(os.environ)
    database_url, broker_url = environment.database_url, environment.broker_url
    if broker_url is None:
        servers = devservers.start()
        database_url, broker_url = servers.database_url, servers.broker_url
        print(
            f"cloacina: embedded development servers in {devservers.directory_in_use()}; "
            f"for production set {DATABASE} and {BROKER}",
            file=sys.stderr,
        )
    app = Celery("cloacina_celery", broker=broker_url)
    app.conf.update(
        imports=environment.imports,
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        broker_connection_retry_on_startup=True,
        # Every queue that a worker of this app is given by -Q is a tenant's: there is no other app to ask.
        cloacina_auto_create="*",
    )
    if broker_url.startswith(("redis", "rediss", "sentinel")):
        # kombu polls a key for each priority step of each queue, and a worker may have many tenants' queues.
        app.conf.broker_transport_options = {"priority_steps": [0]}
    return app, Cloacina(app, database_url=database_url)
