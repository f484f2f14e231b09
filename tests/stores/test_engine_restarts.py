"""The stores of shared engines on engines that end, are killed or paused, and come back, while a manager works."""

from __future__ import annotations

import asyncio
import random
import uuid

import pytest

from cagey_sessions import SessionManager, StoreUnavailableError
from cagey_sessions.stores import Outcome, PostgresStore, RedisStore
from cagey_sessions.testing.store_conformance import opened
from support.engines import PostgresEngine, RedisEngine, need

BOUND = 10
"""Seconds after which the return of the engine counts as not noticed; it takes one."""
USERS = [f"user-{number}" for number in range(50)]
LEAVING = [f"leaving-{number}" for number in range(60)]
OFFLINE = [f"offline-{number}" for number in range(12)]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((PostgresEngine, PostgresStore), id="postgres", marks=need("initdb", "postgres", "pg_isready")),
        pytest.param((RedisEngine, RedisStore), id="redis", marks=need("redis-server")),
    ],
)
def running(request):
    kind, store = request.param
    with kind() as engine:
        yield engine, store


@pytest.fixture
def engine(running):
    return running[0]


@pytest.fixture
def make(running):
    """Makes stores on the engine, each with the users of this test."""
    engine, store = running
    place = {"schema" if store is PostgresStore else "prefix": f"test_{uuid.uuid4().hex}"}
    return lambda: store(engine.url, timeout=0.5, **place)


async def restart(engine):
    await asyncio.to_thread(engine.restart)


async def kill(engine):
    await asyncio.to_thread(engine.kill)
    await asyncio.sleep(0.05)
    await asyncio.to_thread(engine.start)


async def pause(engine):
    await asyncio.to_thread(engine.pause)
    await asyncio.sleep(0.7)  # longer than a call may take
    await asyncio.to_thread(engine.resume)


class Game:
    """Users who play, leave and are changed while they are away, and what was acknowledged of each."""

    def __init__(self, store, seed):
        self.chance = random.Random(seed)
        self.store = store
        self.acknowledged = {}
        """The count that the store has, or more, by user."""
        self.tried = {}
        self.versions = {}
        self.written = {}
        """The last record of each user whom the store has called saved."""
        self._save_many = store.save_many
        store.save_many = self.save_many
        self.over = False

    async def save_many(self, records):
        verdicts = await self._save_many(records)
        for record, verdict in zip(records, verdicts, strict=True):
            if verdict.outcome in (Outcome.SAVED, Outcome.ALREADY):
                known = self.written.setdefault(record.user_id, record)
                if record[1:4:2] >= known[1:4:2]:
                    self.written[record.user_id] = record
        return verdicts

    def acknowledge(self, user, count):
        self.acknowledged[user] = max(count, self.acknowledged.get(user, 0))

    async def begin(self, manager):
        self.manager = manager
        self.sessions = [await manager.open(user, default={"user": user, "count": 0}) for user in USERS]
        self.leaving = [await manager.open(user, default={"user": user, "count": 0}) for user in LEAVING]
        await manager.persist_all_user_data()
        for user in OFFLINE:
            await self.edit(user)

    async def play(self):
        """Until `over`: changes all the time, and now and then somebody wants to know, leaves, or is edited."""
        calls = set()
        while not self.over:
            for session in self.chance.sample(self.sessions, 10):
                session.user_data["count"] += 1
            calls |= {asyncio.ensure_future(self.persist(session)) for session in self.chance.sample(self.sessions, 2)}
            if self.leaving and self.chance.random() < 0.5:
                calls.add(asyncio.ensure_future(self.leave(self.leaving.pop())))
            for user in self.chance.sample(OFFLINE, 2):
                calls.add(asyncio.ensure_future(self.edit(user) if self.chance.random() < 0.3 else self.read(user)))
            await asyncio.sleep(0.005)
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert outcome is None or isinstance(outcome, StoreUnavailableError), repr(outcome)

    async def persist(self, session):
        count = session.user_data["count"]
        receipt = await session.persist_now()
        self.acknowledge(session.user_id, count)
        self.versions[session.user_id] = max(receipt.version, self.versions.get(session.user_id, 0))

    async def leave(self, session):
        session.user_data["count"] = count = 1 + session.user_data["count"]
        await session.destroy()
        self.acknowledge(session.user_id, count)

    async def edit(self, user):
        async with self.manager.edit(user, default={"user": user, "count": 0}) as data:
            assert data["user"] == user
            assert data["count"] >= self.acknowledged.get(user, 0)
            data["count"] += 1
            count = data["count"]
        self.acknowledge(user, count)

    async def read(self, user):
        before = self.acknowledged.get(user, 0)
        data = await self.manager.read(user)
        assert data["user"] == user
        assert data["count"] >= before

    async def until_all_are_saved(self):
        """Wait until everybody's state of now is written, by the manager's own doing."""
        now = {session.user_id: session.user_data["count"] for session in self.sessions}
        async with asyncio.timeout(BOUND):
            while any(self.written[user].value()["count"] < count for user, count in now.items()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def check(self, store):
        """What is stored: everything that was ever acknowledged, each in its place."""
        for user in (*USERS, *LEAVING, *OFFLINE):
            found = await store.load(user)
            assert found is not None, f"{user} is gone"
            assert found.user_id == found.value()["user"] == user
            assert found.value()["count"] >= self.acknowledged.get(user, 0), user
            assert found.version >= self.versions.get(user, 0), user
            written = self.written[user]
            assert (found.epoch, found.version) >= (written.epoch, written.version), user
            assert found.body == written.body or found.version > written.version, user


@pytest.mark.parametrize("fault", [restart, kill, pause])
async def test_nothing_acknowledged_is_lost_by_an_engine_that_comes_back(engine, make, fault):
    store = make()
    game = Game(store, seed=31)
    manager = SessionManager(store=store, interval="100ms", save_timeout=0.5)
    async with manager:
        await game.begin(manager)
        playing = asyncio.ensure_future(game.play())
        await game.until_all_are_saved()
        await fault(engine)
        await game.until_all_are_saved()
        assert manager.health().state != "down"
        game.over = True
        await playing
    assert len(game.acknowledged) > len(USERS)
    async with opened(make()) as direct:
        await game.check(direct)
        for user in USERS:
            assert (await direct.load(user)).owner == ""


async def test_a_server_that_starts_while_the_engine_is_away_is_told_so_and_starts_later(engine, make):
    await asyncio.to_thread(engine.stop)
    try:
        store = make()
        with pytest.raises(StoreUnavailableError):
            await store.open()
    finally:
        await asyncio.to_thread(engine.start)
    async with opened(store):
        assert (await store.claim_many(["early"], "a"))[0].granted
