"""Faults others met when a server ends, with everybody on it; the numbers are those of the catalogue."""

from __future__ import annotations

import asyncio

import pytest

from cagey_sessions import (
    DrainError,
    DurationError,
    ListenerError,
    ManagerClosedError,
    SessionEndedError,
    SessionManager,
)
from support import SECOND, Db, add_user, let_time_pass, turns


async def test_case_14_the_end_of_a_manager_waits_for_everybody(make_manager, db, clock):
    manager = make_manager(max_in_flight=50, interval="10s")
    for user_id in range(1000):
        await add_user(manager, user_id)
    db.delay = "20ms"
    started = clock.now()
    report = await let_time_pass(clock, manager.destroy(True))
    assert len(db.stored) == 1000
    assert report.saved == 1000
    assert report.seconds == pytest.approx(0.4, abs=0.001)
    assert db.most_open == 50
    assert clock.now() - started <= SECOND
    assert len(manager) == 0


async def test_case_14_saves_under_way_are_awaited(make_manager, db, clock):
    manager = make_manager(interval="1s")
    await add_user(manager, 1)
    db.delay = "2s"
    await clock.advance("1s")
    assert db.open == 1
    end = asyncio.create_task(manager.destroy())
    await turns()
    assert not end.done()
    await clock.advance("2s")
    await end
    assert [write.error for write in db.log] == [None]


async def test_a_drain_meets_who_was_being_saved_when_it_began(make_manager, db, clock):
    """Seen in the demo: an acknowledgement during the walk moved a session behind its end, and it was never met."""
    manager = make_manager(max_in_flight=2, interval=None)
    sessions = [await add_user(manager, user_id) for user_id in range(8)]
    db.delay = "50ms"
    buying = asyncio.create_task(sessions[5].persist_now())
    await turns()
    end = asyncio.create_task(manager.destroy(True))
    await turns()
    sessions[5].user_data["gold"] = 7
    await clock.advance("50ms")
    await buying
    assert not end.done()
    report = await let_time_pass(clock, end)
    assert report.saved == 8
    assert db.stored[5] == {"gold": 7}
    assert not any(session.alive for session in sessions)


async def test_case_16_a_drain_ends_at_its_deadline_and_names_who_is_not_saved(make_manager, db, clock):
    manager = make_manager(max_in_flight=50, interval=None)
    order = list(range(200))
    for user_id in order:
        await add_user(manager, user_id)
        await clock.advance("1ms")
    db.delay = "20ms"
    for user_id in (3, 50, 99, 150, 199):
        db.always[user_id] = "hang"
    ended = []
    manager.on("destroy", lambda session: ended.append(session.user_id))
    end = asyncio.create_task(manager.destroy(True, deadline="1s"))
    started = clock.now()
    await clock.advance("1s")
    await turns(100)
    assert end.done()
    assert clock.now() - started == SECOND
    with pytest.raises(DrainError) as caught:
        await end
    report = caught.value.report
    assert [user.user_id for user in report.unsaved] == [3, 50, 99, 150, 199], "oldest first"
    assert caught.value.user_ids == (3, 50, 99, 150, 199)
    assert report.saved == 195
    assert len(db.stored) == 195
    assert sorted(ended) == order, "every session has its destroy event"
    assert [write.user_id for write in db.log] == order, "oldest first"
    assert len(manager) == 0
    db.release.set()
    await turns()
    assert manager.statistics().in_flight == 0


async def test_a_drain_retries_until_the_deadline(make_manager, db, clock):
    manager = make_manager()
    for user_id in range(5):
        await add_user(manager, user_id)
    db.always = {user_id: OSError("restarting") for user_id in range(5)}
    end = asyncio.create_task(manager.destroy(True))
    await clock.advance("10s")
    assert not end.done()
    db.always.clear()
    await clock.advance("1s")
    report = await end
    assert report.saved == 5
    assert len(db.stored) == 5


