"""The doctor and the probe, on systems that lack one thing each."""

from __future__ import annotations

import json
import secrets
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from cloacina_celery.cli import cloacina
from cloacina_celery.plugin import doctor
from tests.acceptance.stage import BAZAAR
from tests.support import brokers
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from tests.acceptance.stage import Stage


def run(stage: Stage, *args: str) -> Result:
    return CliRunner().invoke(cloacina, args, obj=SimpleNamespace(app=stage.bazaar.app))


def wrong(stage: Stage) -> list[tuple[str, str]]:
    """List what the doctor calls wrong, as pairs of what it is and what was found."""
    done = run(stage, "doctor", "--json")
    found = [(one["what"], one["found"]) for one in json.loads(done.stdout) if one["grade"] == "wrong"]
    assert done.exit_code == bool(found)
    return found


def minded(stage: Stage) -> list[str]:
    return [
        one["found"] for one in json.loads(run(stage, "doctor", "--json").stdout) if one["grade"] == "mind"
    ]


def test_a_system_that_works_has_nothing_wrong_and_its_worker_is_alive(standing: Stage) -> None:
    assert wrong(standing) == []
    assert "1 worker alive" in run(standing, "doctor").stdout
    done = run(standing, "probe")
    assert done.exit_code == 0, done.stderr
    assert "gave its last sign" in done.stdout
    # As an orchestrator runs it.
    assert standing.processes.cli("cloacina", "probe", app=BAZAAR).returncode == 0


def test_the_probe_tells_a_frozen_worker_from_a_live_one_and_from_one_that_has_not_started(
    stage: Stage,
) -> None:
    assert "no worker of this host" in run(stage, "probe").stderr
    worker = stage.worker()
    assert run(stage, "probe", "--silent-for", "5").exit_code == 0
    assert run(stage, "probe", "--node", "two@here").exit_code == 1
    worker.stop_signal()
    eventually(
        lambda: run(stage, "probe", "--silent-for", "1").exit_code == 1, why="the frozen worker to be told"
    )
    assert json.loads(run(stage, "probe", "--silent-for", "1", "--json").stdout)["alive"] is False
    assert run(stage, "probe", "--silent-for", "900").exit_code == 0
    worker.cont()
    eventually(lambda: run(stage, "probe", "--silent-for", "1").exit_code == 0, why="the worker to be back")


def test_sweeps_that_hang_are_told_though_the_heartbeat_goes_on(stage: Stage) -> None:
    def last_sweep() -> float | None:
        seen: dict[str, Any] = json.loads(run(stage, "tenant", "show", stage.tenant, "--json").stdout)
        return seen["last_sweep"]

    assert last_sweep() is None
    stage.worker()
    eventually(lambda: (last_sweep() or 99.0) < 5.0, why="a sweep in the register")
    # One that does not sweep at all, as if it had stopped doing so two minutes ago.
    other = stage.worker(env={"BAZAAR_RECOVERY": "off"})
    with stage.observer.cursor() as cursor:
        cursor.execute(
            "UPDATE cloacina.workers SET swept_at = now() - interval '2 min' WHERE name LIKE %s RETURNING id",
            (f"{other.nodename} %",),
        )
        assert cursor.rowcount == 1
    ((what, found),) = wrong(stage)
    assert what == "workers"
    assert "is alive and has not swept its tenants for 12" in found
    assert (last_sweep() or 99.0) < 5.0


def test_the_probe_lets_workers_live_while_the_database_is_away(standing: Stage) -> None:
    done = standing.processes.cli(
        "cloacina", "probe", "--json", app=BAZAAR,
        env={"CLOACINA_DATABASE_URL": "postgresql://127.0.0.1:1/none"},
    )  # fmt: skip
    assert (done.returncode, json.loads(done.stdout)["alive"]) == (0, None)


