"""The database's server goes away under load, or is full: the work waits, goes on, and each effect is there once."""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url

from cloacina_celery import devservers
from cloacina_celery.chaos.proxy import Proxy
from cloacina_celery.errors import DatabaseUnavailable
from tests.acceptance.stage import Stage
from tests.conftest import STARTED
from tests.support import brokers, databases
from tests.support.modules import imported_anew
from tests.support.processes import Processes
from tests.support.shop_tables import prepare_shop
from tests.support.waiting import eventually, never

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.processes import WorkerProcess


def load(stage: Stage, number: int) -> list[Any]:
    """Submit this many executions of one note each."""
    return [stage.send("write", f"job-{n}") for n in range(number)]


def done(stage: Stage) -> int:
    """Count the notes, of which each is one settled execution."""
    with stage.observer.cursor() as cursor:
        cursor.execute(f"SELECT count(*) FROM {stage.tenant}.notes")
        return int(cursor.fetchone()[0])


def wait_until_done(stage: Stage, number: int, timeout: float = 15) -> None:
    """Wait until so many executions have settled."""
    eventually(lambda: done(stage) >= number, timeout, f"{number} settled executions")


def check_load(stage: Stage, results: list[Any], workers: list[WorkerProcess], timeout: float = 40) -> int:
    """Check that all settled once and with their one effect, and that every worker lives; return the extra runs."""

    def unsettled() -> list[str]:
        with stage.observer.cursor() as cursor:
            cursor.execute(f"SELECT id FROM {stage.tenant}.cloacina_executions WHERE state <> 'succeeded'")
            return [id_ for (id_,) in cursor.fetchall()]

    eventually(lambda: not unsettled(), timeout, "all executions to succeed")
    with stage.observer.cursor() as cursor:
        cursor.execute(f"SELECT text, count(*) FROM {stage.tenant}.notes GROUP BY text")
        assert dict(cursor.fetchall()) == {f"job-{n}": 1 for n in range(len(results))}
        cursor.execute(
            f"SELECT count(*) FROM {stage.tenant}.cloacina_events WHERE kind = 'succeeded'"
            " GROUP BY execution_id HAVING count(*) <> 1"
        )
        assert cursor.fetchall() == []
        cursor.execute(f"SELECT sum(failures), sum(attempt) FROM {stage.tenant}.cloacina_executions")
        failures, attempts = cursor.fetchone()
    assert failures == 0
    for worker in workers:
        assert worker.is_running
        assert "raised unexpected" not in worker.log
    return int(attempts) - len(results)


def terminate_all(stage: Stage) -> None:
    """End all of the package's connections to the database at once."""
    with stage.observer.cursor() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'cloacina_celery' AND datname = current_database()"
        )


@pytest.mark.parametrize("outage", ["refused", "hung", "hung and cut"])
def test_an_outage_in_the_middle_of_the_work_is_waited_out(
    stage: Stage, proxied_database: Proxy, proxied: dict[str, str], outage: str
) -> None:
    results = load(stage, 300)
    workers = [stage.start_worker(concurrency=2, env=proxied) for _ in range(2)]
    wait_until_done(stage, 20, timeout=60)
    if outage == "refused":
        proxied_database.refuse()
    else:
        proxied_database.hang()
    at = done(stage)
    never(lambda: done(stage) > at + 4, 8.0, "work without a database")
    if outage == "hung and cut":
        proxied_database.cut()
    proxied_database.forward()
    extra = check_load(stage, results, workers)
    print(f"FIGURE {outage} for 8 s: {extra} extra runs of {len(results)}")
    if outage == "refused":
        waited = [line for worker in workers for line in worker.log.splitlines() if ".waiting: " in line]
        # Four children that try for eight seconds with pauses that double: neither a hot loop nor silence.
        assert 4 <= len(waited) <= 4 * 12


