"""Real engines under the stores. What lives here: batches against single rows and against what one would write by hand,
claims, and the lag of a loop that really saves. What must not: an engine of our own; rows whose engine does not answer
are left out.

Wall time is counted where the engine does the work, and CPU time of the client where that is the question. Rows are
about 310 bytes of JSON, in random order. The store's own fence is in all of ours and in none of the bare ones.
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import orjson

from cagey_sessions.stores import Record, SQLiteStore, Store

from .base import SEED, Figure, Goal, Pair, Sizes, Workload, best_loop, clock, new_loop, plain
from .lag import Lag, frozen, idle, percentiles
from .stored import EPOCH, SECOND, Server, tree_data

POSTGRES = os.environ.get("CAGEY_TEST_POSTGRES", "postgresql://root@127.0.0.1:5432/test")
REDIS = os.environ.get("CAGEY_TEST_REDIS", "redis://127.0.0.1:6379/0")
BATCH = 200
BATCHES = 20
SINGLES = 200
OWNER = "benchmark"

WINDOW = 2.0
"""Seconds, and"""
WINDOWS = 12
"""as many of them: each row may be run twice."""

wall = time.perf_counter_ns


@cache
def postgres_answers() -> bool:
    if find_spec("asyncpg") is None:
        return False
    import asyncpg  # noqa: PLC0415 - an extra

    async def look() -> None:
        await (await asyncpg.connect(POSTGRES, timeout=3)).close()

    with suppress(OSError, TimeoutError, asyncpg.PostgresError):
        asyncio.run(look())
        return True
    return False


@cache
def redis_answers() -> bool:
    if find_spec("redis") is None or find_spec("hiredis") is None:
        return False
    import redis  # noqa: PLC0415 - an extra

    with suppress(redis.RedisError), redis.Redis.from_url(REDIS, socket_connect_timeout=3) as client:
        return bool(client.ping())
    return False


class Users:
    """Users that a store has, and their next states."""

    def __init__(self, count: int) -> None:
        self.ids = list(range(count))
        self.bodies = [orjson.dumps(tree_data(number)) for number in range(min(count, 2_000))]
        self.epochs: dict[int | str, int] = {}
        self._chance = random.Random(SEED)
        self._version = 0

    async def come(self, store: Store) -> None:
        for first in range(0, len(self.ids), BATCH):
            claims = await store.claim_many(self.ids[first : first + BATCH], OWNER)
            self.epochs |= {claim.user_id: claim.epoch for claim in claims}
        for first in range(0, len(self.ids), BATCH):
            await store.save_many(self.records(self.ids[first : first + BATCH]))

    def records(self, ids: Sequence[int]) -> list[Record]:
        self._version += 1
        now = time.time()
        return [
            Record(
                user,
                self.epochs[user],
                OWNER,
                self._version,
                0,
                self.bodies[(user + self._version) % len(self.bodies)],
                now,
            )
            for user in ids
        ]

    def batches(self, count: int, rows: int) -> list[list[Record]]:
        return [self.records(self._chance.sample(self.ids, min(rows, len(self.ids)))) for _ in range(count)]


class SQLitePlace:
    """A file of its own."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name) / "users.db"
        self.store: Store = SQLiteStore(self.path)

    async def put_rows(self, ids: Sequence[int], owner: str) -> None:
        """Users as they are when they have been claimed, without a million claims."""
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.executemany(
                "INSERT INTO cagey_sessions VALUES (?, ?, ?, 0, 0, 0, NULL, NULL, 0)",
                [(user, EPOCH, owner) for user in ids],
            )

    async def clean(self) -> None:
        self._folder.cleanup()


class PostgresPlace:
    """A schema of its own."""

    def __init__(self) -> None:
        from cagey_sessions.stores import PostgresStore  # noqa: PLC0415 - an extra

        self.schema = f"cagey_benchmark_{uuid.uuid4().hex[:12]}"
        self.store: Store = PostgresStore(POSTGRES, schema=self.schema)

    async def connect(self) -> Any:
        import asyncpg  # noqa: PLC0415 - an extra

        return await asyncpg.connect(POSTGRES)

    async def _execute(self, *statement: Any) -> None:
        connection = await self.connect()
        await connection.execute(*statement)
        await connection.close()

    async def put_rows(self, ids: Sequence[int], owner: str) -> None:
        await self._execute(
            f"""INSERT INTO {self.schema}.cagey_sessions
                SELECT id::text, {EPOCH}, $2, false, 0, 0, NULL, NULL, false FROM unnest($1::bigint[]) AS users (id)""",
            ids,
            owner,
        )

    async def clean(self) -> None:
        await self._execute(f"DROP SCHEMA IF EXISTS {self.schema} CASCADE")


