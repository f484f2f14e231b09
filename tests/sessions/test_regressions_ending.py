"""Faults that were once in this library, where sessions and managers end. Each was first seen red."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import pickle

import pytest

from cagey_sessions import (
    DrainError,
    ListenerError,
    ManagerClosedError,
    NothingSavesError,
    SessionEndedError,
    SessionManager,
)
from support import Db, add_user, let_time_pass, turns


@pytest.mark.parametrize("hang", ["save", "listener"])
async def test_destroy_raises_when_the_manager_s_deadline_passed_before_the_save(make_manager, db, clock, hang):
    manager = make_manager()
    session = await add_user(manager, 1)
    if hang == "listener":
        session.on("before_destroy", asyncio.Event().wait)
    db.always[1] = "hang"
    end = asyncio.create_task(session.destroy(True))
    await turns()
    with pytest.raises(DrainError):
        await let_time_pass(clock, manager.destroy(True, deadline="1s"))
    with pytest.raises(ListenerError, match="deadline"):
        await end
    assert session.end_reason == "unsaved"
    db.release.set()
    await turns()


async def test_a_parked_end_is_not_over_while_newer_data_is_known(make_manager, db, clock):
    manager = make_manager(interval="30s")
    session = await add_user(manager, 1, {"gold": 0})
    db.script = [OSError("down"), "1s", OSError("down again")]
    with pytest.raises(ListenerError):
        await session.destroy(True)
    session.user_data["gold"] = 1
    first = asyncio.create_task(session.persist_now())
    await turns()
    session.user_data["gold"] = 2
    second = asyncio.create_task(session.persist_now())
    await clock.advance("1s")
    await first
    with pytest.raises(ListenerError):
        await second
    await clock.advance("30s")
    assert not session.alive
    assert db.stored == {1: {"gold": 2}}
    await manager.destroy()


async def test_a_change_during_the_retry_of_a_parked_end_is_saved(make_manager, db, clock):
    manager = make_manager(interval="30s")
    session = await add_user(manager, 1, {"gold": 0})
    db.script = [OSError("blip"), "1s"]
    with pytest.raises(ListenerError):
        await session.destroy(True)
    while not db.open:
        await clock.advance("100ms")
    session.user_data["gold"] = 5
    await clock.advance("10s")
    assert not session.alive
    assert db.stored == {1: {"gold": 5}}
    assert len(db.log) == 3, "and no save more than needed"
    await manager.destroy()


async def test_a_drain_that_is_asked_to_save_after_all_saves_who_is_in_before_destroy(make_manager, db, clock):
    manager = make_manager()
    manager.on("before_destroy", lambda session: clock.sleep("1s"))
    for user_id in range(60):
        await add_user(manager, user_id)
    without = asyncio.create_task(manager.destroy())
    await turns()
    report = await let_time_pass(clock, manager.destroy(True))
    await without
    assert report.saved == 60
    assert len(db.stored) == 60


async def test_in_a_drain_a_listener_can_wait_for_the_end_of_anybody(make_manager, db):
    manager = make_manager(max_in_flight=2)
    sessions = [await add_user(manager, user_id) for user_id in range(10)]
    for session in sessions[:5]:
        session.on("before_destroy", sessions[9].wait_ended)
    report = await manager.destroy(True)
    assert report.saved == 10


async def test_a_destroy_that_asks_for_nothing_keeps_what_an_earlier_one_asked_for(make_manager, db, clock):
    """`try: await session.destroy(True)` with `finally: await session.destroy()` threw away the data."""
    manager = make_manager()
    session = await add_user(manager, 1)
    db.script = [OSError("down")]
    with pytest.raises(ListenerError):
        await session.destroy(True)
    await session.destroy()
    assert db.stored == {1: {"gold": 1}}
    await manager.destroy()


async def test_a_save_that_fails_under_an_end_without_save_is_reported(make_manager, db, clock):
    manager = make_manager(interval="1s")
    heard = []
    manager.on("error", lambda error, session: heard.append(session))

    async def fail():
        await clock.sleep("900ms")
        raise OSError("down")

    db.script = [fail]
    session = await add_user(manager, 1)
    while not db.open:
        await clock.advance("10ms")
    await let_time_pass(clock, session.destroy())
    assert heard == [session]
    await manager.destroy()


async def test_replace_saves_while_live_and_once_more_what_the_end_has_changed(make_manager, db):
    """The first may fail and leave the session live; a change back and forth is no reason to skip the second."""
    manager = make_manager()
    session = await add_user(manager, 1, key="k")
    session.on("before_destroy", lambda: session.user_data.update(gold=7))
    await manager.create("k", replace=True)
    assert db.writes(1) == [{"gold": 1}, {"gold": 7}]
    await manager.destroy()


class Wallet:
    """Data that is not JSON: its changes cannot be seen."""

    def __init__(self, gold):
        self.gold = gold


@dataclasses.dataclass(slots=True)
class Unset:
    gold: int = 1
    never_set: int = dataclasses.field(init=False)


class WithAttribute(dict):
    gold = 1


@pytest.mark.parametrize("data", [Wallet(1), Unset(), WithAttribute(), {1: "a"}, {"nan": float("nan")}, ("tuple",)])
async def test_data_that_is_not_json_gets_its_last_save_like_any_other(clock, data):
    """It was taken for saved by a save from before the end; and a serialiser may crash on it."""
    manager = SessionManager(interval="10s", clock=clock)
    stored = []

    @manager.on("persist_user_data")
    async def save(session):
        body = pickle.dumps(session.user_data) if not isinstance(session.user_data, Unset) else session.user_data.gold
        gold = getattr(session.user_data, "gold", None)
        await clock.sleep("1s")
        stored.append((body, gold))

    session = await add_user(manager, 1, data)
    earlier = asyncio.create_task(session.persist_now())
    await turns()
    with contextlib.suppress(AttributeError):
        session.user_data.gold = 100
    await let_time_pass(clock, session.destroy(True))
    await earlier
    assert len(stored) == 2
    assert stored[-1][1] in (100, None)
    await manager.destroy()


async def test_in_a_drain_the_errors_of_listeners_survive_a_retry(make_manager, db, clock):
    manager = make_manager()
    session = await add_user(manager, 1)
    session.on("before_destroy", lambda: 1 / 0)
    db.script = [OSError("down")]
    with pytest.raises(DrainError) as caught:
        await let_time_pass(clock, manager.destroy(True))
    assert caught.value.report.saved == 1
    assert isinstance(caught.value.exceptions[0].exceptions[0], ZeroDivisionError)


async def test_a_drain_stopped_after_its_deadline_leaves_a_manager_that_saves(make_manager, db, clock):
    manager = make_manager(interval="10s")
    session = await add_user(manager, 1)
    session.on("before_destroy", asyncio.Event().wait)
    drain = asyncio.create_task(manager.destroy(True, deadline="1s"))
    await clock.advance("1100ms")
    drain.cancel()
    for task in asyncio.all_tasks():
        if task.get_name().startswith("cagey-sessions drain"):
            task.cancel()
    await turns()
    assert drain.cancelled()
    other = await add_user(manager, 2)
    await other.persist_now()
    other.user_data["gold"] = 3
    await clock.advance("20s")
    assert db.stored == {2: {"gold": 3}}
    with pytest.raises(DrainError):
        await let_time_pass(clock, manager.destroy(True, deadline="1s"))


async def test_a_manager_that_is_asked_to_save_too_late_says_so(make_manager, db, clock):
    manager = make_manager()
    session = await add_user(manager, 1)
    session.on("destroy", lambda: clock.sleep("1s"))
    without = asyncio.create_task(manager.destroy())
    await turns()
    with pytest.raises(ManagerClosedError, match="1 users"):
        await let_time_pass(clock, manager.destroy(True))
    await without
    empty = SessionManager(clock=clock)
    await add_user(empty, 1)
    ending = asyncio.create_task(empty.destroy())
    await asyncio.sleep(0)
    with pytest.raises(NothingSavesError):
        await empty.destroy(True)
    await ending


async def test_a_drain_meets_users_in_the_order_of_their_last_acknowledged_saves(make_manager, db, clock):
    manager = make_manager(interval=None, max_in_flight=1)
    sessions = [await add_user(manager, user_id) for user_id in range(6)]
    for number in (3, 0, 5):
        await clock.advance("1s")
        await sessions[number].persist_now()
    db.log.clear()
    await let_time_pass(clock, manager.destroy(True))
    assert [write.user_id for write in db.log] == [1, 2, 4, 3, 0, 5]


async def test_no_listener_is_called_after_the_end(make_manager, db, clock):
    seen = []
    manager = make_manager()
    manager.on("error", lambda error, session: seen.append("error"))

    async def fail():
        await db.release.wait()
        raise OSError("late")

    db.script = [fail]
    session = await add_user(manager, 1)

    @session.on("before_destroy")
    async def stubborn():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)

    session.on("before_destroy", lambda: seen.append("second"))
    save = asyncio.create_task(session.persist_now())
    await turns()
    with pytest.raises(DrainError):
        await let_time_pass(clock, manager.destroy(True, deadline="1s"))
    db.release.set()
    await turns()
    assert seen == []
    await asyncio.gather(save, return_exceptions=True)


@pytest.mark.parametrize("event", ["created", "started"])
async def test_no_listener_is_called_for_a_session_that_an_earlier_one_has_ended(make_manager, event):
    manager = make_manager()
    seen = []
    manager.on(event, lambda session: session.destroy())
    manager.on(event, seen.append)
    if event == "created":
        with pytest.raises(SessionEndedError):
            await manager.create("k")
    else:
        session = await manager.create("k")
        await session.start()
    assert seen == []
    assert manager.find_by_key("k") is None
    await manager.destroy()


async def test_joining_an_end_asks_who_saves_before_anything_changes(clock):
    manager = SessionManager(clock=clock)
    manager.on("before_destroy", lambda session: clock.sleep("1s"))
    session = await add_user(manager, 1)
    end = asyncio.create_task(session.destroy())
    await turns()
    with pytest.raises(NothingSavesError):
        await session.destroy(True)
    await let_time_pass(clock, end)
    assert not session.alive
    await manager.destroy()


async def test_a_save_asked_for_too_late_is_an_error(make_manager, db, clock):
    manager = make_manager()
    session = await add_user(manager, 1)
    session.on("destroy", lambda: clock.sleep("1s"))
    end = asyncio.create_task(session.destroy())
    await turns()
    with pytest.raises(SessionEndedError, match="without"):
        await let_time_pass(clock, session.destroy(True))
    await end
    await manager.destroy()


async def test_an_end_after_the_deadline_does_not_wait_for_a_save_that_hangs(clock):
    manager = SessionManager(interval="1s", max_in_flight=1, clock=clock)
    ended = []

    @manager.on("persist_user_data")
    async def save(session):
        if session.user_id == "hangs":
            await release.wait()

    release = asyncio.Event()
    manager.on("destroy", lambda session: ended.append(session.user_id))
    slow = await add_user(manager, "slow")
    slow.on("before_destroy", lambda: clock.sleep("25500ms"))
    hangs = await add_user(manager, "hangs")
    while not manager._server.autosave.in_flight():
        await clock.advance("100ms")
    hangs.on("before_destroy", lambda: clock.sleep("25500ms"))
    with pytest.raises(DrainError) as caught:
        await let_time_pass(clock, manager.destroy(True))
    assert sorted(ended) == ["hangs", "slow"]
    assert caught.value.report.seconds == pytest.approx(25.5)
    release.set()
    await turns()


async def test_the_warning_comes_when_the_last_session_goes_not_when_the_manager_object_does(caplog, clock):
    caplog.set_level(logging.WARNING)
    db = Db(clock)

    async def begin():
        manager = SessionManager(clock=clock)
        manager.on("persist_user_data", db.save)
        return await manager.create()

    session = await begin()
    gc.collect()
    await session.set_user(1, {})
    assert "unsaved" not in caplog.text
    del session
    await turns()
    gc.collect()
    assert "unsaved users: 1" in caplog.text
