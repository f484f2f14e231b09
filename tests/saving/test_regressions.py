"""Faults that were once in this library, in its saves, its tasks and its listeners. Each was first seen red."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from cagey_sessions import DrainError, ListenerError, SessionManager, WrongLoopError
from cagey_sessions.events import deadlocks as waits
from support import Db, add_user, let_time_pass, turns


async def finishes(*calls, within=400):
    """The tasks of these calls, done after a number of turns in which no time passes."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    await turns(within)
    assert [task.done() for task in tasks] == [True] * len(tasks)
    return tasks


@pytest.mark.parametrize("slots", [1, 2, 50])
@pytest.mark.parametrize("first", [1, 20])
async def test_who_asks_in_the_turn_in_which_workers_leave_is_saved(clock, slots, first):
    """Workers counted as busy until their task was seen to be done; an ask in between found no slot, for ever."""
    for late in range(8):
        saved = []
        manager = SessionManager(clock=clock, max_in_flight=slots)
        manager.on("persist_user_data", lambda session, saved=saved: saved.append(session.user_id))
        sessions = [await add_user(manager, user_id) for user_id in range(first + 1)]
        early = [asyncio.create_task(session.persist_now()) for session in sessions[:-1]]
        for _ in range(late):
            await asyncio.sleep(0)
        await finishes(*early, sessions[-1].persist_now(), within=60)
        assert sorted(saved) == list(range(first + 1)), f"{late} turns later"
        await manager.destroy()


async def test_a_worker_that_somebody_cancels_is_replaced(clock):
    manager = SessionManager(interval="10s", max_in_flight=1, clock=clock)
    saved = []

    @manager.on("persist_user_data")
    async def save(session):
        await asyncio.sleep(0)
        if session.user_id == 0 and not saved:
            saved.append("cancelled")
            asyncio.current_task().cancel()
            await asyncio.sleep(0)
        saved.append(session.user_id)

    sessions = [await add_user(manager, user_id) for user_id in range(4)]
    tasks = [asyncio.create_task(session.persist_now()) for session in sessions]
    await clock.advance("10s")
    assert [task.done() for task in tasks] == [True] * 4
    assert {1, 2, 3} <= set(saved)
    await asyncio.gather(*tasks, return_exceptions=True)
    await let_time_pass(clock, manager.destroy())


@pytest.mark.parametrize(("slots", "call"), [(1, "persist_now"), (1, "destroy"), (4, "persist_now")])
async def test_a_listener_that_waits_for_another_save_does_not_starve_it(clock, slots, call):
    """All slots were held by listeners that waited for saves that needed a slot."""
    manager = SessionManager(max_in_flight=slots, clock=clock)
    stored = []

    @manager.on("persist_user_data")
    async def save(session):
        await asyncio.sleep(0)
        guild = session.get("guild")
        if guild is not None and guild.alive:
            await (guild.persist_now() if call == "persist_now" else guild.destroy(True))
        stored.append(session.user_id)

    members = []
    for number in range(slots):
        member = await add_user(manager, number)
        member.set("guild", await add_user(manager, f"guild {number}"))
        members.append(member)
    await finishes(*(member.persist_now() for member in members))
    assert len(stored) == 2 * slots
    await manager.destroy()


async def test_listeners_that_dawdle_hold_up_no_save_but_their_own_session_s(make_manager, db, clock):
    manager = make_manager(max_in_flight=5)
    for user_id in range(300):
        session = await add_user(manager, user_id)
        if user_id < 50:
            session.on("before_destroy", lambda: clock.sleep("60s"))
    end = asyncio.create_task(manager.destroy(True, deadline="5s"))
    await clock.advance("1s")
    assert len(db.stored) == 250
    await clock.advance("6s")
    with pytest.raises(DrainError) as caught:
        await end
    assert sorted(caught.value.user_ids) == list(range(50))


async def test_a_logger_that_fails_stops_nothing(clock, db):
    class Log:
        def fails(self, *_):
            raise OSError("the disk of the log is full")

        debug = info = warning = error = fails

    manager = SessionManager(interval="10s", clock=clock, log=Log())
    manager.on("persist_user_data", db.save)
    await add_user(manager, 1)
    db.script = [OSError("down")] * 2
    await clock.advance("20s")
    assert db.stored == {1: {"gold": 1}}
    db.always[1] = OSError("down")
    with pytest.raises(DrainError):
        await let_time_pass(clock, manager.destroy(True, deadline="1s"))