class RedisPlace:
    """A prefix of its own."""

    def __init__(self) -> None:
        from cagey_sessions.stores import RedisStore  # noqa: PLC0415 - an extra

        self.prefix = f"cagey-benchmark-{uuid.uuid4().hex[:12]}:"
        self.store: Store = RedisStore(REDIS, prefix=self.prefix)

    def client(self) -> Any:
        from redis.asyncio import Redis  # noqa: PLC0415 - an extra

        return Redis.from_url(REDIS, protocol=2)

    async def put_rows(self, ids: Sequence[int], owner: str) -> None:
        script = """for _, id in ipairs(KEYS) do redis.call('HSET', ARGV[1] .. 'user:' .. id,
            'epoch', ARGV[2], 'owner', ARGV[3], 'released', '0', 'version', '0') end"""
        async with self.client() as client:
            for first in range(0, len(ids), 1_000):
                some = ids[first : first + 1_000]
                await client.eval(script, len(some), *some, self.prefix, EPOCH, owner)

    async def clean(self) -> None:
        async with self.client() as client:
            keys = []
            async for key in client.scan_iter(f"{self.prefix}*", count=5_000):
                keys.append(key)
                if len(keys) == 1_000:
                    await client.unlink(*keys)
                    keys.clear()
            if keys:
                await client.unlink(*keys)


Place: TypeAlias = SQLitePlace | PostgresPlace | RedisPlace
P = TypeVar("P", SQLitePlace, PostgresPlace, RedisPlace)


@contextmanager
def on_a_loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=lambda: new_loop(best_loop())) as runner:
        yield runner


