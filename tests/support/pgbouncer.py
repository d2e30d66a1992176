"""A PgBouncer of a test's own, in transaction mode, as docs/operating.md sets one up."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg2
from sqlalchemy import make_url

from tests.support.databases import connect
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

SETTINGS = {
    "pool_mode": "transaction",
    "ignore_startup_parameters": "options",
    "server_reset_query": "DISCARD ALL",
    "server_reset_query_always": "1",
}
"""What docs/operating.md says that PgBouncer must be told; a test compares the two."""

UNPRIVILEGED = "nobody"
"""Whom it runs as where we are root, as which it refuses to run."""


def binary() -> str | None:
    """Find the program; Debian puts it where only root looks."""
    return shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")


@contextmanager
def pooled(url: str, **changes: str) -> Iterator[str]:
    """Run a PgBouncer before a database and yield the URL that goes through it, for the same login."""
    program, target = binary(), make_url(url)
    assert program is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        **SETTINGS, "listen_addr": "127.0.0.1", "listen_port": str(port), "unix_socket_dir": "",
        "auth_type": "trust", "max_client_conn": "200", "default_pool_size": "30", **changes,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        users, config, log = directory / "users", directory / "pgbouncer.ini", directory / "log"
        users.write_text(f'"{target.username}" "{target.password or ""}"\n')
        lines = [f"{key} = {value}" for key, value in {**settings, "auth_file": str(users)}.items()]
        config.write_text(
            f"[databases]\n* = host={target.host} port={target.port or 5432}\n[pgbouncer]\n"
            + "\n".join(lines)
            + "\n"
        )
        directory.chmod(0o755)
        command = [program, *(["-u", UNPRIVILEGED] if os.getuid() == 0 else []), str(config)]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        through = target.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
        try:

            def answers() -> bool:
                assert process.poll() is None, log.read_text()
                with suppress(psycopg2.OperationalError):
                    connect(through).close()
                    return True
                return False

            eventually(answers, why="PgBouncer to answer")
            yield through
        finally:
            process.terminate()
            process.wait(timeout=20)
