"""What the engines hold, as seen without the library. What lives here: a place of one's own in each of them, reading it
and removing it. What must not: anything of cagey_sessions, whose own way of reading could hide what is wrong.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import asyncpg
import redis

from .history import Event, n_of

__all__ = ["POSTGRES", "REDIS", "DamagedError", "Engine", "MissingEngineError", "Postgres", "Redis", "SQLite", "look"]

POSTGRES = os.environ.get("CAGEY_TEST_POSTGRES", "postgresql://root@127.0.0.1:5432/test")
REDIS = os.environ.get("CAGEY_TEST_REDIS", "redis://127.0.0.1:6379/0")
NAMES = ("user_id", "epoch", "owner", "released", "version", "body")


class MissingEngineError(Exception):
    """There is no such server, or it cannot be used."""


class DamagedError(Exception):
    """What an engine keeps is not whole."""


class _Row(NamedTuple):
    user: str
    epoch: int
    owner: str
    released: bool
    version: int
    body: str | bytes | None


class Engine(Protocol):
    """A place of one's own in one engine."""

    url: str
    space: str
    shared: bool
    """Whether two writers may be there at a time."""

    def open(self) -> None:
        """Raises `MissingEngineError`."""

    def rows(self) -> list[_Row]:
        """Everything that is there. Raises `DamagedError`."""

    def remove(self) -> None:
        """Leave nothing behind."""


def look(engine: Engine, users: Collection[str]) -> list[Event]:
    """What an engine has of these users, and of whomever else it has, as events."""
    began = time.monotonic_ns()
    rows = {row.user: row for row in engine.rows()}
    at = time.monotonic_ns()
    return [_event(began, at, user, rows.get(user)) for user in sorted({*users, *rows})]


def _event(began: int, at: int, user: str, row: _Row | None) -> Event:
    if row is None:
        return Event("read", began, at, user, 0, "", 0, 0)
    owner, released = ("", True) if row.released else (row.owner, False)
    if row.body is None:
        return Event("read", began, at, user, row.epoch, owner, row.version, 0, released)
    try:
        data = json.loads(row.body)
    except ValueError:
        data = repr(row.body)
    return Event("read", began, at, user, row.epoch, owner, row.version, n_of(data), released, data)


def _missing(what: str, url: str, variable: str) -> str:
    place = url.partition("://")[2].rpartition("@")[2]  # no password
    return f"no {what} at {place}; {variable} says where one is"


class SQLite:
    """A file in a folder."""

    space = ""
    shared = False

    def __init__(self, folder: Path) -> None:
        self.path = folder / "users.db"
        self.url = f"sqlite:{self.path}"

    def open(self) -> None:
        return

    def rows(self) -> list[_Row]:
        # a copy, for whoever opens the file first recovers it, and that is to be left to the library
        with tempfile.TemporaryDirectory() as folder:
            for suffix in ("", "-wal", "-journal"):
                if (file := Path(f"{self.path}{suffix}")).exists():
                    shutil.copy(file, folder)
            try:
                return _rows_of(Path(folder) / self.path.name)
            except sqlite3.Error as error:
                raise DamagedError(f"{self.path.name}: {error}") from error

    def remove(self) -> None:
        return  # the folder is


def _rows_of(path: Path) -> list[_Row]:
    with closing(sqlite3.connect(path)) as db:
        found = db.execute("PRAGMA integrity_check").fetchall()
        if found != [("ok",)]:
            raise DamagedError(f"{path.name}: {found!r:.500}")
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'cagey_sessions'").fetchall():
            return []
        return [_Row(*row) for row in db.execute(f"SELECT {', '.join(NAMES)} FROM cagey_sessions")]


class Postgres:
    """A schema."""

    shared = True

    def __init__(self, url: str = POSTGRES) -> None:
        self.url = url
        self.space = f"cagey_crash_{uuid.uuid4().hex}"

    def open(self) -> None:
        try:
            self._run("SELECT 1")
        except (OSError, asyncpg.PostgresError, TimeoutError) as error:
            raise MissingEngineError(_missing("PostgreSQL", self.url, "CAGEY_TEST_POSTGRES")) from error

    def rows(self) -> list[_Row]:
        columns = ", ".join(NAMES[:-1])
        rows = self._run(f"SELECT {columns}, body::text FROM {self.space}.cagey_sessions")
        return [_Row(json.loads(key), *rest) for key, *rest in rows]

    def remove(self) -> None:
        self._run(f"DROP SCHEMA IF EXISTS {self.space} CASCADE")

    def _run(self, statement: str) -> list[Any]:
        async def run() -> list[Any]:
            connection = await asyncpg.connect(self.url, timeout=10)
            try:
                return list(await connection.fetch(statement))
            finally:
                await connection.close()

        return asyncio.run(run())


class Redis:
    """A prefix."""

    shared = True

    def __init__(self, url: str = REDIS) -> None:
        self.url = url
        self.space = f"cagey-crash-{uuid.uuid4().hex}:"

    def open(self) -> None:
        try:
            with self._client() as client:
                client.ping()
        except redis.RedisError as error:
            raise MissingEngineError(_missing("Redis", self.url, "CAGEY_TEST_REDIS")) from error

    def rows(self) -> list[_Row]:
        rows = []
        with self._client() as client:
            for key in client.scan_iter(f"{self.space}user:*", count=1000):
                epoch, owner, released, version, body = client.hmget(key, NAMES[1:])
                if epoch is not None:  # else it has been let go of meanwhile, unsaved
                    user = json.loads(key.decode().removeprefix(f"{self.space}user:"))
                    rows.append(_Row(user, int(epoch), owner.decode(), released == b"1", int(version), body))
        return rows

    def remove(self) -> None:
        with self._client() as client:
            for key in client.scan_iter(f"{self.space}*", count=1000):
                client.delete(key)

    def _client(self) -> Any:
        return redis.Redis.from_url(self.url, socket_connect_timeout=5, socket_timeout=10)
