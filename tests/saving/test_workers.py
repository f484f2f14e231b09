"""The workers that save: each is replaced when its task is cancelled, and no request for a save is forgotten."""

from __future__ import annotations

import asyncio

import pytest

from cagey_sessions import ListenerError, SessionManager
from support import add_user, changed, end, finishes, let_time_pass, turns


@pytest.mark.fault(
    "Workers counted as busy until their tasks were seen to be done: a request in between found no slot."
)
@pytest.mark.parametrize("slots", [1, 2, 50])
@pytest.mark.parametrize("first", [1, 20])
async def test_a_request_in_the_turn_in_which_workers_leave_is_served(clock, slots, first):
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


async def test_cancelling_our_tasks_from_outside_leaves_no_caller_waiting(make_manager, db, clock):
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


@pytest.mark.parametrize("slots", [1, 50])
async def test_tasks_that_are_cancelled_before_their_first_step_leave_no_caller_waiting(clock, db, slots):
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


async def test_a_worker_that_somebody_cancels_leaves_its_call_alone_and_waits_for_it(clock, store, manager):
    """The call goes on; until it has returned nothing else is written of its users."""
    session = await changed(manager)
    store.script = ["5s"]
    task = asyncio.ensure_future(session.persist_now())
    await turns()
    session.user_data["n"] = 2
    for other in asyncio.all_tasks():
        if other.get_name() == "cagey-sessions autosave":
            other.cancel()
    await clock.advance("3s")
    again = asyncio.ensure_future(session.persist_now())
    await clock.advance("1s")
    assert store.open_calls == 1
    assert len(store.batches) == 2, "two saves of a user in flight"
    await let_time_pass(clock, asyncio.gather(task, again))
    assert store.stored(1) == {"n": 2}
    await end(clock, manager)