async def test_stopping_our_tasks_from_outside_leaves_nobody_waiting(make_manager, db, clock):
    def stop_all():
        for task in asyncio.all_tasks():
            if task.get_name().startswith("cagey-sessions"):
                task.cancel()

    manager = make_manager()
    manager.on("before_destroy", lambda session: clock.sleep("1s"))
    session = await add_user(manager, 1)
    end = asyncio.create_task(session.destroy(True))
    await turns()
    stop_all()
    await turns()
    with pytest.raises(ListenerError):
        await end
    assert session.alive
    drain = asyncio.create_task(manager.destroy(True))
    await turns(2)
    stop_all()
    await turns()
    report = await let_time_pass(clock, drain)
    assert report.unsaved == (), "who has called for the end was not cancelled, and gets it"
    assert db.stored == {1: {"gold": 1}}


async def test_a_save_of_everybody_notices_a_circle_of_waits(clock):
    manager = SessionManager(clock=clock)
    go = asyncio.Event()
    first, second = await add_user(manager, 1), await add_user(manager, 2)

    @manager.on("persist_user_data")
    async def save(session):
        if session is first:
            await second.destroy()

    @second.on("before_destroy")
    async def everybody():
        await go.wait()
        await manager.persist_all_user_data()

    end, save_first = asyncio.create_task(second.destroy()), asyncio.create_task(first.persist_now())
    await turns()
    go.set()
    await turns(100)
    assert end.done()
    assert save_first.done()
    await asyncio.gather(end, save_first, return_exceptions=True)
    await manager.destroy()


@pytest.mark.parametrize("slots", [1, 50])
async def test_tasks_that_are_cancelled_before_their_first_step_leave_nobody_waiting(clock, db, slots):
    def stop_all():
        for task in asyncio.all_tasks():
            if task.get_name().startswith("cagey-sessions"):
                task.cancel()

    manager = SessionManager(interval="10s", max_in_flight=slots, clock=clock)
    manager.on("persist_user_data", db.save)
    sessions = [await add_user(manager, user_id) for user_id in range(3)]
    save = asyncio.create_task(sessions[0].persist_now())
    await asyncio.sleep(0)
    stop_all()
    await clock.advance("10s")
    assert save.done()
    end = asyncio.create_task(sessions[1].destroy(True))
    await asyncio.sleep(0)
    stop_all()
    await clock.advance("11s")
    with pytest.raises(ListenerError):
        await end
    assert not sessions[1].alive, "and it was tried again"
    drain = asyncio.create_task(manager.destroy(True))
    await asyncio.sleep(0)
    stop_all()
    await turns()
    report = await let_time_pass(clock, drain)
    assert report.unsaved == (), "who has called for the end was not cancelled, and gets it"
    assert sorted(db.stored) == [0, 1, 2]


@pytest.mark.parametrize("wait", ["destroy", "wait_ended"])
async def test_a_slot_that_is_lent_is_used_at_once(clock, wait):
    manager = SessionManager(interval="1h", max_in_flight=1, clock=clock)
    stored = []

    @manager.on("persist_user_data")
    async def save(session):
        await go.wait()
        if session is first:
            await (second.destroy(True) if wait == "destroy" else second.wait_ended())
        stored.append(session.user_id)

    go = asyncio.Event()
    first, second = await add_user(manager, 1), await add_user(manager, 2)
    saving = asyncio.create_task(first.persist_now())
    await turns()
    ending = asyncio.create_task(second.destroy(True))
    await turns()
    go.set()
    await finishes(saving, ending)
    assert stored == [2, 1]
    await manager.destroy()


async def test_a_listener_lends_one_slot_however_many_saves_it_waits_for(clock):
    db = Db(clock, delay="10ms")
    manager = SessionManager(max_in_flight=2, clock=clock)
    others = [await add_user(manager, user_id) for user_id in range(50)]
    leader = await add_user(manager, "leader")

    @manager.on("persist_user_data")
    async def save(session):
        if session is leader:
            await asyncio.gather(*(other.persist_now() for other in others))
        else:
            await db.save(session)

    await let_time_pass(clock, leader.persist_now())
    assert len(db.log) == 50
    assert db.most_open == 2
    await manager.destroy()


