"""The servers that an example runs on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cloacina_celery import devservers

DATABASE, BROKER = "CLOACINA_DATABASE_URL", "CLOACINA_BROKER_URL"


@contextmanager
def servers() -> Iterator[None]:
    """Have the environment name servers: its own, or embedded ones, which end with the block if it began them."""
    if os.environ.get(DATABASE) or os.environ.get(BROKER):
        # Of one without the other the app says what is missing.
        yield
        return
    is_ours_to_stop = not devservers.is_running()
    try:
        started = devservers.start()
        print(f"embedded servers in {devservers.directory_in_use()}", file=sys.stderr)
        os.environ.update({DATABASE: started.database_url, BROKER: started.broker_url})
        yield
    finally:
        if is_ours_to_stop:
            devservers.stop()
