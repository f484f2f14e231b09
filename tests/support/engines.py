"""Private engines that may be stopped, paused and killed. What lives here: PostgreSQL, Redis and Sentinel as processes
of the tests' own, in folders of their own. What must not: anything that touches an engine somebody else has started.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

PATIENCE = 20
"""Seconds in which an engine comes up or ends."""
POSTGRES_USER = "postgres"


def program(name: str) -> str | None:
    """Where an engine's program is; the newest of several."""
    folders = [*glob.glob("/usr/lib/postgresql/*/bin"), "/usr/sbin"]
    return shutil.which(name) or max((f"{each}/{name}" for each in folders if Path(each, name).exists()), default=None)


def need(*names: str) -> pytest.MarkDecorator:
    """Skips without these programs, and the one that names processes; with CI set that is a failure."""
    missing = [name for name in (*names, "pgrep") if program(name) is None]
    if missing and os.environ.get("CI"):
        raise RuntimeError(f"CI needs {', '.join(missing)}")
    return pytest.mark.skipif(bool(missing), reason=f"there is no {', '.join(missing)} here")


_numbers = itertools.count(os.getpid())


def free_port() -> int:
    """A port that is free, and that nobody else takes before it is used.

    It is not among those that a system hands out by itself, and each worker of pytest-xdist has 500 of its own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for number in itertools.islice(_numbers, 500):
        port = 16_000 + 500 * (worker % 20) + number % 500
        with socket.socket() as taken, contextlib.suppress(OSError):
            taken.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


class Engine:
    """A process that is an engine, and its folder. All calls block."""

    command: list[str]
    as_user: dict[str, Any] = {}  # noqa: RUF012 - what `Popen` is given besides

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="cagey-engine-"))
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Any:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        until = time.monotonic() + PATIENCE
        while True:
            if self.process is None or self.process.poll() is not None:  # it may still see the end of the one before
                with (self.folder / "log").open("ab") as log:
                    self.process = subprocess.Popen(
                        self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, **self.as_user
                    )
            if self.is_ready():
                return
            if time.monotonic() > until:
                raise RuntimeError(f"{self.command[0]} does not start:\n{(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def is_ready(self) -> bool:
        raise NotImplementedError

    def processes(self) -> list[int]:
        assert self.process is not None
        children = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        return [self.process.pid, *map(int, children.stdout.split())]

    def stop(self) -> None:
        """End it as an administrator does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        self.process.wait(PATIENCE)

    def restart(self) -> None:
        self.stop()
        self.start()

    def kill(self) -> None:
        """End all of it at once, in the middle of whatever it does."""
        if self.process is not None and self.process.poll() is None:
            self._signal(signal.SIGKILL)
            self.process.wait(PATIENCE)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


class PostgresEngine(Engine):
    """PostgreSQL behind a Unix socket, of a user who is not root."""

    def __init__(self) -> None:
        super().__init__()
        data = self.folder / "data"
        owner: dict[str, Any] = {}
        if os.geteuid() == 0:
            shutil.chown(self.folder, POSTGRES_USER, POSTGRES_USER)
            owner = {"user": POSTGRES_USER, "group": POSTGRES_USER, "extra_groups": []}
        self.as_user = owner
        initdb, postgres, self._is_ready = program("initdb"), program("postgres"), program("pg_isready")
        assert initdb is not None and postgres is not None and self._is_ready is not None
        subprocess.run(
            [initdb, "-D", str(data), "-U", POSTGRES_USER, "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            capture_output=True,
            cwd=self.folder,
            **owner,
        )
        self.command = [postgres, "-D", str(data), "-k", str(self.folder), "-c", "listen_addresses="]
        # what a process has written outlives it without a sync; and after a crash all files would be synced first
        self.command += ["-c", "fsync=off", "-c", "shared_buffers=16MB", "-c", "max_connections=40"]
        self.url = f"postgresql://{POSTGRES_USER}@/postgres?host={self.folder}"
        self.socket = self.folder / ".s.PGSQL.5432"

    def is_ready(self) -> bool:
        assert self._is_ready is not None
        command = [self._is_ready, "-h", str(self.folder), "-U", POSTGRES_USER, "-q"]
        return subprocess.run(command, check=False).returncode == 0


class PgBouncerEngine(Engine):
    """PgBouncer behind a Unix socket, in front of the PostgreSQL of the tests."""

    def __init__(self, postgres: str, mode: str, *settings: str) -> None:
        super().__init__()
        if os.geteuid() == 0:  # it does not run as root
            shutil.chown(self.folder, POSTGRES_USER, POSTGRES_USER)
            self.as_user = {"user": POSTGRES_USER, "group": POSTGRES_USER, "extra_groups": []}
        at = urlsplit(postgres)
        database = at.path.strip("/")
        behind = {"host": at.hostname, "port": at.port or 5432, "user": at.username, "password": at.password}
        words = " ".join(f"{name}='{unquote(str(value))}'" for name, value in behind.items() if value)
        lines = [
            *("[databases]", f"{database} = {words}", "[pgbouncer]", f"unix_socket_dir = {self.folder}"),
            *("listen_addr =", "listen_port = 6432", "auth_type = any", f"pool_mode = {mode}", *settings),
        ]
        (self.folder / "pgbouncer.ini").write_text("\n".join(lines))
        bouncer = program("pgbouncer")
        assert bouncer is not None
        self.command = [bouncer, str(self.folder / "pgbouncer.ini")]
        self.url = f"postgresql://somebody@/{database}?host={self.folder}&port=6432"

    def is_ready(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self.folder / ".s.PGSQL.6432")) == 0


class RedisProcess(Engine):
    """A process that is asked as Redis is."""

    def client(self) -> redis.Redis:
        raise NotImplementedError

    def ask(self, *command: str) -> Any:
        """One command, by a connection of its own."""
        with self.client() as client:
            return client.execute_command(*command)

    def is_ready(self) -> bool:
        try:
            return bool(self.ask("PING"))
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False


class RedisEngine(RedisProcess):
    """Redis behind a Unix socket, or at a port where others are to find it, that forgets nothing."""

    def __init__(self, *settings: str, port: int = 0) -> None:
        super().__init__()
        server = program("redis-server")
        assert server is not None
        self.socket = self.folder / "redis.sock"
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0" if port else f"unix://{self.socket}"
        self.command = [server, "--port", str(port), "--unixsocket", str(self.socket), "--dir", str(self.folder)]
        self.command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always", *settings]

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket), retry=Retry(NoBackoff(), 0))


class SentinelEngine(RedisProcess):
    """A Sentinel that watches one primary, alone, so that its own word is enough."""

    def __init__(self, primary: RedisEngine, service: str = "mymaster") -> None:
        super().__init__()
        server = program("redis-server")
        assert server is not None
        self.port = free_port()
        (self.folder / "sentinel.conf").write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n"
            f"sentinel monitor {service} 127.0.0.1 {primary.port} 1\n"
            f"sentinel down-after-milliseconds {service} 1000\n"
            f"sentinel failover-timeout {service} 3000\n"
        )
        self.command = [server, str(self.folder / "sentinel.conf"), "--sentinel"]

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, protocol=2, retry=Retry(NoBackoff(), 0))
