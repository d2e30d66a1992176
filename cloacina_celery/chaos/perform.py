"""A run from its first process to the verdict, the same for `make chaos` and for a user's own system."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console

from cloacina_celery.chaos import queues, report
from cloacina_celery.chaos.checker import check
from cloacina_celery.chaos.deck import FAULTS
from cloacina_celery.chaos.drive import Run
from cloacina_celery.chaos.fleet import Fleet
from cloacina_celery.chaos.ground import Ground
from cloacina_celery.chaos.history import History
from cloacina_celery.chaos.plan import SHARES, WITH_CALLBACK, Plan
from cloacina_celery.chaos.submit import Submissions
from cloacina_celery.errors import SettingsError

QUICK = {"lease_ttl": 3.0, "heartbeat_interval": 1.0, "stranded_after": 3.0, "sweep_interval": 2.0}
"""Settings with which a short run has time for what takes the default ones half a minute."""

DRAIN_PATIENCE = 45.0
"""Seconds for what may still be under way when all executions have ended: late messages, callbacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a run is asked for; durations are seconds.

    Raises:
        SettingsError: there is no fault or no kind of execution of a name.
    """

    seed: int
    seconds: float = 120
    executions: int = 1000
    tenants: int = 10
    workers: int = 3
    every: float = 6
    calm: float = 1
    faults: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    is_quick: bool = False
    keeps_logs: bool = False

    def __post_init__(self) -> None:
        for name, value in (
            ("executions", self.executions),
            ("tenants", self.tenants),
            ("workers", self.workers),
        ):
            if value < 1:
                raise SettingsError(f"--{name} must be at least 1, not {value}")
        _refuse_unknown("--fault", self.faults, [fault.kind for fault in FAULTS])
        _refuse_unknown("--kind", self.kinds, list(SHARES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What a run calls its own, so that it can share servers with others."""

    mark: str
    tenants: tuple[str, ...]
    control_queue: str
    plain_queue: str
    application: str

    @classmethod
    def of(cls, mark: str, tenants: int, prefix: str) -> Names:
        """Return the names of the run with this mark."""
        return cls(
            mark=mark, tenants=tuple(f"{prefix}{mark}_{number}" for number in range(tenants)),
            control_queue=f"cloacina_control_{mark}", plain_queue=f"cloacina_plain_{mark}",
            application=f"cloacina_chaos_{mark}",
        )  # fmt: skip

    @property
    def queues(self) -> list[str]:
        """All queues of the run."""
        return [*self.tenants, self.control_queue, self.plain_queue]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The app under test: how its processes name it, and how this one loads it."""

    spec: str
    load: Callable[[], Any]
    settings: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def perform(
    options: Options, ground: Ground, names: Names, subject: Subject, folder: Path, console: Console
) -> bool:
    """Run, print the verdict, and return whether it is clean. Queues are deleted; tenants are left to the caller."""
    outside = folder / "outside.txt"
    settings = {
        **(QUICK if options.is_quick else {}), **subject.settings, "control_queue": names.control_queue,
    }  # fmt: skip
    os.environ.update(
        CLOACINA_DATABASE_URL=ground.package_database_url, CLOACINA_BROKER_URL=ground.package_broker_url,
        CHAOS_OUTSIDE=str(outside), CHAOS_APPLICATION=names.application, CHAOS_DRIVER=str(os.getpid()),
        CHAOS_SETTINGS=json.dumps(settings), CHAOS_TENANTS=json.dumps(names.tenants), PYTHONUNBUFFERED="1",
    )  # fmt: skip
    os.environ.update(subject.environment)
    # What the package logs in this process goes where the others' logs are.
    logging.getLogger().addHandler(logging.FileHandler(folder / "driver.log"))
    app = subject.load()
    random = Random(options.seed)
    plan = Plan.draw(random, list(names.tenants), options.executions, list(options.kinds) or None)
    fleet = Fleet(
        subject.spec, names.tenants, options.workers, mark=names.mark, environment=os.environ, folder=folder
    )
    run = Run(
        app=app, ground=ground, plan=plan, fleet=fleet, random=random,
        submissions=Submissions(app, plan, random, names.plain_queue),
        broker=app.connection_for_write(ground.broker_url), application=names.application,
        plain_queue=names.plain_queue, console=console,
    )  # fmt: skip
    began = time.monotonic()
    try:
        run.prepare()
        fleet.start()
        fleet.wait_ready()
        run.play(
            seconds=options.seconds, every=options.every, calm=options.calm, faults=options.faults or None
        )
        console.print("faults are over; waiting for the rest", highlight=False)
        run.settle()
        _drain(run)
        fleet.shut_down()
        run.collect_callbacks()
        history = History.read(run, outside)
    finally:
        fleet.kill_all()
        queues.delete(run.broker, names.queues)
        app.cloacina.database.dispose()
    verdict = check(history)
    report.show(console, verdict, history, run, time.monotonic() - began, options.seed)
    return verdict.is_clean


def new_folder(options: Options, console: Console) -> Path:
    """Make the folder of a run's logs, and say where it is."""
    folder = Path(tempfile.mkdtemp(prefix="cloacina-chaos-"))
    console.print(f"seed {options.seed}; logs in {folder}", highlight=False)
    return folder


def leave_folder(options: Options, folder: Path, console: Console, *, is_clean: bool) -> None:
    """Remove the logs of a clean run unless they are to be kept."""
    if is_clean and not options.keeps_logs:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        console.print(f"logs are in {folder}", highlight=False)


def _drain(run: Run) -> None:
    """Let the workers take and send what is left: a late message may do harm as well."""
    deadline = time.monotonic() + DRAIN_PATIENCE
    wanted = {step.id for step in run.plan.planned.values() if step.kind == WITH_CALLBACK}
    while time.monotonic() < deadline:
        run.collect_callbacks()
        if wanted <= set(run.callbacks) and not any(queues.depth(run.broker, t) for t in run.plan.tenants):
            return
        run.fleet.mend()
        time.sleep(0.1)


def _refuse_unknown(option: str, names: tuple[str, ...], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise SettingsError(f"{option}: there is no {name!r}; known are {', '.join(map(repr, known))}")
