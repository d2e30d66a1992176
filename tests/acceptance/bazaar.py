"""The app of the acceptance suite: durable tasks that die, fail, retry, replace and call back, and plain ones.

Configured by the environment alone, as `tests.support.shop` is. The BAZAAR_* variables are a deploy: a worker
that is started with other ones runs other code.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from celery import Celery
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.signals import before_task_publish
from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from cloacina_celery import Cloacina, DurableTask, LeaseLost, RetryPolicy
from cloacina_celery.plugin import prefetch
from tests.support import shop_tables
from tests.support.brokers import configure_queues
from tests.support.databases import connect
from tests.support.waiting import eventually

GATE_PATIENCE = 300.0
DATABASE_URL = os.environ["CLOACINA_DATABASE_URL"]
OUTSIDE_URL = os.environ.get("BAZAAR_OUTSIDE_URL", DATABASE_URL)
"""The same database by another way, for what the tests must learn also while the package's own way is cut."""
QUICK = RetryPolicy(max_attempts=3, initial_delay=0.1, backoff="fixed", jitter=False)

app = Celery("bazaar", broker=os.environ["CLOACINA_BROKER_URL"])
app.conf.result_backend = os.environ.get("BAZAAR_RESULT_BACKEND")
app.conf.broker_connection_retry_on_startup = True
app.conf.broker_transport_options = json.loads(os.environ.get("BAZAAR_TRANSPORT_OPTIONS", "{}"))
configure_queues(app)
cloacina = Cloacina(
    app,
    database_url=DATABASE_URL,
    lease_ttl=float(os.environ.get("BAZAAR_LEASE_TTL", "15")),
    heartbeat_interval=float(os.environ.get("BAZAAR_LEASE_TTL", "15")) / 3,
    sweep_interval=float(os.environ.get("BAZAAR_SWEEP_INTERVAL", "10")),
    stranded_after=float(os.environ.get("BAZAAR_STRANDED_AFTER", "10")),
    enable_recovery=os.environ.get("BAZAAR_RECOVERY", "on") == "on",
)
if os.environ.get("BAZAAR_HELD_FOR"):
    prefetch.HELD_FOR = float(os.environ["BAZAAR_HELD_FOR"])
    prefetch.LOOK_INTERVAL = prefetch.HELD_FOR / 4

if os.environ.get("BAZAAR_DIES_SENDING"):

    @before_task_publish.connect(sender="bazaar.plain_record")
    def die_once_sending(**_: Any) -> None:
        """Die where a settlement is committed and the plain message that follows it has not left, once."""
        marker = Path(os.environ["BAZAAR_DIES_SENDING"])
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


if os.environ.get("BAZAAR_OWN_SCHEDULE"):
    app.conf.beat_schedule = {"own": {"task": "bazaar.plain_record", "schedule": 3600.0, "args": ("own",)}}


# --- dying ---


END_OWN_CONNECTION = text(
    "SELECT pg_terminate_backend(pg_backend_pid()) FROM set_config('role', 'none', true)"
)
"""As the login: a tenant's role may not end a superuser's connection, not even its own."""


@cloacina.task(name="bazaar.block", retry=QUICK)
def block(key: str) -> int:
    """Write a note, record the start, wait at the gate of this attempt, then return the attempt."""
    note(key)
    attempt = record(key)
    wait_at_gate(f"{key}-{attempt}")
    return attempt


@cloacina.task(name="bazaar.block_without_effects", retry=QUICK)
def block_without_effects(key: str) -> int:
    """As `block`, without the note."""
    attempt = record(key)
    wait_at_gate(f"{key}-{attempt}")
    return attempt


@cloacina.task(name="bazaar.die_once", retry=QUICK)
def die_once(key: str, how: str) -> int:
    """Die on the first attempt, and return the attempt on the later ones."""
    attempt = record(key)
    if attempt == 1:
        die(how)
    return attempt


@cloacina.task(name="bazaar.poison", retry=QUICK, max_recoveries=1)
def poison(key: str) -> None:
    """Die each time."""
    record(key)
    die("SIGKILL")


