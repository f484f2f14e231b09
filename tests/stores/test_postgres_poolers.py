"""The stores in PostgreSQL behind a pooler that gives each transaction another session of the server."""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest

from cagey_sessions import OptionError, SessionManager, StoreError, StoreUnavailableError
from cagey_sessions.stores import PostgresStore, PostgresTable
from cagey_sessions.testing.conformance.base import SAVED
from cagey_sessions.testing.store_conformance import claim, opened, record, save
from stores.test_postgres import TestPostgresStore as OfPostgresStore
from stores.test_postgres_table import Both, Contract
from support import POSTGRES, drop_schema, execute, needs_server
from support.engines import PgBouncerEngine, need

pytestmark = [need("pgbouncer"), needs_server(POSTGRES)]


@pytest.fixture(scope="module")
def bouncer() -> Iterator[PgBouncerEngine]:
    """Each transaction has another session of the server."""
    with PgBouncerEngine(POSTGRES, "transaction") as engine:
        yield engine


@pytest.fixture(scope="module")
def faithful() -> Iterator[PgBouncerEngine]:
    """A client keeps its session."""
    with PgBouncerEngine(POSTGRES, "session") as engine:
        yield engine


@pytest.fixture
def schema() -> Iterator[str]:
    name = f"cagey_{uuid.uuid4().hex}"
    yield name
    asyncio.run(drop_schema(name))


POOLS = [
    # mode, statement_cache_size, max_size, what is said
    ("transaction", 100, 4, "statement_cache_size=0"),
    ("transaction", 100, 1, "pool of one connection"),
    ("transaction", 0, 4, ""),
    ("transaction", 0, 1, ""),
    ("session", 100, 4, ""),
    ("session", 0, 1, ""),
    ("direct", 100, 4, ""),
    ("direct", 100, 1, ""),
    ("direct", 0, 4, ""),
]


# By DSN


class TestPostgresStoreBehindAPooler(OfPostgresStore):
    """Everything that is promised without one."""

    loops = ("uvloop",)

    @pytest.fixture
    def make(self, schema, bouncer):
        self.nodes = f"{schema}.cagey_sessions_nodes"
        return functools.partial(PostgresStore, bouncer.url, schema=schema)


class TestPostgresTableBehindAPooler(Contract):
    loops = ("asyncio",)

    @pytest.fixture
    def make(self, schema, bouncer):
        self.schema = schema
        asyncio.run(
            execute(f"CREATE SCHEMA {schema}", f"CREATE TABLE {schema}.players (id text PRIMARY KEY, data json)")
        )
        return lambda: Both(bouncer.url, (schema, "players"), body="data", schema=schema)


@pytest.mark.parametrize("mode", ["transaction", "session"])
async def test_servers_that_share_a_pooler_keep_all_that_they_acknowledge(schema, bouncer, faithful, mode):
    """Twelve that begin at once, and make the tables; their calls come to whichever session is free."""
    url = {"transaction": bouncer, "session": faithful}[mode].url

    async def play(number: int) -> None:
        async with SessionManager(store=PostgresStore(url, schema=schema), interval="50ms") as manager:
            users = await asyncio.gather(*(manager.open(f"{number} {place}", default={"n": 0}) for place in range(9)))
            for _ in range(10):
                for user in users:
                    user.user_data["n"] += 1
                await asyncio.gather(*(user.persist_now() for user in users))
            async with manager.edit(f"{number} edited", default={"n": 0}) as data:
                data["n"] = 10
            await manager.erase(f"{number} 0")

    await asyncio.gather(*(play(number) for number in range(12)))
    async with opened(PostgresStore(POSTGRES, schema=schema)) as store:
        found = [each async for each in store.scan()]
        assert len(found) == 12 * 9
        assert all(each.value() == {"n": 10} and each.owner == "" for each in found)


