"""Print what many tenants cost: ``python -m bench.tenants [--tenants N] [--brokers redis rabbitmq] [--minutes M]``.

It makes a database of its own on the server of ``CLOACINA_DATABASE_URL``, and drops it at the end. RabbitMQ is
that of ``CLOACINA_TEST_AMQP_URL``, by default on this machine, and is left out where none answers.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psycopg2
from rich.console import Console
from rich.table import Table
from sqlalchemy.engine import make_url

from bench import tenants_database, tenants_worker
from bench.__main__ import _find_servers
from bench.tenants_worker import in_ms

BOUNDS = {
    "create, p50": 0.05,
    "migrate, nothing to do, all": 1.0,
    "sweep of idle tenants, all": 1.0,
    "a sweep of idle tenants that beat asks for": 1.0,
    "a poll of idle tenants": 0.1,
    "dead worker of all: its execution goes on": 1.0,
}
"""What we mean to hold, in seconds."""


def main() -> int:
    """Run the benchmark and print its tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tenants", type=int, default=1000, help="how many (default: %(default)s)")
    options.add_argument("--paced", type=int, default=200, help="tasks to measure latency with")
    options.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        help="for how long each worker is given work, to watch its memory",
    )
    options.add_argument("--brokers", nargs="*", choices=["redis", "rabbitmq"], default=["redis", "rabbitmq"])
    chosen = options.parse_args()
    _find_servers()
    with tempfile.TemporaryDirectory() as folder, _database():
        os.environ["BENCH_MARKS"] = str(Path(folder, "marks"))
        os.environ["BENCH_RUN"] = secrets.token_hex(4)
        from bench.apps import cloacina

        names = [f"tenant_f{number:05}" for number in range(chosen.tenants)]
        for title, measure in {
            "the catalog": tenants_database.create,
            "sweeps": tenants_database.sweep,
            "recovery": tenants_database.lose_a_worker,
        }.items():
            _show_seconds(f"{len(names):,} tenants: {title}", measure(cloacina, names))
        cloacina.database.dispose()
        urls = {
            "redis": os.environ["CLOACINA_BROKER_URL"],
            "rabbitmq": os.environ.get("CLOACINA_TEST_AMQP_URL", "amqp://guest:guest@127.0.0.1:5672//"),
        }
        for broker in chosen.brokers:
            if tenants_worker.answers(urls[broker]):
                rows = tenants_worker.work(
                    broker, urls[broker], names, Path(folder), paced=chosen.paced, minutes=chosen.minutes
                )
                _show(f"{len(names):,} tenants: a worker of two processes on {broker}", rows)
            else:
                print(f"no {broker} answers", file=sys.stderr)
        # The last, as it leaves behind a revision that no version of the package has.
        _show_seconds(f"{len(names):,} tenants: migration", tenants_database.migrate_all(cloacina, names))
        cloacina.database.dispose()
    return 0


@contextmanager
def _database() -> Iterator[None]:
    given = os.environ["CLOACINA_DATABASE_URL"]
    name = f"bench_tenants_{secrets.token_hex(4)}"
    url = make_url(given).set(drivername="postgresql")

    def administer(statement: str) -> list[tuple[str]]:
        connection = psycopg2.connect(url.render_as_string(hide_password=False))
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            found: list[tuple[str]] = cursor.fetchall() if cursor.description else []
        connection.close()
        return found

    administer(f"CREATE DATABASE {name}")
    # Roles are the cluster's, and would outlive the database that they are for.
    ((oid,),) = administer(f"SELECT oid FROM pg_database WHERE datname = '{name}'")
    roles = (
        f"FROM pg_roles WHERE shobj_description(oid, 'pg_authid') LIKE 'cloacina_celery, database {oid}:%'"
    )
    os.environ["CLOACINA_DATABASE_URL"] = url.set(database=name).render_as_string(hide_password=False)
    try:
        yield
    finally:
        administer(f"DROP DATABASE {name} WITH (FORCE)")
        for (statement,) in administer(f"SELECT format('DROP ROLE %I', rolname) {roles}"):
            administer(statement)


def _show_seconds(title: str, rows: Mapping[str, float]) -> None:
    table = Table("", "measured", "bound", title=title)
    for what, seconds in rows.items():
        bound = BOUNDS.get(what)
        table.add_row(what, in_ms(seconds), "" if bound is None else in_ms(bound))
    _print(table)


def _show(title: str, rows: Mapping[str, str]) -> None:
    table = Table("", "measured", title=title)
    for what, measured in rows.items():
        table.add_row(what, measured)
    _print(table)


def _print(table: Table) -> None:
    Console(width=110 if not sys.stdout.isatty() else None).print(table)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
