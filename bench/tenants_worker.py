"""What many tenants cost a worker: its start, its idle time and latency, and the memory of all its processes."""

from __future__ import annotations

import os
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from kombu import Connection

from bench.__main__ import _percentile, _wait

PACE = 0.02
IDLE = 10.0
"""Seconds for which a worker is watched doing nothing."""


def work(
    broker: str, url: str, names: list[str], folder: Path, *, paced: int, minutes: float
) -> dict[str, str]:
    """Start a worker of all tenants and return what it costs.

    Args:
        paced: tasks to measure latency with.
        minutes: for how long all tenants are given work again and again; the memory is printed once a minute.
    """
    from bench.apps import cloacina, durable, durable_noop
    from cloacina_celery.plugin.connections import BoundedConnections

    marks = Path(os.environ["BENCH_MARKS"])
    marks.write_bytes(b"")
    durable.conf.broker_url = url
    # Celery's pools and ours are of the broker before.
    durable._after_fork()
    cloacina.parts.publisher.connections = BoundedConnections(cloacina.parts.kernel)
    sent = 0

    def submit(name: str) -> None:
        nonlocal sent
        with cloacina.tenant(name):
            durable_noop.delay(time.monotonic())
        sent += 1

    rows: dict[str, str] = {}
    with _worker(url, folder / f"{broker}.log") as (worker, started):
        rows["start to ready"] = in_ms(started)
        main = psutil.Process(worker.pid)
        before = _cpu(main)
        time.sleep(IDLE)
        rows["idle, of one core"] = f"{(_cpu(main) - before) / IDLE:.1%}"
        for _ in range(paced):
            submit(random.choice(names))
            time.sleep(PACE)
        waits = sorted(start - at for at, start in _wait(marks, sent, worker))
        rows["idle latency, p50"] = in_ms(_percentile(waits, 50))
        rows["idle latency, p99"] = in_ms(_percentile(waits, 99))
        began = said = time.monotonic()
        rounds = 0
        while rounds < 2 or time.monotonic() - began < minutes * 60:
            for name in names:
                submit(name)
                if rounds >= 2:  # whoever watches for an hour need not have the whole machine
                    time.sleep(PACE)
            _wait(marks, sent, worker)
            rounds += 1
            memory = _memory(main, cloacina)
            if rounds <= 2:
                rows[f"memory when all were touched {rounds} times"] = memory
            if minutes and (time.monotonic() - said >= 60 or rounds == 1):
                said = time.monotonic()
                print(f"{(said - began) / 60:6.1f} minutes, {rounds:4} rounds: {memory}", flush=True)
        rows[f"memory when all were touched {rounds} times"] = memory
    _delete_queues(url, names)
    cloacina.database.dispose()
    return rows


def answers(url: str) -> bool:
    """Tell whether a broker answers."""
    with Connection(url, connect_timeout=2) as connection:
        try:
            connection.ensure_connection(max_retries=1)
        except connection.connection_errors:
            return False
    return True


def in_ms(seconds: float) -> str:
    """Return a duration in words."""
    return f"{seconds * 1000:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


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
    own = _in_mb(main.memory_full_info().uss)
    return f"main {own}, child {children}, backend {backends} (the largest of {len(pids)})"


def _largest(pids: list[int]) -> str:
    sizes = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):  # a backend may have ended since it was listed
            try:
                sizes.append(psutil.Process(pid).memory_full_info().uss)
            except psutil.AccessDenied:
                return "?"
    return _in_mb(max(sizes)) if sizes else "?"  # none of this machine's


def _delete_queues(url: str, names: list[str]) -> None:
    with Connection(url) as connection:
        channel = connection.default_channel
        for name in names:
            channel.queue_delete(name)
            if url.startswith("amqp"):
                channel.exchange_delete(name)


def _in_mb(size: float) -> str:
    return f"{size / 1e6:.0f} MB"
