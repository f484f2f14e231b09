"""`RedisStore` and what only Redis does: scripts that are flushed, replicas, Cluster, eviction, rights, full memory and
Sentinel; on private engines.
"""

from __future__ import annotations

import asyncio

import orjson
import pytest

from cagey_sessions import OwnedElsewhereError, SessionManager, StoreLayoutError, StoreUnavailableError
from cagey_sessions.stores import Outcome, RedisStore
from cagey_sessions.testing.conformance.base import stored
from cagey_sessions.testing.store_conformance import claim, opened, record, release, save
from support.engines import RedisEngine, SentinelEngine, free_port, need

BOUND = 15
"""Seconds after which what takes one or two counts as never happening."""
SAVED, ALREADY = Outcome.SAVED, Outcome.ALREADY

pytestmark = need("redis-server")


@pytest.fixture(scope="module")
def running():
    with RedisEngine(port=free_port()) as engine:
        yield engine


@pytest.fixture
def engine(running):
    yield running
    running.ask("REPLICAOF", "NO", "ONE")
    running.ask("CONFIG", "SET", "maxmemory", "0")
    running.ask("FLUSHALL")


def store_of(engine, **settings):
    return RedisStore(engine.url, timeout=settings.pop("timeout", 2), **settings)


async def until(condition):
    async with asyncio.timeout(BOUND):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - engines set no event
            await asyncio.sleep(0.05)


async def until_it_works(call):
    async with asyncio.timeout(BOUND):
        while True:
            try:
                return await call()
            except StoreUnavailableError:
                await asyncio.sleep(0.02)


async def everybody(store):
    return [record async for record in store.scan()]


def replication(engine):
    with engine.client() as client:
        return client.info("replication")


# Scripts


async def test_scripts_that_are_flushed_are_there_again(engine):
    async with opened(store_of(engine)) as store:
        epoch = (await claim(store)).epoch
        for version in range(1, 20):
            engine.ask("SCRIPT", "FLUSH")
            assert await save(store, record(version=version, epoch=epoch)) == [SAVED]
        engine.ask("SCRIPT", "FLUSH")
        assert await release(store, 1, epoch, "a")
        engine.ask("SCRIPT", "FLUSH")
        assert (await claim(store)).granted
        engine.ask("SCRIPT", "FLUSH")
        assert await store.erase(1, "a")


async def test_scripts_that_are_flushed_all_the_time_hold_up_nobody(engine):
    async with opened(store_of(engine)) as store:
        epochs = {each.user_id: each.epoch for each in await store.claim_many(range(8), "a")}
        over = False

        async def flush():
            client = engine.client()
            while not over:
                for _ in range(20):
                    client.execute_command("SCRIPT", "FLUSH")
                await asyncio.sleep(0)
            client.close()

        flushing = asyncio.ensure_future(flush())
        try:
            for version in range(1, 30):
                calls = (save(store, record(user, version, epoch=epoch)) for user, epoch in epochs.items())
                assert await asyncio.gather(*calls) == [[SAVED]] * len(epochs)
        finally:
            over = True
            await flushing


# Engines that a store does not take


async def test_a_replica_is_refused(engine):
    of = "127.0.0.1", str(engine.port)
    with RedisEngine("--replicaof", *of) as replica, pytest.raises(StoreUnavailableError, match="replica"):
        await store_of(replica).open()


async def test_redis_cluster_is_refused():
    port = str(free_port())
    with RedisEngine("--cluster-enabled", "yes", "--cluster-port", port, port=free_port()) as cluster:
        with pytest.raises(StoreLayoutError, match="Cluster"):
            await store_of(cluster).open()
        assert cluster.ask("DBSIZE") == 0


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_an_engine_that_evicts_is_refused_and_left_as_it_is(engine, policy):
    engine.ask("CONFIG", "SET", "maxmemory-policy", policy)
    try:
        with pytest.raises(StoreLayoutError, match=policy):
            await store_of(engine).open()
        assert engine.ask("DBSIZE") == 0
    finally:
        engine.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")


# Rights


async def refusal(url):
    """What `open` says, with everything that hangs on it."""
    with pytest.raises((StoreUnavailableError, StoreLayoutError)) as caught:
        await RedisStore(url, timeout=2).open()
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert "hunter2" not in str(caught.value)
    return caught.value


