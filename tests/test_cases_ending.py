"""Faults others met when sessions and servers end, each as a trial; the numbers are those of the catalogue."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref

import pytest

from cagey_sessions import (
    DrainError,
    DurationError,
    ListenerError,
    ManagerClosedError,
    SessionEndedError,
    SessionManager,
    UserActiveError,
)
from support import SECOND, Db, add_user, let_time_pass, turns


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
