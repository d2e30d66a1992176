"""Two apps on one broker with the same no-op task: one plain, one durable."""

from __future__ import annotations

import os
import struct
import time

from celery import Celery

from cloacina_celery import Cloacina

RUN = os.environ["BENCH_RUN"]
"""Names this run's queues: a worker that an interrupted run left behind must not take part in this one."""
TENANT = f"tenant_bench_{RUN}"
PLAIN_QUEUE = f"bench_plain_{RUN}"
MARK = struct.Struct("dd")
"""What each run leaves: the monotonic instants of its submission and of its start."""

_OPTIONS = {
    "task_ignore_result": True,
    "worker_hijack_root_logger": False,
    "broker_transport_options": {"priority_steps": [0]},
}


def _leave_mark(sent_at: float) -> None:
    # One small append is atomic and costs both apps the same two microseconds.
    global _marks
    if _marks is None:
        _marks = os.open(os.environ["BENCH_MARKS"], os.O_WRONLY | os.O_APPEND)
    os.write(_marks, MARK.pack(sent_at, time.monotonic()))


_marks: int | None = None

plain = Celery("bench_plain", broker=os.environ["CLOACINA_BROKER_URL"])
plain.conf.update(_OPTIONS, task_default_queue=PLAIN_QUEUE)

durable = Celery("bench_durable", broker=os.environ["CLOACINA_BROKER_URL"])
durable.conf.update(_OPTIONS)
cloacina = Cloacina(durable, database_url=os.environ["CLOACINA_DATABASE_URL"])


@plain.task(shared=False)
def plain_noop(sent_at: float) -> None:
    """Do nothing, plainly."""
    _leave_mark(sent_at)


@cloacina.task(shared=False)
def durable_noop(sent_at: float) -> None:
    """Do nothing, durably."""
    _leave_mark(sent_at)
