"""`cloacina verify` on a user's own system: it breaks its own processes and touches nothing of anybody else's."""

from __future__ import annotations

import importlib.util
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from kombu import Connection
from psycopg2 import extensions

from cloacina_celery.chaos import queues
from cloacina_celery.cli import cloacina
from tests.chaos.runs import PATIENCE, count

if TYPE_CHECKING:
    from tests.support.processes import Processes

SHORT = (
    "--quick",
    "--seconds",
    "8",
    "--executions",
    "40",
    "--tenants",
    "2",
    "--workers",
    "2",
    "--every",
    "2",
)


@pytest.mark.timeout(240)
def test_it_passes_and_leaves_everything_else_as_it_was(
    processes: Processes, shop: ModuleType, tenant_name: str, broker_url: str, observer: extensions.connection
) -> None:
    shop.cloacina.tenants.create(tenant_name)
    with shop.cloacina.tenant(tenant_name):
        waiting = shop.add.delay(1, 2)
    # Whoever sweeps this tenant finds the row stranded, rings again, and is found out.
    with Connection(broker_url) as broker:
        assert [one.execution_id for one in queues.take_all(broker, tenant_name)] == [waiting.id]
    done = processes.cli("cloacina", "verify", "--yes", *SHORT, timeout=PATIENCE)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert done.stdout.startswith("verify makes the tenants verify_")
    assert count(done.stdout, "executions") >= 40
    assert count(done.stdout, "faults") > 0
    with observer.cursor() as cursor:
        cursor.execute("SELECT name FROM cloacina.tenants")
        assert cursor.fetchall() == [(tenant_name,)]
        cursor.execute("SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'verify%%'")
        assert cursor.fetchone() == (0,)
        cursor.execute("SELECT count(*) FROM cloacina.workers")
        assert cursor.fetchone() == (0,)
        cursor.execute(f'SELECT kind FROM "{tenant_name}".cloacina_events ORDER BY id')
        assert cursor.fetchall() == [("submitted",)]
    with Connection(broker_url) as broker:
        assert queues.take_all(broker, tenant_name) == []


def refusal(shop: ModuleType, *args: str, **options: Any) -> str:
    done = CliRunner().invoke(cloacina, ["verify", *args], obj=SimpleNamespace(app=shop.app), **options)
    assert done.exit_code == 1
    return done.stderr


def test_it_says_what_to_install_where_psutil_is_missing(
    shop: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install 'cloacina-celery[verify]'" in refusal(shop)


def test_it_wants_the_apps_name_for_its_workers(shop: ModuleType) -> None:
    assert "name the app" in refusal(shop, "--yes")


def test_it_does_nothing_unless_somebody_says_so(processes: Processes) -> None:
    done = processes.cli("cloacina", "verify", *SHORT)
    assert done.returncode == 1
    assert "Go on?" in done.stderr
    assert "Aborted" in done.stderr


def test_a_fault_that_does_not_exist_is_named_with_those_that_do(processes: Processes) -> None:
    done = processes.cli("cloacina", "verify", "--yes", "--fault", "earthquake")
    assert done.returncode == 1
    assert "there is no 'earthquake'" in done.stderr
    assert "crash of Postgres" in done.stderr
