"""The app of `make chaos`, which has nothing but the run's own work.

Configured by the environment alone, so that the driver and its workers import the same thing: the two URLs,
CHAOS_SETTINGS (JSON, the plugin's settings), CHAOS_CONF (JSON, Celery's), and what `chaos.tasks` reads.
"""

from __future__ import annotations

import json
import os

from celery import Celery

from cloacina_celery import Cloacina
from cloacina_celery.chaos import tasks

app = Celery("chaos", broker=os.environ["CLOACINA_BROKER_URL"])
app.conf.update(broker_connection_retry_on_startup=True, broker_connection_max_retries=None)
app.conf.update(json.loads(os.environ.get("CHAOS_CONF", "{}")))
cloacina = Cloacina(
    app,
    database_url=os.environ["CLOACINA_DATABASE_URL"],
    **json.loads(os.environ.get("CHAOS_SETTINGS", "{}")),
)
tasks.join(app)
