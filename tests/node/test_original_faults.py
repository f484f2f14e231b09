"""What went wrong in the Node package of this name cannot happen here."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from cagey_sessions import (
    AlreadyIdentifiedError,
    InvalidKeyError,
    InvalidUserDataError,
    KeyTakenError,
    ListenerError,
    ManagerClosedError,
    OptionError,
    SessionManager,
    UnknownEventError,
    UnsavedError,
    create,
)
from support import let_time_pass, turns

pytestmark = pytest.mark.fault("Seen in the Node package that this library takes the place of.")


async def identified(manager, *user_ids, data=None):
    """Sessions with these users."""
    sessions = []
    for user_id in user_ids:
        session = await manager.create(f"key of {user_id}")
        await session.set_user(user_id, {"gold": 1} if data is None else data)
        sessions.append(session)
    return sessions


async def test_no_timer_is_left_after_the_manager_is_destroyed(make_manager, db, clock):
    manager = make_manager(interval="1s")
    await identified(manager, 1)
    await clock.advance("2s")
    await manager.destroy()
    writes = len(db.log)
    assert clock.pending == 0
    await clock.advance("10s")
    assert len(db.log) == writes


async def test_destroying_the_older_session_never_removes_the_newer(make_manager):
    manager = make_manager()
    older = await manager.create("k")
    with pytest.raises(KeyTakenError):
        await manager.create("k")
    assert manager.find_by_key("k") is older
    newer = await manager.create("k", replace=True)
    assert not older.alive
    assert older.end_reason == "replaced"
    await older.destroy()
    assert manager.find_by_key("k") is newer
    await manager.destroy()


async def test_a_pass_meets_each_session_once_and_ends(make_manager, db, clock):
    manager = make_manager(interval=None)
    a, _ = await identified(manager, 1, 2)
    db.delay = "20ms"

    async def traffic():
        while not done.is_set():
            await a.persist_now()

    done = asyncio.Event()
    chatter = asyncio.create_task(traffic())
    everybody = asyncio.create_task(manager.persist_all_user_data())
    await clock.advance("200ms")
    assert everybody.done()
    assert len(db.writes(2)) == 1
    done.set()
    await clock.advance("100ms")
    await chatter
    await let_time_pass(clock, manager.destroy())


async def test_saves_go_side_by_side(make_manager, db, clock):
    manager = make_manager(interval=None)
    await identified(manager, *range(10))
    db.delay = "20ms"
    everybody = asyncio.create_task(manager.persist_all_user_data())
    await clock.advance("20ms")
    assert everybody.done()
    assert db.most_open == 10
    await let_time_pass(clock, manager.destroy())


async def test_one_failing_listener_does_not_end_the_pass(make_manager, db):
    manager = make_manager(interval=None)
    await identified(manager, *range(5))
    db.always[1] = OSError("disk")
    with pytest.raises(UnsavedError) as caught:
        await manager.persist_all_user_data()
    assert caught.value.user_ids == (1,)
    assert sorted(db.stored) == [0, 2, 3, 4]
    await manager.destroy()


async def test_an_error_in_the_timer_path_reaches_the_error_event(make_manager, db, clock):
    manager = make_manager(interval="10s")
    seen = []
    manager.on("error", lambda error, session: seen.append((error, session)))
    (session,) = await identified(manager, 1)
    db.script = [OSError("disk")]
    await clock.advance("11s")
    assert [type(error) for error, _ in seen] == [ListenerError]
    assert seen[0][1] is session
    assert db.stored == {1: {"gold": 1}}
    await manager.destroy()


async def test_nothing_is_saved_before_there_is_a_user(make_manager, db, clock):
    manager = make_manager(interval="1s")
    session = await manager.create("k")
    await session.start()
    await session.persist_now()
    await manager.persist_all_user_data()
    await clock.advance("5s")
    await session.destroy(True)
    assert db.log == []
    await manager.destroy(True)


async def test_a_save_that_ends_after_destroy_revives_nothing(make_manager, db, clock):
    manager = make_manager(interval="1s")
    (session,) = await identified(manager, 1)
    db.delay = "50ms"
    save = asyncio.create_task(session.persist_now())
    await turns()
    end = asyncio.create_task(session.destroy(persist=False))
    await clock.advance("60ms")
    await save
    await end
    assert manager.find_by_key("key of 1") is None
    assert manager.sessions() == []
    await clock.advance("10s")
    assert len(db.log) == 1
    await manager.destroy()


async def test_two_destroys_are_one_end(make_manager, db):
    manager = make_manager()
    events = []
    (session,) = await identified(manager, 1)
    session.on("destroy", lambda: events.append("destroy"))
    await asyncio.gather(session.destroy(True), session.destroy(True))
    await session.destroy(True)
    assert len(db.log) == 1
    assert events == ["destroy"]
    await manager.destroy()


async def test_a_failed_last_save_keeps_the_session_hidden_and_due(make_manager, db, clock):
    manager = make_manager(interval="16s")
    events = []
    for name in ("before_destroy", "destroy"):
        manager.on(name, lambda session, name=name: events.append(name))
    (session,) = await identified(manager, 1)
    db.script = [OSError("disk"), OSError("disk")]
    with pytest.raises(ListenerError):
        await session.destroy(True)
    assert manager.find_by_key("key of 1") is None
    assert manager.find_by_user(1) is None
    assert session.alive
    assert events == ["before_destroy"]
    await clock.advance("16s")
    assert not session.alive
    assert events == ["before_destroy", "destroy"]
    assert db.stored == {1: {"gold": 1}}
    await manager.destroy()


async def test_the_end_of_a_manager_does_not_stop_at_a_failing_session(make_manager, db, clock):
    manager = make_manager()
    await identified(manager, *range(5))
    db.script_of[1] = [OSError("disk")]
    end = asyncio.create_task(manager.destroy(True))
    await clock.advance("2s")
    report = await end
    assert report.saved == 5
    assert sorted(db.stored) == list(range(5))


async def test_a_failing_created_listener_leaves_no_session(make_manager):
    manager = make_manager()
    seen = []

    @manager.on("created")
    def fails(session):
        seen.append(session)
        raise ValueError("no")

    with pytest.raises(ListenerError):
        await manager.create("k")
    assert manager.find_by_key("k") is None
    assert len(manager) == 0
    assert seen[0].end_reason == "create failed"
    await manager.destroy()


async def test_keys_are_data(make_manager):
    manager = make_manager()
    names = ["constructor", "__proto__", "__class__", "key", "\0", "\ud800", "x" * 100_000, " "]
    for name in names:
        assert manager.find_by_key(name) is None
    sessions = {name: await manager.create(name) for name in names}
    for name in names:
        assert manager.find_by_key(name) is sessions[name]
    await manager.destroy()


async def test_one_hung_save_blocks_nobody_else(make_manager, db, clock):
    manager = make_manager(interval="10s")
    await identified(manager, 1, 2)
    db.always[1] = "hang"
    await clock.advance("50s")
    assert len(db.writes(1)) == 1
    assert len(db.writes(2)) >= 5
    db.always.clear()
    db.release.set()
    await let_time_pass(clock, manager.destroy())


@pytest.mark.parametrize("interval", ["abc", "0s", "30", "1 fortnight", "-5s", "", True])
def test_an_interval_that_cannot_be_meant_is_refused(interval):
    with pytest.raises(OptionError):
        SessionManager(interval=interval)


async def test_the_interval_is_each_session_s_own(make_manager, db, clock):
    manager = make_manager(interval="10s")
    await identified(manager, *range(200))
    db.delay = "1s"
    begins: dict[object, list[int]] = {}
    start = clock.now()
    await clock.advance("41s")
    for write in db.log:
        begins.setdefault(write.user_id, [start]).append(write.start)
    assert len(begins) == 200
    for times in begins.values():
        assert max(b - a for a, b in pairwise(times)) <= 10_000_000_000
    await let_time_pass(clock, manager.destroy())


async def test_a_second_set_user_is_refused(make_manager, db):
    manager = make_manager()
    (session,) = await identified(manager, 1)
    session.user_data["gold"] = 5
    with pytest.raises(AlreadyIdentifiedError):
        await session.set_user(2, {})
    await session.destroy(True)
    assert db.stored == {1: {"gold": 5}}
    await manager.destroy()


async def test_a_dying_session_is_not_found_and_takes_no_entry_with_it(make_manager, db, clock):
    manager = make_manager()
    (session,) = await identified(manager, 1)
    db.delay = "1s"
    end = asyncio.create_task(session.destroy(True))
    await turns()
    assert manager.find_by_key("key of 1") is None
    newer = await manager.create("key of 1")
    await clock.advance("2s")
    await end
    assert manager.find_by_key("key of 1") is newer
    await let_time_pass(clock, manager.destroy())


async def test_a_failing_before_destroy_listener_prevents_neither_save_nor_end(make_manager, db):
    manager = make_manager()
    (session,) = await identified(manager, 1)

    @manager.on("before_destroy")
    def fails(session):
        raise ValueError("no")

    with pytest.raises(ListenerError) as caught:
        await session.destroy(True)
    assert "fails" in caught.value.exceptions[0].__notes__[0]
    assert db.stored == {1: {"gold": 1}}
    assert not session.alive
    await manager.destroy()


async def test_a_failing_manager_listener_stops_neither_later_ones_nor_the_session_s(make_manager):
    manager = make_manager()
    seen = []

    @manager.on("started")
    def first(session):
        raise ValueError("no")

    manager.on("started", lambda session: seen.append("manager"))
    session = await manager.create()
    session.on("started", lambda: seen.append("session"))
    with pytest.raises(ListenerError):
        await session.start()
    assert seen == ["manager", "session"]
    await manager.destroy()


async def test_nobody_is_created_after_the_end(make_manager):
    manager = make_manager()
    await manager.destroy()
    with pytest.raises(ManagerClosedError):
        await manager.create()


async def test_the_end_does_not_visit_sessions_its_own_listeners_want(make_manager):
    manager = make_manager()
    refused = []

    @manager.on("destroy")
    async def again(session):
        try:
            await manager.create()
        except ManagerClosedError as error:
            refused.append(error)

    await manager.create()
    await manager.destroy()
    assert len(refused) == 1
    assert len(manager) == 0


@pytest.mark.parametrize("key", [0, 1, "", b"k", 1.5, True, object()])
async def test_a_key_is_a_text_that_is_not_empty(make_manager, key):
    manager = make_manager()
    with pytest.raises(InvalidKeyError):
        await manager.create(key)
    assert len(manager) == 0
    await manager.destroy()


async def test_the_events_to_save_on_are_a_list_of_known_names(make_manager):
    with pytest.raises(OptionError, match="shutdown"):
        SessionManager(persist_on="shutdown")
    with pytest.raises(OptionError, match="did you mean 'shutdown'"):
        SessionManager(persist_on=["shutdwn"])
    manager = create({}, {"user_data": {"persistence": {"events": ["shutdown"]}}})
    assert manager.will_persist_user_data_on("shutdown")
    assert not manager.will_persist_user_data_on("disconnect")
    with pytest.raises(UnknownEventError):
        manager.will_persist_user_data_on("shutdown-now")


async def test_what_is_serialised_first_is_never_torn(make_manager, db, clock):
    """The bytes are fixed before the first await, whatever happens to the data afterwards."""
    manager = make_manager(interval="1s")
    (session,) = await identified(manager, 1, data={"bag": list(range(50)), "bank": list(range(50))})
    db.delay = "7ms"
    for _ in range(300):
        session.user_data["bank"].append(session.user_data["bag"].pop(0))
        await clock.advance("10ms")
        session.user_data["bag"].append(session.user_data["bank"].pop(0))
    assert len(db.log) >= 3
    assert all(len(body["bag"]) + len(body["bank"]) == 100 for body in db.writes(1))
    await clock.advance("1s")
    await let_time_pass(clock, manager.destroy())


async def test_timer_pass_call_and_end_never_overlap(make_manager, db, clock):
    manager = make_manager(interval="1s")
    (session,) = await identified(manager, 1)
    db.delay = "300ms"
    tasks = [asyncio.create_task(manager.persist_all_user_data())]
    for _ in range(8):
        tasks.append(asyncio.create_task(session.persist_now()))
        tasks.append(asyncio.create_task(manager.persist_all_user_data()))
        await clock.advance("250ms")
    session.user_data["gold"] = 99
    tasks.append(asyncio.create_task(session.destroy(True)))
    await clock.advance("3s")
    await asyncio.gather(*tasks)
    assert db.most_open == 1
    assert db.stored == {1: {"gold": 99}}
    await let_time_pass(clock, manager.destroy())


async def test_no_user_and_no_data_are_refused(make_manager, db):
    manager = make_manager()
    session = await manager.create()
    with pytest.raises(ValueError):
        await session.set_user(None, {})
    with pytest.raises(InvalidUserDataError):
        await session.set_user(7, None)
    assert session.user_id is None
    await session.destroy(True)
    await manager.destroy(True)
    assert db.log == []


@pytest.mark.parametrize("log", [object(), "log", 7])
def test_a_logger_that_cannot_log_is_refused_at_once(log):
    with pytest.raises(OptionError, match="log"):
        create({"log": log})


def test_no_logger_is_needed():
    create()
    create({})
    create(None, {})