@cloacina.task(name="bazaar.hold", retry=QUICK)
def hold(key: str, directory: str, *, with_note: bool) -> int:
    """Wait for a file, so that nothing but the settlement needs the database."""
    if with_note:
        note(key)
    attempt = record(key)
    eventually((Path(directory) / f"{key}-{attempt}").exists, GATE_PATIENCE, "the file")
    return attempt


@cloacina.task(name="bazaar.doubt", retry=QUICK)
def doubt(key: str) -> None:
    """Record the start, wait until the lease is not trusted any more, and ask for a session all the same."""
    record(key)
    execution = cloacina.current_execution()
    eventually(lambda: not execution.is_trusted, GATE_PATIENCE, "doubt")
    record(f"{key}-doubted")
    _ask_for_session(key)


@cloacina.task(name="bazaar.go_on", retry=QUICK)
def go_on(key: str) -> None:
    """Write a note, wait at the gate, and ask for the session once more."""
    note(key)
    record(key)
    wait_at_gate(key)
    _ask_for_session(key)


def _ask_for_session(key: str) -> None:
    try:
        note(f"{key}-late")
    except LeaseLost:
        record(f"{key}-refused")
        raise


# --- failing ---


class Busy(Exception):
    """An error that says when to come back."""

    def __init__(self, retry_after: float | timedelta) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class Refused(Exception):
    """An error that a policy gives up on."""


@cloacina.task(
    name="bazaar.fail",
    retry=RetryPolicy(
        max_attempts=int(os.environ.get("BAZAAR_MAX_ATTEMPTS", "3")),
        initial_delay=float(os.environ.get("BAZAAR_INITIAL_DELAY", "0.1")),
        backoff="fixed",
        jitter=False,
        give_up_on=(Refused,),
    ),
)
def fail(key: str, failures: int = 99) -> int:
    """Fail this many times, each with an error of its own."""
    attempt = record(key)
    if attempt <= failures:
        raise OSError(f"failure {attempt} of {key}")
    return attempt


@cloacina.task(
    name="bazaar.refuse", retry=RetryPolicy(max_attempts=5, initial_delay=0.1, give_up_on=(Refused,))
)
def refuse(key: str) -> None:
    """Raise what the policy gives up on."""
    record(key)
    raise Refused(key)


@cloacina.task(name="bazaar.out_of_memory", retry=QUICK)
def out_of_memory(key: str) -> int:
    """Be refused memory once, by Python and not by the kernel."""
    attempt = record(key)
    if attempt == 1:
        raise MemoryError(key)
    return attempt


@cloacina.task(name="bazaar.busy", retry=QUICK)
def busy(key: str, seconds: float) -> int:
    """Ask once to be called again in so many seconds."""
    attempt = record(key)
    if attempt == 1:
        raise Busy(seconds)
    return attempt


@app.task(
    name="bazaar.autoretry",
    base=DurableTask,
    autoretry_for=(OSError,),
    retry_kwargs={"max_retries": 2, "countdown": 0.1},
)
def autoretry(key: str, failures: int) -> int:
    """Celery's own autoretry, durably."""
    attempt = record(key)
    if attempt <= failures:
        raise OSError(f"failure {attempt}")
    return attempt


@app.task(
    name="bazaar.backoff", base=DurableTask, autoretry_for=(OSError,), retry_backoff=1, retry_jitter=False
)
def backoff(key: str) -> int:
    """Celery's exponential backoff: a second, then two."""
    attempt = record(key)
    if attempt <= 2:
        raise OSError(f"failure {attempt}")
    return attempt


@app.task(name="bazaar.no_retry", base=DurableTask)
def no_retry(key: str) -> None:
    """Without retry settings an exception is final, as Celery has it."""
    record(key)
    raise OSError("once")


