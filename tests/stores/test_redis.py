"""`RedisStore` on a real engine against the contract, and what is only its own."""

from __future__ import annotations

import functools
import uuid

import pytest
import redis
from hypothesis.stateful import rule

from cagey_sessions import (
    CorruptRecordError,
    OptionError,
    StoreError,
    StoreLayoutError,
    StoreUnavailableError,
)
from cagey_sessions.stores import Claim, Outcome, Record, RedisStore
from cagey_sessions.testing.conformance.base import ERASED, FENCED, SAVED
from cagey_sessions.testing.conformance.histories import OWNERS
from cagey_sessions.testing.store_conformance import (
    StoreMachine,
    claim,
    everything,
    machine_test,
    opened,
    record,
    release,
    save,
)
from support import REDIS as URL
from support import needs_server
from support.shared_stores import SharedStoreConformance

pytestmark = needs_server(URL)


def remove(engine, prefix):
    keys = list(engine.scan_iter(f"{prefix}*", count=1000))
    if keys:
        engine.delete(*keys)


@pytest.fixture
def engine():
    """A client of the driver's own."""
    with redis.Redis.from_url(URL) as client:
        yield client


@pytest.fixture
def prefix(engine):
    """A prefix of one's own."""
    name = f"cagey-{uuid.uuid4().hex}:"
    yield name
    remove(engine, name)


class TestRedisStore(SharedStoreConformance):
    @pytest.fixture
    def make(self, prefix, engine):
        self.engine, self.leases = engine, f"{prefix}node:"
        return functools.partial(RedisStore, URL, prefix=prefix)

    async def expire(self):
        for key in self.engine.scan_iter(f"{self.leases}*"):
            self.engine.hset(key, "alive_until", 1)

    async def lose_leases(self):
        self.engine.delete(*self.engine.scan_iter(f"{self.leases}*"))

    async def alive_until(self):
        return self.engine.hget(f"{self.leases}a", "alive_until")

    async def seconds_left(self):
        seconds, micros = self.engine.time()
        return int(await self.alive_until()) / 1e6 - seconds - micros / 1e6

    async def bury(self, store, owner):
        await store._end_lease(owner)

    async def damage(self, store, user_id):
        self.engine.hset(store._key(user_id), "version", "x")


class RedisMachine(StoreMachine):
    def make(self):
        self.prefix = f"cagey-{uuid.uuid4().hex}:"
        return RedisStore(URL, prefix=self.prefix, lease="1h")

    def bury(self, owner):
        self.runner.run(self.store._leases.hold(owner))  # else its first claim, which renews, would raise it
        self.runner.run(self.store._end_lease(owner))

    @rule()
    def open_again(self):
        """Closing lets go of all users. Here whoever was alive comes back before anybody else does."""
        super().open_again()
        for owner in OWNERS:
            self.runner.run(self.store._leases.hold(owner))
            if owner in self.dead:
                self.bury(owner)

    def teardown(self):
        super().teardown()
        with redis.Redis.from_url(URL) as client:
            remove(client, self.prefix)


TestRedisMachine = pytest.mark.slow(machine_test(RedisMachine, 20))


# Opening


@pytest.mark.parametrize("url", ["postgresql://127.0.0.1", "", "127.0.0.1", "redis:/127.0.0.1", 7])
def test_what_is_no_url_of_redis_is_refused_at_once(url):
    with pytest.raises(OptionError, match="redis://"):
        RedisStore(url)


