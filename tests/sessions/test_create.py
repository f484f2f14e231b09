"""Sessions that the program makes and gives a user: `create` and `set_user`."""

from __future__ import annotations

import asyncio
import gc

import pytest

from cagey_sessions import ListenerError, SessionManager, UserActiveError
from support import ScriptedStore, add_user, add_users, let_time_pass, turns


async def test_a_user_has_one_session(make_manager, db, clock):
    manager = make_manager(interval="1s")
    first = await add_user(manager, 7, {"gold": 1})
    second = await manager.create()
    with pytest.raises(UserActiveError) as caught:
        await second.set_user(7, {"gold": 100})
    assert caught.value.session is first
    assert second.user_id is None
    other = await add_user(manager, "7", {"gold": 50})
    assert manager.find_by_user(7) is first
    assert manager.find_by_user("7") is other
    await clock.advance("2s")
    assert db.stored == {7: {"gold": 1}, "7": {"gold": 50}}
    await first.destroy(True)
    await second.set_user(7, dict(db.stored[7]))
    await manager.destroy()


async def test_the_user_of_an_ending_session_can_be_waited_for(make_manager, db, clock):
    manager = make_manager()
    first = await add_user(manager, 7, {"gold": 1})
    first.user_data["gold"] = 2
    db.delay = "1s"
    end = asyncio.create_task(first.destroy(True))
    await turns()
    second = await manager.create()
    with pytest.raises(UserActiveError) as caught:
        await second.set_user(7, {"gold": 1})
    waiting = asyncio.create_task(caught.value.session.wait_ended())
    await clock.advance("1s")
    assert await waiting == "destroyed"
    assert db.stored == {7: {"gold": 2}}
    await second.set_user(7, dict(db.stored[7]))
    await end
    await manager.destroy()


async def test_a_session_whose_load_failed_writes_nothing(make_manager, db, clock):
    manager = make_manager(interval="1s")
    session = await manager.create()

    async def load():
        raise OSError("database away")

    @session.on("started")
    async def log_in():
        await session.set_user(7, await load())

    with pytest.raises(ListenerError):
        await session.start()
    await clock.advance("5s")
    await manager.persist_all_user_data()
    await session.destroy(persist=True)
    assert db.log == []
    await manager.destroy(True)


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


async def test_replace_saves_the_older_session_first_or_leaves_it_live(make_manager, db):
    manager = make_manager()
    older = await add_user(manager, 1, key="k")
    db.script = [OSError("no")]
    with pytest.raises(ListenerError):
        await manager.create("k", replace=True)
    assert manager.find_by_key("k") is older
    assert older.alive
    newer = await manager.create("k", replace=True)
    assert older.end_reason == "replaced"
    assert db.stored == {1: {"gold": 1}}
    await newer.set_user(1, db.stored[1])
    await manager.destroy()


async def test_replace_saves_while_live_and_once_more_what_the_end_has_changed(make_manager, db):
    """The first may fail and leave the session live; a change back and forth is no reason to skip the second."""
    manager = make_manager()
    session = await add_user(manager, 1, key="k")
    session.on("before_destroy", lambda: session.user_data.update(gold=7))
    await manager.create("k", replace=True)
    assert db.writes(1) == [{"gold": 1}, {"gold": 7}]
    await manager.destroy()