@app.task(name="bazaar.self_retry", base=DurableTask, bind=True, max_retries=2, default_retry_delay=0.1)
def self_retry(self: Any, key: str, failures: int) -> list[int]:
    """Celery's self.retry()."""
    attempt = record(key)
    if attempt <= failures:
        raise self.retry(exc=OSError(f"failure {attempt}"))
    return [attempt, self.request.retries]


@app.task(name="bazaar.self_retry_args", base=DurableTask, bind=True)
def self_retry_args(self: Any, key: str, words: str) -> str:
    """Retry with other arguments."""
    record(key)
    if words == "first":
        raise self.retry(args=(key, "second"), countdown=0)
    return words


@app.task(name="bazaar.self_retry_quietly", base=DurableTask, bind=True)
def self_retry_quietly(self: Any, key: str) -> str:
    """Retry without an exception: what is returned meanwhile counts for nothing."""
    attempt = record(key)
    if attempt == 1:
        self.retry(countdown=0, throw=False)
        return "ignored"
    return "returned"


@cloacina.task(name="bazaar.reject", retry=QUICK)
def reject(key: str, *, requeue: bool) -> int:
    """Reject the message of the first attempt."""
    attempt = record(key)
    if attempt == 1:
        raise Reject("no", requeue=requeue)
    return attempt


@cloacina.task(name="bazaar.ignore", retry=QUICK)
def ignore(key: str) -> None:
    """Raise Ignore."""
    record(key)
    raise Ignore("not interesting")


@cloacina.task(name="bazaar.hard_limit", time_limit=1, retry=QUICK)
def hard_limit(key: str) -> int:
    """Hang on the first attempt until the worker kills the process."""
    attempt = record(key)
    if attempt == 1:
        time.sleep(60)
    return attempt


@cloacina.task(name="bazaar.hard_limit_always", time_limit=1, retry=RetryPolicy(max_attempts=1))
def hard_limit_always(key: str) -> None:
    """Hang until the worker kills the process."""
    record(key)
    time.sleep(60)


@cloacina.task(name="bazaar.soft_limit", soft_time_limit=1, time_limit=30, retry=QUICK)
def soft_limit(key: str, *, catch: bool) -> str:
    """Hang on the first attempt until the soft limit."""
    attempt = record(key)
    if attempt > 1:
        return f"attempt {attempt}"
    try:
        time.sleep(60)
    except SoftTimeLimitExceeded:
        if not catch:
            raise
    return "caught"