async def test_a_drain_that_cannot_save_says_why(make_manager, db, clock):
    manager = make_manager()
    for user_id in range(3):
        await add_user(manager, user_id)
    db.always[1] = OSError("read-only")
    with pytest.raises(DrainError, match="1 users were not saved: 1") as caught:
        await let_time_pass(clock, manager.destroy(True, deadline="5s"))
    (user,) = caught.value.report.unsaved
    assert user.user_id == 1
    assert isinstance(user.error, ListenerError)
    assert isinstance(user.error.exceptions[0], OSError)
    assert user.age == pytest.approx(5, abs=0.1)
    assert sorted(db.stored) == [0, 2]


async def test_a_drain_with_no_time_at_all_still_ends_everybody(make_manager, db, clock):
    manager = make_manager()
    sessions = [await add_user(manager, user_id) for user_id in range(5)]
    db.delay = "1s"
    with pytest.raises(DrainError) as caught:
        await let_time_pass(clock, manager.destroy(True, deadline=0))
    assert len(caught.value.user_ids) == 5
    assert all(session.end_reason == "unsaved" for session in sessions)
    await clock.advance("1s")
    assert db.open == 0, "what was under way has come to its end by itself"


async def test_a_listener_that_hangs_at_the_end_cannot_hold_the_drain(make_manager, db, clock):
    manager = make_manager()
    for user_id in range(5):
        session = await add_user(manager, user_id)
        if user_id == 2:
            session.on("before_destroy", asyncio.Event().wait)
        if user_id == 3:
            session.on("destroy", asyncio.Event().wait)
    anonymous = await manager.create()
    with pytest.raises(DrainError) as caught:
        await let_time_pass(clock, manager.destroy(True, deadline="2s"))
    assert caught.value.user_ids == (2,)
    assert sorted(db.stored) == [0, 1, 3, 4]
    assert len(manager) == 0
    assert anonymous.end_reason == "drained"
    assert caught.value.report.seconds <= 3.01


async def test_case_20_nobody_joins_a_manager_that_ends(make_manager, db, clock):
    manager = make_manager()
    session = await add_user(manager, 1)
    anonymous = await manager.create()
    db.delay = "1s"
    refused = []

    @manager.on("destroy")
    async def from_inside(session):
        with pytest.raises(ManagerClosedError):
            await manager.create("late")
        refused.append(session)

    end = asyncio.create_task(manager.destroy(True))
    await turns()
    with pytest.raises(ManagerClosedError):
        await manager.create("late")
    with pytest.raises((ManagerClosedError, SessionEndedError)):
        await anonymous.set_user(2, {})
    await clock.advance("1s")
    await end
    with pytest.raises(ManagerClosedError):
        await manager.create("late")
    assert refused == [anonymous, session] or refused == [session, anonymous]
    assert len(manager) == 0


async def test_case_21_one_failing_hook_does_not_end_the_shutdown(make_manager, db):
    manager = make_manager()
    destroyed = []
    manager.on("destroy", lambda session: destroyed.append(session.user_id))

    @manager.on("before_destroy")
    def hook(session):
        if session.user_id == 2:
            raise AttributeError("no such thing")

    for user_id in range(5):
        await add_user(manager, user_id)
    with pytest.raises(DrainError, match="listeners raised") as caught:
        await manager.destroy(True)
    assert caught.value.report.unsaved == ()
    assert sorted(db.stored) == sorted(destroyed) == list(range(5))


async def test_leaving_the_block_saves_if_shutdown_is_a_moment_to_save_on(clock):
    for persist_on, stored in ((["shutdown"], {1: {"gold": 1}}), ([], {})):
        db = Db(clock)
        async with SessionManager(persist_on=persist_on, clock=clock) as manager:
            manager.on("persist_user_data", db.save)
            await add_user(manager, 1)
        assert db.stored == stored


async def test_a_wrong_deadline_changes_nothing(make_manager):
    manager = make_manager()
    with pytest.raises(DurationError, match="soon"):
        await manager.destroy(deadline="soon")
    await manager.create()
    await manager.destroy()


async def test_the_manager_is_destroyed_once(make_manager, db):
    manager = make_manager()
    await add_user(manager, 1)
    first, second = await asyncio.gather(manager.destroy(False), manager.destroy(True))
    assert first == second == await manager.destroy()
    assert db.stored == {1: {"gold": 1}}, "the call that asks for a save is not ignored"