@pytest.mark.parametrize(
    "setting",
    [{"prefix": ""}, {"prefix": 7}, {"prefix": "x" * 257}, {"timeout": 0}, {"lease": "soon"}, {"lease": 5}],
    ids=str,
)
def test_bad_settings_are_refused_at_once(setting):
    with pytest.raises(OptionError):
        RedisStore(URL, **setting)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:sec/ret@127.0.0.1:6379",
        "redis://:sec#ret@127.0.0.1:no",
        "redis+sentinel://127.0.0.1:26379",
        "redis+sentinel://127.0.0.1:secret/main",
    ],
)
def test_a_url_that_cannot_be_understood_is_refused_and_its_password_not_told(url):
    with pytest.raises(OptionError, match="cannot be understood") as caught:
        RedisStore(url)
    assert "sec" not in str(caught.value).replace("Sentinel", "")
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    "url",
    ["redis://:secret@127.0.0.1:1", "unix:///no/such/socket", "redis+sentinel://:secret@127.0.0.1:1/main"],
)
async def test_an_engine_that_is_not_there_is_unavailable(url):
    with pytest.raises(StoreUnavailableError, match="cannot be reached") as caught:
        await RedisStore(url, timeout=2).open()
    assert "secret" not in str(caught.value)


async def test_a_wrong_password_is_told_and_not_which():
    with pytest.raises(StoreUnavailableError, match="check the user and password") as caught:
        await RedisStore(URL.replace("redis://", "redis://nobody:secret@")).open()
    assert "secret" not in str(caught.value)


async def test_a_prefix_that_is_somebody_elses_is_left_alone(engine, prefix):
    engine.set(f"{prefix}layout", "mine")
    with pytest.raises(StoreLayoutError, match="not a key of cagey-sessions"):
        await RedisStore(URL, prefix=prefix).open()
    assert engine.get(f"{prefix}layout") == b"mine"


async def test_a_prefix_under_which_something_else_is_is_left_alone(engine, prefix):
    engine.hset(f"{prefix}layout", mapping={"mine": 1})
    with pytest.raises(StoreLayoutError, match="not a key of cagey-sessions"):
        await RedisStore(URL, prefix=prefix).open()


async def test_a_layout_of_a_newer_version_is_left_alone(engine, prefix):
    engine.set(f"{prefix}layout", "cagey-sessions 99")
    with pytest.raises(StoreLayoutError, match="newer version"):
        await RedisStore(URL, prefix=prefix).open()


async def test_the_settings_of_the_engine_are_read(prefix):
    async with opened(RedisStore(URL, prefix=prefix)) as store:
        assert store.loss_class.startswith("appendonly=")
        assert "failover" in store.loss_class


async def test_the_life_of_the_engine_is_known(engine, prefix):
    async with opened(RedisStore(URL, prefix=prefix)) as store:
        assert store.incarnation == engine.info("server")["run_id"]


async def test_a_prefix_is_no_pattern(engine, prefix):
    odd = prefix + "a*[bc]?\\"
    async with opened(RedisStore(URL, prefix=odd), RedisStore(URL, prefix=prefix + "axb\\\\")) as (here, there):
        assert await save(here, record(epoch=(await claim(here)).epoch)) == [SAVED]
        assert await save(there, record(2, epoch=(await claim(there, 2)).epoch)) == [SAVED]
        assert set(await everything(here)) == {(int, 1)}
        assert set(await everything(there)) == {(int, 2)}


# Rows


async def test_what_is_stored_can_be_read_by_anybody(engine, prefix):
    async with opened(RedisStore(URL, prefix=prefix)) as store:
        epoch = (await claim(store, "ann")).epoch
        assert await save(store, record("ann", epoch=epoch, body=b'{"gold":1}', schema=3)) == [SAVED]
    row = engine.hgetall(f'{prefix}user:"ann"')
    assert row[b"body"] == b'{"gold":1}'
    assert (row[b"epoch"], row[b"version"], row[b"schema"], row[b"released"]) == (b"%d" % epoch, b"1", b"3", b"0")


