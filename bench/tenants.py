"""Print what many tenants cost: ``python -m bench.tenants [--tenants N] [--brokers redis rabbitmq]``.

It makes a database of its own on the server of ``CLOACINA_DATABASE_URL``, and drops it at the end. RabbitMQ is
that of ``CLOACINA_TEST_AMQP_URL``, by default on this machine, and is left out where none answers.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg2
from kombu import Connection
from rich.console import Console
from rich.table import Table
from sqlalchemy.engine import make_url

from bench.__main__ import _find_servers, _percentile, _wait

PACE = 0.02
IDLE = 10.0
"""Seconds for which a worker is watched doing nothing."""

BOUNDS = {
    "create, p50": 0.05,
    "migrate, nothing to do, all": 1.0,
    "sweep of idle tenants, all": 1.0,
}
"""What we mean to hold, in seconds."""


def main() -> int:
    """Run the benchmark and print its tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tenants", type=int, default=1000, help="how many (default: %(default)s)")
    options.add_argument("--paced", type=int, default=200, help="tasks to measure latency with")
    options.add_argument("--brokers", nargs="*", choices=["redis", "rabbitmq"], default=["redis", "rabbitmq"])
    chosen = options.parse_args()
    _find_servers()
    with tempfile.TemporaryDirectory() as folder, _database():
        os.environ["BENCH_MARKS"] = str(Path(folder, "marks"))
        os.environ["BENCH_RUN"] = secrets.token_hex(4)
        names = [f"tenant_f{number:05}" for number in range(chosen.tenants)]
        _print_catalog(names)
        urls = {
            "redis": os.environ["CLOACINA_BROKER_URL"],
            "rabbitmq": os.environ.get("CLOACINA_TEST_AMQP_URL", "amqp://guest:guest@127.0.0.1:5672//"),
        }
        for broker in chosen.brokers:
            if _answers(urls[broker]):
                _print_worker(broker, urls[broker], names, chosen.paced, Path(folder))
            else:
                print(f"no {broker} answers", file=sys.stderr)
    return 0


@contextmanager
def _database() -> Iterator[None]:
    given = os.environ["CLOACINA_DATABASE_URL"]
    name = f"bench_tenants_{secrets.token_hex(4)}"
    url = make_url(given).set(drivername="postgresql")

    def administer(statement: str) -> None:
        connection = psycopg2.connect(url.render_as_string(hide_password=False))
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
        connection.close()

    administer(f"CREATE DATABASE {name}")
    os.environ["CLOACINA_DATABASE_URL"] = url.set(database=name).render_as_string(hide_password=False)
    try:
        yield
    finally:
        administer(f"DROP DATABASE {name} WITH (FORCE)")


def _print_catalog(names: list[str]) -> None:
    from bench.apps import cloacina
    from cloacina_celery.store import fleet, limits, migrate

    database = cloacina.database
    creations = [_timed(lambda name=name: cloacina.tenants.create(name)) for name in names]
    reaper = cloacina.parts.recovery.reaper()
    reaper.sweep_all()  # looks for old executions too, which it does once an hour

    def look() -> None:
        with database.statement() as cursor:
            limits.paused(cursor)

    def check() -> None:
        with database.statement() as cursor:
            migrate.revisions_of(cursor, names)

    rows = {
        "create, p50": statistics.median(creations),
        "create, p99": _percentile(sorted(creations), 99),
        "migrate, nothing to do, all": _timed(lambda: fleet.stale(database)),
        "revisions read, all": _timed(check),
        "sweep of idle tenants, all": _timed(reaper.sweep_all),
        "one look at every tenant": _timed(lambda: reaper.sweep(names)),
        "look into the catalog": _timed(look),
    }
    table = Table("", "measured", "bound", title=f"{len(names):,} tenants: the database")
    for what, seconds in rows.items():
        bound = BOUNDS.get(what)
        table.add_row(what, _in_ms(seconds), "" if bound is None else _in_ms(bound))
    _show(table)
    cloacina.database.dispose()


def _print_worker(broker: str, url: str, names: list[str], paced: int, folder: Path) -> None:
    from bench.apps import cloacina, durable, durable_noop

    marks = Path(os.environ["BENCH_MARKS"])
    marks.write_bytes(b"")
    durable.conf.broker_url = url
    durable._after_fork()  # its pools are of the broker before
    sent = 0

    def submit(name: str) -> None:
        nonlocal sent
        with cloacina.tenant(name):
            durable_noop.delay(time.monotonic())
        sent += 1

    rows: dict[str, str] = {}
    with _worker(url, folder / f"{broker}.log") as (worker, started):
        rows["start to ready"] = _in_ms(started)
        main = psutil.Process(worker.pid)
        before = _cpu(main)
        time.sleep(IDLE)
        rows["idle, of one core"] = f"{(_cpu(main) - before) / IDLE:.1%}"
        for _ in range(paced):
            submit(random.choice(names))
            time.sleep(PACE)
        waits = sorted(start - at for at, start in _wait(marks, sent, worker))
        rows["idle latency, p50"] = _in_ms(_percentile(waits, 50))
        rows["idle latency, p99"] = _in_ms(_percentile(waits, 99))
        for turn in ("once", "twice"):
            for name in names:
                submit(name)
            _wait(marks, sent, worker)
            rows[f"memory when all were touched {turn}"] = _memory(main, cloacina)
    table = Table("", "measured", title=f"{len(names):,} tenants: a worker of two processes on {broker}")
    for what, measured in rows.items():
        table.add_row(what, measured)
    _show(table)
    _delete_queues(url, names)
    cloacina.database.dispose()


@contextmanager
def _worker(url: str, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    began = time.monotonic()
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "bench.apps:durable", "worker", "-Q", "tenant_*", "-c", "2",
             "-l", "INFO", "--without-gossip", "--without-mingle", "-n", f"fleet-{secrets.token_hex(4)}@%h"],
            stdout=output, stderr=output,
            env={**os.environ, "CLOACINA_BROKER_URL": url, "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
    try:
        while b" ready." not in log.read_bytes():
            if worker.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.02)
        yield worker, time.monotonic() - began
    finally:
        worker.terminate()
        worker.wait(timeout=60)


def _cpu(main: psutil.Process) -> float:
    return float(sum(sum(one.cpu_times()[:2]) for one in [main, *main.children(recursive=True)]))


def _memory(main: psutil.Process, cloacina: Any) -> str:
    with cloacina.database.statement() as cursor:
        cursor.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        pids = [pid for (pid,) in cursor.fetchall()]
    backends = _largest(pids)
    children = _largest([child.pid for child in main.children(recursive=True)])
    return f"main {_in_mb(main.memory_full_info().uss)}, child {children}, backend {backends}"


def _largest(pids: list[int]) -> str:
    try:
        return _in_mb(max(psutil.Process(pid).memory_full_info().uss for pid in pids))
    except (psutil.Error, ValueError):
        return "?"  # another machine's, or another user's


def _delete_queues(url: str, names: list[str]) -> None:
    with Connection(url) as connection:
        channel = connection.default_channel
        for name in names:
            channel.queue_delete(name)
            if url.startswith("amqp"):
                channel.exchange_delete(name)


def _answers(url: str) -> bool:
    with Connection(url, connect_timeout=2) as connection:
        try:
            connection.ensure_connection(max_retries=1)
        except connection.connection_errors:
            return False
    return True


def _timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _in_ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def _in_mb(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


def _show(table: Table) -> None:
    Console(width=100 if not sys.stdout.isatty() else None).print(table)


if __name__ == "__main__":
    sys.exit(main())
