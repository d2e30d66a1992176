"""Every document with Python in it is followed from top to bottom, on real servers, as a reader would.

A Python block that begins with a comment like `# shop.py` is that file. The others run in one interpreter, and
print what the comments behind their `print` calls say. Workers and beats named in shell blocks are started,
other `celery` commands are run and must succeed, unless they have a `<placeholder>`.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.docs.markdown import Block, blocks, documents
from tests.support import ROOT
from tests.support.processes import leash_environment, on_leash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.processes import Processes

READER = Path(__file__).with_name("reader.py")
WRITTEN_DATABASE = "postgresql://localhost/shop"
WRITTEN_BROKER = "redis://localhost:6379/0"
WRITTEN_PORT = "18099"

WITH_PYTHON = [path for path in documents() if any(block.language == "python" for block in blocks(path))]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("document", WITH_PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_reader_who_follows_the_document_sees_what_it_says(
    document: Path, processes: Processes, tmp_path: Path, database_url: str, broker_url: str
) -> None:
    directory = tmp_path / "reader"
    directory.mkdir()

    port = str(free_port())

    def here(code: str) -> str:
        code = code.replace(WRITTEN_DATABASE, database_url).replace(WRITTEN_BROKER, broker_url)
        return code.replace(WRITTEN_PORT, port)

    environment: dict[str, str | None] = {
        "PYTHONPATH": os.pathsep.join([str(directory), str(ROOT)]),
        "CLOACINA_DATABASE_URL": None,
        "CLOACINA_BROKER_URL": None,
    }
    with reader(directory, lambda: processes.environment(environment)) as read:
        for block in blocks(document):
            if block.language == "python" and block.file_name:
                (directory / block.file_name).write_text(here(block.code), encoding="utf-8")
            elif block.language == "python":
                assert read(block.where, here(block.code)) == block.printed, block.where
            elif block.language == "sh":
                for command in block.commands:
                    follow(here(command), block, processes, environment)


def free_port() -> int:
    """Find a port for a server that a document starts: several test runs may read it at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def follow(command: str, block: Block, processes: Processes, environment: dict[str, str | None]) -> None:
    """Do what one line of a shell block says, as far as it concerns Celery."""
    if command.startswith("export "):
        name, _, value = command.removeprefix("export ").partition("=")
        environment[name] = value
    if not command.startswith("celery ") or "<" in command:
        return
    words = shlex.split(command)[1:]
    app, verb, rest = words[1], words[2], words[3:]
    assert words[0] == "-A", f"{block.where}: {command}"
    if verb == "worker":
        queues = rest[rest.index("-Q") + 1].split(",")
        extra = [word for word in rest if word not in ("-Q", ",".join(queues))]
        processes.worker(app, queues=queues, env=environment, extra=extra).wait_ready()
    elif verb == "beat":
        processes.beat(app, env=environment, extra=rest).wait_ready()
    else:
        done = processes.cli(*words[2:], app=app, env=environment)
        assert done.returncode == 0, f"{block.where}: {command}\n{done.stdout}{done.stderr}"


@contextmanager
def reader(
    directory: Path, environment: Callable[[], dict[str, str]]
) -> Iterator[Callable[[str, str], list[str]]]:
    """Yield a function that runs a block in the document's interpreter and returns the lines it printed."""
    started: list[subprocess.Popen[str]] = []

    def read(where: str, code: str) -> list[str]:
        if not started:  # with the settings that the document has exported by now
            started.append(
                subprocess.Popen(
                    on_leash([sys.executable, str(READER)]),
                    cwd=directory,
                    env=leash_environment(environment()),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        stdin, stdout = started[0].stdin, started[0].stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"where": where, "code": code}) + "\n")
        stdin.flush()
        answer = json.loads(stdout.readline())
        assert answer["error"] is None, f"{where} raised\n{answer['error']}"
        printed: str = answer["printed"]
        return printed.splitlines()

    try:
        yield read
    finally:
        for process in started:
            process.kill()
            process.communicate()
