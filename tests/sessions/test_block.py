"""A session in ``async with``: it ends with the block, whatever ends the block."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref

import pytest

from cagey_sessions import (
    EndReason,
    KeyTakenError,
    ListenerError,
    NothingSavesError,
    SessionCall,
    SessionEndedError,
    SessionManager,
    StoreUnavailableError,
    UnsavableError,
    UserNotFoundError,
)
from cagey_sessions.stores import MemoryStore
from support import ScriptedStore, let_time_pass, turns


async def test_the_end_of_the_block_saves_and_ends_the_session():
    async with SessionManager(store=MemoryStore()) as manager:
        async with manager.create("key") as session:
            assert manager.find_by_key("key") is session
            await session.login("ann", default={"gold": 0})
            session.user_data["gold"] = 1
        assert session.end_reason is EndReason.DESTROYED
        assert await manager.read("ann") == {"gold": 1}
        assert len(manager) == 0


async def test_a_block_that_raises_or_is_cancelled_saves_all_the_same():
    async with SessionManager(store=MemoryStore()) as manager:
        with pytest.raises(ZeroDivisionError):
            async with manager.open("ann", default={}) as session:
                session.user_data["gold"] = 1 / 1
                session.user_data["rich"] = 1 / 0
        assert await manager.read("ann") == {"gold": 1.0}

        entered = asyncio.Event()

        async def play():
            async with manager.open("bob", default={}) as session:
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
    async with manager.create() as session:
        await session.set_user(7, {})
    assert seen == saved
    assert not session.alive
    async with SessionManager(store=MemoryStore(), persist_on=persist_on) as stored:
        async with stored.open(7, default={}):
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
    async with manager.open("ann", default={"gold": 0}) as session:
        await session.persist_now()
        session.user_data["gold"] = 1
        await session.destroy(persist=False)
    assert await manager.read("ann") == {"gold": 0}

    with pytest.raises(StoreUnavailableError):  # once, and after one patience: the end of the block asks for no more
        async with manager.open("bob", default={"gold": 3}) as session:
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
                async with manager.create() as second:
                    await second.login("ann")
                    first.user_data["gold"] += 1
        assert first.end_reason is EndReason.REPLACED
        assert second.end_reason is EndReason.DESTROYED
        with pytest.raises(SessionEndedError):
            await first.__aenter__()


async def test_a_session_whose_last_save_is_refused_stays_as_with_destroy():
    async with SessionManager(store=MemoryStore()) as manager:
        with pytest.raises(UnsavableError):
            async with manager.open("ann", default={}) as session:
                session.user_data["bag"] = {"rope"}
        assert manager.find_by_user("ann") is session
        session.user_data["bag"] = ["rope"]
    silent = SessionManager(persist_on=["disconnect"])
    with pytest.raises(NothingSavesError):
        async with silent.create() as session:
            await session.set_user(1, {})
    await session.destroy(False)
    async with silent.create() as session:
        await turns()
    assert not session.alive, "without a user nobody has to save"
    await silent.destroy()


async def hear(session):
    """A listener that takes a turn of the loop."""
    await asyncio.sleep(0)


MAKERS = {
    "create": lambda manager: manager.create(),
    "create with a key": lambda manager: manager.create("key"),
    "create in place of another": lambda manager: manager.create("key", replace=True),
    "open": lambda manager: manager.open("ann", default={}),
    "open in place of another": lambda manager: manager.open("ann", default={}, when_active="replace"),
}


@pytest.mark.parametrize("heard", [False, True])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
async def test_a_session_is_entered_as_it_is_made_or_awaited_first(make, heard):
    async with SessionManager(store=MemoryStore()) as manager:
        if heard:
            manager.on("created", hear)
        async with make(manager) as session:
            assert manager.sessions() == [session]
            assert session.alive
        assert session.end_reason is EndReason.DESTROYED
        async with await make(manager) as awaited:
            assert awaited is not session
        assert awaited.end_reason is EndReason.DESTROYED
        call = make(manager)
        assert isinstance(call, SessionCall)
        assert asyncio.iscoroutine(call) and isinstance(call, contextlib.AbstractAsyncContextManager)
        task = asyncio.create_task(call)
        assert (await asyncio.wait_for(task, 60)).alive
        async with contextlib.AsyncExitStack() as stack:
            stacked = await stack.enter_async_context(manager.create())
        assert not stacked.alive


async def test_entering_a_user_who_is_live_enters_that_very_session():
    async with SessionManager(store=MemoryStore()) as manager:
        first = await manager.open("ann", default={"gold": 0})
        async with manager.open("ann") as session:
            assert session is first
            session.user_data["gold"] = 1
        assert not first.alive
        assert await manager.read("ann") == {"gold": 1}


@pytest.mark.parametrize("heard", [False, True])
async def test_a_block_is_not_run_without_its_session(heard):
    async with SessionManager(store=MemoryStore()) as manager:
        if heard:
            manager.on("created", hear)
        taken = await manager.create("key")
        for call, refusal in (
            (manager.create("key"), KeyTakenError),
            (manager.create(7), TypeError),  # type: ignore[arg-type]
            (manager.open("nobody"), UserNotFoundError),
        ):
            with pytest.raises(refusal):
                async with call:
                    raise AssertionError("the block has begun")
        assert manager.sessions() == [taken]

        @manager.on("created")
        def fails(session):
            raise ValueError("no")

        for call in (manager.create(), manager.open("ann", default={})):
            with pytest.raises(ListenerError):
                async with call:
                    raise AssertionError("the block has begun")
        assert manager.sessions() == [taken]


async def test_a_session_that_has_ended_while_it_was_made_is_not_entered():
    async with SessionManager(store=MemoryStore()) as manager:

        @manager.on("identified")
        async def leave(session, user_id, user_data):
            await session.destroy()

        with pytest.raises(SessionEndedError):
            async with manager.open("ann", default={}):
                raise AssertionError("the block has begun")
        assert len(manager) == 0


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
async def test_a_block_cancelled_while_its_session_is_made_leaves_no_session(make):
    async with SessionManager(store=MemoryStore()) as manager:
        entered = asyncio.Event()

        @manager.on("created")
        async def wait(session):
            entered.set()
            await asyncio.Event().wait()

        async def play():
            async with make(manager):
                raise AssertionError("the block has begun")

        task = asyncio.create_task(play())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await turns()
        assert manager.sessions() == []


async def test_a_block_cancelled_while_the_user_is_loaded_leaves_no_session(clock):
    store = ScriptedStore(clock)
    manager = SessionManager(store=store, clock=clock)
    for when in range(8):  # before, while and after the store has answered
        store.claim_script = ["1s"]

        async def play():
            async with manager.open("ann", default={}):
                await asyncio.Event().wait()

        task = asyncio.create_task(play())
        await turns()
        await clock.advance(0.99)
        for timer in range(when):
            await (clock.advance(0.01) if timer == 0 else asyncio.sleep(0))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await clock.advance("2s")
        assert manager.sessions() == []
    await let_time_pass(clock, manager.destroy())


async def test_a_call_is_used_once():
    async with SessionManager(store=MemoryStore()) as manager:
        for make in MAKERS.values():
            call = make(manager)
            with pytest.raises(RuntimeError, match="has not been entered"):
                await call.__aexit__(None, None, None)
            async with call as session:
                with pytest.raises(RuntimeError):
                    await call
                with pytest.raises(RuntimeError):
                    async with call:
                        raise AssertionError("the block has begun")
                call.close()
                assert session.alive
            assert not session.alive
            with pytest.raises(RuntimeError, match="has been left"):
                await call.__aexit__(None, None, None)
            for over in (call, make(manager)):
                over.close()
                with pytest.raises(RuntimeError):
                    async with over:
                        raise AssertionError("the block has begun")
            awaited = make(manager)
            session = await awaited
            with pytest.raises(RuntimeError):
                async with awaited:
                    raise AssertionError("the block has begun")
            assert session.alive
            await session.destroy()


async def test_a_call_that_makes_no_session_is_not_entered():
    async with SessionManager() as manager, manager.create() as session:
        for call in (session.start(), session.set_user(1, {}), session.destroy()):
            with pytest.raises(TypeError, match="makes no session"):
                async with call:
                    raise AssertionError("the block has begun")
            call.close()
        assert session.alive and session.user_id is None


async def test_a_session_is_freed_once_its_block_is_left():
    async with SessionManager() as manager:
        call = manager.create()
        async with call as session:
            pass
        gone = weakref.ref(session)
        del session
        gc.collect()
        assert gone() is None
