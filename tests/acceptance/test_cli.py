"""The command line: tables for people, JSON for programs, exit codes for scripts."""

from __future__ import annotations

import json
import secrets
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from cloacina_celery.cli import cloacina
from cloacina_celery.store.migrate import TENANT_HEAD
from tests.acceptance.stage import BAZAAR

if TYPE_CHECKING:
    from pathlib import Path

    from tests.acceptance.stage import Stage


def run(standing: Stage, *args: str) -> Result:
    """Run a command in this process, with the app that `celery -A` would have found."""
    return CliRunner().invoke(cloacina, args, obj=SimpleNamespace(app=standing.bazaar.app))


def words(standing: Stage, *args: str) -> str:
    done = run(standing, *args)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def data(standing: Stage, *args: str) -> Any:
    return json.loads(words(standing, *args, "--json"))


def refusal(standing: Stage, *args: str) -> str:
    done = run(standing, *args)
    assert done.exit_code in (1, 2)
    assert isinstance(done.exception, SystemExit)
    return done.stderr


def refused_object(standing: Stage, *args: str) -> tuple[int, Any]:
    done = run(standing, *args, "--json")
    assert isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, json.loads(done.stdout)


def test_tenants_are_created_listed_and_dropped(standing: Stage) -> None:
    assert words(standing, "tenant", "create", "cli_one") == "tenant cli_one created\n"
    assert words(standing, "tenant", "create", "cli_one") == "tenant cli_one exists already\n"
    assert data(standing, "tenant", "create", "cli_two") == {"name": "cli_two", "created": True}
    assert "cli_one" in words(standing, "tenant", "list")
    assert {"cli_one", "cli_two", standing.tenant} <= {
        one["name"] for one in data(standing, "tenant", "list")
    }
    assert words(standing, "tenant", "drop", "cli_one", "--yes") == "tenant cli_one dropped\n"
    assert data(standing, "tenant", "drop", "cli_two", "--yes") == {"name": "cli_two", "dropped": True}
    assert words(standing, "tenant", "drop", "cli_one", "--yes") == "tenant cli_one is removed already\n"
    assert "cli_none" in refusal(standing, "tenant", "drop", "cli_none", "--yes")
    # Without --yes somebody has to say so, and here is nobody.
    refusal(standing, "tenant", "drop", standing.tenant)
    assert standing.tenant in words(standing, "tenant", "list")


def test_a_tenants_life_on_the_command_line(standing: Stage, tmp_path: Path) -> None:
    words(standing, "tenant", "create", "cli_life")
    assert "suspended; nothing is left to run" in words(
        standing, "tenant", "suspend", "cli_life", "--by", "ada"
    )
    assert "is suspended already" in words(standing, "tenant", "suspend", "cli_life")
    assert data(standing, "tenant", "resume", "cli_life")["resumed"]
    assert "nothing is left" in words(standing, "tenant", "drain", "cli_life", "--wait", "--timeout", "9")
    assert words(standing, "tenant", "set", "cli_life", "--retain-failed", "60") == "tenant cli_life set\n"
    assert data(standing, "tenant", "set", "cli_life", "--unset", "retain-failed")["retain_failed"] is None
    assert "nothing to set" in refusal(standing, "tenant", "set", "cli_life")
    assert "at once" in refusal(
        standing, "tenant", "set", "cli_life", "--retain-failed", "60", "--unset", "retain-failed"
    )
    assert "tenant suspend cli_life" in refusal(standing, "tenant", "rename", "cli_life", "cli_new")
    words(standing, "tenant", "suspend", "cli_life")
    assert "renamed to cli_new" in words(standing, "tenant", "rename", "cli_life", "cli_new")
    shown = data(standing, "tenant", "show", "cli_life")
    assert (shown["state"], shown["moved_to"]) == ("removed", "cli_new")
    assert [entry["operator"] for entry in shown["audit"]][1] == "ada"
    assert "moved" in words(standing, "tenant", "show", "cli_life")
    assert "cli_life" in words(standing, "tenant", "list", "--removed")
    assert "is not there: install" in refusal(
        standing, "tenant", "export", "cli_new", str(tmp_path / "dump"), "--programs", str(tmp_path)
    )
    (tmp_path / "dump").write_bytes(b"nonsense")
    assert "Error: " in refusal(standing, "tenant", "import", str(tmp_path / "dump"), "--as", "cli_newer")
    assert "'public'" in refusal(standing, "tenant", "adopt", "cli_newer", "--dry-run")
    words(standing, "tenant", "drop", "cli_new", "--yes")


