"""Saving without a store: the listeners of `persist_user_data` do it, one call for each user."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextvars import Context

import pytest

from cagey_sessions import DrainError, ListenerError, NothingSavesError, SaveOverdueError, SessionManager, UnsavedError
from support import SECOND, add_user, let_time_pass, turns


@pytest.mark.guarantee("I1")
async def test_an_older_save_never_lands_on_a_newer(make_manager, db, clock):
    manager = make_manager(interval=None)
    session = await add_user(manager, 1)
    db.script = ["50ms", "5ms"]
    everybody = asyncio.create_task(manager.persist_all_user_data())
    await turns()
    session.user_data["gold"] = 2
    ended = asyncio.create_task(session.destroy(persist=True))
    session.on("destroy", lambda: stored_at_end.append(dict(db.stored)))
    stored_at_end: list[dict] = []
    await clock.advance("100ms")
    await asyncio.gather(everybody, ended)
    assert stored_at_end == [{1: {"gold": 2}}]
    assert len(db.log) == 2
    await manager.destroy()


async def test_an_edit_made_during_a_save_is_saved_by_a_later_one(make_manager, db, clock):
    manager = make_manager(interval="10s")
    session = await add_user(manager, 1)
    db.delay = "50ms"
    save = asyncio.create_task(session.persist_now())
    await clock.advance("10ms")
    session.user_data["gold"] = 7
    await clock.advance("40ms")
    await save
    assert db.stored == {1: {"gold": 1}}
    await clock.advance("10s")
    await clock.advance("50ms")
    assert db.stored == {1: {"gold": 7}}
    await let_time_pass(clock, manager.destroy())


async def test_a_failed_write_is_not_a_save(make_manager, db, clock):
    manager = make_manager(interval="10s")
    errors = []
    manager.on("error", lambda error, session: errors.append(session.user_id))
    await add_user(manager, 1)
    db.script_of[1] = [OSError("no")]
    await clock.advance("20s")
    assert errors == [1]
    assert db.stored == {1: {"gold": 1}}
    failed, ok = db.log[0], db.log[1]
    assert failed.error is not None
    assert ok.start - failed.start <= 5 * SECOND, "the retry comes well inside the interval"
    assert manager.statistics().failed == 1
    await manager.destroy()


async def test_one_failing_user_stops_the_save_of_no_other(make_manager, db):
    manager = make_manager(interval=None)
    for user_id in range(100):
        await add_user(manager, user_id)
    db.always[3] = OSError("full")
    with pytest.raises(UnsavedError, match="3") as caught:
        await manager.persist_all_user_data()
    assert caught.value.user_ids == (3,)
    assert len(db.stored) == 99
    db.always.clear()
    await manager.persist_all_user_data()
    assert len(db.stored) == 100
    await manager.destroy()


@pytest.mark.guarantee("I10")
@pytest.mark.parametrize("trouble", ["raises", "is cancelled", "never returns"])
async def test_whatever_one_listener_does_the_others_are_saved(make_manager, db, clock, trouble):
    manager = make_manager(interval="10s", max_in_flight=2)
    errors = []
    manager.on("error", lambda error, session: errors.append(error))
    sessions = [await add_user(manager, user_id) for user_id in range(5)]

    async def cancelled():
        raise asyncio.CancelledError

    db.always[0] = {"raises": OSError("no"), "is cancelled": cancelled, "never returns": "hang"}[trouble]
    await clock.advance("10s")
    for round_ in range(5):
        for session in sessions:
            session.user_data["gold"] = round_
        await clock.advance("10s")
        assert [db.stored[user_id]["gold"] for user_id in range(1, 5)] == [round_] * 4
    if trouble == "never returns":
        assert len(db.writes(0)) == 1, "no second write while the first is unresolved"
        overdue = [error for error in errors if isinstance(error, SaveOverdueError)]
        assert 4 <= len(overdue) <= 6, "one report a pass"
        assert overdue[0].count == 1
        assert 10 <= overdue[0].oldest_age <= 20
        assert manager.statistics().overdue == 1
    db.always.clear()
    db.release.set()
    await clock.advance("10s")
    assert db.stored[0]["gold"] == 4 or trouble == "never returns"
    await manager.destroy(True)


async def test_a_save_under_way_is_not_garbage_collected(make_manager, db, clock):
    manager = make_manager(interval="1s")
    futures = []

    async def orphan():
        future = asyncio.get_running_loop().create_future()
        futures.append(weakref.ref(future))
        asyncio.get_running_loop().call_soon(lambda: None)
        clock.call_later(1000, lambda: future.done() or future.set_result(None), Context())
        await future

    db.delay = orphan
    await add_user(manager, 1)
    for _ in range(30):
        gc.collect()
        await clock.advance("100ms")
    assert len([write for write in db.log if write.error is None]) >= 2
    await let_time_pass(clock, manager.destroy())


async def test_a_save_without_a_listener_that_saves_is_an_error(clock):
    manager = SessionManager(interval="1s", clock=clock)
    errors = []
    manager.on("error", lambda error, session: errors.append(error))
    session = await add_user(manager, 1)
    for call in (
        session.persist_now,
        lambda: session.destroy(True),
        manager.persist_all_user_data,
        lambda: manager.destroy(True),
    ):
        with pytest.raises(NothingSavesError):
            await call()
    assert session.alive
    await clock.advance("5s")
    assert 3 <= len(errors) <= 5, "one report a pass"
    assert all(isinstance(error, NothingSavesError) for error in errors)
    saved = []
    manager.on("persist_user_data", lambda session: saved.append(session.user_id))
    await turns()
    assert saved == [1], "who was due is saved as soon as somebody saves"
    await manager.destroy(True)


async def test_slow_listeners_hold_up_no_save_but_that_of_their_own_session(make_manager, db, clock):
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


async def test_removing_the_only_saving_listener_during_a_save_fails_that_save(clock):
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
