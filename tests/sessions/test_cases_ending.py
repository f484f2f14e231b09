"""Faults others met when a session ends, each as a trial; the numbers are those of the catalogue."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref

import pytest

from cagey_sessions import (
    ListenerError,
    SessionEndedError,
    SessionManager,
    UserActiveError,
)
from support import SECOND, add_user, let_time_pass, turns


async def test_the_last_save_and_the_events_come_in_the_original_s_order(make_manager, db):
    manager = make_manager()
    seen = []
    for name in ("created", "started", "identified", "persist_user_data", "before_destroy", "destroy"):
        manager.on(name, lambda session, *args, name=name: seen.append(("manager", name, *args)))
    session = await manager.create("k")
    for name in ("started", "identified", "before_destroy", "destroy"):
        session.on(name, lambda *args, name=name: seen.append(("session", name, *args)))
    await session.start()
    await session.set_user(7, {"gold": 1})
    await session.destroy(True)
    assert seen == [
        ("manager", "created"),
        ("manager", "started"),
        ("session", "started"),
        ("manager", "identified", 7, {"gold": 1}),
        ("session", "identified", 7, {"gold": 1}),
        ("manager", "before_destroy"),
        ("session", "before_destroy"),
        ("manager", "persist_user_data"),
        ("manager", "destroy"),
        ("session", "destroy"),
    ]
    await manager.destroy()


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


async def test_case_32_a_dead_handle_never_swallows_a_write(make_manager):
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


async def test_the_last_save_is_repeated_while_the_data_changes_under_it(make_manager, db, clock):
    manager = make_manager(interval=None)
    session = await add_user(manager, 1)
    db.delay = "50ms"
    end = asyncio.create_task(session.destroy(True))
    await clock.advance("20ms")
    session.user_data["gold"] = 7
    await clock.advance("50ms")
    session.user_data["gold"] = 8
    await let_time_pass(clock, end)
    assert db.writes(1) == [{"gold": 1}, {"gold": 7}, {"gold": 8}]
    await manager.destroy()


async def test_data_that_never_stops_changing_does_not_keep_its_session_for_ever(make_manager, db, clock, caplog):
    manager = make_manager(interval=None)
    session = await add_user(manager, 1)

    async def write_and_change():
        await clock.sleep("10ms")
        if session.alive:
            session.user_data["gold"] += 1

    db.always[1] = write_and_change
    await let_time_pass(clock, session.destroy(True))
    assert not session.alive
    assert 2 < len(db.log) < 50
    assert "goes on changing" in caplog.text
    await manager.destroy()


async def test_case_18_everybody_who_ends_a_session_joins_one_end(make_manager, db, clock):
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
async def test_case_31_nothing_is_kept_however_a_session_ends(make_manager, db, clock, way):
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


async def test_a_call_that_asks_for_a_save_gets_it_from_an_end_that_did_not_want_one(make_manager, db, clock):
    manager = make_manager()
    session = await add_user(manager, 1)
    session.on("before_destroy", lambda: clock.sleep("1s"))
    without = asyncio.create_task(session.destroy(False))
    await turns()
    with_save = asyncio.create_task(session.destroy(True))
    await clock.advance("1s")
    await asyncio.gather(without, with_save)
    assert db.stored == {1: {"gold": 1}}
    await manager.destroy()


async def test_destroy_without_a_save_writes_nothing_even_if_one_was_due(make_manager, db, clock):
    manager = make_manager(interval="1s", max_in_flight=1)
    hung, session = await add_user(manager, 0), await add_user(manager, 1)
    db.always[0] = "hang"
    save = asyncio.create_task(hung.persist_now())
    await clock.advance("2s")
    assert manager.statistics().pending == 1
    await session.destroy(False)
    db.release.set()
    await turns()
    await save
    assert db.writes(1) == []
    await let_time_pass(clock, manager.destroy())


async def test_a_parked_end_is_retried_at_once_by_another_call_or_given_up(make_manager, db, clock):
    manager = make_manager()
    first, second = await add_user(manager, 1), await add_user(manager, 2)
    db.script = [OSError("no"), OSError("no")]
    for session in (first, second):
        with pytest.raises(ListenerError) as caught:
            await session.destroy(True)
        assert "tried again" in caught.value.__notes__[0]
    with pytest.raises(UserActiveError):
        await add_user(manager, 1)
    await first.destroy(True)
    await second.destroy(False)
    assert db.stored == {1: {"gold": 1}}
    assert not second.alive
    await manager.destroy()


async def test_persist_now_while_ending_repeats_the_last_save(make_manager, db, clock):
    manager = make_manager()
    session = await add_user(manager, 1)
    db.delay = "1s"
    end = asyncio.create_task(session.destroy(True))
    await clock.advance("500ms")
    session.user_data["gold"] = 2
    save = asyncio.create_task(session.persist_now())
    await clock.advance("500ms")
    assert not end.done()
    await let_time_pass(clock, asyncio.gather(end, save))
    assert db.stored == {1: {"gold": 2}}
    await manager.destroy()


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


async def test_neither_keys_nor_data_are_logged(make_manager, db, clock, caplog):
    caplog.set_level(logging.DEBUG)
    manager = make_manager()
    session = await add_user(manager, 1, {"secret": "canary-data"}, key="canary-key")
    db.script = [ValueError("canary-data")] * 3
    messages = [repr(session)]
    with pytest.raises(ListenerError) as caught:
        await session.destroy(True)
    messages.append(str(caught.value))
    await clock.advance("40s")
    messages += [record.getMessage() for record in caplog.records]
    assert any("user 1" in message for message in messages)
    assert not [message for message in messages if "canary" in message]
    await manager.destroy()