def test_the_doctor_names_workers_that_fell_silent_and_work_that_nobody_takes(stage: Stage) -> None:
    assert any("no worker serves" in found for found in minded(stage))
    worker = stage.worker()
    assert wrong(stage) == []
    worker.stop_signal()
    with stage.observer.cursor() as cursor:
        cursor.execute("UPDATE cloacina.workers SET heartbeat_at = now() - interval '1 hour'")
    stage.send("add", 1, 2)
    # Whether the message is still in the queue is open: the frozen worker may have asked for it before.
    found = [(what, said) for what, said in wrong(stage) if what != "queues"]
    assert [what for what, _ in found] == ["workers", "tenants"]
    assert "has given no sign for 3600 s" in found[0][1]
    assert stage.tenant in found[1][1]


@brokers.EACH_KIND
def test_a_queue_without_a_consumer_is_seen_on_each_broker(stage: Stage) -> None:
    sent = stage.send("add", 1, 2)
    assert [what for what, _ in wrong(stage)] == ["tenants", "queues"]
    stage.worker()
    stage.wait_for_state(sent, "succeeded")
    assert wrong(stage) == []


def test_the_doctor_names_a_schema_that_is_behind_and_one_that_is_locked(stage: Stage) -> None:
    with stage.observer.cursor() as cursor:
        cursor.execute(f"UPDATE {stage.tenant}.cloacina_version SET version_num = 't0001'")
        assert [what for what, _ in wrong(stage)] == ["schemas"]
    with stage.bazaar.cloacina.database.transaction() as lent:
        lent.execute(f"LOCK TABLE {stage.tenant}.cloacina_executions IN ACCESS EXCLUSIVE MODE")
        assert "tenants" in [what for what, _ in wrong(stage)]


def test_the_doctor_names_the_broker_and_the_database_that_do_not_answer(standing: Stage) -> None:
    for name, url in (("BROKER", "redis://127.0.0.1:1/0"), ("DATABASE", "postgresql://127.0.0.1:1/none")):
        done = standing.processes.cli(
            "cloacina", "doctor", "--json", app=BAZAAR, env={f"CLOACINA_{name}_URL": url}
        )
        assert done.returncode == 1
        found: list[dict[str, Any]] = json.loads(done.stdout)
        assert [one["what"] for one in found if one["grade"] == "wrong"] == [name.lower()]


def test_the_doctor_names_the_tenants_whose_tables_the_login_may_not_use(stage: Stage) -> None:
    role = f"doctor_{secrets.token_hex(4)}"
    with stage.observer.cursor() as cursor:
        cursor.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'doctor'")
        try:
            cursor.execute(
                f"GRANT USAGE ON SCHEMA cloacina, {stage.tenant} TO {role};"
                f"GRANT SELECT ON ALL TABLES IN SCHEMA cloacina TO {role};"
                f"GRANT SELECT ON ALL TABLES IN SCHEMA {stage.tenant} TO {role};"
                f"CREATE POLICY doctor ON cloacina.tenants TO {role} USING (true)"
            )
            url = stage.bazaar.cloacina.database.url.set(username=role, password="doctor")
            done = stage.processes.cli(
                "cloacina", "doctor", "--json", app=BAZAAR,
                env={"CLOACINA_DATABASE_URL": url.render_as_string(hide_password=False)},
            )  # fmt: skip
            found = {(one["what"], one["grade"]): one["found"] for one in json.loads(done.stdout)}
            assert stage.tenant in found["privileges", "wrong"]
            assert "may not create" in found["privileges", "mind"]
        finally:
            cursor.execute(f"DROP OWNED BY {role}")
            cursor.execute(f"DROP ROLE {role}")


def test_the_doctor_names_clocks_that_are_apart(standing: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.time.time
    monkeypatch.setattr(doctor.time, "time", lambda: real() + 60)
    assert any("the database's is -60" in found for found in minded(standing))


def test_the_doctor_says_that_a_setting_is_wrong(standing: Stage) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(standing.bazaar.app.conf, "cloacina_liveness", "hope")
        patch.setattr(standing.bazaar.cloacina.parts.kernel, "_settings", None)
        assert [what for what, _ in wrong(standing)] == ["settings"]
