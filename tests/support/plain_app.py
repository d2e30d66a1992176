"""A plain Celery app without the plugin, on which the harness tests itself."""

from __future__ import annotations

import os
from pathlib import Path

from celery import Celery

from tests.support.waiting import eventually

app = Celery("plain", broker=os.environ["CLOACINA_BROKER_URL"])
# RabbitMQ has no place for results; `rpc` keeps them in the client's own queue.
app.conf.result_backend = app.conf.broker_url if "redis" in app.conf.broker_url else "rpc://"
app.conf.beat_schedule = {"tick": {"task": "plain.tick", "schedule": 0.2}}


@app.task(name="plain.add")
def add(x: int, y: int) -> int:
    """Return the sum."""
    return x + y


@app.task(name="plain.process_id")
def process_id() -> int:
    """Return the id of the process that runs it."""
    return os.getpid()


@app.task(name="plain.hold")
def hold(directory: str) -> int:
    """Write a file `held` with the process's id, then wait until a file `released` is beside it."""
    place = Path(directory)
    partial = place / "held.partial"
    partial.write_text(str(os.getpid()))
    partial.rename(place / "held")
    eventually((place / "released").exists, 60, "the file that releases this task")
    return os.getpid()


@app.task(name="plain.tick")
def tick() -> None:
    """Do nothing: beat sends it."""