@pytest.mark.parametrize("name", ["Tenant_Standing", "a-b", "public", "pg_x", "ä", "x" * 64])
def test_a_name_that_cannot_be_a_tenants_is_refused_with_the_rule(standing: Stage, name: str) -> None:
    assert refusal(standing, "tenant", "create", name).startswith("Error: ")


def test_schemas_are_migrated_and_their_status_shown(standing: Stage) -> None:
    assert standing.tenant in words(standing, "schema", "status")
    assert all(row["ok"] for row in data(standing, "schema", "status"))
    assert "nothing to do" in words(standing, "schema", "migrate")
    assert standing.tenant in words(standing, "schema", "migrate", "--recheck", "--jobs", "2")
    assert "tenant_missing" in words_of(run(standing, "schema", "migrate", "--canary", "tenant_missing"))
    assert data(standing, "schema", "migrate", standing.tenant)[0]["error"] is None
    assert "tenant_missing" in words_of(run(standing, "schema", "migrate", "tenant_missing"))
    with standing.observer.cursor() as cursor:
        cursor.execute(f"UPDATE {standing.tenant}.cloacina_version SET version_num = 't9999'")
    try:
        assert "schema migrate" in refusal(standing, "schema", "status")
        assert run(standing, "schema", "migrate", "--recheck").exit_code == 1
    finally:
        with standing.observer.cursor() as cursor:
            cursor.execute(f"UPDATE {standing.tenant}.cloacina_version SET version_num = '{TENANT_HEAD}'")


def words_of(done: Result) -> str:
    assert done.exit_code == 1
    return done.stdout + done.stderr


def test_executions_are_listed_shown_cancelled_and_requeued(standing: Stage) -> None:
    failed = standing.send("fail", "cli")
    standing.wait_for_state(failed, "failed")
    assert failed.id in words(standing, "execution", "list", standing.tenant)
    listed = data(
        standing, "execution", "list", standing.tenant, "--state", "failed", "--task", "bazaar.fail"
    )
    assert [one["id"] for one in listed] == [failed.id]

    shown = words(standing, "execution", "show", standing.tenant, failed.id)
    assert "failed after 3 attempts" in shown
    assert "attempt 1 failed with OSError(failure 1 of cli)" in shown
    assert "Traceback" in shown
    kinds = [
        event["kind"] for event in data(standing, "execution", "show", standing.tenant, failed.id)["events"]
    ]
    assert kinds[0] == "submitted"
    assert kinds[-1] == "failed"

    requeued = data(standing, "execution", "requeue", standing.tenant, failed.id)
    assert (requeued["state"], requeued["failures"]) == ("pending", 0)
    standing.wait_for_runs("cli", 6)
    standing.wait_for_state(failed, "failed")

    waiting = standing.bazaar.add.apply_async((1, 2), tenant=standing.tenant, countdown=600)
    assert "cancelled" in words(standing, "execution", "cancel", standing.tenant, waiting.id)
    assert standing.row(waiting).state == "cancelled"
    assert "cancelled" in refusal(standing, "execution", "cancel", standing.tenant, waiting.id)
    assert "pending" in words(standing, "execution", "requeue", standing.tenant, waiting.id)
    assert waiting.get(timeout=15) == 3
    assert "succeeded" in refusal(standing, "execution", "requeue", standing.tenant, waiting.id)
    assert "no-such-id" in refusal(standing, "execution", "show", standing.tenant, "no-such-id")
    assert "tenant_missing" in refusal(standing, "execution", "list", "tenant_missing")
    assert "nonsense" in refusal(standing, "execution", "list", standing.tenant, "--state", "nonsense")


