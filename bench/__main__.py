"""Print how fast this package is beside plain Celery: ``python -m bench [--tasks N] [--rounds N]``.

Both run the same no-op tasks on the same broker with the same pool, in alternating rounds, so that a machine
that slows down slows both. The ratio of each pair of rounds is taken, and the median pair is quoted.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from rich.console import Console
from rich.table import Table

PACE = 0.02
"""Seconds between two submissions while latency is measured: the worker is idle most of the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two things compared."""

    name: str
    app: str
    queue: str
    submit: Callable[[], object]
    purge: Callable[[], object]
    clean_up: Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round of one side measured, in tasks per second and seconds."""

    submitted: float
    run: float
    latencies: list[float]


def main() -> int:
    """Run the benchmark and print its tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tasks", type=int, default=3000, help="tasks a round (default: %(default)s)")
    options.add_argument("--rounds", type=int, default=5, help="rounds of each side (default: %(default)s)")
    options.add_argument(
        "--paced", type=int, default=300, help="tasks to measure latency with (default: %(default)s)"
    )
    options.add_argument(
        "--concurrency", type=int, nargs="+", default=[2, 4], help="pool sizes (default: 2 4)"
    )
    chosen = options.parse_args()
    _find_servers()
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder, "marks")
        os.environ["BENCH_MARKS"] = str(marks)
        os.environ["BENCH_RUN"] = uuid4().hex[:8]
        sides = _sides()
        for concurrency in chosen.concurrency:
            rounds: dict[str, list[Round]] = {side.name: [] for side in sides}
            for number in range(chosen.rounds):
                # Whoever goes second finds the caches as the first left them, so the order alternates too.
                for side in sides if number % 2 == 0 else sides[::-1]:
                    rounds[side.name].append(
                        _round(side, marks, concurrency, tasks=chosen.tasks, paced=chosen.paced)
                    )
            _print(concurrency, chosen.tasks, rounds)
        for side in sides:
            side.clean_up()
    return 0


def _find_servers() -> None:
    database_url, broker_url = (os.environ.get(f"CLOACINA_{name}_URL") for name in ("DATABASE", "BROKER"))
    if not database_url or not broker_url:
        from cloacina_celery import devservers

        # Of the two that it starts, the one whose place is taken stays idle.
        servers = devservers.start()
        os.environ["CLOACINA_DATABASE_URL"] = database_url or servers.database_url
        os.environ["CLOACINA_BROKER_URL"] = broker_url or servers.broker_url


def _sides() -> list[Side]:
    from bench import apps

    apps.cloacina.tenants.create(apps.TENANT)

    def submit_durable() -> None:
        with apps.cloacina.tenant(apps.TENANT):
            apps.durable_noop.delay(time.monotonic())

    def purge(app: object, queue: str) -> None:
        with app.connection_for_write() as connection:  # type: ignore[attr-defined]  # Celery is untyped
            connection.default_channel.queue_declare(queue=queue)
            connection.default_channel.queue_purge(queue)

    def purge_durable() -> None:
        purge(apps.durable, apps.TENANT)
        # A fresh tenant each round: an ever longer table would slow later rounds and not earlier ones.
        apps.cloacina.tenants.drop(apps.TENANT)
        apps.cloacina.tenants.create(apps.TENANT)

    return [
        Side(
            name="plain Celery", app="bench.apps:plain", queue=apps.PLAIN_QUEUE,
            submit=lambda: apps.plain_noop.delay(time.monotonic()),
            purge=lambda: purge(apps.plain, apps.PLAIN_QUEUE),
            clean_up=lambda: purge(apps.plain, apps.PLAIN_QUEUE),
        ),
        Side(
            name="cloacina_celery", app="bench.apps:durable", queue=apps.TENANT,
            submit=submit_durable, purge=purge_durable,
            clean_up=lambda: apps.cloacina.tenants.drop(apps.TENANT),
        ),
    ]  # fmt: skip


def _round(side: Side, marks: Path, concurrency: int, *, tasks: int, paced: int) -> Round:
    side.purge()
    marks.write_bytes(b"")
    began = time.monotonic()
    for _ in range(tasks):
        side.submit()
    submitted = tasks / (time.monotonic() - began)
    with _worker(side, concurrency) as worker:
        starts = sorted(start for _, start in _wait(marks, tasks, worker))
        # The first tenth is left out: children that warm up are no one's speed.
        warm = starts[tasks // 10 :]
        run = (len(warm) - 1) / (warm[-1] - warm[0])
        for _ in range(paced):
            side.submit()
            time.sleep(PACE)
        latencies = [start - sent for sent, start in _wait(marks, tasks + paced, worker)[tasks:]]
    return Round(submitted=submitted, run=run, latencies=latencies)


@contextmanager
def _worker(side: Side, concurrency: int) -> Iterator[subprocess.Popen[bytes]]:
    worker = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", side.app, "worker", "-Q", side.queue, "-c", str(concurrency),
         "-l", "WARNING", "--without-gossip", "--without-mingle", "-n", f"bench-{concurrency}@%h"],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    try:
        yield worker
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(timeout=30)


def _wait(marks: Path, number: int, worker: subprocess.Popen[bytes]) -> list[tuple[float, float]]:
    from bench.apps import MARK

    deadline = time.monotonic() + 300
    while marks.stat().st_size < number * MARK.size:
        if worker.poll() is not None:
            raise SystemExit(f"the worker ended with exit code {worker.returncode}")
        if time.monotonic() > deadline:
            raise SystemExit(f"only {marks.stat().st_size // MARK.size} of {number} tasks ran within 300 s")
        time.sleep(0.02)
    return list(MARK.iter_unpack(marks.read_bytes()))


def _print(concurrency: int, tasks: int, rounds: dict[str, list[Round]]) -> None:
    plain, ours = rounds["plain Celery"], rounds["cloacina_celery"]
    table = Table(
        title=f"{tasks} no-op tasks a round, {len(ours)} rounds, prefork, concurrency {concurrency}"
    )
    for column in ("", "submitted/s", "run/s", "latency p50", "p99"):
        table.add_column(column, justify="left" if not column else "right")
    for name, side in rounds.items():
        latencies = sorted(latency for one in side for latency in one.latencies)
        table.add_row(
            name,
            f"{statistics.median(one.submitted for one in side):,.0f}",
            f"{statistics.median(one.run for one in side):,.0f}",
            f"{_percentile(latencies, 50) * 1000:.1f} ms",
            f"{_percentile(latencies, 99) * 1000:.1f} ms",
        )
    table.add_row(
        "ratio",
        f"{statistics.median(b.submitted / a.submitted for a, b in zip(plain, ours, strict=True)):.2f}",
        f"{statistics.median(b.run / a.run for a, b in zip(plain, ours, strict=True)):.2f}",
    )
    Console(width=100 if not sys.stdout.isatty() else None).print(table)


def _percentile(ordered: list[float], percent: int) -> float:
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


if __name__ == "__main__":
    sys.exit(main())
