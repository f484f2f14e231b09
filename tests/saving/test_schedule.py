"""When users are saved: within the interval, spread evenly over it, and once after a stall."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import Counter
from typing import Any

import pytest

from cagey_sessions import SessionManager
from cagey_sessions.stores import Record
from support import SECOND, Db, ManualClock, ScriptedStore, add_user, add_users, let_time_pass, turns


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


async def test_saves_are_spread_and_an_outage_leaves_no_echo(make_manager, db, clock):
    manager = make_manager(interval="30s", max_in_flight=10)
    for user_id in range(3000):
        await add_user(manager, user_id)
    start = clock.now()
    await clock.advance("90s")
    seconds = Counter((write.start - start) // SECOND for write in db.log)
    assert max(seconds.values()) <= 1.5 * 100
    assert db.most_open <= 10
    assert sum(seconds.values()) == pytest.approx(9000, rel=0.05)
    await manager.destroy()


async def test_after_everybody_was_saved_at_once_listeners_are_called_at_times_spread_evenly(make_manager, db, clock):
    manager = make_manager(interval="30s", max_in_flight=50)
    for user_id in range(1000):
        await add_user(manager, user_id)
    for moment in ("7300ms", "12s"):
        await clock.advance(moment)
        await manager.persist_all_user_data()
    start = clock.now()
    db.log.clear()
    await clock.advance("60s")
    tenths = Counter((write.start - start - 1) // (3 * SECOND) for write in db.log)
    assert [tenths[number] for number in range(20)] == pytest.approx([100] * 20, abs=10)
    await manager.destroy()


async def test_after_a_stall_the_saves_move_apart_again(make_manager, db, clock):
    """The loop stands still for 20 of 30 seconds, and all who were due then are saved at one moment: but only once."""
    manager = make_manager(interval="30s", max_in_flight=50)
    for user_id in range(1000):
        await add_user(manager, user_id)
    await clock.advance("40s")
    await clock.jump("20s")
    await clock.advance("1s")
    start = clock.now()
    db.log.clear()
    await clock.advance("300s")
    most = [0] * 10
    for second, count in Counter((write.start - start - 1) // SECOND for write in db.log).items():
        most[second // 30] = max(most[second // 30], count)
    assert most[0] < 400, "of the 670 who were saved at one moment"
    assert most[-1] < 100
    assert most == sorted(most, reverse=True)
    await manager.destroy()


async def test_a_deadline_that_is_already_past_is_served_in_the_next_turn(db):
    """On the real clock of each loop: a shortest interval, and a loop that was blocked past many deadlines."""
    manager = SessionManager(interval="10ms")
    manager.on("persist_user_data", db.save)
    await add_user(manager, 1)
    time.sleep(0.05)  # noqa: ASYNC251 - the blocked loop is the point
    enough = asyncio.Event()
    manager.on("persist_user_data", lambda session: len(db.log) >= 3 and enough.set())
    async with asyncio.timeout(5):
        await enough.wait()
    await manager.destroy()


async def test_a_wake_up_that_comes_early_is_harmless(make_manager, db):
    class EarlyClock(ManualClock):
        def call_later(self, delay, callback, context):
            return super().call_later(max(0, delay - 900_000), callback, context)

    clock = EarlyClock(start=5)
    db.clock = clock
    manager = SessionManager(interval="1s", clock=clock)
    manager.on("persist_user_data", db.save)
    await add_user(manager, 1)
    start = clock.now()
    await clock.advance("10s")
    assert 10 <= len(db.log) <= 12
    assert clock.fired <= 4 * len(db.log) + 12, "no busy loop of early wake-ups"
    for before, after in zip(db.log, db.log[1:], strict=False):
        assert after.start - before.start >= SECOND - 10_000_000, "not early by more than a tick"
    assert db.log[0].start - start <= SECOND
    await manager.destroy()


async def test_after_a_stall_each_session_is_saved_once(make_manager, db, clock):
    manager = make_manager(interval="1s", max_in_flight=7)
    for user_id in range(500):
        await add_user(manager, user_id)
    await clock.advance("1s")
    db.log.clear()
    await clock.jump("2h")
    await turns(500)
    assert sorted(write.user_id for write in db.log) == list(range(500))
    assert db.most_open <= 7
    back = clock.now()
    await clock.advance("1s")
    assert len(db.log) <= 1000
    first_again = db.log[500].start - back
    assert first_again >= 0.9 * SECOND, "no second round out of the backlog"
    await manager.destroy()


async def test_a_session_may_be_destroyed_by_the_tick_that_would_save_it(make_manager, db, clock):
    manager = SessionManager(interval="1s", max_in_flight=1, clock=clock)
    sessions = []
    saved = []

    @manager.on("persist_user_data")
    async def save(session):
        saved.append(session.user_id)
        if len(saved) == 1:
            for other in sessions:
                if other is not session:
                    await other.destroy()

    sessions += [await add_user(manager, user_id) for user_id in range(11)]
    await clock.jump("1s")
    statistics = manager.statistics()
    assert len(saved) == 1
    assert (statistics.live, statistics.pending, statistics.in_flight) == (1, 0, 0)
    await manager.destroy()


async def test_a_listener_that_raises_in_a_tick_spoils_no_later_tick(make_manager, db, clock):
    """Nor do listeners that hear of the failure and raise as well; the user it is about is tried again and again."""
    manager = make_manager(interval="1s")
    tried: Counter[int] = Counter()

    @manager.on("persist_user_data")
    def fail(session):
        tried[session.user_id] += 1
        if session.user_id == 3:
            raise KeyError(session.user_id)

    @manager.on("error")
    def fail_again(*_):
        raise ValueError("while hearing of an error")

    for user_id in range(10):
        await add_user(manager, user_id)
    for _ in range(3):
        before = tried.copy()
        await clock.advance("2s")
        assert all(tried[user_id] > before[user_id] for user_id in range(10))
    await manager.destroy()


async def test_more_periodic_saves_than_can_be_made_do_not_starve_the_urgent(clock):
    db = Db(clock, delay="10ms")
    manager = SessionManager(interval="1s", max_in_flight=1, clock=clock)
    manager.on("persist_user_data", db.save)
    for user_id in range(300):
        await add_user(manager, user_id)
    await clock.advance("2s")
    assert manager.statistics().pending > 50
    for user_id in range(5):
        started = clock.now()
        await let_time_pass(clock, manager.find_by_user(user_id).persist_now())
        assert clock.now() - started <= 0.2 * SECOND
    manager.off("persist_user_data", db.save)
    await let_time_pass(clock, manager.destroy())


async def test_urgent_and_periodic_saves_do_not_starve_each_other(clock):
    db = Db(clock, delay="10ms")
    manager = SessionManager(interval="1s", max_in_flight=1, clock=clock)
    manager.on("persist_user_data", db.save)
    chatty = [await add_user(manager, user_id) for user_id in range(3)]
    for user_id in range(100, 120):
        await add_user(manager, user_id)
    stop = asyncio.Event()

    async def chatter(session):
        while not stop.is_set():
            await session.persist_now()

    tasks = [asyncio.create_task(chatter(session)) for session in chatty]
    await clock.advance("3s")
    counts = Counter(write.user_id for write in db.log)
    assert all(counts[user_id] >= 2 for user_id in range(100, 120))
    assert all(counts[user_id] >= 20 for user_id in range(3))
    stop.set()
    await let_time_pass(clock, asyncio.gather(*tasks))
    await let_time_pass(clock, manager.destroy())


async def test_users_who_come_and_go_during_a_pass_are_each_saved(make_manager, db, clock):
    manager = make_manager(interval=None, max_in_flight=100)
    sessions = [await add_user(manager, user_id) for user_id in range(2000)]
    db.delay = "1ms"
    everybody = asyncio.create_task(manager.persist_all_user_data())
    ends = []
    for step in range(20):
        for user_id in range(step * 10, step * 10 + 10):
            ends.append(asyncio.create_task(sessions[user_id * 7 % 2000].destroy(True)))
            await add_user(manager, 10_000 + user_id)
        await clock.advance("1ms")
    await let_time_pass(clock, asyncio.gather(everybody, *ends))
    leavers = {user_id * 7 % 2000 for user_id in range(200)}
    writes = Counter(write.user_id for write in db.log)
    assert all(writes[user_id] == 1 for user_id in range(2000) if user_id not in leavers)
    assert all(1 <= writes[user_id] <= 2 for user_id in leavers)
    assert len(manager) == 2000
    await let_time_pass(clock, manager.destroy())


async def test_the_age_of_what_is_unsaved_can_be_seen(make_manager, db, clock):
    manager = make_manager(interval="10s")
    assert manager.statistics().oldest_unsaved is None
    await add_user(manager, 1)
    db.always[1] = OSError("down")
    await clock.advance("25s")
    assert manager.statistics().oldest_unsaved == pytest.approx(25, abs=0.02)
    db.always.clear()
    await clock.advance("5s")
    assert manager.statistics().oldest_unsaved <= 5
    await manager.destroy()


@pytest.mark.guarantee("I12")
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


@pytest.mark.guarantee("I12")
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