async def test_a_wrong_password_is_told_and_not_repeated(engine):
    engine.ask("ACL", "SETUSER", "app", "on", ">right", "~*", "&*", "+@all")
    try:
        for user in ("app", "nobody"):
            error = await refusal(f"redis://{user}:hunter2@127.0.0.1:{engine.port}/0")
            assert isinstance(error, StoreUnavailableError)
            assert "password" in str(error)
        async with opened(RedisStore(f"redis://app:right@127.0.0.1:{engine.port}/0")) as store:
            assert (await claim(store)).granted
    finally:
        engine.ask("ACL", "DELUSER", "app")


async def test_a_password_that_is_not_given_is_told():
    with RedisEngine("--requirepass", "hunter2", port=free_port()) as guarded:
        error = await refusal(guarded.url)
        assert isinstance(error, StoreUnavailableError)
        assert "password" in str(error)


async def test_a_user_who_may_only_read_is_told_so(engine):
    engine.ask("ACL", "SETUSER", "reader", "on", ">hunter2", "~*", "&*", "+@read", "+@connection", "+info")
    try:
        error = await refusal(f"redis://reader:hunter2@127.0.0.1:{engine.port}/0")
        assert isinstance(error, StoreLayoutError)
        assert "may not" in str(error)
        assert engine.ask("DBSIZE") == 0
    finally:
        engine.ask("ACL", "DELUSER", "reader")


async def test_a_user_who_may_write_elsewhere_only_is_told_so(engine):
    engine.ask("ACL", "SETUSER", "other", "on", ">hunter2", "~other:*", "&*", "+@all")
    try:
        error = await refusal(f"redis://other:hunter2@127.0.0.1:{engine.port}/0")
        assert isinstance(error, StoreLayoutError)
        async with opened(RedisStore(f"redis://other:hunter2@127.0.0.1:{engine.port}/0", prefix="other:")) as store:
            assert (await claim(store)).granted
    finally:
        engine.ask("ACL", "DELUSER", "other")


# An engine that changes under a store


async def test_a_primary_that_becomes_a_replica_is_unavailable_until_it_is_a_primary_again(engine):
    async with opened(store_of(engine)) as store:
        epochs = {each.user_id: each.epoch for each in await store.claim_many(range(1, 9), "a")}
        assert set(await save(store, *(record(user, epoch=epoch) for user, epoch in epochs.items()))) == {SAVED}
        await asyncio.gather(*(store.load(user) for user in epochs))  # as many connections as there can be
        engine.ask("REPLICAOF", "127.0.0.1", str(free_port()))
        for _ in range(8):
            calls = (
                store.save_many([record(1, 2, epoch=epochs[1])]),
                store.claim_many([2, 77], "a"),
                release(store, 3, epochs[3], "a"),
                store.erase(4, "a"),
            )
            for answer in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(answer, StoreUnavailableError), repr(answer)
        engine.ask("REPLICAOF", "NO", "ONE")
        assert await until_it_works(lambda: save(store, record(1, 2, epoch=epochs[1]))) == [SAVED]
        for user, epoch in epochs.items():
            assert (await stored(store, user)).epoch == epoch
        assert await store.load(77) is None


async def test_what_a_replica_has_is_not_taken_for_what_is_stored(engine):
    """It may have nothing of a user, who would be new."""
    async with opened(store_of(engine)) as store:
        epoch = (await claim(store)).epoch
        assert await save(store, record(epoch=epoch)) == [SAVED]
        with RedisEngine("--repl-diskless-sync-delay", "0", port=free_port()) as empty:
            engine.ask("REPLICAOF", "127.0.0.1", str(empty.port))
            await until(lambda: replication(engine)["master_link_status"] == "up")
            for _ in range(3):
                for call in (everybody(store), store.load(1), store.holder(1)):
                    with pytest.raises(StoreUnavailableError):
                        await call


