"""An app that is configured by the environment alone, as one whose workers have their tenants' own logins."""

from __future__ import annotations

import os
import time

from celery import Celery
from sqlalchemy import text

from cloacina_celery import Cloacina

app = Celery("own", broker=os.environ["CLOACINA_BROKER_URL"])
app.conf.broker_connection_retry_on_startup = True
cloacina = Cloacina(app, isolation=os.environ.get("CLOACINA_ISOLATION"))


@cloacina.task(name="own.write")
def write(key: int) -> str:
    """Write a line into the tenant's table, slowly, and return the login that did."""
    with cloacina.session() as session:
        session.execute(text("INSERT INTO lines (key) VALUES (:key)"), {"key": key})
        time.sleep(0.02)
        login: str = session.execute(text("SELECT session_user::text")).scalar_one()
        return login