def test_connections_that_are_cut_again_and_again_cost_runs_and_nothing_else(
    stage: Stage, proxied_database: Proxy, proxied: dict[str, str]
) -> None:
    results = load(stage, 300)
    workers = [stage.start_worker(concurrency=2, env=proxied) for _ in range(2)]
    for number in range(20, 200, 20):
        wait_until_done(stage, number, timeout=60)
        terminate_all(stage)
        proxied_database.cut()
    print(f"FIGURE 9 cuts of all connections: {check_load(stage, results, workers)} extra runs")


def test_a_server_that_loses_the_answer_to_one_commit_in_five_has_each_execution_settled_once(
    stage: Stage, proxied_database: Proxy, proxied: dict[str, str]
) -> None:
    results = load(stage, 100)
    proxied_database.lose_commits(None, matching="cloacina_executions", probability=0.2, seed=4)
    workers = [stage.start_worker(concurrency=2, env=proxied) for _ in range(2)]
    assert len(proxied_database.wait_for_lost_commits(20, timeout=90)) >= 20
    extra = check_load(stage, results, workers, timeout=60)
    print(f"FIGURE {len(proxied_database.lost_commits)} lost answers: {extra} extra runs of {len(results)}")
    # Each of them was found out about: no claim was lost with its answer, no settled task ran again.
    assert extra == 0


@pytest.fixture
def restartable(
    tmp_path: Path, claimed_redis_url: str, tenant_name: str, request: pytest.FixtureRequest
) -> Iterator[tuple[Stage, Proxy, Path]]:
    """A stage on a Postgres of its own, behind a proxy, that may be restarted."""
    folder = tmp_path / "servers"
    with ExitStack() as stack:
        url = devservers.start(folder).database_url
        stack.callback(devservers.stop, folder)
        brokers.empty_redis(claimed_redis_url)
        settings = {"CLOACINA_DATABASE_URL": url, "CLOACINA_BROKER_URL": claimed_redis_url}
        bazaar = stack.enter_context(imported_anew("tests.acceptance.bazaar", settings))
        bazaar.cloacina.tenants.create(tenant_name)
        prepare_shop(url, tenant_name)
        processes = Processes(tmp_path, settings)
        request.node.stash[STARTED] = processes
        stack.callback(processes.end_all)
        proxy = stack.enter_context(Proxy.in_front_of(url))
        observer = databases.connect(url)
        yield Stage(bazaar=bazaar, tenant=tenant_name, observer=observer, processes=processes), proxy, folder
        bazaar.cloacina.database.dispose()


@pytest.mark.parametrize("how", ["restarted", "failed over"])
def test_a_server_that_is_restarted_or_replaced_under_load_loses_nothing(
    restartable: tuple[Stage, Proxy, Path], how: str
) -> None:
    stage, proxy, folder = restartable
    url = stage.bazaar.cloacina.database.url.render_as_string(hide_password=False)
    results = load(stage, 300)
    # Through the proxy where the server is replaced, so that it refuses before another one answers.
    reached_by = {"CLOACINA_DATABASE_URL": proxy.url(url)} if how == "failed over" else {}
    workers = [stage.start_worker(concurrency=2, env=reached_by) for _ in range(2)]
    wait_until_done(stage, 20, timeout=60)
    if how == "failed over":
        proxy.refuse()
    stage.observer.close()
    devservers.stop(folder)
    devservers.start(folder)
    stage.observer = databases.connect(url)
    proxy.forward()
    print(f"FIGURE {how} under load: {check_load(stage, results, workers, timeout=60)} extra runs of 300")
    stage.observer.close()


def test_a_worker_whose_server_is_frozen_can_be_shut_down(
    stage: Stage, proxied_database: Proxy, proxied: dict[str, str]
) -> None:
    worker = stage.worker(concurrency=1, env={**proxied, "BAZAAR_LEASE_TTL": "3"})
    proxied_database.hang()
    worker.wait_log(r"liveness\.lost")
    worker.terminate()
    assert worker.wait_exit(timeout=40) == 0