async def test_only_rows_with_data_or_an_owner_are_kept(engine, prefix):
    """Else they would grow without end; an erasure is kept, too."""
    async with opened(RedisStore(URL, prefix=prefix)) as store:
        for user in range(50):
            epoch = (await claim(store, user)).epoch
            assert await release(store, user, epoch, "a")
        assert await save(store, record("kept", epoch=(await claim(store, "kept")).epoch, release=True)) == [SAVED]
    users = {key.removeprefix(prefix.encode()) for key in engine.scan_iter(f"{prefix}user:*")}
    assert users == {b'user:"kept"'}
    assert all(engine.ttl(key) == -1 for key in engine.scan_iter(f"{prefix}user:*")), "users never expire"
    assert all(engine.ttl(key) > 0 for key in engine.scan_iter(f"{prefix}node:*")), "leases do"


async def test_something_else_under_the_key_of_a_user_makes_no_other_fail(engine, prefix):
    async with opened(RedisStore(URL, prefix=prefix)) as store:
        epochs = {each.user_id: each.epoch for each in await store.claim_many([1, 2, 3], "a")}
        engine.set(f"{prefix}user:2", "mine")
        answers = await store.claim_many([1, 2, 3], "a")
        assert [type(each) for each in answers] == [Claim, CorruptRecordError, Claim]
        epochs |= {each.user_id: each.epoch for each in answers if isinstance(each, Claim)}
        for look in (store.load, store.holder):
            with pytest.raises(CorruptRecordError, match="something else than a hash"):
                await look(2)
        assert await store.load(1) is None, "no reply is left for whoever comes next"
        verdicts = await store.save_many([record(user, epoch=epoch) for user, epoch in epochs.items()])
        assert [verdict.outcome for verdict in verdicts] == [SAVED, Outcome.FAILED, SAVED]
        assert await store.release_many([(2, epochs[2])], "a") == [False]
        assert engine.get(f"{prefix}user:2") == b"mine"


async def test_keys_among_the_users_that_are_of_nobody_are_told_and_passed_over(engine, prefix):
    async with opened(RedisStore(URL, prefix=prefix)) as store:
        assert await save(store, record(7, epoch=(await claim(store, 7)).epoch)) == [SAVED]
        odd = [b"mine", b'"ann', b'"', b"7.0", b"07", b"+7", b"7_0", b" 7", b'"\xff"', b"9" * 30, b'""', b""]
        for key in odd:
            engine.hset(f"{prefix}user:".encode() + key, mapping={"body": "mine"})
        found = [each async for each in store.scan()]
        assert [each.user_id for each in found if isinstance(each, Record)] == [7]
        errors = [each for each in found if isinstance(each, StoreError)]
        assert len(errors) == len(odd)
        assert all("none of ours" in str(each) for each in errors)


async def test_records_of_several_owners_are_each_written_as_theirs(prefix):
    async with opened(RedisStore(URL, prefix=prefix)) as store:
        records = [
            record(user, epoch=(await claim(store, user, owner)).epoch, owner=owner)
            for user, owner in enumerate(["a", "b", "a", "c", "b"])
        ]
        assert await save(store, *records[:4], records[4]._replace(owner="a")) == [SAVED] * 4 + [FENCED]


async def test_a_call_of_many_rows_is_made_in_portions(prefix):
    async with opened(RedisStore(URL, prefix=prefix)) as store:
        claims = await store.claim_many(range(1001), "a")
        records = [record(each.user_id, epoch=each.epoch, body=b"%d" % each.user_id) for each in claims]
        assert await save(store, *records) == [SAVED] * 1001
        again = await store.claim_many(range(1001), "a")
        assert [each.record.body for each in again] == [b"%d" % user for user in range(1001)]


async def test_scripts_that_the_engine_has_forgotten_are_loaded_again(engine, prefix):
    async with opened(RedisStore(URL, prefix=prefix)) as store:
        epoch = (await claim(store)).epoch
        engine.script_flush()
        assert await save(store, record(epoch=epoch)) == [SAVED]
        engine.script_flush()
        assert await store.erase(1, "a")
        engine.script_flush()
        assert await save(store, record(epoch=epoch, version=2)) == [ERASED]