def test_a_sweep_and_the_status_of_all_tenants(standing: Stage) -> None:
    assert "executions" in words(standing, "sweep")
    assert set(data(standing, "sweep")) == {"touched"}
    assert "pending" in words(standing, "status")
    status = data(standing, "status")
    assert standing.tenant in {row["tenant"] for row in status["tenants"]}
    assert standing.tenant in status["workers"][0]["tenants"]


def test_the_list_of_tenants_counts_what_each_has_and_tells_how_old_the_oldest_are(standing: Stage) -> None:
    words(standing, "tenant", "create", "cli_ages")
    try:
        due = standing.bazaar.add.apply_async((1, 2), tenant="cli_ages")
        standing.bazaar.add.apply_async((1, 2), tenant="cli_ages", countdown=600)
        with standing.observer.cursor() as cursor:
            cursor.execute(
                "UPDATE cli_ages.cloacina_executions SET run_at = now() - interval '90 s' WHERE id = %s",
                (due.id,),
            )
        (row,) = [one for one in data(standing, "tenant", "list") if one["name"] == "cli_ages"]
        assert (row["pending"], row["due"], row["running"], row["revision"]) == (2, 1, 0, TENANT_HEAD)
        assert 90 <= row["oldest_due"] < 120
        shown = data(standing, "tenant", "show", "cli_ages")
        assert (shown["pending"], shown["letters"], shown["workers"]) == (2, 0, [])
        assert "oldest_due:           1 min 3" in words(standing, "tenant", "show", "cli_ages")
        assert "1 min 3" in words(standing, "status").partition("cli_ages")[2].splitlines()[0]
        assert data(standing, "tenant", "show", standing.tenant)["workers"]
    finally:
        words(standing, "tenant", "drop", "cli_ages", "--now", "--yes")


def test_a_locked_tenant_does_not_hide_the_others_from_the_status(standing: Stage) -> None:
    words(standing, "tenant", "create", "cli_locked")
    try:
        with standing.bazaar.cloacina.database.transaction() as cursor:
            cursor.execute("LOCK TABLE cli_locked.cloacina_executions IN ACCESS EXCLUSIVE MODE")
            began = time.monotonic()
            done = run(standing, "status", "--json")
            took = time.monotonic() - began
        # A second for the lock, and not the half minute that a statement may take.
        assert took < 10.0
        assert done.exit_code == 1
        assert "tenant cli_locked could not be looked at" in done.stderr
        rows = {row["tenant"]: row for row in json.loads(done.stdout)["tenants"]}
        assert rows["cli_locked"]["pending"] is None
        assert rows[standing.tenant]["trouble"] is None
    finally:
        words(standing, "tenant", "drop", "cli_locked", "--now", "--yes")


def test_a_drain_or_a_drop_that_ends_with_something_left_exits_with_a_number_of_its_own(
    standing: Stage,
) -> None:
    words(standing, "tenant", "create", "cli_left")
    try:
        standing.bazaar.add.apply_async((1, 2), tenant="cli_left", countdown=600)
        done = run(standing, "tenant", "drain", "cli_left", "--wait", "--timeout", "0")
        assert (done.exit_code, "1 execution waits, 0 run" in done.stderr) == (75, True)
        code, left = refused_object(standing, "tenant", "drain", "cli_left", "--wait", "--timeout", "0")
        assert (code, left["pending"]) == (75, 1)
        code, left = refused_object(standing, "tenant", "drop", "cli_left", "--yes", "--timeout", "0")
        assert (code, left["dropped"], left["pending"]) == (75, False, 1)
        assert run(standing, "tenant", "drain", "cli_left", "--timeout", "5").exit_code == 2
        assert run(standing, "tenant", "drain", "cli_none", "--wait").exit_code == 1
    finally:
        words(standing, "tenant", "drop", "cli_left", "--now", "--yes")


