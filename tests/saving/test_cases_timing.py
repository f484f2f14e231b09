"""Faults others met with the time of a save: ticks, stalls, crowds; the numbers are those of the catalogue."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest

from cagey_sessions import SessionManager
from support import SECOND, Db, ManualClock, add_user, let_time_pass, turns


async def test_case_24_saves_are_spread_and_an_outage_leaves_no_echo(make_manager, db, clock):
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


async def test_case_48_a_deadline_that_is_already_past_is_served_in_the_next_turn(db):
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


async def test_case_49_a_wake_up_that_comes_early_is_harmless(make_manager, db):
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


async def test_cases_50_and_55_after_a_stall_each_session_is_saved_once(make_manager, db, clock):
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


async def test_case_56_sessions_destroyed_by_the_tick_that_would_save_them(make_manager, db, clock):
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


async def test_cases_59_and_72_a_listener_that_raises_in_a_tick_spoils_no_later_tick(make_manager, db, clock):
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
