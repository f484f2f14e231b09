"""Rows of every engine, field by field, written past the store. What must not be here: tests."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import Any

import asyncpg
import redis

from cagey_sessions.stores import MemoryStore, PostgresStore, PostgresTable, RedisStore, SQLiteStore, Store
from cagey_sessions.stores.memory import MemoryBacking
from cagey_sessions.testing.store_conformance import claim, opened, record, save
from support import POSTGRES, REDIS, drop_schema, execute, skip_without

FIELDS = ("epoch", "owner", "released", "version", "schema", "body", "saved_at", "erased")
BODY = b'{"gold":3}'
TYPES = MappingProxyType(dict(zip(FIELDS, (int, str, bool, int, int, bytes, float, bool), strict=True)))


class RawRows:
    """The users of one store. Fields are Python's values; None is NULL, or not there."""

    async def begin(self) -> None:
        """Make the place, with columns that take NULL."""

    async def end(self) -> None:
        """Remove it."""

    def make(self) -> Store:
        """A store of these users."""
        raise NotImplementedError

    def holds(self, **fields: Any) -> bool:
        """Whether the engine keeps such values in these fields at all."""
        raise NotImplementedError

    async def put(self, user_id: int | str, **fields: Any) -> None:
        """Change fields of a row that is there."""
        raise NotImplementedError

    async def get(self, user_id: int | str) -> Any:
        """All that there is of a user, to be compared."""
        raise NotImplementedError

    async def put_body(self, user_id: int | str, body: bytes) -> None:
        """Change what is stored of a user's data."""
        await self.put(user_id, body=body)

    async def fill(self, *users: int | str) -> None:
        """Have users saved and released, as version 3."""
        async with opened(self.make()) as store:
            for user_id in users:
                epoch = (await claim(store, user_id)).epoch
                await save(store, record(user_id, 3, epoch=epoch, body=BODY, schema=0, saved_at=5.0, release=True))


class InSQLite(RawRows):
    def __init__(self, folder: Path) -> None:
        self.path = folder / "users.db"

    def make(self) -> Store:
        return SQLiteStore(self.path)

    async def begin(self) -> None:
        async with opened(self.make()):
            pass
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute("UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '') WHERE type = 'table'")

    def holds(self, **fields: Any) -> bool:
        return all(not isinstance(value, int) or -(2**63) <= value < 2**63 for value in fields.values())

    def write(self, statement: str, *values: Any) -> None:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute(statement, values)

    async def put(self, user_id: int | str, **fields: Any) -> None:
        for name, value in fields.items():
            text = value.decode() if name == "body" and isinstance(value, bytes) else value
            self.write(f"UPDATE cagey_sessions SET {name} = ? WHERE user_id = ?", text, user_id)

    async def get(self, user_id: int | str) -> Any:
        with closing(sqlite3.connect(self.path)) as connection:
            connection.text_factory = bytes
            return connection.execute("SELECT * FROM cagey_sessions WHERE user_id = ?", (user_id,)).fetchone()


class InRedis(RawRows):
    def __init__(self, folder: Path) -> None:
        skip_without(REDIS)
        self.prefix = f"cagey-{uuid.uuid4().hex}:"
        self.engine = redis.Redis.from_url(REDIS)

    def make(self) -> Store:
        return RedisStore(REDIS, prefix=self.prefix)

    async def end(self) -> None:
        if keys := list(self.engine.scan_iter(f"{self.prefix}*", count=1000)):
            self.engine.delete(*keys)
        self.engine.close()

    def holds(self, **fields: Any) -> bool:
        return True

    def key(self, user_id: int | str) -> str:
        return f'{self.prefix}user:"{user_id}"' if isinstance(user_id, str) else f"{self.prefix}user:{user_id}"

    async def put(self, user_id: int | str, **fields: Any) -> None:
        for name, value in fields.items():
            if value is None or (name == "erased" and value is False):
                self.engine.hdel(self.key(user_id), name)
            else:
                self.engine.hset(self.key(user_id), name, int(value) if isinstance(value, bool) else value)

    async def get(self, user_id: int | str) -> Any:
        return self.engine.hgetall(self.key(user_id))


class InPostgres(RawRows):
    types: Mapping[str, type] = TYPES
    table = "cagey_sessions"

    def __init__(self, folder: Path) -> None:
        skip_without(POSTGRES)
        self.schema = f"cagey_{uuid.uuid4().hex}"

    def make(self) -> Store:
        return PostgresStore(POSTGRES, schema=self.schema)

    async def begin(self) -> None:
        async with opened(self.make()):
            pass
        columns = (f"ALTER COLUMN {name} DROP NOT NULL" for name in self.types)
        await execute(f"ALTER TABLE {self.schema}.{self.table} {', '.join(columns)}")

    async def end(self) -> None:
        await drop_schema(self.schema)

    def key(self, user_id: int | str) -> Any:
        return f'"{user_id}"' if isinstance(user_id, str) else str(user_id)

    def holds(self, **fields: Any) -> bool:
        return all(
            name in self.types
            and (value is None or type(value) is self.types[name])
            and (type(value) is not int or -(2**63) <= value < 2**63)
            for name, value in fields.items()
        )

    async def put(self, user_id: int | str, **fields: Any) -> None:
        connection = await asyncpg.connect(POSTGRES)
        try:
            for name, value in fields.items():
                await connection.execute(
                    f"UPDATE {self.schema}.{self.table} SET {name} = $2 WHERE user_id = $1",
                    self.key(user_id),
                    value.decode() if isinstance(value, bytes) else value,
                )
        finally:
            await connection.close()

    async def get(self, user_id: int | str) -> Any:
        connection = await asyncpg.connect(POSTGRES)
        try:
            return await connection.fetchrow(
                f"SELECT kept::text FROM {self.schema}.{self.table} AS kept WHERE user_id = $1", self.key(user_id)
            )
        finally:
            await connection.close()


class InSideTable(InPostgres):
    types = MappingProxyType({name: kind for name, kind in TYPES.items() if name != "body"})  # that is in their table
    table = "cagey_sessions_fence_players"

    def make(self) -> Store:
        return PostgresTable(POSTGRES, (self.schema, "players"), body="data", schema=self.schema)

    async def begin(self) -> None:
        await execute(
            f"CREATE SCHEMA {self.schema}", f"CREATE TABLE {self.schema}.players (id text PRIMARY KEY, data json)"
        )
        await super().begin()

    def key(self, user_id: int | str) -> Any:
        return user_id

    async def put_body(self, user_id: int | str, body: bytes) -> None:
        await execute(f"UPDATE {self.schema}.players SET data = '{body.decode()}' WHERE id = '{user_id}'")


class InMemory(RawRows):
    """Only what it was given: all else it makes itself."""

    def __init__(self, folder: Path) -> None:
        self.backing = MemoryBacking()

    def make(self) -> Store:
        return MemoryStore(self.backing)

    def holds(self, **fields: Any) -> bool:
        return set(fields) <= {"version", "schema", "body", "saved_at"}

    async def put(self, user_id: int | str, **fields: Any) -> None:
        row = self.backing.rows[user_id]
        assert row.record is not None
        row.record = row.record._replace(**fields)

    async def get(self, user_id: int | str) -> Any:
        row = self.backing.rows[user_id]
        return row.epoch, row.claimant, row.released, row.record, row.erased


ENGINES: dict[str, type[RawRows]] = {
    "memory": InMemory,
    "sqlite": InSQLite,
    "redis": InRedis,
    "postgres": InPostgres,
    "side table": InSideTable,
}