def test_what_is_refused_is_an_object_for_programs(standing: Stage) -> None:
    code, said = refused_object(standing, "execution", "show", standing.tenant, "no-such-id")
    assert (code, said["error"]) == (1, "ExecutionNotFound")
    assert "no-such-id" in said["message"]


def test_names_that_plain_tasks_travel_by_and_that_are_in_use_are_refused(standing: Stage) -> None:
    assert "task_default_queue" in refusal(standing, "tenant", "create", "celery")
    assert "tenant create public --legacy" in refusal(standing, "tenant", "adopt", "cli_adopted")
    words(standing, "tenant", "create", "public", "--legacy")
    try:
        assert "in use" in refusal(standing, "tenant", "adopt", standing.tenant, "--dry-run")
        assert "cli_adopted would move" in words(
            standing, "tenant", "adopt", "cli_adopted", "--from", "public", "--dry-run"
        )
    finally:
        words(standing, "tenant", "drop", "public", "--now", "--yes")


def test_a_login_without_privileges_is_told_so_in_one_line(standing: Stage) -> None:
    role = f"cli_poor_{standing.tenant}_{secrets.token_hex(4)}"
    with standing.observer.cursor() as cursor:
        cursor.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'poor'")
    try:
        url = standing.bazaar.cloacina.database.url.set(username=role, password="poor")
        for command in (("status",), ("sweep",), ("schema", "migrate"), ("tenant", "create", "cli_poor")):
            done = standing.processes.cli(
                "cloacina", *command, "--json", app=BAZAAR,
                env={"CLOACINA_DATABASE_URL": url.render_as_string(hide_password=False)},
            )  # fmt: skip
            assert done.returncode == 1
            assert json.loads(done.stdout)["error"] == "DatabaseRefused", command
            assert "permission denied for schema cloacina; run this with the login" in done.stderr
            assert "Traceback" not in done.stderr
    finally:
        with standing.observer.cursor() as cursor:
            cursor.execute(f"DROP ROLE {role}")


def test_a_sweep_of_an_empty_database_touches_nothing(stage: Stage) -> None:
    with stage.observer.cursor() as cursor:
        cursor.execute("DROP SCHEMA cloacina CASCADE")
    assert data(stage, "sweep") == {"touched": 0}


def test_a_database_that_does_not_answer_is_one_line_and_not_a_traceback(standing: Stage) -> None:
    for command in (("tenant", "list"), ("schema", "migrate")):
        done = standing.processes.cli(
            "cloacina", *command, app=BAZAAR, env={"CLOACINA_DATABASE_URL": "postgresql://127.0.0.1:1/none"}
        )
        assert done.returncode == 1
        assert done.stderr.startswith("Error: ")
        assert "Traceback" not in done.stderr


def test_an_app_without_the_plugin_is_told_what_it_lacks(standing: Stage) -> None:
    done = standing.processes.cli("cloacina", "status", app="tests.support.plain_app:app")
    assert done.returncode == 1
    assert "Cloacina(app" in done.stderr


def test_the_commands_hang_on_celerys_own_command_line(standing: Stage) -> None:
    listed = standing.processes.cli("cloacina", "tenant", "list", "--json", app=BAZAAR)
    assert listed.returncode == 0
    assert standing.tenant in {one["name"] for one in json.loads(listed.stdout)}
    refused = standing.processes.cli(
        "cloacina", "execution", "show", standing.tenant, "no-such-id", app=BAZAAR
    )
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in refused.stderr
