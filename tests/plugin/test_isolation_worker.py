"""Isolation in a real worker: two tenants' tasks in one process, and messages that lie."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from kombu import Queue

from tests.support import brokers
from tests.support.databases import connect
from tests.support.modules import imported_anew
from tests.support.processes import Processes, WorkerProcess
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from psycopg2 import extensions

    from tests.support.databases import Databases

RED, BLUE = "tenant_red", "Tenant_Blue"
ORDINARY, IMPOSSIBLE = "ordinary", "bad-name"

POINTS = [
    "at first",
    "after a commit",
    "in a savepoint",
    "after a savepoint was rolled back",
    "after a rollback",
    "in a second block",
]

TABLES = """
CREATE TABLE IF NOT EXISTS public.marks AS SELECT 'public' AS whose;
CREATE TABLE "{tenant}".marks AS SELECT '{tenant}' AS whose;
CREATE TABLE "{tenant}".ran (whose text);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ward:
    """One worker with one child, in which both tenants' tasks run one after the other."""

    app: ModuleType
    worker: WorkerProcess
    observer: extensions.connection

    def run(self, name: str, tenant: str, *args: Any) -> Any:
        """Run a task and return its result."""
        return getattr(self.app, name).apply_async(args, tenant=tenant).get(timeout=30)

    def due_row(self, tenant: str, whose: str) -> str:
        """Submit a call of `mark` that is due and whose message did not leave, and return its id."""
        result = self.app.mark.apply_async((whose,), tenant=tenant, countdown=3600)
        with self.observer.cursor() as cursor:
            cursor.execute(
                f'UPDATE "{tenant}".cloacina_executions SET run_at = now(), rung_at = now() WHERE id = %s',
                (result.id,),
            )
        return str(result.id)

    def send(self, queue: str, execution_id: str, headers: dict[str, Any], body: Any = None) -> None:
        """Send a message for `mark` as nobody's plugin would."""
        whole = {"lang": "py", "task": "isolated.mark", "id": execution_id, "root_id": execution_id}
        with self.app.app.producer_pool.acquire(block=True) as producer:
            producer.publish(
                body if body is not None else [["crafted"], {}, {}],
                routing_key=queue,
                declare=[Queue(queue, routing_key=queue)],
                headers={**whole, **headers},
                correlation_id=execution_id,
                serializer="json",
            )

    def marks(self) -> list[str]:
        """Return all marks that `mark` made, of both tenants."""
        with self.observer.cursor() as cursor:
            cursor.execute(f'SELECT whose FROM "{RED}".ran UNION ALL SELECT whose FROM "{BLUE}".ran')
            return [row[0] for row in cursor.fetchall()]


@pytest.fixture(scope="module")
def ward(
    session_databases: Databases, claimed_redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ward]:
    """The worker, on both tenants' queues, on an ordinary one, and on one that no tenant can have."""
    with ExitStack() as stack:
        database_url = stack.enter_context(session_databases.fresh())
        brokers.empty_redis(claimed_redis_url)
        settings = {"CLOACINA_DATABASE_URL": database_url, "CLOACINA_BROKER_URL": claimed_redis_url}
        app = stack.enter_context(imported_anew("tests.plugin.isolated", settings))
        stack.callback(lambda: app.cloacina.database.dispose())
        observer = connect(database_url)
        stack.callback(observer.close)
        for tenant in (RED, BLUE):
            app.cloacina.tenants.create(tenant)
            with observer.cursor() as cursor:
                cursor.execute(TABLES.format(tenant=tenant))
        processes = Processes(tmp_path_factory.mktemp("processes"), settings)
        stack.callback(processes.end_all)
        worker = processes.worker(
            "tests.plugin.isolated:app", queues=[RED, BLUE, ORDINARY, IMPOSSIBLE], concurrency=1
        )
        worker.wait_ready()
        yield Ward(app=app, worker=worker, observer=observer)


def test_a_task_sees_its_tenant_and_nothing_else_all_its_life(ward: Ward) -> None:
    for tenant in (RED, BLUE, RED):
        found = ward.run("look", tenant)
        assert found["tenant"] == tenant
        expected = [f'"{tenant}"', ["pg_catalog", tenant], tenant]
        assert found["seen"] == dict.fromkeys(POINTS, expected)


def test_what_one_tenants_task_leaves_on_the_connection_reaches_nobody(ward: Ward) -> None:
    backend = ward.run("leave_traces", RED)
    assert ward.run("without_a_tenant", BLUE) == "UndefinedTable"
    found = ward.run("look", BLUE)
    assert found["backend"] == backend, "not the same connection: this test shows nothing"
    assert found["seen"]["at first"] == [f'"{BLUE}"', ["pg_catalog", BLUE], BLUE]


