"""A file for SQLite and the connection that a store writes to it by, a schema of PostgreSQL's, and engines of Redis."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import time
import uuid
from pathlib import Path

import pytest
import redis as driver

from support import drop_schema, execute
from support.watched_sqlite import Writer


class Server:
    """A Redis of one's own, on a Unix socket."""

    def __init__(self, folder, *settings):
        self.socket = str(folder / "socket")
        command = ["redis-server", "--port", "0", "--unixsocket", self.socket, "--save", "", "--dir", str(folder)]
        self._process = subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL)
        self.client = driver.Redis(unix_socket_path=self.socket)
        until = time.monotonic() + 30
        while True:
            try:
                self.client.ping()
                return
            except (driver.ConnectionError, OSError):
                if self._process.poll() is not None or time.monotonic() > until:
                    self.stop()
                    raise
            time.sleep(0.01)  # there is no event to wait for

    def stop(self):
        self.client.close()
        self._process.kill()
        self._process.wait()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "users.db"


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Writer:
    watched = Writer()
    monkeypatch.setattr(sqlite3, "connect", watched.connect)
    return watched


@pytest.fixture
def schema():
    """The name of a schema of one's own."""
    name = f"cagey_{uuid.uuid4().hex}"
    asyncio.run(execute(f"CREATE SCHEMA {name}"))
    yield name
    asyncio.run(drop_schema(name))


@pytest.fixture
def servers(tmp_path):
    """Makes an engine of one's own."""
    made = []

    def start(name, *settings):
        folder = tmp_path / name
        folder.mkdir()
        made.append(Server(folder, *settings))
        return made[-1]

    yield start
    for server in made:
        server.stop()
