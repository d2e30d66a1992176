"""A Celery app whose tasks run into their time limits, to see what each pool makes of them."""

from __future__ import annotations

import os
import time

from celery import Celery

from cloacina_celery import Cloacina, RetryPolicy

app = Celery("limits", broker=os.environ["CLOACINA_BROKER_URL"])
cloacina = Cloacina(app, database_url=os.environ["CLOACINA_DATABASE_URL"])

ONCE = RetryPolicy(max_attempts=1)


@cloacina.task(name="limits.hard", time_limit=1, retry=ONCE)
def hard() -> str:
    """Take longer than the hard limit."""
    time.sleep(3)
    return "ran on"


@cloacina.task(name="limits.soft", soft_time_limit=1, retry=ONCE)
def soft() -> str:
    """Take longer than the soft limit."""
    time.sleep(3)
    return "ran on"