def test_raw_sql_without_a_tenant_fails_and_never_reads_public(ward: Ward) -> None:
    assert ward.run("without_a_tenant", RED) == "UndefinedTable"


def test_a_task_cannot_open_another_tenants_session(ward: Ward) -> None:
    assert ward.run("elsewhere", RED, BLUE) == "TenantMismatch"
    assert RED in ward.run("elsewhere", RED, RED)


def test_a_task_that_a_task_calls_belongs_to_the_same_tenant(ward: Ward) -> None:
    for tenant in (RED, BLUE):
        execution_id = ward.run("call_another", tenant)
        found = ward.app.cloacina.result(execution_id, tenant=tenant).get(timeout=30)
        assert found["tenant"] == tenant


def test_asyncio_in_a_task_inherits_the_tenant(ward: Ward) -> None:
    assert ward.run("inherit", BLUE) == [BLUE, BLUE]


LIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "the queue of another tenant": (
        BLUE, {"cloacina_tenant": RED, "cloacina_attempt": 1}, "but came from queue 'Tenant_Blue'"),
    "an ordinary queue": (
        ORDINARY, {"cloacina_tenant": RED, "cloacina_attempt": 1}, "but came from queue 'ordinary'"),
    "a tenant that nobody created": (
        ORDINARY, {"cloacina_tenant": ORDINARY, "cloacina_attempt": 1}, "unknown tenant 'ordinary'"),
    "a name that no tenant can have": (
        IMPOSSIBLE, {"cloacina_tenant": IMPOSSIBLE, "cloacina_attempt": 1}, "invalid tenant name 'bad-name'"),
    "a tenant in other letters": (
        RED, {"cloacina_tenant": RED.upper(), "cloacina_attempt": 1}, "but came from queue 'tenant_red'"),
    "no tenant": (RED, {"cloacina_attempt": 1}, "carries no cloacina_tenant and cloacina_attempt"),
    "no attempt": (RED, {"cloacina_tenant": RED}, "carries no cloacina_tenant"),
    "nothing at all": (RED, {}, "it was not sent by cloacina_celery; send durable tasks through an app"),
    "a tenant that is no text": (RED, {"cloacina_tenant": [RED], "cloacina_attempt": 1}, "carries no"),
    "an attempt that is a text": (RED, {"cloacina_tenant": RED, "cloacina_attempt": "1"}, "carries no"),
    "an attempt that is a truth": (RED, {"cloacina_tenant": RED, "cloacina_attempt": True}, "carries no"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_message_that_lies_is_refused_before_user_code_and_stops_no_worker(ward: Ward, lie: str) -> None:
    queue, headers, complaint = LIES[lie]
    execution_id = ward.due_row(RED, lie)
    ward.send(queue, execution_id, headers)
    refused = ward.worker.wait_log(rf"message\.refused: message {execution_id} .*$")
    assert complaint in refused.group()
    # The honest message that comes after it is served by the same worker, for the same attempt.
    ward.send(RED, execution_id, {"cloacina_tenant": RED, "cloacina_attempt": 1}, [[lie], {}, {}])
    eventually(
        lambda: ward.app.cloacina.executions(RED).get(execution_id).state == "succeeded", why="the row"
    )
    assert ward.app.cloacina.executions(RED).get(execution_id).attempt == 1
    assert ward.marks().count(lie) == 1
    assert "crafted" not in ward.marks()


@pytest.mark.parametrize("attempt", [0, 2, -1, 10**6])
def test_a_message_for_another_attempt_declines_before_user_code(ward: Ward, attempt: int) -> None:
    execution_id = ward.due_row(RED, f"attempt {attempt}")
    ward.send(RED, execution_id, {"cloacina_tenant": RED, "cloacina_attempt": attempt})
    ward.worker.wait_log(rf"claim\.declined: .*{execution_id}.*stale or duplicate")
    assert ward.app.cloacina.executions(RED).get(execution_id).state == "pending"
    assert "crafted" not in ward.marks()


@pytest.mark.parametrize("body", ["a text", {"a": 1}, [], 7], ids=repr)
def test_a_message_with_a_poisoned_body_stops_no_worker(ward: Ward, body: Any) -> None:
    execution_id = ward.due_row(RED, "poisoned")
    ward.send(RED, execution_id, {"cloacina_tenant": RED, "cloacina_attempt": 1}, body)
    assert ward.run("look", RED)["tenant"] == RED
    assert ward.worker.is_running
    assert ward.app.cloacina.executions(RED).get(execution_id).attempt <= 1


def test_user_code_ran_for_nobody_else(ward: Ward) -> None:
    with ward.observer.cursor() as cursor:
        cursor.execute(f'SELECT count(*) FROM "{BLUE}".ran')
        assert cursor.fetchone() == (0,)