@cloacina.task(name="bazaar.unsettleable", retry=QUICK)
def unsettleable(key: str) -> None:
    """Write what Postgres finds out to be wrong at the commit only."""
    record(key)
    with cloacina.session() as session:
        session.execute(
            text("CREATE TEMPORARY TABLE IF NOT EXISTS once (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        )
        session.execute(text("INSERT INTO once VALUES (1), (1)"))


class EarlyTask(DurableTask):
    """A user's base class whose hook has an opinion."""

    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Fail before the body, once more than the policy allows."""
        record(f"before-{args[0]}")
        raise OSError("before_start failed")


@cloacina.task(name="bazaar.early", base=EarlyTask, retry=QUICK)
def early(key: str) -> None:
    """Never reached."""
    record(key)


# --- a database that goes away ---


@cloacina.task(name="bazaar.remember", retry=QUICK)
def remember(key: str) -> int:
    """Record the start and write a note."""
    attempt = record(key)
    note(key)
    return attempt


@cloacina.task(name="bazaar.write", retry=QUICK)
def write(key: str) -> None:
    """Write a note, with no connection but the session's."""
    note(key)


@cloacina.task(name="bazaar.submit_beside_session", retry=QUICK)
def submit_beside_session(key: str) -> int:
    """Hold the session's connection, wait at the gate, and submit outside of the session, on a second one."""
    note(key)
    attempt = record(key)
    wait_at_gate("all")
    add.delay(1, 2)
    return attempt


@cloacina.task(name="bazaar.enter_late", retry=QUICK)
def enter_late(key: str) -> int:
    """Record the start, wait at the gate, and only then submit and enter the session."""
    attempt = record(key)
    wait_at_gate(f"{key}-{attempt}")
    add.delay(1, 2)
    note(key)
    return attempt


@cloacina.task(name="bazaar.note_late", retry=QUICK)
def note_late(key: str) -> int:
    """Record the start, wait at the gate, and only then enter the session."""
    attempt = record(key)
    wait_at_gate(f"{key}-{attempt}")
    note(key)
    return attempt


@cloacina.task(name="bazaar.wait_in_statement", retry=QUICK)
def wait_in_statement(key: str) -> int:
    """Wait in the middle of a statement, until the test cuts its connection; on later attempts return."""
    note(key)
    attempt = record(key)
    if attempt == 1:
        with cloacina.session() as session:
            session.execute(text("SELECT pg_sleep(60)"))
    return attempt


@cloacina.task(name="bazaar.lose_connection", retry=QUICK, max_recoveries=1)
def lose_connection(key: str, how: str) -> str:
    """Lose the session's connection on each attempt, in one of the ways."""
    record(key)
    match how:
        case "in a statement":
            with cloacina.session() as session:
                session.execute(END_OWN_CONNECTION)
        case "and raise another error":
            with cloacina.session() as session:
                try:
                    session.execute(END_OWN_CONNECTION)
                except DBAPIError:
                    raise ValueError("what now?") from None
        case "and say nothing":
            note(key)
            with cloacina.session() as session, suppress(DBAPIError):
                session.execute(END_OWN_CONNECTION)
        case "in a submission":
            with cloacina.session() as session:
                pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
                terminate(pid)
                add.delay(1, 2)
        case "by idling":
            note(key)
            with cloacina.session() as session:
                session.execute(text("SET LOCAL idle_in_transaction_session_timeout = '50ms'"))
                pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
            wait_for_end_of(pid)
    return "returned"


@cloacina.task(name="bazaar.lose_another_database", retry=QUICK)
def lose_another_database(key: str) -> None:
    """Find that a database which is none of ours does not answer, through both ways to it."""
    attempt = record(key)
    if attempt == 1:
        connect("postgresql://nobody@127.0.0.1:1/nowhere")
    create_engine(make_url(OUTSIDE_URL), poolclass=NullPool).connect().execute(END_OWN_CONNECTION)


def terminate(pid: int) -> None:
    """End a backend, and return when it has ended."""
    conn = connect(OUTSIDE_URL)
    try:
        conn.cursor().execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
    finally:
        conn.close()


def wait_for_end_of(pid: int) -> None:
    """Return when the server has ended a backend."""
    conn = connect(OUTSIDE_URL)
    try:
        cursor = conn.cursor()

        def is_gone() -> bool:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", (pid,))
            return bool(cursor.fetchone() == (0,))

        eventually(is_gone, 10, "the backend to end")
    finally:
        conn.close()


# --- calling on ---


@cloacina.task(name="bazaar.add", retry=QUICK)
def add(x: int, y: int) -> int:
    """Return the sum."""
    return x + y


@cloacina.task(name="bazaar.wait_a_bit", retry=QUICK)
def wait_a_bit(x: int) -> int:
    """Return the number after a twentieth of a second."""
    time.sleep(0.05)
    return x


@cloacina.task(name="bazaar.total", retry=QUICK)
def total(numbers: list[int]) -> int:
    """Return the sum of a chord's header."""
    return sum(numbers)


@cloacina.task(name="bazaar.boom", retry=RetryPolicy(max_attempts=1))
def boom(*_: Any) -> None:
    """Fail at once."""
    raise ValueError("boom")


@cloacina.task(name="bazaar.record_value", retry=QUICK)
def record_value(value: Any, key: str) -> Any:
    """Record a start of `key`, and return the value; the callback of link."""
    record(f"{key}={value}")
    return value


@cloacina.task(name="bazaar.record_error", retry=QUICK)
def record_error(failed_id: str) -> None:
    """Record a start under the failed execution's id; the errback of link_error."""
    record(f"error-{failed_id}")


@cloacina.task(name="bazaar.record_error_inline", retry=QUICK)
def record_error_inline(request: Any, error: Exception, traceback: Any) -> None:
    """Note in the tenant's table what failed; an errback of Celery's new style, called where the error is."""
    with cloacina.session() as session:
        session.execute(
            text("INSERT INTO notes (text, attempt) VALUES (:words, 0)"),
            {"words": f"{request.id}: {type(error).__name__}"},
        )


@cloacina.task(name="bazaar.tenant_of_call", retry=QUICK)
def tenant_of_call(*_: Any) -> str:
    """Return the tenant that this runs for."""
    return cloacina.current_tenant()


@cloacina.task(name="bazaar.parent", retry=QUICK)
def parent(key: str) -> str:
    """Submit a task from a task, for the same tenant, and return its id."""
    return str(record_value.delay("from the parent", key).id)


@cloacina.task(name="bazaar.replaced", bind=True, retry=QUICK)
def replaced(self: Any, by: str) -> Any:
    """Be replaced."""
    match by:
        case "task":
            return self.replace(add.s(2, 3))
        case "chain":
            return self.replace(add.s(1, 1) | add.s(10))
        case "group":
            return self.replace(_pair())
        case "chord":
            return self.replace(_pair() | total.s())
        case _:
            return self.replace(plain_add.si(1, 2))


def _pair() -> Any:
    from celery import group

    return group(add.s(1, 1), add.s(2, 2))


@app.task(name="bazaar.plain_add")
def plain_add(x: int, y: int) -> int:
    """Return the sum; a plain task."""
    return x + y


@app.task(name="bazaar.plain_record")
def plain_record(value: Any, tenant: str = "", key: str = "plain") -> Any:
    """Record a start; a plain task, which knows of no tenant but the one it is told."""
    if tenant:
        conn = connect(OUTSIDE_URL)
        try:
            shop_tables.record_run(
                conn, tenant, key, execution_id="plain", attempt=0, is_recovery=False, pid=os.getpid()
            )
        finally:
            conn.close()
    return value


@app.task(name="bazaar.plain_flaky", bind=True, max_retries=1)
def plain_flaky(self: Any) -> int:
    """Fail once and be retried by Celery; a plain task."""
    if not self.request.retries:
        raise self.retry(countdown=0)
    return int(self.request.retries)


# --- what they share ---


def die(how: str) -> None:
    """End this process the hard way."""
    match how:
        case "sys.exit":
            sys.exit(3)
        case "os._exit":
            os._exit(137)
        case _:
            os.kill(os.getpid(), signal.Signals[how])
            time.sleep(60)


def record(key: str) -> int:
    """Write this start to `runs` on a connection of its own, so that it stays whatever happens next."""
    execution = cloacina.current_execution()
    conn = connect(OUTSIDE_URL)
    try:
        shop_tables.record_run(
            conn,
            cloacina.current_tenant(),
            key,
            execution_id=str(execution.id) if execution else "",
            attempt=execution.attempt if execution else 0,
            is_recovery=bool(execution and execution.is_recovery),
            pid=os.getpid(),
        )
    finally:
        conn.close()
    return execution.attempt if execution else 0


def note(words: str) -> None:
    """Write one row to `notes` through the tenant's session."""
    execution = cloacina.current_execution()
    with cloacina.session() as session:
        session.execute(
            text("INSERT INTO notes (text, attempt) VALUES (:words, :attempt)"),
            {"words": words, "attempt": execution.attempt if execution else 0},
        )


def wait_at_gate(key: str) -> None:
    """Wait until the test opens the gate."""
    tenant = cloacina.current_tenant()
    conn = connect(OUTSIDE_URL)
    try:
        eventually(
            lambda: shop_tables.gate_is_open(conn, tenant, key),
            GATE_PATIENCE,
            f"the gate {key!r} of {tenant}",
        )
    finally:
        conn.close()


# --- taking up slots ---


@cloacina.task(name="bazaar.nap", retry=QUICK)
def nap(seconds: float) -> None:
    """Do nothing, for so long."""
    time.sleep(seconds)
