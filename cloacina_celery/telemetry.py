"""Every log wording of the package in one table, so that operators can search for and alert on them."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("cloacina")

_WORDINGS: dict[str, tuple[int, str]] = {
    "worker.registered": (logging.INFO, "worker %(worker_id)s serves tenants %(tenants)s"),
    "worker.stopped": (
        logging.INFO,
        "worker %(worker_id)s stopped; gave %(released)s running executions back",
    ),
    "worker.dead": (
        logging.WARNING,
        "worker %(worker_id)s (%(name)s) is dead: %(reason)s; recovering its executions",
    ),
    "selection.left_out": (
        logging.ERROR,
        (
            "tenant %(tenant)s is selected and not served: its schema is at revision %(found)s, this worker works with "
            "%(expected)s; migrate it (`celery -A <app> cloacina schema migrate %(tenant)s`) or upgrade this worker"
        ),
    ),
    "tenant.created": (logging.INFO, "tenant %(tenant)s created"),
    "tenant.changed": (logging.INFO, "tenant %(tenant)s is %(state)s now, by %(by)s"),
    "tenant.gone": (logging.ERROR, "queue %(tenant)s is not consumed: %(error)s"),
    "isolation.fallback": (
        logging.WARNING,
        (
            "tenants are kept apart by search_path alone: login %(login)s may not create roles "
            "(ALTER ROLE ... CREATEROLE), or set cloacina_isolation to 'schema' to say that this is wanted"
        ),
    ),
    "isolation.superuser": (
        logging.WARNING,
        (
            "login %(login)s is a superuser: a task that says RESET ROLE may do anything; give the app a login of "
            "its own"
        ),
    ),
    "isolation.inherits": (
        logging.WARNING,
        (
            "login %(login)s has its tenants' rights also where no tenant is bound: ALTER ROLE ... NOINHERIT "
            "takes them"
        ),
    ),
    "isolation.left": (
        logging.WARNING,
        (
            "tenant %(tenant)s has no role and is kept apart by search_path alone: "
            "run `celery -A <app> cloacina tenant isolate %(tenant)s`"
        ),
    ),
    "isolation.public": (
        logging.WARNING,
        (
            "every role may create functions in %(schema)s, which is a tenant here: "
            "REVOKE CREATE ON SCHEMA public FROM PUBLIC"
        ),
    ),
    "isolation.kept": (
        logging.WARNING,
        "%(object)s in tenant %(tenant)s is not the login's to hand over: the tenant's sessions may not have access",
    ),
    "broker.refused": (
        logging.WARNING,
        (
            "the broker takes no messages (%(error)s) and is left alone for %(seconds).1f s: executions are committed "
            "meanwhile, and their messages leave when it is back"
        ),
    ),
    "broker.back": (logging.INFO, "the broker takes messages again, after %(seconds).1f s"),
    "queue.refused": (
        logging.ERROR,
        (
            "the broker refuses queue %(queue)s (%(error)s): its executions are committed, and sent when it takes "
            "them. If the queue was made with other arguments than this app declares, such as another "
            "x-queue-type, give all processes the same ones, or delete the queue while nobody consumes it; it is "
            "made anew and filled from the rows. Tried again in %(seconds).0f s"
        ),
    ),
    "callback.unsent": (
        logging.WARNING,
        (
            "the message of plain task %(task)s, which is to follow a durable one, is kept (%(error)s); "
            "the sweep will send it"
        ),
    ),
    "message.unsendable": (
        logging.ERROR,
        (
            "the message of execution %(execution_id)s in %(tenant)s cannot be sent (%(error)s); its row waits, the "
            "others go on"
        ),
    ),
    "task.unknown": (
        logging.ERROR,
        (
            "no module of this worker defines task %(task)s of execution %(execution_id)s: import it, or cancel the "
            "execution; its row waits"
        ),
    ),
    "claim.declined": (
        logging.INFO,
        "message for attempt %(attempt)s of execution %(execution_id)s in %(tenant)s declined: stale or duplicate",
    ),
    "claim.held": (
        logging.INFO,
        (
            "message for attempt %(attempt)s of execution %(execution_id)s in %(tenant)s held back: the tenant starts "
            "nothing now; the row waits, and is sent again"
        ),
    ),
    "tenant.limited": (
        logging.INFO,
        (
            "tenant %(tenant)s: at most %(tasks)s tasks at once, %(rate)s starts per second, paused: %(paused)s, "
            "weight %(weight)s"
        ),
    ),
    "weight.unheeded": (
        logging.WARNING,
        (
            "tenant %(tenant)s has a weight that changes nothing: the broker chooses whose message comes next; "
            "weights work on Redis with kombu's default queue_order_strategy, and on RabbitMQ"
        ),
    ),
    "message.handed_back": (
        logging.INFO,
        (
            "%(number)s messages that have waited for a slot for %(seconds)s s went back to their queues, for whoever "
            "is free: RabbitMQ ends the connection of a worker that keeps one for too long"
        ),
    ),
    "window.shared": (
        logging.INFO,
        (
            "%(held)s more messages are held than the pool has places, most often plain tasks with an ETA: until they "
            "have run all queues share one prefetch window, and a quiet tenant may wait for a noisy one"
        ),
    ),
    "window.each": (logging.INFO, "each queue has its own prefetch window again"),
    "claim.deferred": (
        logging.DEBUG,
        "execution %(execution_id)s in %(tenant)s waits: its tenant is at its limit, or paused",
    ),
    "limits.failed": (
        logging.ERROR,
        "what waits for room in %(tenant)s was not looked at, and will be again: %(error)s",
    ),
    "claim.waiting": (
        logging.WARNING,
        "claim of %(execution_id)s in %(tenant)s waits for the database: %(error)s",
    ),
    "claim.found": (
        logging.WARNING,
        (
            "claim of attempt %(attempt)s of execution %(execution_id)s in %(tenant)s had been given and its answer "
            "lost; it starts now"
        ),
    ),
    "attempt.waiting": (
        logging.WARNING,
        "execution %(execution_id)s in %(tenant)s waits for the database while it runs: %(error)s",
    ),
    "settle.waiting": (
        logging.WARNING,
        (
            "settlement of attempt %(attempt)s of execution %(execution_id)s in %(tenant)s waits for the database: "
            "%(error)s"
        ),
    ),
    "settle.found": (
        logging.WARNING,
        (
            "attempt %(attempt)s of execution %(execution_id)s in %(tenant)s had been settled (%(kind)s) and the "
            "answer lost"
        ),
    ),
    "settle.fenced": (
        logging.ERROR,
        (
            "attempt %(attempt)s of execution %(execution_id)s in %(tenant)s lost its lease before it settled; "
            "its effects were rolled back"
        ),
    ),
    "recover.done": (
        logging.WARNING,
        "execution %(execution_id)s in %(tenant)s lost attempt %(attempt)s: %(reason)s; %(decision)s",
    ),
    "recover.unfollowed": (
        logging.ERROR,
        (
            "execution %(execution_id)s in %(tenant)s is abandoned, and what follows from that (errbacks, the rest of "
            "its chain, its chord) was not done: %(error)s"
        ),
    ),
    "sweep.rung": (logging.INFO, "published %(count)s due executions of %(tenant)s"),
    "sweep.stranded": (
        logging.WARNING,
        "published %(count)s executions of %(tenant)s again: waiting rows outnumber the queue's messages",
    ),
    "sweep.letters": (
        logging.INFO,
        "sent %(count)s messages of plain tasks that were left in the outbox of %(tenant)s",
    ),
    "sweep.pruned": (logging.INFO, "deleted %(count)s executions of %(tenant)s that ended long ago"),
    "sweep.paused": (
        logging.ERROR,
        "no worker and no lease is judged for %(seconds)s s, since this view may be wrong: %(reason)s",
    ),
    "sweep.resumed": (
        logging.WARNING,
        "workers and leases are judged again, after a pause because %(reason)s",
    ),
    "sweep.failed": (logging.ERROR, "sweep of %(tenant)s failed, the others go on: %(error)s"),
    "message.refused": (
        logging.ERROR,
        "message %(execution_id)s for %(task)s refused before user code: %(error)s",
    ),
    "keeper.trouble": (logging.ERROR, "background work failed and is tried again: %(error)s"),
    "heartbeat.failed": (logging.WARNING, "leases in %(tenant)s were not extended: %(error)s"),
    "messages.kept": (
        logging.WARNING,
        "messages that were delivered and not started could not be put back (%(error)s); rows ring again",
    ),
    "liveness.taken": (
        logging.WARNING,
        "somebody holds the worker's liveness lock; its heartbeat and its leases speak for it: %(error)s",
    ),
    "migrate.waiting": (
        logging.WARNING,
        "waiting for the migration lock, which %(holder)s has held for more than %(seconds)s s",
    ),
    "liveness.lost": (logging.WARNING, "liveness connection lost, opening a new one: %(error)s"),
}


EVENTS = {name: (level, f"{name}: {wording}") for name, (level, wording) in _WORDINGS.items()}


def log(event: str, **fields: Any) -> None:
    """Log one named event with its fields; never arguments or results of tasks."""
    level, wording = EVENTS[event]
    if logger.isEnabledFor(level):
        logger.log(level, wording, fields, extra={"cloacina_event": event, "cloacina": fields})
