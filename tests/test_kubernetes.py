"""The manifests for Kubernetes, without a cluster.

What they run is run, what they ask of Postgres is asked, and Kustomize puts them together where `kubectl` is
installed. What only a cluster can tell is left: that its API takes them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.support import ROOT
from tests.support.processes import celery
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from psycopg2 import extensions

    from tests.support.processes import Processes

APP = "cloacina_celery"
"""What the image runs: its entry point is `celery -A cloacina_celery`."""

PLACE = ROOT / "deploy" / "kubernetes"
OVERLAYS = {"acme": "tenant_acme", "shard-1-of-2": "tenant_*@1/2", "shard-2-of-2": "tenant_*@2/2"}
FILES = {
    str(path.relative_to(PLACE)): list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    for path in sorted(PLACE.glob("*/*.yaml"))
}


def objects(kind: str) -> list[dict[str, Any]]:
    return [one for documents in FILES.values() for one in documents if one.get("kind") == kind]


def containers() -> list[dict[str, Any]]:
    found = [
        container
        for one in [*objects("Deployment"), *objects("Job")]
        for container in one["spec"]["template"]["spec"]["containers"]
    ]
    assert {one["name"] for one in found} == {"migrate", "beat", "worker"}
    return found


def container(name: str) -> dict[str, Any]:
    (found,) = [one for one in containers() if one["name"] == name]
    return found


def patched(overlay: str) -> tuple[str, str]:
    """Return the queues and the query that an overlay puts in."""
    (kustomization,) = FILES[f"{overlay}/kustomization.yaml"]
    values = {
        patch["target"]["kind"]: yaml.safe_load(patch["patch"])[0]["value"]
        for patch in kustomization["patches"]
    }
    return values["Deployment"], values["ScaledObject"]


def test_secrets_are_named_and_never_written() -> None:
    assert objects("Secret") == []
    for one in containers():
        for variable in one["env"]:
            if variable["name"].endswith("_URL"):
                assert set(variable) == {"name", "valueFrom"}
                assert variable["valueFrom"]["secretKeyRef"]["name"] == "cloacina"


def test_every_container_has_bounds_and_ends_before_it_is_killed() -> None:
    for one in containers():
        assert one["resources"]["requests"]
        assert one["resources"]["limits"]["memory"]
    (soft,) = [arg for arg in container("worker")["args"] if arg.startswith("worker.soft_shutdown_timeout=")]
    (worker,) = [one for one in objects("Deployment") if one["metadata"]["name"] == "cloacina-worker"]
    assert int(soft.partition("=")[2]) < worker["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]


SLOW = """
import time
from pathlib import Path

from cloacina_celery import cloacina


@cloacina.task(name="slow.hold")
def hold(place):
    Path(place, "held").touch()
    while not Path(place, "released").exists():
        time.sleep(0.05)
"""


def test_the_worker_starts_as_it_is_written_answers_its_probes_and_lets_a_task_end(
    processes: Processes, tmp_path: Path
) -> None:
    written = container("worker")
    queues, _ = patched("acme")
    (tmp_path / "slow.py").write_text(SLOW)
    environment = {one["name"]: one["value"] for one in written["env"] if "value" in one} | {
        "QUEUES": queues, "CLOACINA_IMPORTS": "slow", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
    }  # fmt: skip
    words = [word.replace("$(QUEUES)", queues) for word in written["args"]]
    worker = processes.start("worker", [*celery(APP), *words], env=environment)
    worker.wait_log("worker.registered: worker 1 serves tenants tenant_acme")
    worker.wait_log(" ready")
    for probe in ("startupProbe", "livenessProbe"):
        program, *command = written[probe]["exec"]["command"]
        assert (program, command[:2]) == ("celery", ["-A", APP])
        answer = processes.cli(*command[2:], app=APP)
        assert (answer.returncode, "gave its last sign" in answer.stdout) == (0, True), answer.stderr
    submit = f"from slow import hold; hold.apply_async(({str(tmp_path)!r},), tenant={queues!r})"
    sent = processes.start("submit", [sys.executable, "-c", submit], env=environment)
    assert sent.wait_exit() == 0, sent.log
    eventually((tmp_path / "held").exists, why="the task to run")
    worker.send(signal.SIGTERM)
    worker.wait_log("Initiating Soft Shutdown, terminating in 20")
    (tmp_path / "released").touch()
    assert worker.wait_exit() == 0
    assert "gave 0 running executions back" in worker.log


@pytest.mark.parametrize("name", ["migrate", "beat"])
def test_the_rest_of_the_fleet_starts_as_it_is_written(processes: Processes, name: str) -> None:
    process = processes.start(name, [*celery(APP), *container(name)["args"]])
    if name == "migrate":
        assert process.wait_exit() == 0, process.log
    else:
        process.wait_log("beat: Starting")


def test_the_scalers_count_what_runs_or_could_and_no_more(
    shop: ModuleType, observer: extensions.connection
) -> None:
    for tenant in ("tenant_acme", "tenant_globex", "other"):
        shop.cloacina.tenants.create(tenant)
    counts = {"tenant_acme": 3, "tenant_globex": 2, "other": 7}
    for tenant, count in counts.items():
        shop.cloacina.submit_many([shop.add.s(1, 2)] * count, tenant=tenant)
    assert {overlay: asked(observer, overlay) for overlay in OVERLAYS} == {
        "acme": 3, "shard-1-of-2": 3, "shard-2-of-2": 3,
    }  # fmt: skip
    with observer.cursor() as cursor:
        cursor.execute(
            "UPDATE tenant_acme.cloacina_executions SET run_at = now() + interval '1 hour' WHERE id ="
            " (SELECT min(id) FROM tenant_acme.cloacina_executions)"
        )
    assert asked(observer, "acme") == 2
    shop.cloacina.tenants.suspend("tenant_globex")
    assert asked(observer, "shard-1-of-2") == 1
    with observer.cursor() as cursor:
        cursor.execute(
            "UPDATE tenant_acme.cloacina_executions SET state = 'running', attempt = 1,"
            " lease_expires_at = now() + interval '1 minute', started_at = now() WHERE run_at <= now()"
        )
    assert asked(observer, "acme") == 2


def asked(observer: extensions.connection, overlay: str) -> int:
    """Ask what KEDA asks for an overlay."""
    with observer.cursor() as cursor:
        cursor.execute(patched(overlay)[1])
        ((count,),) = cursor.fetchall()
    return int(count)


@pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="Kustomize comes with kubectl, which is not installed"
)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_puts_a_deployment_and_its_scaler_together(overlay: str) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(PLACE / overlay)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    deployment, scaler = yaml.safe_load_all(done.stdout)
    assert deployment["metadata"]["name"] == f"cloacina-worker-{overlay}"
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    # Or the deployments would count each other's pods.
    assert deployment["spec"]["selector"]["matchLabels"]["app.kubernetes.io/instance"] == overlay
    variables = {
        one["name"]: one.get("value")
        for one in deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert variables["QUEUES"] == OVERLAYS[overlay]
    assert scaler["spec"]["triggers"][0]["metadata"]["query"] == patched(overlay)[1]
