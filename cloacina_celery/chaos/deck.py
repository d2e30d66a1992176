"""All faults, with what each needs and how often it is drawn."""

from __future__ import annotations

from cloacina_celery.chaos import faults, orders, outages
from cloacina_celery.chaos.faults import Fault
from cloacina_celery.chaos.ground import BROKER_PROXY, DATABASE_PROXY, OWN_DATABASE, OWN_SERVERS

_SERVERS = frozenset({OWN_SERVERS})
_DATABASE = frozenset({OWN_DATABASE})
_TO_DATABASE = frozenset({DATABASE_PROXY})
_TO_BROKER = frozenset({BROKER_PROXY})

FAULTS = [
    Fault(kind="kill -9 of a child", strike=faults.kill_child, weight=3),
    Fault(kind="kill -9 of a worker", strike=faults.kill_main, weight=3),
    Fault(kind="power loss of a worker", strike=faults.kill_machine),
    Fault(kind="freeze past the lease", strike=faults.freeze, weight=4),
    Fault(kind="SIGTERM and replacement", strike=faults.shut_down_warmly),
    Fault(kind="SIGQUIT and replacement", strike=faults.shut_down_coldly),
    Fault(kind="children recycled", strike=faults.recycle_children),
    Fault(kind="restart of beat", strike=faults.restart_beat, weight=1),
    Fault(kind="death by the task itself", strike=orders.die_while_running, weight=3),
    Fault(kind="hard time limit", strike=orders.run_into_hard_limit, weight=1),
    Fault(kind="soft time limit", strike=orders.run_into_soft_limit, weight=1),
    Fault(kind="GIL held past the lease", strike=orders.hold_gil, weight=1),
    Fault(kind="cancel", strike=orders.cancel_running),
    Fault(kind="revoke with terminate", strike=orders.revoke_running),
    Fault(kind="one message in ten lost", strike=faults.lose_some),
    Fault(kind="queue emptied", strike=faults.lose_queue),
    Fault(kind="all queues emptied", strike=faults.lose_all_queues, weight=1),
    Fault(kind="messages repeated", strike=faults.repeat, weight=3),
    Fault(kind="messages of old attempts", strike=faults.ring_for_old_attempts),
    Fault(kind="the broker refuses connections", strike=outages.refuse_broker, needs=_TO_BROKER),
    Fault(kind="database connections cut", strike=faults.cut_connections, weight=3),
    Fault(kind="tenant locked", strike=faults.lock_tenant, weight=1),
    Fault(kind="Postgres refuses connections", strike=outages.refuse_database, needs=_TO_DATABASE),
    Fault(kind="Postgres falls silent", strike=outages.silence_database, weight=1, needs=_TO_DATABASE),
    Fault(kind="commits whose answer is lost", strike=outages.lose_answers, weight=3, needs=_TO_DATABASE),
    Fault(kind="Postgres at its connection limit", strike=outages.fill_database, weight=1, needs=_DATABASE),
    Fault(kind="crash of Postgres", strike=outages.crash_database, needs=_SERVERS),
    Fault(kind="restart of both servers", strike=outages.restart_servers, weight=1, needs=_SERVERS),
]
