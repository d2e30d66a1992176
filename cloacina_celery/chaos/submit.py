"""Submitting a run's jobs, each until it is known to be there."""

from __future__ import annotations

import time
from contextlib import suppress
from random import Random
from typing import Any

from celery import chain
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from cloacina_celery.chaos.plan import WITH_CALLBACK, Job, Plan
from cloacina_celery.chaos.tasks import NOTE, POISON, WORK
from cloacina_celery.errors import DatabaseUnavailable

GHOSTS = 0.3
"""The share of transactions that are rolled back once before they are committed with another execution."""

Unknown = (DatabaseUnavailable, DBAPIError)
"""What a submission raises whose fate is not known; the same id makes trying again safe."""


class RolledBack(Exception):
    """The driver rolls its own transaction back."""


class Submissions:
    """Submit jobs through an app, and remember what was rolled back and what had to be asked twice.

    Args:
        plain_queue: where the messages of plain tasks that follow an execution are sent.
    """

    def __init__(self, app: Any, plan: Plan, random: Random, plain_queue: str) -> None:
        self._app = app
        self._plan = plan
        self._random = random
        self._plain_queue = plain_queue
        self.ghosts: list[tuple[str, str]] = []
        self.unknown = 0
        """Submissions whose answer was lost, and that were made again."""

    def submit(self, job: Job) -> None:
        """Submit a job, however often the database has to be asked."""
        self._plan.submitted.append(job)
        is_ghostly = job.kind == "in a transaction" and self._random.random() < GHOSTS
        while True:
            try:
                if is_ghostly:
                    self._submit_ghost(job.tenant)
                    is_ghostly = False
                self._submit(job)
                return
            except ProgrammingError:
                raise  # a mistake stays one, however often it is tried
            except Unknown:
                self.unknown += 1
                time.sleep(0.1)

    def _submit(self, job: Job) -> None:
        cloacina, work = self._app.cloacina, self._app.tasks[WORK]
        with cloacina.tenant(job.tenant):
            if job.kind == "chain":
                chain(*(work.si(step.order).set(task_id=step.id) for step in job.steps)).apply_async()
                return
            step, options = job.steps[0], dict[str, Any](job.options)
            task = self._app.tasks[POISON] if job.kind == "poison" else work
            if job.kind == WITH_CALLBACK:
                options["link"] = self._app.tasks[NOTE].si(step.id).set(queue=self._plain_queue)
            if job.kind != "in a transaction":
                task.apply_async((step.order,), task_id=step.id, **options)
                return
            with cloacina.session() as session:
                _place_order(session, step.id)
                task.apply_async((step.order,), task_id=step.id)
                # Whoever rings before the commit is heard before there is a row.
                time.sleep(0.03)

    def _submit_ghost(self, tenant: str) -> None:
        ghost = self._plan.job("ghost", tenant).steps[0]
        self.ghosts.append((ghost.id, tenant))
        with suppress(RolledBack), self._app.cloacina.session(tenant) as session:
            _place_order(session, ghost.id)
            self._app.tasks[WORK].apply_async((ghost.order,), task_id=ghost.id)
            raise RolledBack


def _place_order(session: Any, execution_id: str) -> None:
    session.execute(
        text("INSERT INTO chaos_orders VALUES (:id) ON CONFLICT DO NOTHING"), {"id": execution_id}
    )
