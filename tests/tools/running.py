"""Running the tools, and users to run them on. What must not be here: tests."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
import redis

import cagey_sessions
from cagey_sessions.stores import open_store
from cagey_sessions.testing.store_conformance import claim, opened, record, save
from support import POSTGRES, REDIS, drop_schema, skip_without

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cagey_sessions.__file__).parents[1])}
COMMAND = [sys.executable, "-W", "error", "-m", "cagey_sessions", "store"]

posix = pytest.mark.skipif(sys.platform == "win32", reason="terminals, signals and shells are others there")
TOOLS = ["stats", "show", "export", "import", "erase"]


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.encode().splitlines()]  # of bytes: a text has other line ends


def put(url: str, *users: tuple[int | str, bytes], schema: int = 0, owner: str = "a", release: bool = True) -> None:
    """Save users as a server does that ends then."""

    async def put() -> None:
        async with opened(open_store(url)) as store:
            for number, (user_id, body) in enumerate(users):
                granted = await claim(store, user_id, owner)
                assert granted.granted
                saved_at = 1767225600.0 + number
                new = record(user_id, 1 if granted.record is None else granted.record.version + 1, owner=owner)
                await save(
                    store,
                    new._replace(epoch=granted.epoch, body=body, schema=schema, saved_at=saved_at, release=release),
                )

    asyncio.run(put())


def line(user_id: Any, body: Any, **more: Any) -> bytes:
    return orjson.dumps({"user_id": user_id, **more, "body": body}) + b"\n"


def users(done: Done) -> dict[Any, Any]:
    return {each["user_id"]: each["body"] for each in done.lines}


# Engines


def postgres() -> Iterator[str]:
    schema = f"cagey_{uuid.uuid4().hex}"

    skip_without(POSTGRES)
    yield f"{POSTGRES}{'&' if '?' in POSTGRES else '?'}schema={schema}"
    asyncio.run(drop_schema(schema))


def in_redis() -> Iterator[str]:
    prefix = f"cagey-{uuid.uuid4().hex}:"
    skip_without(REDIS)
    with redis.Redis.from_url(REDIS) as client:
        yield f"{REDIS}{'&' if '?' in REDIS else '?'}prefix={prefix}"
        for key in client.scan_iter(f"{prefix}*", count=1000):
            client.delete(key)


def in_a_file() -> Iterator[str]:
    yield "sqlite:///players.db"


ENGINES = {"sqlite": in_a_file, "postgres": postgres, "redis": in_redis}


def damage(user_id: str, body: str) -> None:
    with closing(sqlite3.connect("players.db")) as connection, connection:
        connection.execute("UPDATE cagey_sessions SET body = ? WHERE user_id = ?", (body, user_id))


async def tool(*arguments: str, stdin: bytes = b"") -> Done:
    """A tool as a process."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(*COMMAND, *arguments, env=ENVIRONMENT, **pipes)
    out, err = await process.communicate(stdin)
    return Done(process.returncode, out.decode(), err.decode())