# --- the server has no connection left ---


@pytest.fixture
def limited_url(stage: Stage, database_url: str) -> Iterator[str]:
    """The database's URL for a login that may have four connections at a time."""
    login = f"limited_{secrets.token_hex(4)}"
    with stage.observer.cursor() as cursor:
        cursor.execute(f"CREATE ROLE {login} LOGIN PASSWORD 'word' CONNECTION LIMIT 4")
        for schema in ("cloacina", stage.tenant):
            cursor.execute(
                f"GRANT USAGE ON SCHEMA {schema} TO {login};"
                f"GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {login};"
                f"GRANT ALL ON ALL SEQUENCES IN SCHEMA {schema} TO {login}"
            )
        cursor.execute(
            "SELECT role FROM cloacina.tenants WHERE name = %s AND role IS NOT NULL", (stage.tenant,)
        )
        for (role,) in cursor.fetchall():
            cursor.execute(f"GRANT {role} TO {login}")
        yield (
            make_url(database_url).set(username=login, password="word").render_as_string(hide_password=False)
        )
        stage.processes.end_all()
        cursor.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = %s", (login,)
        )
        cursor.execute(f"DROP OWNED BY {login}; DROP ROLE {login}")


def test_a_server_without_a_connection_to_spare_slows_the_work_down_and_breaks_nothing(
    stage: Stage, limited_url: str
) -> None:
    results = load(stage, 60)
    # The main process wants three connections and each of six children one; four is all that there are.
    worker = stage.start_worker(concurrency=6, env={"CLOACINA_DATABASE_URL": limited_url})
    worker.wait_log(r"\.waiting: .*too many connections for role")
    check_load(stage, results, [worker], timeout=60)
    assert "worker.dead" not in worker.log


def test_tasks_that_each_hold_a_connection_and_need_another_do_not_wait_for_each_other_for_ever(
    stage: Stage, limited_url: str, database_url: str
) -> None:
    login = make_url(limited_url).username
    with stage.observer.cursor() as cursor:
        cursor.execute(f"ALTER ROLE {login} CONNECTION LIMIT 50")
        worker = stage.worker(
            concurrency=3, env={"CLOACINA_DATABASE_URL": limited_url, "BAZAAR_OUTSIDE_URL": database_url}
        )
        results = {key: stage.send("submit_beside_session", key) for key in ("a", "b", "c")}
        for key in results:
            stage.wait_for_runs(key, 1)
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = %s", (login,))
        cursor.execute(f"ALTER ROLE {login} CONNECTION LIMIT {cursor.fetchone()[0]}")
    stage.open_gate("all")
    # Each has one connection and wants a second; there is none. Somebody gives up what it has, and another goes on.
    eventually(
        lambda: any(stage.row(result).state == "succeeded" for result in results.values()),
        40,
        "one of them to end",
    )
    with stage.observer.cursor() as cursor:
        cursor.execute(f"ALTER ROLE {login} CONNECTION LIMIT 50")
    for key, result in results.items():
        row = stage.wait_for_state(result, "succeeded", 60)
        assert row.failures == 0
        assert len(stage.notes(key)) == 1
    assert worker.is_running


def test_a_caller_is_told_that_there_is_no_connection_left(
    stage: Stage, limited_url: str, broker_url: str
) -> None:
    held = [databases.connect(limited_url) for _ in range(4)]
    settings = {"CLOACINA_DATABASE_URL": limited_url, "CLOACINA_BROKER_URL": broker_url}
    with imported_anew("tests.acceptance.bazaar", settings) as bazaar:
        with pytest.raises(DatabaseUnavailable, match="too many connections for role"):
            bazaar.write.apply_async(("k",), tenant=stage.tenant)
        held.pop().close()
        assert stage.kinds(bazaar.write.apply_async(("k",), tenant=stage.tenant)) == ["submitted"]
        bazaar.cloacina.database.dispose()
    for conn in held:
        conn.close()