async def test_a_row_that_somebody_has_locked_is_no_outage(schema, bouncer):
    """The limits are in force although no session keeps them."""
    async with opened(PostgresStore(bouncer.url, schema=schema)) as store:
        epochs = {each.user_id: each.epoch for each in await store.claim_many([1, 2], "a")}
        blocker = await asyncpg.connect(POSTGRES)
        try:
            await blocker.execute(f"BEGIN; SELECT FROM {schema}.cagey_sessions WHERE user_id = '1' FOR UPDATE")
            with pytest.raises(StoreError) as caught:
                await store.save_many([record(1, epoch=epochs[1])])
            assert not isinstance(caught.value, StoreUnavailableError)
        finally:
            await blocker.close()
        assert await save(store, record(1, epoch=epochs[1]), record(2, epoch=epochs[2])) == [SAVED, SAVED]


async def test_a_function_that_makes_rows_gets_a_connection_of_the_driver(schema, bouncer):
    """It may begin a transaction within ours."""

    async def insert(connection: Any, user_id: int, value: Any) -> None:
        assert isinstance(connection, asyncpg.Connection)
        async with connection.transaction():
            await connection.execute(f"INSERT INTO {schema}.players (id, email) VALUES ($1, 'x')", user_id)

    await execute(
        f"CREATE SCHEMA {schema}", f"CREATE TABLE {schema}.players (id int PRIMARY KEY, email text NOT NULL, gold int)"
    )
    store = PostgresTable(bouncer.url, (schema, "players"), columns=["gold"], schema=schema, insert=insert)
    async with opened(store):
        epoch = (await claim(store, 7)).epoch
        assert await save(store, record(7, epoch=epoch, body=b'{"gold":3}')) == [SAVED]
        assert (await store.load(7)).value() == {"gold": 3}


async def test_what_the_dsn_sets_and_a_pooler_refuses_is_named(bouncer):
    with pytest.raises(OptionError, match=r"what the DSN sets \(.*geqo\); leave that out"):
        await PostgresStore(f"{bouncer.url}&geqo=off").open()


# By a pool


@pytest.mark.parametrize(("mode", "cache", "size", "says"), POOLS)
async def test_a_pool_is_refused_where_its_statements_would_be_looked_for_in_another_session(
    schema, bouncer, faithful, mode, cache, size, says
):
    url = {"transaction": bouncer.url, "session": faithful.url, "direct": POSTGRES}[mode]
    async with asyncpg.create_pool(url, min_size=1, max_size=size, statement_cache_size=cache) as pool:
        store = PostgresStore(pool=pool, schema=schema)
        if says:
            with pytest.raises(OptionError, match=says):
                await store.open()
            return
        async with opened(store):
            assert (await claim(store)).granted
        assert pool.get_idle_size() == pool.get_size(), "it has all its connections"


async def test_pools_without_a_statement_cache_share_a_pooler(schema, bouncer):
    async def play(number: int) -> None:
        async with asyncpg.create_pool(bouncer.url, min_size=1, max_size=3, statement_cache_size=0) as pool:
            store = PostgresStore(pool=pool, schema=schema)
            async with SessionManager(store=store, interval="50ms") as manager:
                user = await manager.open(number, default={"n": 0})
                for _ in range(20):
                    user.user_data["n"] += 1
                    await user.persist_now()

    await asyncio.gather(*(play(number) for number in range(12)))
    async with opened(PostgresStore(POSTGRES, schema=schema)) as store:
        assert [each.value() async for each in store.scan()] == [{"n": 20}] * 12


async def test_statements_that_are_missing_later_are_explained(schema):
    """As where a pooler has come in between since the store was opened."""
    async with (
        asyncpg.create_pool(POSTGRES, min_size=1, max_size=1) as pool,
        opened(PostgresStore(pool=pool, schema=schema)) as store,
    ):
        await store.load(1)
        await pool.execute("DEALLOCATE ALL")
        with pytest.raises(StoreError, match="statement_cache_size=0"):
            await store.load(1)
