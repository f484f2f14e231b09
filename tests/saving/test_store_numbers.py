"""The figures a store is promised: freshness, the length of a drain, what a hanging call costs, the way back from an
outage. Virtual time, so they are exact.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from cagey_sessions import DrainError, SessionManager, StoreUnavailableError
from cagey_sessions.stores import Record
from support import SECOND, ManualClock, ScriptedStore, let_time_pass, turns


async def add_users(manager: SessionManager, count: int, data: Any = None) -> list[Any]:
    sessions = []
    for start in range(0, count, 500):
        created = [await manager.create() for _ in range(min(500, count - start))]
        await asyncio.gather(
            *(session.login(start + place, default=data or {"n": 0}) for place, session in enumerate(created))
        )
        sessions += created
    return sessions


class Books:
    """A script of 2 ms a batch that notes for each user when the bytes were fixed and when they were acknowledged."""

    def __init__(self, clock: ManualClock, users: int) -> None:
        self.clock = clock
        self.fixed = [0] * users
        self.acknowledged = [0] * users
        self.oldest_bytes = self.oldest_acknowledgement = 0

    def start(self) -> None:
        self.fixed = [self.clock.now()] * len(self.fixed)
        self.acknowledged = list(self.fixed)

    def pop(self, place: int) -> Any:
        return self.write

    async def write(self, records: list[Record]) -> None:
        now = self.clock.now()
        for record in records:
            user_id = int(record.user_id)
            self.oldest_bytes = max(self.oldest_bytes, now - self.fixed[user_id])
            self.fixed[user_id] = now
        await self.clock.sleep("2ms")
        now = self.clock.now()
        for record in records:
            user_id = int(record.user_id)
            self.oldest_acknowledgement = max(self.oldest_acknowledgement, now - self.acknowledged[user_id])
            self.acknowledged[user_id] = now


@pytest.mark.slow
async def test_everybody_is_fixed_within_the_interval_and_acknowledged_within_a_tick_and_a_save_more(clock):
    """100,000 users who change all the time, interval 10 s, 2 ms a batch; fewer where the core is traced."""
    users = int(os.environ.get("CAGEY_TEST_USERS", "100000"))
    store = ScriptedStore(clock)
    store.shared = False
    store.check = False
    books = Books(clock, users)
    changes = itertools.count()

    def change(session: Any) -> None:
        session.user_data["n"] = next(changes)

    manager = SessionManager(store=store, interval="10s", before_save=change, clock=clock)
    await add_users(manager, users)
    books.start()
    store.script = books
    await clock.advance("11s")
    now = clock.now()
    interval, tick, save = 10 * SECOND, SECOND // 100, SECOND // 500
    assert 0 < max(books.oldest_bytes, *(now - at for at in books.fixed)) <= interval
    assert max(books.oldest_acknowledgement, *(now - at for at in books.acknowledged)) <= interval + tick + save
    statistics = manager.statistics()
    assert statistics.saved >= users
    assert statistics.unchanged == 0
    assert statistics.oldest_unsaved <= 10 + 0.01 + 0.002
    assert store.most_open <= 4
    await let_time_pass(clock, manager.destroy(False))


class SlowToRelease(ScriptedStore):
    """A release takes as long as a save."""

    async def release_many(self, claims: Any, owner: str) -> list[bool]:
        await self.clock.sleep(self.delay)
        return await super().release_many(claims, owner)


@pytest.mark.parametrize("which", ["changed", "unchanged", "unsaved"])
async def test_a_drain_of_a_thousand_takes_less_than_twenty_batch_times(clock, which):
    """1,000 sessions, 20 ms a batch; whether there is anything to be written or not."""
    store = SlowToRelease(clock, "20ms")
    manager = SessionManager(store=store, clock=clock)
    sessions = await add_users(manager, 1000)
    await let_time_pass(clock, manager.persist_all_user_data())
    for session in sessions:
        session.user_data["n"] += which == "changed"
    store.batches.clear()
    before = clock.now()
    report = await let_time_pass(clock, manager.destroy(persist=which != "unsaved"))
    assert report.saved == (0 if which == "unsaved" else 1000)
    assert report.seconds < 20 * 0.020
    assert clock.now() - before >= SECOND // 50
    assert all(store.stored(user_id) == {"n": which == "changed"} for user_id in range(1000))
    assert not any(store.owner_of(user_id) for user_id in range(1000))
    assert len(store.batches) + len(store.release_calls) < 20
    assert store.most_open <= 4


@pytest.mark.parametrize("fenced", [True, False], ids=["fenced", "unfenced"])
async def test_a_hanging_call_costs_its_own_batch_and_is_reported_user_by_user(clock, fenced):
    """The first of many batches hangs: its users are unknown, everybody else is saved meanwhile."""
    store = ScriptedStore(clock, "20ms")
    store.fenced = fenced
    manager = SessionManager(store=store, clock=clock, interval=None)
    sessions = await add_users(manager, 1000)
    for session in sessions:
        session.user_data["n"] = 1
    store.script = ["hang"]
    waiting = [asyncio.ensure_future(session.persist_now()) for session in sessions]
    await clock.advance("9900ms")
    hanging = {record.user_id for record in store.batches[0].records}
    assert 0 < len(hanging) <= 200
    for session, task in zip(sessions, waiting, strict=True):
        assert task.done() == (session.user_id not in hanging)
    await clock.advance("300ms")
    for session, task in zip(sessions, waiting, strict=True):
        if session.user_id in hanging:
            with pytest.raises(StoreUnavailableError):
                await task
            assert store.stored(session.user_id) is None
        else:
            receipt = await task
            assert receipt.changed
            assert store.stored(session.user_id) == {"n": 1}
    assert len(store.aborted) == 1
    assert manager.statistics().store_up, "others got through"
    store.release_all.set()
    await turns()
    await let_time_pass(clock, manager.destroy())
    assert all(store.stored(session_id) == {"n": 1} for session_id in range(1000))


async def test_without_a_store_hanging_listeners_cost_their_own_users(clock, db, make_manager):
    """200 users whose listener takes 20 ms, 5 hang, 50 at a time, deadline 1 s: 195 saved, 5 named, oldest first."""
    manager = make_manager(interval=None, max_in_flight=50)
    db.delay = "20ms"
    hanging = [3, 50, 51, 120, 199]
    for user_id in hanging:
        db.always[user_id] = "hang"
    for user_id in range(200):
        session = await manager.create()
        await session.set_user(user_id, {"n": user_id})
        await clock.advance("10ms")
    with pytest.raises(DrainError) as raised:
        await let_time_pass(clock, manager.destroy(True, deadline="1s"))
    assert raised.value.report.saved == 195
    assert [user.user_id for user in raised.value.report.unsaved] == hanging
    assert len(db.stored) == 195
    db.release.set()
    await turns()


OUTAGE_USERS = 3000


async def test_after_an_outage_everybody_is_saved_within_an_interval_and_never_in_a_herd(clock):
    """40 s without a store, interval 30 s: memory grows by marks; then at most 1.5 x users / interval in any second."""
    interval = 30
    store = ScriptedStore(clock, "5ms")
    manager = SessionManager(store=store, interval=interval, clock=clock)
    sessions = await add_users(manager, OUTAGE_USERS, {"n": 0, "text": "x" * 1000})

    def change() -> None:
        for session in sessions:
            session.user_data["n"] += 1

    change()
    await clock.advance(interval + 1)
    assert all(store.stored(user_id) is not None for user_id in range(OUTAGE_USERS))
    store.down = True
    await clock.advance("1s")
    change()
    await clock.advance("5s")
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(34):
            change()
            await clock.advance("1s")
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / OUTAGE_USERS < 300, "what waits is a mark, not a body"
    assert not manager.statistics().store_up
    assert manager.health().state == "down"
    attempts = [batch for batch in store.batches if batch.start > clock.now() - 10 * SECOND]
    assert 8 <= len(attempts) <= 25, "it is tried about once a second"
    assert all(len(batch.records) == 1 for batch in attempts)
    assert all(session.alive for session in sessions)

    store.down = False
    back = clock.now()
    store.batches.clear()
    wanted = [dict(session.user_data) for session in sessions]
    await clock.advance("1s")
    assert manager.statistics().store_up
    for _ in range(interval - 1):
        await clock.advance("1s")
    saved = {record.user_id for batch in store.batches for record in batch.records}
    assert saved == set(range(OUTAGE_USERS)), "everybody within one interval"
    assert [store.stored(user_id) for user_id in range(OUTAGE_USERS)] == wanted
    for _ in range(3 * interval):
        change()
        await clock.advance("1s")
        assert manager.statistics().oldest_unsaved <= interval + 0.02
    per_second: Counter[int] = Counter()
    for batch in store.batches:
        per_second[(batch.start - back) // SECOND] += len(batch.records)
    assert max(per_second.values()) <= 1.5 * OUTAGE_USERS / interval
    await let_time_pass(clock, manager.destroy())


@pytest.mark.parametrize("hook", [False, True], ids=["in batches", "one by one"])
async def test_after_everybody_was_saved_at_once_saves_are_spread_evenly_again(clock, hook):
    """Whenever somebody asks for a save of all: in each tenth of an interval a tenth of the users is saved."""
    interval, users = 30, 2000
    store = ScriptedStore(clock, "5ms")
    store.check = False
    rows: Counter[int] = Counter()
    save_many = store.save_many

    async def count(records: list[Record]) -> Any:
        rows[(clock.now() - start - 1) // (interval * SECOND // 10)] += len(records)
        return await save_many(records)

    store.save_many = count
    manager = SessionManager(
        store=store, interval=interval, clock=clock, before_save=(lambda session: None) if hook else None
    )
    start = clock.now()
    sessions = await add_users(manager, users)
    for moment in ("7300ms", "1s", "12s"):
        await clock.advance(moment)
        await let_time_pass(clock, manager.persist_all_user_data())
    start = clock.now()
    rows.clear()
    for _ in range(2 * interval):
        for session in sessions:
            session.user_data["n"] += 1
        await clock.advance("1s")
        assert manager.statistics().oldest_unsaved <= interval + 0.02
    assert sorted(rows) == list(range(20))
    assert all(abs(count - users // 10) <= users // 100 for count in rows.values())
    await let_time_pass(clock, manager.destroy(False))


async def test_whoever_is_saved_after_each_message_is_saved_by_the_timer_once_in_an_interval(clock):
    store = ScriptedStore(clock)
    manager = SessionManager(store=store, interval=30, clock=clock)
    session = await manager.open("ann", default={"n": 0})
    await session.persist_now()
    before = manager.statistics()
    for _ in range(300):
        session.user_data["n"] += 1
        await session.persist_now()
        await clock.advance("1s")
    after = manager.statistics()
    assert after.saved - before.saved - 300 == after.unchanged - before.unchanged <= 10, "they find nothing to write"
    await let_time_pass(clock, manager.destroy())


async def test_urgent_calls_of_one_turn_share_a_batch(clock):
    store = ScriptedStore(clock, "5ms")
    manager = SessionManager(store=store, clock=clock)
    sessions = await add_users(manager, 150)
    for session in sessions:
        session.user_data["n"] = 1
    store.batches.clear()
    await let_time_pass(clock, asyncio.gather(*(session.persist_now() for session in sessions)))
    assert [len(batch.records) for batch in store.batches] == [150]
    await let_time_pass(clock, manager.destroy())


async def test_batches_are_bounded_by_rows_and_by_bytes(clock):
    store = ScriptedStore(clock, "5ms")
    manager = SessionManager(store=store, clock=clock, interval=None)
    sessions = await add_users(manager, 1000)
    for session in sessions:
        session.user_data["n"] = 1
    store.batches.clear()
    await let_time_pass(clock, manager.persist_all_user_data())
    assert sum(len(batch.records) for batch in store.batches) == 1000
    assert max(len(batch.records) for batch in store.batches) == 200
    store.batches.clear()
    for session in sessions[:12]:
        session.user_data["text"] = "x" * 200_000
    await let_time_pass(clock, manager.persist_all_user_data())
    assert sum(len(batch.records) for batch in store.batches) == 12
    assert max(sum(len(record.body) for record in batch.records) for batch in store.batches) <= 1024 * 1024 + 200_100
    assert store.most_open <= 4
    await let_time_pass(clock, manager.destroy())


async def test_what_is_saved_is_the_data_of_one_moment(clock):
    """Gold goes between two bags in every step of the loop, while saves that are slow are under way all the time."""
    store = ScriptedStore(clock, "7ms")
    manager = SessionManager(store=store, clock=clock, interval="1s")
    session = await manager.open("ann", default={"bag": list(range(50)), "bank": list(range(50))})
    for _ in range(300):
        session.user_data["bank"].append(session.user_data["bag"].pop(0))
        save = asyncio.ensure_future(session.persist_now())
        await clock.advance("3ms")
        session.user_data["bag"].append(session.user_data["bank"].pop(0))
        await clock.advance("3ms")
        save.cancel()
    saved = [record.value() for batch in store.batches for record in batch.records]
    assert len(saved) > 100
    assert len({len(data["bag"]) for data in saved}) == 2, "of both moments"
    assert all(sorted(data["bag"] + data["bank"]) == sorted([*range(50)] * 2) for data in saved)
    await let_time_pass(clock, manager.destroy())


async def test_an_idle_session_has_no_task_no_timer_and_no_dict(clock):
    manager = SessionManager(store=ScriptedStore(clock), clock=clock, interval="1h")
    gc.collect()
    dicts = sum(type(each) is dict for each in gc.get_objects())
    sessions = await add_users(manager, 1000, 7)
    await let_time_pass(clock, manager.persist_all_user_data())
    gc.collect()
    assert len(manager) == 1000
    assert len(asyncio.all_tasks()) < 10
    assert clock.pending < 10
    assert sum(type(each) is dict for each in gc.get_objects()) < dicts + 100
    sessions[0].set("bag", 1)
    assert [number for number in range(1000) if dict in map(type, gc.get_referents(sessions[number]))] == [0]
    await let_time_pass(clock, manager.destroy())
