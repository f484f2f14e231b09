"""How a session ends: once, whoever asks for it, and nothing of it is kept."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from cagey_sessions import DrainError, ListenerError, NothingSavesError, SessionEndedError, SessionManager
from support import SECOND, add_user, inside, let_time_pass, turns


async def test_data_can_be_read_until_the_destroy_listeners_are_done_and_not_after(make_manager, db):
    manager = make_manager()
    session = await add_user(manager, 1, key="k")
    session.set("client", "socket")
    seen = []

    @session.on("before_destroy")
    def last_words():
        session.user_data["gold"] = 9

    @session.on("destroy")
    def read():
        seen.append((session.alive, session.user_data["gold"], session.get("client"), manager.find_by_key("k")))

    await session.destroy(True)
    assert seen == [(True, 9, "socket", None)]
    assert db.stored == {1: {"gold": 9}}
    assert not session.alive
    assert session.get("client") == "socket"
    assert session.get("other", "none") == "none"
    assert session.key == "k"
    assert session.user_id == 1
    await manager.destroy()


@pytest.mark.guarantee("I11")
async def test_a_dead_handle_never_swallows_a_write(make_manager):
    manager = make_manager()
    session = await add_user(manager, 1)
    await session.destroy()

    def assign():
        session.user_data = {}

    for call in (
        lambda: session.user_data,
        assign,
        lambda: session.set("a", 1),
        lambda: session.on("destroy", print),
    ):
        with pytest.raises(SessionEndedError, match="destroyed"):
            call()
    for method in (session.start, session.persist_now, lambda: session.set_user(2, {})):
        with pytest.raises(SessionEndedError):
            await method()
    await session.destroy(True)
    assert await session.wait_ended() == "destroyed"
    session.off("destroy", print)
    await manager.destroy()


async def test_nothing_can_be_assigned_that_no_save_would_see(make_manager):
    manager = make_manager()
    session = await manager.create()
    await session.set_user(1, {"gold": 1})
    refused = []

    @session.on("destroy")
    def assign():
        with pytest.raises(SessionEndedError, match="past its last save") as raised:
            session.user_data = {"gold": 2}
        refused.append(raised.value)

    await session.destroy()
    assert len(refused) == 1
    await manager.destroy()


async def test_all_callers_of_destroy_join_one_end(make_manager, db, clock):
    manager = make_manager()
    session = await add_user(manager, 1)
    events = []

    @manager.on("before_destroy")
    def score(session):
        events.append("before_destroy")
        session.user_data["score"] = 42

    manager.on("destroy", lambda session: events.append("destroy"))
    db.delay = "1s"
    done_at = []

    async def end(work):
        await work
        done_at.append(clock.now())

    started = clock.now()
    await let_time_pass(
        clock, asyncio.gather(end(manager.destroy(True)), end(session.destroy(True)), end(session.destroy(True)))
    )
    assert events == ["before_destroy", "destroy"]
    assert len(db.log) == 1
    assert db.stored[1]["score"] == 42
    assert done_at == [started + SECOND] * 3


@pytest.mark.parametrize("way", ["clean", "failing save", "raising listener", "cancelled caller"])
async def test_nothing_is_kept_however_a_session_ends(make_manager, db, clock, way):
    class Client:
        pass

    manager = make_manager()
    if way == "raising listener":
        manager.on("before_destroy", lambda session: 1 / 0)
    references = []
    for user_id in range(200):
        session = await add_user(manager, user_id, key=str(user_id))
        client = Client()
        client.session = session
        session.set("client", client)
        session.on("destroy", lambda client=client: None)
        references.append(weakref.ref(client))
        if way == "failing save":
            db.script = [OSError("no")]
            with pytest.raises(ListenerError):
                await session.destroy(True)
            await session.destroy(False)
        elif way == "cancelled caller":
            task = asyncio.create_task(session.destroy(True))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await session.wait_ended()
        elif way == "raising listener":
            with pytest.raises(ListenerError):
                await session.destroy(True)
        else:
            await session.destroy(True)
    del session, client
    db.log.clear()  # its errors remember their tracebacks
    try:
        await turns()
        gc.collect()
        assert len(manager) == 0
        assert not [reference for reference in references if reference() is not None]
    finally:
        await manager.destroy()


async def test_destroy_from_inside_the_listeners_its_end_waits_for(make_manager, db, clock):
    """It cannot wait for itself: it returns at once, whatever the listener wraps the call in."""
    manager = make_manager()
    session = await add_user(manager, 1)
    calls = []

    async def again(*_):
        await session.destroy(True)
        await asyncio.wait_for(session.destroy(True), 5)
        await asyncio.gather(session.destroy(), manager.destroy(True))
        calls.append("returned")

    manager.on("before_destroy", again)
    session.on("before_destroy", again)
    session.on("destroy", again)
    await session.destroy(True)
    assert calls == ["returned"] * 3
    assert len(db.log) == 1
    await manager.destroy()


async def test_destroy_from_inside_the_persist_listener_ends_the_session_after_that_save(clock):
    manager = SessionManager(clock=clock)
    seen = []

    @manager.on("persist_user_data")
    async def save(session):
        seen.append("save")
        await session.destroy()
        assert session.alive

    manager.on("destroy", lambda session: seen.append("destroy"))
    session = await add_user(manager, 1)
    await session.persist_now()
    await session.wait_ended()
    assert seen == ["save", "destroy"]
    await manager.destroy()


async def test_destroy_from_started_and_identified_listeners(make_manager, db):
    manager = make_manager()
    late = []
    first = await manager.create()
    manager.once("started", lambda session: session.destroy())
    manager.on("started", lambda session: late.append("manager"))
    first.on("started", lambda: late.append("session"))
    await first.start()
    assert first.end_reason == "destroyed"
    assert "session" not in late, "no event after the end"
    second = await manager.create()
    second.on("identified", lambda user_id, data: second.destroy(True))
    await second.set_user(1, {"gold": 1})
    assert second.end_reason == "destroyed"
    assert db.stored == {1: {"gold": 1}}
    await manager.destroy()


async def test_sessions_that_end_each_other(make_manager, db):
    """A party: whoever leaves takes the others along, from each one's before_destroy listener."""
    manager = make_manager()
    party = [await add_user(manager, user_id) for user_id in range(4)]

    @manager.on("before_destroy")
    async def together(session):
        await asyncio.gather(*(other.destroy(True) for other in party))

    await party[0].destroy(True)
    assert sorted(db.stored) == [0, 1, 2, 3]
    assert len(manager) == 0
    await manager.destroy()


async def test_a_save_under_way_does_not_bring_a_session_back(make_manager, db, clock):
    manager = make_manager(interval="1s")
    session = await add_user(manager, 1, key="k")
    db.script = ["50ms"]
    save = asyncio.create_task(session.persist_now())
    await turns()
    events = []
    session.on("destroy", lambda: events.append("destroy"))
    await let_time_pass(clock, session.destroy(persist=False))
    await save
    assert events == ["destroy"]
    assert manager.find_by_key("k") is None
    assert manager.statistics().live == 0
    with pytest.raises(SessionEndedError):
        await session.persist_now()
    await clock.advance("5s")
    assert len(db.log) == 1
    await manager.destroy()


async def test_a_destroyed_session_lets_go_of_its_data_at_once(make_manager, clock):
    class Data(dict):
        pass

    manager = make_manager(interval="1h")
    references = []
    for user_id in range(100):
        data = Data()
        references.append(weakref.ref(data))
        session = await add_user(manager, user_id, data)
        del data
        await session.destroy()
        assert references[-1]() is None
    assert inside(manager).table.armed == 0
    assert clock.pending <= 1, "one timer for a manager, not one for a session"
    await manager.destroy()


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


async def test_a_refused_request_to_join_an_end_changes_nothing(clock):
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
