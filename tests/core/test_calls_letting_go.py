"""What calls have been given, and whom they were about: a call that is over keeps nobody."""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref

import pytest

from cagey_sessions import AlreadyIdentifiedError, KeyTakenError, SessionManager


def make() -> SessionManager:
    manager = SessionManager(interval="1h")
    manager.on("persist_user_data", lambda session: None)
    return manager


async def test_a_call_that_is_done_keeps_nobody():
    manager = make()
    session = await manager.create()
    task = asyncio.create_task(session.destroy())
    await task
    gone = weakref.ref(session)
    del session
    assert gone() is None
    await manager.destroy()


async def test_a_call_in_a_cycle_is_collected():
    manager = make()
    session = await manager.create()
    call = session.start()
    session.set("call", call)
    gone = weakref.ref(session)
    await session.destroy()
    call.close()
    del session, call
    gc.collect()
    assert gone() is None
    await manager.destroy()


async def test_what_calls_are_given_is_let_go_of():
    """Done, refused, closed or thrown away: nothing is kept, and nothing is released twice."""
    manager = make()
    session = await manager.create("key")
    other = await manager.create()
    await other.set_user(2, {})
    key, data = "".join(["an", "other"]), {}
    before = [sys.getrefcount(each) for each in (key, data, session, manager)]
    for _ in range(50):
        made = await manager.create(key)
        await made.set_user(1, data)
        await made.destroy(persist=False)
        del made
        with pytest.raises(AlreadyIdentifiedError):
            await other.set_user(3, data)
        with pytest.raises(KeyTakenError):
            await manager.create("key")
        manager.create(key).close()
        session.set_user(1, data).close()
        with pytest.raises(ValueError, match="thrown"):
            session.set_user(1, data).throw(ValueError("thrown"))
    gc.collect()
    assert [sys.getrefcount(each) for each in (key, data, session, manager)] == before
    await manager.destroy()


@pytest.mark.parametrize("listens", [False, True])
async def test_the_reason_of_an_end_is_there_when_the_data_is_freed(listens):
    manager = make()
    session = await manager.create()
    seen = []

    class Data:
        def __del__(self):
            seen.append(session.end_reason)

    await session.set_user(1, Data())
    if listens:
        session.on("destroy", lambda *_: None)
    await session.destroy(persist=False)
    assert seen == ["destroyed"]
    await manager.destroy()


@pytest.mark.parametrize("end", ["refused", "closed", "thrown"])
async def test_a_call_that_is_over_keeps_nobody(end):
    manager = make()
    session = await manager.create()
    await session.set_user(1, {})
    call = session.set_user(2, {})
    if end == "refused":
        with pytest.raises(AlreadyIdentifiedError):
            await call
    elif end == "closed":
        call.close()
    else:
        with pytest.raises(KeyError):
            call.throw(KeyError("thrown"))
    await session.destroy(persist=False)
    gone = weakref.ref(session)
    del session
    gc.collect()
    assert gone() is None
    await manager.destroy()
