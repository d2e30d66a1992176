"""The three stages at once, and the move from the second to the third, by the commands that an operator types."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from sqlalchemy import text

from examples.one_to_many.app import Base, app, cloacina, enter, greet
from examples.one_to_many.totals import account_of, print_accounts
from examples.processes import CeleryProcess

APP = "examples.one_to_many.app"
LEGACY, FIRST, NEW = "public", "tenant_first", ("tenant_north", "tenant_south")
TIMEOUT = 60.0
"""Seconds without the awaited thing after which the example gives up."""

OLD, BEFORE, DURING, AFTER = range(40), range(40, 120), range(120, 150), range(150, 180)
"""Entries of the first customer: sent as plain messages, before the move, while it is suspended, and after it."""

LATER = 4.0
"""Seconds by which every tenth entry is put off, so that delayed work moves too."""


class StoryFailed(Exception):
    """The example did not come to what it is to show."""


def play() -> bool:
    """Play the whole story, and tell whether every total is right."""
    left = {tenant.name for tenant in cloacina.tenants.list()} & {LEGACY, FIRST, *NEW}
    if left:
        raise StoryFailed(f"there is a tenant {', '.join(sorted(left))} already: name an empty database")
    with ExitStack() as cleanup:
        cleanup.callback(clear)
        return tell(cleanup)


def tell(cleanup: ExitStack) -> bool:
    """Bring up the stages one after the other, move the first customer while all of them work, and count."""
    say("Stage one: a plain app. Its messages wait in the queue `celery`.")
    with cloacina.database.engine.begin() as connection:
        connection.execute(text("CREATE TABLE public.greetings (number integer)"))
    for number in OLD:
        app.send_task("books.enter_entry", (number, cents_of(number)))
        greet.delay(number)

    say("\nStage two: the same customer's tables are in `public`, and new tenants come beside it.")
    run("tenant", "create", LEGACY, "--legacy")
    for tenant in NEW:
        run("tenant", "create", tenant)
    for tenant in (LEGACY, *NEW):
        with cloacina.session(tenant) as session:
            Base.metadata.create_all(session.connection())
    worker = start_worker(cleanup)
    for number in BEFORE:
        greet.delay(number)
        for tenant in (LEGACY, *NEW):
            submit(tenant, number)
    wait_for(worker, "the first entries of each", lambda: all(ended(t) > 10 for t in (LEGACY, *NEW)))
    run("status")

    say("\nStage three: the first customer becomes a tenant like the others, which go on meanwhile.")
    run("tenant", "adopt", FIRST, "--from", LEGACY, "--dry-run")
    run("tenant", "suspend", LEGACY)
    for number in DURING:
        submit(LEGACY, number)  # is committed, and waits
        submit(NEW[0], number)
    wait_for(worker, "what runs in public to end", lambda: cloacina.tenants.left(LEGACY).running == 0)
    ended_by_others = sum(map(ended, NEW))
    run("tenant", "adopt", FIRST, "--from", LEGACY)
    with cloacina.database.engine.begin() as connection:
        say("psql: ALTER TABLE public.book_entries SET SCHEMA tenant_first")
        connection.execute(text(f"ALTER TABLE public.book_entries SET SCHEMA {FIRST}"))
    run("tenant", "isolate", FIRST)
    wait_for(worker, "the others' work", lambda: sum(map(ended, NEW)) > ended_by_others)
    run("tenant", "resume", FIRST)
    for number in AFTER:
        submit(FIRST, number)
        greet.delay(number)
    for number in OLD:
        submit(FIRST, number)  # the keys came along: these are the executions that there are
    wait_for(worker, "everything to end", lambda: not any(map(cloacina.tenants.left, (FIRST, *NEW))))
    wait_for(worker, "the greetings", lambda: greetings() == len([*OLD, *BEFORE, *AFTER]))

    say("")
    expected = {
        FIRST: [*OLD, *BEFORE, *DURING, *AFTER],
        NEW[0]: [*BEFORE, *DURING],
        NEW[1]: [*BEFORE],
    }
    return print_accounts(
        [account_of(t, {n: cents_of(n) for n in numbers}) for t, numbers in expected.items()]
    )


def submit(tenant: str, number: int) -> None:
    """Submit an entry of a tenant's, every tenth for later; with its key it is made once."""
    enter.apply_async(
        (number, cents_of(number)),
        tenant=tenant,
        idempotency_key=f"entry-{number}",
        countdown=LATER if number % 10 == 0 else None,
    )


def cents_of(number: int) -> int:
    """Tell the amount of an entry, of each number another one."""
    return 100 + number * number


def ended(tenant: str) -> int:
    """Count the executions of a tenant that have succeeded."""
    return sum(n for state, n in cloacina.executions(tenant).count().items() if state == "succeeded")


def greetings() -> int:
    """Count what the plain task has noted."""
    with cloacina.database.engine.connect() as connection:
        return int(connection.execute(text("SELECT count(*) FROM public.greetings")).scalar_one())


def start_worker(cleanup: ExitStack) -> CeleryProcess:
    """Start the one worker of everything: the plain queue, the legacy tenant, and whatever tenant comes."""
    log = Path(tempfile.mkdtemp(prefix="cloacina-one-to-many-")) / "worker.log"
    queues = f"celery,{LEGACY},tenant_*"
    worker = CeleryProcess.start(
        "worker", ["worker", "-Q", queues, "--concurrency=2", "--loglevel=INFO"], log=log, app=APP
    )
    cleanup.callback(worker.stop)
    say(f"$ {worker.command.replace(queues, repr(queues))} &  # its log is {log}")
    return worker


def run(*arguments: str) -> None:
    """Run one of our commands, and show it with what it says."""
    say(f"$ celery -A {APP} cloacina {' '.join(arguments)}")
    command = [sys.executable, "-m", "celery", "-A", APP, "cloacina", *arguments]
    if subprocess.run(command, check=False).returncode:
        raise StoryFailed(f"cloacina {' '.join(arguments)} failed")


def wait_for(worker: CeleryProcess, wish: str, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not is_so():
        if not worker.is_alive() or time.monotonic() > deadline:
            raise StoryFailed(f"waited in vain for {wish}; see the worker's log {worker.log}")
        time.sleep(0.1)


def clear() -> None:
    """Remove what the example has made: tenants, tables and tombstones' queues."""
    for tenant in cloacina.tenants.list():
        if tenant.name in (LEGACY, FIRST, *NEW):
            cloacina.tenants.drop(tenant.name, now=True)
    with cloacina.database.engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS public.greetings, public.book_entries"))


def say(what: str) -> None:
    # At once: the commands write to the same place from processes of their own.
    print(what, flush=True)