async def test_a_manager_waits_for_a_primary_that_is_a_replica_for_a_while(engine):
    async with SessionManager(store=store_of(engine), interval="100ms", save_timeout=0.5) as manager:
        sessions = [await manager.open(user, default={"count": 0}) for user in range(20)]
        await manager.persist_all_user_data()
        engine.ask("REPLICAOF", "127.0.0.1", str(free_port()))
        for session in sessions:
            session.user_data["count"] += 1
        with pytest.raises(StoreUnavailableError):
            await sessions[0].persist_now()
        assert all(session.alive for session in sessions)
        engine.ask("REPLICAOF", "NO", "ONE")
        await until_it_works(sessions[0].persist_now)
        await manager.persist_all_user_data()
    async with opened(store_of(engine)) as store:
        for user in range(20):
            assert (await stored(store, user)).value() == {"count": 1}


async def test_a_full_memory_writes_no_half_and_goes_on_when_there_is_room(engine):
    users = range(60)
    async with opened(store_of(engine)) as store:
        epochs = {each.user_id: each.epoch for each in await store.claim_many(users, "a")}
        bodies = [orjson.dumps({"version": version, "filling": "x" * 20_000 * version}) for version in range(3)]
        first = [record(user, 1, epoch=epochs[user], body=bodies[1], schema=1) for user in users]
        second = [record(user, 2, epoch=epochs[user], body=bodies[2], schema=2, release=True) for user in users]
        assert set(await save(store, *first)) == {SAVED}
        with engine.client() as client:
            used = client.info("memory")["used_memory"]
        engine.ask("CONFIG", "SET", "maxmemory", str(used + 500_000))
        refused = 0
        for begin in range(0, len(users), 10):
            try:
                assert set(await save(store, *second[begin : begin + 10])) == {SAVED}
            except StoreUnavailableError as error:
                assert "maxmemory" in str(error)
                refused += 1
        assert refused
        engine.ask("CONFIG", "SET", "maxmemory", "1")
        for call in (store.claim_many(["new"], "a"), release(store, 59, epochs[59], "a"), store.erase(59, "a")):
            with pytest.raises(StoreUnavailableError):
                await call
        for user in users:
            found = await stored(store, user)
            assert (found.version, found.schema, found.owner) in ((1, 1, "a"), (2, 2, ""))
            assert found.body == bodies[found.version]
        engine.ask("CONFIG", "SET", "maxmemory", "0")
        assert set(await save(store, *second)) <= {SAVED, ALREADY}
        for user in users:
            found = await stored(store, user)
            assert (found.version, found.owner, found.body) == (2, "", bodies[2])


# Sentinel


@pytest.fixture
def trio():
    quick = "--repl-diskless-sync-delay", "0"
    with (
        RedisEngine(*quick, port=free_port()) as primary,
        RedisEngine(*quick, "--replicaof", "127.0.0.1", str(primary.port), port=free_port()) as replica,
        SentinelEngine(primary) as sentinel,
    ):
        yield primary, replica, sentinel


async def test_a_store_follows_the_primary_that_sentinel_names(trio):
    primary, replica, sentinel = trio

    def is_known():
        rows = sentinel.ask("SENTINEL", "REPLICAS", "mymaster")
        known = [dict(zip(row[::2], row[1::2], strict=True)) for row in rows]
        return known and known[0][b"master-link-status"] == b"ok"

    await until(lambda: replication(replica).get("master_link_status") == "up")
    await until(is_known)
    url = f"redis+sentinel://127.0.0.1:{sentinel.port}/mymaster/0"
    row = 'cagey-sessions:user:"ann"'
    async with SessionManager(store=RedisStore(url, timeout=1), interval="100ms", save_timeout=1) as manager:
        session = await manager.open("ann", default={"gold": 0})
        session.user_data["gold"] += 1
        assert (await session.persist_now()).changed
        assert primary.ask("HGET", row, "body") == b'{"gold":1}'
        await until(lambda: replica.ask("HGET", row, "body") == b'{"gold":1}')
        primary.kill()
        sentinel.ask("SENTINEL", "FAILOVER", "mymaster")
        session.user_data["gold"] += 1
        await until_it_works(session.persist_now)
        assert replica.ask("HGET", row, "body") == b'{"gold":2}'
        async with opened(RedisStore(url, timeout=1)) as store:
            with pytest.raises(OwnedElsewhereError):
                await store.erase("ann", "b")
            assert (await stored(store, "ann")).value() == {"gold": 2}