@contextmanager
def opened(kind: type[P], sizes: Sizes) -> Iterator[tuple[asyncio.Runner, P, Users]]:
    """A store with users in it."""
    users = Users(sizes.many // 5)
    with on_a_loop() as runner:
        place = kind()
        try:
            runner.run(place.store.open())
            runner.run(users.come(place.store))
            yield runner, place, users
        finally:
            runner.run(place.store.close())
            runner.run(place.clean())


async def time_saves(store: Store, batches: list[list[Record]], now: Callable[[], int] = wall) -> float:
    """Nanoseconds a row, one batch after the other."""
    rows = sum(map(len, batches))
    start = now()
    for batch in batches:
        verdicts = await store.save_many(batch)
        assert verdicts[0].outcome == "saved"
    return (now() - start) / rows


def against_singles_and(
    bare: Callable[[list[list[Record]]], float], runner: asyncio.Runner, store: Store, users: Users
) -> Pair:
    """Batches against single rows of the same store, and against the same batches written by hand."""

    def ours() -> tuple[float, float]:
        cost = runner.run(time_saves(store, users.batches(BATCHES, BATCH)))
        return cost, cost

    def base() -> tuple[float, float]:
        return runner.run(time_saves(store, users.batches(SINGLES, 1))), bare(users.batches(BATCHES, BATCH))

    return Pair(ours, base)


# Batches


@contextmanager
def sqlite_batch(sizes: Sizes) -> Iterator[Pair]:
    upsert = """INSERT INTO players VALUES (?, ?, ?, ?)
        ON CONFLICT (id) DO UPDATE SET version = excluded.version, body = excluded.body, saved_at = excluded.saved_at"""
    with (
        opened(SQLitePlace, sizes) as (runner, place, users),
        closing(sqlite3.connect(place.path.with_name("bare.db"), isolation_level=None)) as connection,
    ):
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE players (id INTEGER PRIMARY KEY, version INTEGER, body TEXT, saved_at REAL)")

        def write(batches: list[list[Record]]) -> float:
            start = wall()
            for batch in batches:
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany(
                    upsert, [(each.user_id, each.version, each.body.decode(), each.saved_at) for each in batch]
                )
                connection.execute("COMMIT")
            return (wall() - start) / sum(map(len, batches))

        write([users.records(users.ids)])
        yield against_singles_and(write, runner, place.store, users)


@contextmanager
def pg_batch(sizes: Sizes) -> Iterator[Pair]:
    with opened(PostgresPlace, sizes) as (runner, place, users):
        table = f"{place.schema}.players"
        upsert = f"""INSERT INTO {table}
            SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::text[]::json[], $4::float8[])
            ON CONFLICT (id) DO UPDATE
                SET version = excluded.version, body = excluded.body, saved_at = excluded.saved_at"""
        create = f"""CREATE TABLE {table} (id bigint PRIMARY KEY, version bigint, body json, saved_at float8)
            WITH (fillfactor = 50)"""
        connection = runner.run(place.connect())

        async def write(batches: list[list[Record]]) -> float:
            start = wall()
            for batch in batches:
                rows = sorted((each.user_id, each.version, each.body.decode(), each.saved_at) for each in batch)
                await connection.execute(upsert, *zip(*rows, strict=True))
            return (wall() - start) / sum(map(len, batches))

        runner.run(connection.execute(create))
        runner.run(write([users.records(users.ids)]))
        yield against_singles_and(lambda batches: runner.run(write(batches)), runner, place.store, users)
        runner.run(connection.close())


@contextmanager
def pg_claim(sizes: Sizes) -> Iterator[Pair]:
    with opened(PostgresPlace, sizes) as (runner, place, users):
        rows = min(BATCH, len(users.ids) // 2)

        async def claim(rows: int, calls: int) -> float:
            start = wall()
            for first in range(0, rows * calls, rows):
                await place.store.claim_many(users.ids[first : first + rows], OWNER)
            return (wall() - start) / (rows * calls)

        yield Pair(
            lambda: runner.run(claim(rows, len(users.ids) // 2 // rows)),
            lambda: runner.run(claim(1, min(SINGLES, len(users.ids)))),
        )


@contextmanager
def redis_batch(sizes: Sizes) -> Iterator[Pair]:
    with opened(RedisPlace, sizes) as (runner, place, users):
        client = place.client()

        async def write(batches: list[list[Record]]) -> float:
            start = clock()
            for batch in batches:
                pipeline = client.pipeline(transaction=False)
                for each in batch:
                    pipeline.set(f"{place.prefix}plain:{each.user_id}", each.body)
                await pipeline.execute()
            return (clock() - start) / sum(map(len, batches))

        def both_times(work: Callable[[list[list[Record]]], Any]) -> tuple[float, float]:
            batches = users.batches(BATCHES, BATCH)
            start = wall()
            cost: float = runner.run(work(batches))
            return cost, (wall() - start) / (BATCHES * BATCH)

        yield Pair(
            lambda: both_times(lambda batches: time_saves(place.store, batches, clock)), lambda: both_times(write)
        )
        runner.run(client.aclose())


# Lag while users are really written


@contextmanager
def store_lag(kind: type[P], rate: int, sizes: Sizes) -> Iterator[Pair]:
    """The windows together are shorter than the interval, so each save is a user's first and has something to write."""
    seconds = min(sizes.seconds, WINDOW)
    count = int(rate * seconds * WINDOWS)
    place = kind()

    async def load(server: Server) -> tuple[float, ...]:
        saved = server.table.counters.saved
        server.clock.go_on(server.clock.now())
        lags = await idle(seconds)
        server.clock.stop()
        written = server.table.counters.saved - saved
        while server.table.counters.in_flight:  # noqa: ASYNC110 - what is under way belongs to this side
            await asyncio.sleep(0.002)
        return *percentiles(lags)[1::-1], written / seconds

    with frozen(lambda: Server(count * SECOND // rate, store=place.store), count) as (server, runner):
        try:
            runner.run(place.put_rows([session.user_id for session in server.sessions], server.parts.owner))
            yield Pair(
                lambda: runner.run(load(server)),
                lambda: (*percentiles(runner.run(idle(seconds)))[1::-1], rate),
            )
        finally:
            runner.run(place.store.close())
            runner.run(place.clean())


def lag_of(id_: str, name: str, kind: type[P], rate: int, added: float, answers: Callable[[], bool]) -> Workload:
    return Lag(
        id_,
        partial(store_lag, kind, rate),
        Goal(added=added),
        plain(
            f"p99.9 lag of a 1 ms ticker while {rate:,} users a second are really written to {name}, uvloop, vs idle"
        ),
        more=(
            Figure(f"{id_}_p99", Goal(), plain("p99 of the same"), "ms"),
            Figure(f"{id_}_rate", Goal(), plain("rows written a second vs those due"), "/s"),
        ),
        is_there=answers,
    )


Postgres = partial(Workload, is_there=postgres_answers)

WORKLOADS = (
    Workload(
        "sqlite_batch",
        sqlite_batch,
        Goal(faster=6),
        plain(f"SQLiteStore, synchronous=FULL, {BATCH} rows vs one at a time, wall time a row"),
        more=(
            Figure(
                "sqlite_batch_bare",
                Goal(ratio=1.5, aim="1.25"),
                plain("the same vs a bare executemany of the same rows"),
            ),
        ),
    ),
    Postgres(
        "pg_batch",
        pg_batch,
        Goal(faster=20),
        plain(f"PostgresStore, synchronous_commit as set, {BATCH} rows vs one at a time, wall time a row"),
        more=(
            Figure(
                "pg_batch_bare",
                Goal(ratio=1.25),
                plain("the same vs a bare upsert from unnest of the same rows"),
            ),
        ),
    ),
    Postgres("pg_claim", pg_claim, Goal(faster=8), plain(f"claims in batches of {BATCH} vs one by one, wall time")),
    Workload(
        "redis_batch",
        redis_batch,
        Goal(faster=3.5),
        plain(f"RedisStore, {BATCH} rows, CPU time of the client a row vs redis-py's pipeline of as many SETs"),
        more=(Figure("redis_batch_wall", Goal(), plain("wall time of the same")),),
        is_there=redis_answers,
    ),
    lag_of("store_lag_pg", "PostgreSQL", PostgresPlace, 33_333, 3, postgres_answers),
    lag_of("store_lag_redis", "Redis", RedisPlace, 33_333, 3, redis_answers),
    lag_of("store_lag_sqlite", "SQLite", SQLitePlace, 16_667, 6, lambda: True),
)
