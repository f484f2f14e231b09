"""A user who was taken over by another process, or whose row is gone: nothing newer is overwritten."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cagey_sessions import (
    DrainError,
    EndReason,
    FencedError,
    LostRecordError,
    SessionEndedError,
    SessionManager,
    StoreUnavailableError,
    UserErasedError,
)
from cagey_sessions.stores import CallbackStore, Outcome
from support import ScriptedStore, changed, end, inside, let_time_pass, turns


async def test_a_lost_reply_to_the_last_save_and_a_change_are_no_takeover(clock, store, manager):
    """The user was released by a save whose reply was lost, and nobody else has come: the change is saved."""
    session = await changed(manager)
    store.script = ["lose"]
    task = asyncio.ensure_future(session.destroy())
    await turns()
    assert store.stored(1) == {"n": 1}
    session.user_data["n"] = 2
    await let_time_pass(clock, task)
    assert session.end_reason == EndReason.DESTROYED
    assert store.stored(1) == {"n": 2}
    assert store.owner_of(1) == ""
    await end(clock, manager)


async def test_a_user_erased_and_made_anew_elsewhere_is_not_written_over(clock, store, manager):
    """Versions begin again after an erasure: a lower one in the store is not an older one of ours."""
    session = await changed(manager)
    for number in range(5):
        session.user_data["n"] = number
        await session.persist_now()
    other_store = ScriptedStore(clock, backing=store.backing)
    other = SessionManager(store=other_store, clock=clock)
    store.bury(inside(manager).owner)
    await other.erase(1)
    theirs = await other.open(1, default={"made": "anew"})
    await theirs.destroy()
    store.backing.dead.clear()
    session.user_data["n"] = 99
    with pytest.raises(FencedError):
        await let_time_pass(clock, session.persist_now())
    assert store.stored(1) == {"made": "anew"}
    await end(clock, other, manager)


async def test_a_takeover_is_told_once_and_nothing_is_sent_after_it(clock, store, manager):
    """Also where somebody has asked for another save while the refused one was under way."""
    heard = []
    manager.on("error", lambda error, session: heard.append(type(error)))
    session = await changed(manager)
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    store.bury(inside(manager).owner)
    theirs = await other.open(1)
    store.backing.dead.clear()
    store.script = ["50ms"]
    first = asyncio.ensure_future(session.persist_now())
    await clock.advance("10ms")
    second = asyncio.ensure_future(session.persist_now())
    for task in (first, second):
        with pytest.raises(FencedError):
            await let_time_pass(clock, task)
    await clock.advance("1s")
    assert session.end_reason == EndReason.FENCED
    assert len(store.batches) == 2
    assert manager.statistics().fenced == 1
    assert heard == [FencedError]
    await theirs.destroy()
    await end(clock, manager, other)


async def test_a_session_that_was_taken_over_does_not_take_its_user_back(clock, store, manager):
    """Nothing more is written in its name, and no claim is left behind that nobody lets go of."""
    session = await changed(manager)
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    store.bury(inside(manager).owner)
    theirs = await other.open(1)
    store.backing.dead.clear()

    async def try_once_more() -> None:
        await theirs.destroy(persist=False)
        with pytest.raises((FencedError, SessionEndedError)):
            await session.persist_now()

    session.on("before_destroy", try_once_more)
    with pytest.raises(FencedError):
        await let_time_pass(clock, session.persist_now())
    await clock.advance("1s")
    assert session.end_reason == EndReason.FENCED
    assert store.owner_of(1) == ""
    await end(clock, manager, other)


async def test_an_erased_user_is_not_written_by_a_claim_for_a_row_that_is_gone(clock, store, manager):
    """The engine loses the row, the save claims it again, and meanwhile the user is erased."""
    session = await changed(manager)
    del store.backing.rows[1]
    store.claim_script = ["50ms"]
    task = asyncio.ensure_future(session.persist_now())
    await turns()
    erasing = asyncio.ensure_future(manager.erase(1))
    await let_time_pass(clock, asyncio.gather(task, erasing, return_exceptions=True))
    assert store.stored(1) is None
    await end(clock, manager)


async def test_a_session_that_has_lost_its_user_is_told_once_and_writes_nothing_more(clock, store, manager):
    """A save asked for during the one that is fenced is answered with it, not performed."""
    heard = []
    manager.on("error", lambda error, session: heard.append(error))
    session = await changed(manager)
    gate = asyncio.Event()
    session.on("before_destroy", gate.wait)
    store.bury(inside(manager).owner)
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    await other.open(1)
    store.script = ["50ms"]
    first = asyncio.ensure_future(session.persist_now())
    await clock.advance("10ms")
    second = asyncio.ensure_future(session.persist_now())
    await clock.advance("100ms")
    sent = len(store.batches)
    await clock.advance("5s")
    gate.set()
    await turns()
    assert [type(error) for error in await asyncio.gather(first, second, return_exceptions=True)] == [FencedError] * 2
    assert len(store.batches) == sent == 2
    assert len(heard) == 1
    assert manager.statistics().fenced == 1
    await end(clock, manager, other)


async def test_a_record_that_is_gone_is_claimed_and_saved_again_with_an_alarm(clock, store, manager):
    heard = []
    manager.on("error", lambda error, session: heard.append(error))
    sessions = [await changed(manager, number) for number in range(5)]
    for number in range(5):
        del store.backing.rows[number]
    store.script = ["1ms"]
    await let_time_pass(clock, manager.persist_all_user_data())
    assert [store.stored(number) for number in range(5)] == [{"n": 1}] * 5
    await turns()
    assert {type(error) for error in heard} == {LostRecordError}
    assert all(session.alive for session in sessions)
    sessions[0].user_data["n"] = 2
    await sessions[0].persist_now()
    assert store.stored(0) == {"n": 2}
    await end(clock, manager)


async def test_a_record_that_is_gone_and_taken_by_another_node_is_fenced_off(clock, store, manager):
    session = await changed(manager)
    del store.backing.rows[1]
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    theirs = await other.open(1, default={"theirs": True})
    with pytest.raises(FencedError):
        await let_time_pass(clock, session.persist_now())
    await turns()
    assert session.end_reason == EndReason.FENCED
    await let_time_pass(clock, theirs.destroy())
    assert store.stored(1) == {"theirs": True}
    await end(clock, manager, other)


async def test_a_session_that_was_taken_over_ends_unsaved_and_says_so(clock, store, manager):
    heard = []
    manager.on("error", lambda error, session: heard.append((error, session)))
    session = await changed(manager)
    events = []
    session.on("before_destroy", lambda: events.append("before_destroy"))
    session.on("destroy", lambda: events.append("destroy"))
    store.bury(inside(manager).owner)
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    theirs = await other.open(1)
    assert theirs.user_data == {"n": 0}
    with pytest.raises(FencedError):
        await let_time_pass(clock, session.persist_now())
    await turns()
    assert session.end_reason == EndReason.FENCED
    assert events == ["before_destroy", "destroy"]
    assert [(type(error), about) for error, about in heard] == [(FencedError, session)]
    assert manager.statistics().fenced == 1
    assert store.owner_of(1) == inside(other).owner, "not let go of by who no longer has it"
    theirs.user_data["n"] = 5
    await end(clock, other, manager)
    assert store.stored(1) == {"n": 5}


@pytest.mark.parametrize("when", ["destroy", "drain"])
async def test_a_takeover_is_told_at_the_end_of_the_session_at_the_latest(clock, store, manager, when):
    session = await changed(manager)
    store.bury(inside(manager).owner)
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    await other.open(1)
    if when == "destroy":
        with pytest.raises(FencedError):
            await let_time_pass(clock, session.destroy())
    else:
        with pytest.raises(DrainError) as raised:
            await let_time_pass(clock, manager.destroy())
        assert [user.user_id for user in raised.value.report.unsaved] == [1]
    assert session.end_reason == EndReason.FENCED
    assert store.stored(1) == {"n": 0}
    await let_time_pass(clock, other.destroy())
    if when == "destroy":
        await end(clock, manager)


async def test_an_erased_user_is_never_written_again(clock, store, manager):
    session = await changed(manager)
    store.bury(inside(manager).owner)
    await ScriptedStore.erase(store, 1)
    with pytest.raises(UserErasedError):
        await let_time_pass(clock, session.persist_now())
    await turns()
    assert session.end_reason == EndReason.ERASED
    assert store.stored(1) is None
    await end(clock, manager)


async def test_a_node_that_was_taken_over_never_overwrites_a_user_made_anew(clock, store, manager):
    """I4: another node took the user over, erased it and made it new; its version is lower than ours by that."""
    session = await changed(manager)
    for number in range(2, 6):
        session.user_data["n"] = number
        await session.persist_now()
    session.user_data["n"] = 6
    store.bury(inside(manager).owner)
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    await other.erase(1)
    theirs = await other.open(1, default={"theirs": True})
    await let_time_pass(clock, theirs.destroy())
    assert store.stored(1) == {"theirs": True}
    with pytest.raises(FencedError):
        await let_time_pass(clock, session.persist_now())
    assert store.stored(1) == {"theirs": True}
    await let_time_pass(clock, asyncio.gather(other.destroy(), manager.destroy(), return_exceptions=True))


async def test_a_stray_claim_does_not_make_a_stale_session_the_owner(clock, store, manager):
    """I4: what another node wrote meanwhile is not overwritten in the name of a claim that came late."""
    gate = asyncio.Event()

    async def hang(_: Any) -> None:
        await gate.wait()

    store.put(1, b'{"n":0}')
    store.claim_script = [hang]
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, manager.open(1))  # its claim is under way for a long time
    session = await let_time_pass(clock, manager.open(1))
    session.user_data["n"] = 1
    await let_time_pass(clock, session.persist_now())
    store.bury(inside(manager).owner)
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    theirs = await other.open(1)
    theirs.user_data["n"] = 50
    await let_time_pass(clock, theirs.destroy())
    assert store.stored(1) == {"n": 50}
    store.backing.dead.clear()
    gate.set()  # the claim arrives now, and is granted
    await turns()
    session.user_data["n"] = 2
    with pytest.raises(FencedError):
        await let_time_pass(clock, session.persist_now())
    assert store.stored(1) == {"n": 50}
    await let_time_pass(clock, asyncio.gather(other.destroy(), manager.destroy(), return_exceptions=True))


async def test_a_callback_that_answers_fenced_ends_the_session(clock):
    """The program's own tables say that somebody else has changed the row: that is an answer, not an outage."""

    async def save_many(records: Any) -> Any:
        return [Outcome.FENCED for _ in records]

    manager = SessionManager(store=CallbackStore(lambda _: {"n": 0}, save_many), clock=clock)
    session = await manager.open(1)
    session.user_data["n"] = 1
    with pytest.raises(FencedError):
        await let_time_pass(clock, session.persist_now())
    await turns()
    assert session.end_reason == EndReason.FENCED
    await end(clock, manager)
