"""Callers who wait for a save: what they are told, and how long they wait at most."""

from __future__ import annotations

import asyncio

import pytest

from cagey_sessions import SessionEndedError, StoreUnavailableError
from cagey_sessions.stores import Outcome, Verdict
from support import add_user, changed, end, inside, let_time_pass, turns


async def test_a_later_caller_waits_for_the_whole_save_timeout(clock, store, manager):
    """`persist_now` waits for `save_timeout`, not for what is left of an earlier caller's."""
    session = await changed(manager)
    store.down = True
    first = asyncio.ensure_future(session.persist_now())
    await clock.advance("9500ms")
    second = asyncio.ensure_future(session.persist_now())
    await clock.advance("2s")
    assert first.done()
    assert isinstance(first.exception(), StoreUnavailableError)
    assert not second.done(), "told after half a second that the store did not answer within 10 s"
    store.down = False
    await clock.advance("2s")
    assert (await second).changed
    await end(clock, manager)


async def test_a_save_of_everybody_gives_up_after_the_save_timeout(clock, store, manager):
    """Not after `save_timeout` for each thousand users."""
    [await changed(manager, number) for number in range(2500)]
    store.down = True
    task = asyncio.ensure_future(manager.persist_all_user_data())
    await clock.advance("12s")
    done = task.done()
    store.down = False
    await let_time_pass(clock, asyncio.gather(task, return_exceptions=True), "120s")
    await end(clock, manager)
    assert done


async def test_a_save_asked_for_during_a_save_waits_for_a_later_one(make_manager, db, clock):
    manager = make_manager(interval=None)
    session = await add_user(manager, 1)
    db.delay = "50ms"
    first = asyncio.create_task(session.persist_now())
    await clock.advance("10ms")
    session.user_data["gold"] = 7
    later = [asyncio.create_task(session.persist_now()) for _ in range(3)]
    await clock.advance("40ms")
    assert first.done()
    assert not any(task.done() for task in later)
    await clock.advance("50ms")
    assert all(task.done() for task in later)
    assert db.writes(1) == [{"gold": 1}, {"gold": 7}]
    await manager.destroy()


@pytest.mark.fault("A change made before the call, while an earlier save was under way, was not covered.")
async def test_a_save_of_everybody_is_a_save_of_what_everybody_has_now(make_manager, db, clock):
    manager = make_manager(interval=None, max_in_flight=2)
    sessions = [await add_user(manager, user_id) for user_id in range(6)]
    db.delay = "50ms"
    earlier = asyncio.create_task(sessions[4].persist_now())
    await clock.advance("20ms")
    for session in sessions:
        session.user_data["gold"] = 7
    await let_time_pass(clock, manager.persist_all_user_data())
    assert [db.stored[user_id] for user_id in range(6)] == [{"gold": 7}] * 6
    assert len(db.log) == 7
    await earlier
    await manager.destroy()


@pytest.mark.parametrize("during", ["between attempts", "in an attempt"])
async def test_a_caller_who_asks_late_waits_for_the_whole_save_timeout(clock, store, manager, during):
    """Somebody else has been waiting for nine seconds; that is no reason to be told of ten."""
    session = await changed(manager)
    store.verdict_of[1] = Verdict(Outcome.FAILED, "for now")
    if during == "in an attempt":
        store.delay = "900ms"
    early = asyncio.ensure_future(session.persist_now())
    await clock.advance("9.6s")
    late = asyncio.ensure_future(session.persist_now())
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, early)
    await clock.advance("1s")
    store.verdict_of.clear()
    assert (await let_time_pass(clock, late)).version == 2
    await end(clock, manager)


async def test_a_caller_who_waits_for_a_save_is_told_that_the_session_has_ended_without_it(clock, store, manager):
    """Not, at the end of their own patience, that a session which is gone stays due."""
    session = await changed(manager)
    store.down = True
    early = asyncio.ensure_future(session.persist_now())
    await clock.advance("1s")
    ending = asyncio.ensure_future(session.destroy(persist=False))
    await clock.advance("5s")
    late = asyncio.ensure_future(session.persist_now())
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, early)
    await let_time_pass(clock, ending, "5s")
    with pytest.raises(SessionEndedError):
        await late
    store.down = False
    await end(clock, manager)


async def test_a_caller_who_waits_for_the_next_attempt_is_told_of_an_end_at_once(clock, store, manager):
    """Between two attempts a session has no save under way, and may end here and now."""
    store.shared = False
    session = await changed(manager)
    store.verdict_of[1] = Verdict(Outcome.FAILED, "for now")
    task = asyncio.ensure_future(session.persist_now())
    await turns()
    assert inside(manager).table.state(session) in ("idle", "due")
    await session.destroy(persist=False)
    with pytest.raises(SessionEndedError):
        await task
    await end(clock, manager)


async def test_while_somebody_waits_attempts_are_repeated_soon(clock, store, manager):
    session = await changed(manager)
    store.verdict_of[1] = Verdict(Outcome.FAILED, "locked")
    task = asyncio.ensure_future(session.persist_now())
    await clock.advance("3s")
    assert not task.done()
    del store.verdict_of[1]
    await clock.advance("1100ms")
    assert (await task).version == 2
    await end(clock, manager)
