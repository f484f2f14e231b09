"""The end of a manager: everybody is saved or named, and nobody joins any more."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cagey_sessions import (
    DrainError,
    DurationError,
    ListenerError,
    ManagerClosedError,
    NothingSavesError,
    SessionEndedError,
    SessionManager,
    UnsavableError,
)
from cagey_sessions.stores import Outcome, Verdict
from support import SECOND, Db, ScriptedStore, add_user, add_users, changed, edit, inside, let_time_pass, turns


class SlowToRelease(ScriptedStore):
    """A release takes as long as a save."""

    async def release_many(self, claims: Any, owner: str) -> list[bool]:
        await self.clock.sleep(self.delay)
        return await super().release_many(claims, owner)


async def test_the_end_of_a_manager_waits_for_everybody(make_manager, db, clock):
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


async def test_saves_under_way_are_awaited(make_manager, db, clock):
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


@pytest.mark.fault("An acknowledgement during the walk moved a session behind its end, and the walk never met it.")
async def test_a_drain_ends_sessions_that_were_being_saved_when_it_began(make_manager, db, clock):
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


async def test_a_drain_ends_at_its_deadline_and_names_the_unsaved_users(make_manager, db, clock):
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


async def test_a_manager_that_ends_admits_no_session(make_manager, db, clock):
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


async def test_one_failing_hook_does_not_end_the_shutdown(make_manager, db):
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


async def test_everybody_is_saved_at_the_end_timer_or_not(make_manager, db):
    manager = make_manager(interval=None)
    for user_id in range(5):
        (await add_user(manager, user_id)).user_data["gold"] = user_id
    report = await manager.destroy(True)
    assert report.saved == 5
    assert db.stored == {user_id: {"gold": user_id} for user_id in range(5)}


async def test_a_drain_does_not_wait_for_data_that_is_refused_at_a_second_attempt(clock, store, manager):
    """What can be known to be hopeless is not waited for until the deadline."""
    await changed(manager)
    store.down = True
    store.verdict_of[1] = Verdict(Outcome.INVALID, "never")
    task = asyncio.ensure_future(manager.destroy(deadline="60s"))
    await clock.advance("12s")
    store.down = False
    before = clock.now()
    with pytest.raises(DrainError) as raised:
        await let_time_pass(clock, task)
    assert isinstance(raised.value.report.unsaved[0].error, UnsavableError)
    assert (clock.now() - before) / 1e9 < 5
    assert clock.pending == 0


@pytest.mark.parametrize("which", ["changed", "unchanged", "unsaved"])
async def test_a_drain_of_a_thousand_takes_less_than_twenty_batch_times(clock, which):
    """1,000 sessions, 20 ms a batch; whether there is anything to be written or not."""
    store = SlowToRelease(clock, "20ms")
    manager = SessionManager(store=store, clock=clock)
    sessions = await add_users(manager, 1000)
    await let_time_pass(clock, manager.persist_all_user_data())
    for session in sessions:
        session.user_data["n"] += which == "changed"
    store.batches.clear()
    before = clock.now()
    report = await let_time_pass(clock, manager.destroy(persist=which != "unsaved"))
    assert report.saved == (0 if which == "unsaved" else 1000)
    assert report.seconds < 20 * 0.020
    assert clock.now() - before >= SECOND // 50
    assert all(store.stored(user_id) == {"n": which == "changed"} for user_id in range(1000))
    assert not any(store.owner_of(user_id) for user_id in range(1000))
    assert len(store.batches) + len(store.release_calls) < 20
    assert store.most_open <= 4


async def test_a_drain_that_is_asked_to_save_after_all_saves_sessions_in_before_destroy(make_manager, db, clock):
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
    while not inside(manager).autosave.in_flight():
        await clock.advance("100ms")
    hangs.on("before_destroy", lambda: clock.sleep("25500ms"))
    with pytest.raises(DrainError) as caught:
        await let_time_pass(clock, manager.destroy(True))
    assert sorted(ended) == ["hangs", "slow"]
    assert caught.value.report.seconds == pytest.approx(25.5)
    release.set()
    await turns()


@pytest.mark.parametrize("call", ["login", "open", "edit"])
async def test_a_drain_leaves_no_claim_behind(clock, call):
    """Whoever is at work on a user when the manager is destroyed lets go of that user before the store is closed."""
    for count in range(20):
        store = ScriptedStore(clock)
        manager = SessionManager(store=store, clock=clock)
        session = await manager.create()

        if call == "login":
            task = asyncio.ensure_future(session.login(1, default={"n": 0}))
        elif call == "open":
            task = asyncio.ensure_future(manager.open(1, default={"n": 0}))
        else:
            task = asyncio.ensure_future(edit(manager))
        await turns(count)
        leaving = asyncio.ensure_future(manager.destroy())
        await let_time_pass(clock, asyncio.gather(leaving, task, return_exceptions=True))
        assert store.owner_of(1) == "", f"still claimed (destroyed after {count} turns)"