async def test_errors_that_no_caller_waits_for_are_reported(make_manager, db, clock):
    manager = make_manager()
    heard = []
    manager.on("error", lambda error, session: heard.append(error))
    session = await add_user(manager, 1)
    session.on("before_destroy", lambda: 1 / 0)
    db.script = [OSError("down")]
    end = asyncio.create_task(session.destroy(True))
    await asyncio.sleep(0)
    end.cancel()
    await turns()
    assert {type(part) for error in heard for part in error.exceptions} == {ZeroDivisionError, OSError}
    await clock.advance("30s")
    assert not session.alive
    await manager.destroy()


async def test_a_writer_that_is_removed_under_a_save_makes_it_a_failed_one(clock):
    manager = SessionManager(clock=clock)
    written = []

    @manager.on("persist_user_data")
    async def first(session):
        manager.off("persist_user_data", written.append)

    manager.on("persist_user_data", written.append)
    session = await add_user(manager, 1)
    with pytest.raises(ListenerError):
        await session.persist_now()
    assert manager.statistics().saved == 0
    await manager.destroy()


async def test_a_listener_that_cannot_have_saved_is_no_save(clock):
    manager = SessionManager(clock=clock)

    async def stray(session):
        yield session

    manager.on("persist_user_data", stray)
    session = await add_user(manager, 1)
    with pytest.raises(ListenerError) as caught:
        await session.persist_now()
    assert "yield" in str(caught.value.exceptions[0])
    assert manager.statistics().saved == 0
    await manager.destroy()


async def test_a_future_of_a_thread_pool_is_waited_for(clock):
    with ThreadPoolExecutor(1) as pool:
        manager = SessionManager(clock=clock)
        manager.on("persist_user_data", lambda session: pool.submit(lambda: 1 / 0))
        session = await add_user(manager, 1)
        with pytest.raises(ListenerError) as caught:
            await session.persist_now()
        assert isinstance(caught.value.exceptions[0], ZeroDivisionError)
        await manager.destroy()


async def test_listeners_cannot_be_registered_from_another_thread(make_manager):
    manager = make_manager()
    await manager.create()
    with pytest.raises(WrongLoopError):
        await asyncio.to_thread(manager.on, "persist_user_data", print)
    await manager.destroy()


def test_a_listener_may_be_registered_while_the_loop_stands_still(clock):
    manager = SessionManager(interval="1s", clock=clock)
    saved = []

    async def begin():
        await add_user(manager, 1)
        await clock.advance("2s")

    async def go_on():
        await turns()
        await manager.destroy(True)

    with asyncio.Runner() as runner:
        runner.run(begin())
        manager.on("persist_user_data", lambda session: saved.append(session.user_id))
        runner.run(go_on())
    assert saved == [1, 1]


async def test_frames_and_notes_do_not_pile_up(clock):
    manager = SessionManager(clock=clock)
    failure = ValueError("the same each time")

    @manager.on("persist_user_data")
    def save(session):
        raise failure

    session = await add_user(manager, 1)
    for _ in range(20):
        with pytest.raises(ListenerError):
            await session.persist_now()
    assert len(failure.__notes__) == 1

    depth = []

    async def generation(left):
        next_one = await manager.create()
        depth.append(len(waits._frames.get()))
        if left:
            next_one.on("destroy", lambda: tasks.append(asyncio.create_task(generation(left - 1))))
        await next_one.destroy()

    tasks = [asyncio.create_task(generation(20))]
    await turns(500)
    assert len(tasks) == 21
    assert max(depth) <= 2
    await manager.destroy()


async def test_tick_lag_is_not_the_time_without_users(make_manager, clock):
    manager = make_manager(interval="10s")
    assert manager.statistics().tick_lag == 0
    await (await add_user(manager, 1)).destroy()
    await clock.advance("5h")
    await add_user(manager, 1)
    await clock.advance("9s")
    assert manager.statistics().tick_lag <= 0.01
    await clock.jump("20s")
    assert manager.statistics().tick_lag >= 9
    await manager.destroy()
