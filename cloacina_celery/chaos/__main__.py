"""Run thousands of executions over ten tenants under faults, and check the history.

Real broker, database, workers and beats. The faults are drawn with the printed seed; the exit code is the
checker's: 0 where nothing was lost, doubled, settled twice, misplaced or stuck.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import secrets
import sys
from typing import Any

from rich.console import Console

from cloacina_celery.chaos.deck import FAULTS
from cloacina_celery.chaos.ground import own_ground
from cloacina_celery.chaos.perform import Names, Options, Subject, leave_folder, new_folder, perform
from cloacina_celery.chaos.plan import SHARES


def main(arguments: list[str] | None = None) -> int:
    """Run, print and return the exit code."""
    chosen = _parser().parse_args(arguments)
    options = Options(
        seed=chosen.seed, seconds=chosen.seconds, executions=chosen.executions, tenants=chosen.tenants,
        workers=chosen.workers, every=chosen.every, calm=chosen.calm, faults=tuple(chosen.fault or ()),
        kinds=tuple(chosen.kind or ()), is_quick=chosen.quick, keeps_logs=chosen.keep,
    )  # fmt: skip
    # A file's lines shall be whole, whoever reads them.
    console = Console(width=None if sys.stdout.isatty() else 120)
    folder = new_folder(options, console)
    # The names are this run's own: others may use the same broker.
    names = Names.of(secrets.token_hex(3), options.tenants, "tenant_")
    subject = Subject(
        spec=chosen.app, load=lambda: _load(chosen.app), environment={"CHAOS_CONF": _conf(chosen.queue_type)}
    )
    with own_ground(os.environ.get("CLOACINA_DATABASE_URL", ""), _broker(chosen.broker), folder) as ground:
        is_clean = perform(options, ground, names, subject, folder, console)
    leave_folder(options, folder, console, is_clean=is_clean)
    return 0 if is_clean else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cloacina_celery.chaos", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=120, help="time in which faults strike (%(default)s)"
    )
    parser.add_argument("--executions", type=int, default=1000, help="how many are submitted (%(default)s)")
    parser.add_argument("--tenants", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=3, help="processes of two children each (%(default)s)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="drawn unless given")
    parser.add_argument("--every", type=float, default=6, help="mean seconds between faults (%(default)s)")
    parser.add_argument("--calm", type=float, default=1, help="seconds before the first fault (%(default)s)")
    parser.add_argument(
        "--broker", choices=("redis", "env"), default="redis",
        help="redis: the environment's if it is one, else an embedded one; env: whatever CLOACINA_BROKER_URL names",
    )  # fmt: skip
    parser.add_argument(
        "--queue-type", choices=("classic", "quorum"), default="classic", help="of RabbitMQ (%(default)s)"
    )
    parser.add_argument(
        "--fault",
        action="append",
        choices=[fault.kind for fault in FAULTS],
        help="only these kinds; repeatable",
    )
    parser.add_argument(
        "--kind", action="append", choices=list(SHARES), help="only these executions; repeatable"
    )
    parser.add_argument(
        "--quick", action="store_true", help="short leases and sweeps instead of the defaults"
    )
    parser.add_argument(
        "--app", default="cloacina_celery.chaos.app:app", help="another app module (%(default)s)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the logs of a clean run too")
    return parser


def _broker(choice: str) -> str:
    url = os.environ.get("CLOACINA_BROKER_URL", "")
    if choice == "env" and not url:
        raise SystemExit("--broker env: set CLOACINA_BROKER_URL")
    return url if choice == "env" or url.startswith("redis") else ""


def _conf(queue_type: str) -> str:
    if queue_type == "classic":
        return "{}"
    return json.dumps(
        {
            "task_default_queue_type": queue_type,
            "task_create_missing_queue_type": queue_type,
            "broker_transport_options": {"confirm_publish": True},
        }
    )


def _load(spec: str) -> Any:
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name or "app")


if __name__ == "__main__":
    sys.exit(main())
