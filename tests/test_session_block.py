"""A session in ``async with``: it ends with the block, whatever ends the block."""

from __future__ import annotations

import asyncio

import pytest

from cagey_sessions import (
    EndReason,
    NothingSavesError,
    SessionEndedError,
    SessionManager,
    StoreUnavailableError,
    UnsavableError,
)
from cagey_sessions.stores import MemoryStore
from support import ScriptedStore, let_time_pass, turns


async def test_the_end_of_the_block_saves_and_ends_the_session():
    async with SessionManager(store=MemoryStore()) as manager:
        async with await manager.create("key") as session:
            assert manager.find_by_key("key") is session
            await session.login("ann", default={"gold": 0})
            session.user_data["gold"] = 1
        assert session.end_reason is EndReason.DESTROYED
        assert await manager.read("ann") == {"gold": 1}
        assert len(manager) == 0


async def test_a_block_that_raises_or_is_cancelled_saves_all_the_same():
    async with SessionManager(store=MemoryStore()) as manager:
        with pytest.raises(ZeroDivisionError):
            async with await manager.open("ann", default={}) as session:
                session.user_data["gold"] = 1 / 1
                session.user_data["rich"] = 1 / 0
        assert await manager.read("ann") == {"gold": 1.0}

        entered = asyncio.Event()

        async def play():
            async with await manager.open("bob", default={}) as session:
                session.user_data["gold"] = 2
                entered.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(play())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await manager.read("bob") == {"gold": 2}
        assert len(manager) == 0


@pytest.mark.parametrize(("persist_on", "saved"), [(["disconnect"], [7]), (["shutdown"], []), ([], [])])
async def test_whether_the_end_of_the_block_saves_is_said_by_persist_on(persist_on, saved):
    seen = []
    manager = SessionManager(persist_on=persist_on)
    manager.on("persist_user_data", lambda session: seen.append(session.user_id))
    async with await manager.create() as session:
        await session.set_user(7, {})
    assert seen == saved
    assert not session.alive
    async with SessionManager(store=MemoryStore(), persist_on=persist_on) as stored:
        async with await stored.open(7, default={}):
            pass
        if not saved:
            with pytest.raises(LookupError):
                await stored.read(7)
        else:
            assert await stored.read(7) == {}
    await manager.destroy()


async def test_an_end_that_has_begun_is_left_to_whoever_began_it(clock):
    """Neither is a save that was not wanted made after all, nor one that is wanted let go of."""
    store = ScriptedStore(clock)
    manager = SessionManager(store=store, clock=clock, persist_on=[])
    async with await manager.open("ann", default={"gold": 0}) as session:
        await session.persist_now()
        session.user_data["gold"] = 1
        await session.destroy(persist=False)
    assert await manager.read("ann") == {"gold": 0}

    with pytest.raises(StoreUnavailableError):  # once, and after one patience: the end of the block asks for no more
        async with await manager.open("bob", default={"gold": 3}) as session:
            store.down = True
            started = clock.now()
            await let_time_pass(clock, session.destroy(persist=True))
    assert clock.now() - started < 11 * 10**9
    assert session.alive
    store.down = False
    assert await let_time_pass(clock, session.wait_ended()) is EndReason.DESTROYED
    assert await let_time_pass(clock, manager.read("bob")) == {"gold": 3}
    await let_time_pass(clock, manager.destroy())


async def test_the_handler_of_a_replaced_session_leaves_without_waiting_for_anything():
    async with SessionManager(store=MemoryStore()) as manager:
        first = await manager.create()
        with pytest.raises(SessionEndedError):
            async with first:
                await first.login("ann", default={"gold": 0})
                async with await manager.create() as second:
                    await second.login("ann")
                    first.user_data["gold"] += 1
        assert first.end_reason is EndReason.REPLACED
        assert second.end_reason is EndReason.DESTROYED
        with pytest.raises(SessionEndedError):
            await first.__aenter__()


async def test_a_session_whose_last_save_is_refused_stays_as_with_destroy():
    async with SessionManager(store=MemoryStore()) as manager:
        with pytest.raises(UnsavableError):
            async with await manager.open("ann", default={}) as session:
                session.user_data["bag"] = {"rope"}
        assert manager.find_by_user("ann") is session
        session.user_data["bag"] = ["rope"]
    silent = SessionManager(persist_on=["disconnect"])
    with pytest.raises(NothingSavesError):
        async with await silent.create() as session:
            await session.set_user(1, {})
    await session.destroy(False)
    async with await silent.create() as session:
        await turns()
    assert not session.alive, "without a user nobody has to save"
    await silent.destroy()
