"""What it costs an engine to let go of users: as many statements for a batch as for one, with a save or without."""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
import redis

from cagey_sessions import SessionManager
from cagey_sessions.stores import PostgresStore, PostgresTable, RedisStore, SQLiteStore, Store
from cagey_sessions.stores.redis import store as redis_store
from cagey_sessions.testing.store_conformance import opened, record
from support import POSTGRES, REDIS, execute, needs_server

USERS = 150
WRITES = ("UPDATE", "INSERT", "DELETE", "WITH")

ENGINES = [
    pytest.param("postgres", marks=needs_server(POSTGRES)),
    pytest.param("side_table", marks=needs_server(POSTGRES)),
    pytest.param("redis", marks=needs_server(REDIS)),
    "sqlite",
]


@pytest.fixture
def engine(request, monkeypatch, kind) -> Any:
    """Makes a store on an engine of that kind, and a list of all that the engine is told."""
    if kind == "sqlite":
        return functools.partial(on_sqlite, request.getfixturevalue("writer"), request.getfixturevalue("path"))
    if kind == "redis":
        return functools.partial(on_redis, monkeypatch)
    return functools.partial(on_postgres, request.getfixturevalue("schema"), kind)


@asynccontextmanager
async def on_sqlite(writer: Any, path: Any) -> AsyncIterator[tuple[Store, list[str]]]:
    yield SQLiteStore(path), writer.statements


@asynccontextmanager
async def on_redis(monkeypatch: Any) -> AsyncIterator[tuple[Store, list[str]]]:
    told: list[str] = []
    run_script, prefix = redis_store.run_script, f"cagey-{uuid.uuid4().hex}:"

    async def run(connection: Any, script: Any, keys: Any, *arguments: Any) -> Any:
        told.append("WITH a script")
        return await run_script(connection, script, keys, *arguments)

    monkeypatch.setattr(redis_store, "run_script", run)
    yield RedisStore(REDIS, prefix=prefix), told
    with redis.Redis.from_url(REDIS) as client:
        client.delete(prefix, *client.scan_iter(f"{prefix}*", count=1000))


@asynccontextmanager
async def on_postgres(schema: str, kind: str) -> AsyncIterator[tuple[Store, list[str]]]:
    told: list[str] = []

    async def listen(connection: Any) -> None:
        connection.add_query_logger(lambda query: told.append(query.query))

    async with asyncpg.create_pool(POSTGRES, min_size=1, max_size=2, init=listen) as pool:
        if kind == "postgres":
            yield PostgresStore(pool=pool, schema=schema), told
        else:
            store = PostgresTable(pool, (schema, "players"), body="data", fence=kind, schema=schema)
            await execute(f"CREATE TABLE {schema}.players (id bigint PRIMARY KEY, data json)")
            yield store, told


def writes(told: list[str]) -> int:
    """How many statements of a list change something."""
    return sum(statement.lstrip().startswith(WRITES) for statement in told)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("how", ["without a save", "never saved", "by a save of what is there"])
async def test_a_batch_is_let_go_of_by_as_many_statements_as_one_user(engine, how):
    async with engine() as (store, told), opened(store):
        counts = []
        for users in (range(1), range(1, USERS)):
            claims = await store.claim_many(users, "a")
            records = [record(each.user_id, epoch=each.epoch) for each in claims]
            if how != "never saved":
                await store.save_many(records)
            told.clear()
            if how == "by a save of what is there":
                await store.save_many([each._replace(release=True) for each in records])
            else:
                answers = await store.release_many([(each.user_id, each.epoch) for each in claims], "a")
                assert answers == [True] * len(users)
            counts.append(writes(told))
            if store.shared:
                for user_id in users:
                    assert (await store.holder(user_id))[0] == ""
        assert counts[0] == counts[1] <= 3


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("persist", [True, False])
async def test_a_drain_of_users_who_have_not_changed_takes_few_statements(engine, persist):
    async with engine() as (store, told):
        manager = SessionManager(store=store)
        await asyncio.gather(*(manager.open(user_id, default={"n": 0}) for user_id in range(USERS)))
        await manager.persist_all_user_data()
        told.clear()
        report = await manager.destroy(persist)
        assert report.saved == USERS * persist
        assert writes(told) <= 12, "a few batches, and the end of the lease"
        async with SessionManager(store=store) as following:
            assert (await following.open(0)).user_data == {"n": 0}
