"""Faults of the servers and of the way to them: refused, silent, full, crashed, restarted, answers lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from cloacina_celery.chaos.faults import Done, done

if TYPE_CHECKING:
    from cloacina_celery.chaos.drive import Run
    from cloacina_celery.chaos.proxy import Proxy

LOST_ANSWERS = 0.3
"""The share of commits whose answer is lost while answers are."""


def refuse_database(run: Run) -> Done | None:
    """Have Postgres take no connections for some seconds, and lose those there are."""
    return _for_a_while(run, "Postgres refuses connections", run.ground.database_proxy, lambda p: p.refuse())


def silence_database(run: Run) -> Done | None:
    """Have Postgres answer nobody for some seconds."""
    return _for_a_while(run, "Postgres falls silent", run.ground.database_proxy, lambda p: p.hang())


def refuse_broker(run: Run) -> Done | None:
    """Have the broker take no connections for some seconds, and lose those there are."""
    return _for_a_while(run, "the broker refuses connections", run.ground.broker_proxy, lambda p: p.refuse())


def lose_answers(run: Run) -> Done | None:
    """Have commits done and their answers lost for some seconds."""
    proxy = run.ground.database_proxy
    if proxy is None:
        return None
    seconds, seed = run.random.uniform(2, 4), run.random.randrange(10**6)
    struck = done(
        run, "commits whose answer is lost", f"{LOST_ANSWERS:.0%} of them for {seconds:.1f} s", is_total=True
    )
    proxy.lose_commits(None, probability=LOST_ANSWERS, seed=seed)
    run.soon(seconds, lambda: proxy.lose_commits(0))
    return struck


def fill_database(run: Run) -> Done | None:
    """Cut half of the package's connections and let no more in than there are then, for some seconds."""
    seconds = run.random.uniform(2, 5)
    struck = done(run, "Postgres at its connection limit", f"for {seconds:.1f} s", is_total=True)
    run.ground.limit_connections(run.count_connections() // 2)
    run.cut_connections(0.5)
    run.soon(seconds, lambda: run.ground.limit_connections(-1))
    return struck


def crash_database(run: Run) -> Done | None:
    """Have Postgres end at once, with what it had not yet written, and come back."""
    struck = done(run, "crash of Postgres", "", is_total=True)
    run.ground.crash_postgres()
    run.reconnect()
    return replace(struck, is_crash=True, until=run.now())


def restart_servers(run: Run) -> Done | None:
    """Restart Postgres and Redis."""
    struck = done(run, "restart of both servers", "", is_total=True)
    run.ground.restart_servers()
    run.reconnect()
    return struck


def _for_a_while(run: Run, kind: str, proxy: Proxy | None, misbehave: Callable[[Proxy], None]) -> Done | None:
    if proxy is None:
        return None
    seconds = run.random.uniform(2, 5)
    struck = done(run, kind, f"for {seconds:.1f} s", is_total=True)
    misbehave(proxy)
    run.soon(seconds, proxy.forward)
    return struck
