"""The calls that are done in one step: they are coroutines all the same, and what they do is what the slow way does."""

from __future__ import annotations

import asyncio
import collections.abc
import gc
import inspect
import sys
import warnings
import weakref

import pytest

from cagey_sessions import KeyTakenError, Session, SessionManager, UsageError, UserActiveError, WrongLoopError
from cagey_sessions._core import ManagerCore, SessionCore


def make() -> SessionManager:
    manager = SessionManager(interval="1h")
    manager.on("persist_user_data", lambda session: None)
    return manager


async def test_a_call_is_a_coroutine():
    manager = make()
    call = manager.create("key")
    assert inspect.isawaitable(call)
    assert asyncio.iscoroutine(call)
    assert isinstance(call, collections.abc.Coroutine)
    session = await call
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        await call
    for call in (session.start(), session.set_user(1, {}), session.destroy()):
        assert asyncio.iscoroutine(call)
        assert await call is None
    await manager.destroy()


async def test_nothing_happens_before_a_call_is_awaited():
    manager = make()
    call = manager.create("key")
    assert manager.find_by_key("key") is None
    task = asyncio.Task(manager.create("other"))  # of no factory that would begin it here and now
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(manager) == 0
    assert (await call).key == "key"
    await manager.destroy()


async def test_errors_are_raised_where_the_call_is_awaited():
    manager = make()
    calls = [manager.create("key"), manager.create("key"), manager.create(7)]  # type: ignore[arg-type]
    session, taken, invalid = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(session, Session)
    assert isinstance(taken, KeyTakenError)
    assert "a key is a non-empty str, not int" in str(invalid)
    await session.set_user(1, {})
    other = await manager.create()
    with pytest.raises(UserActiveError):
        await other.set_user(1, {})
    await manager.destroy()


async def test_a_call_by_hand_steps_like_any_coroutine():
    manager = make()
    call = manager.create("key")
    with pytest.raises(TypeError, match="just-started coroutine"):
        call.send(1)
    with pytest.raises(StopIteration) as stopped:
        call.send(None)
    session = stopped.value.value
    assert session.key == "key"
    call = session.start()
    call.close()
    with pytest.raises(RuntimeError, match="reuse"):
        call.send(None)
    call = session.start()
    with pytest.raises(ValueError, match="thrown"):
        call.throw(ValueError("thrown"))
    with pytest.raises(RuntimeError, match="reuse"):
        call.send(None)
    await manager.destroy()


async def test_a_call_that_has_to_wait_hands_everything_on():
    """Somebody begins to listen between the call and its await; the wait can be cancelled, and goes on by itself."""
    manager = make()
    session = await manager.create()
    call = session.destroy()
    entered, leave = asyncio.Event(), asyncio.Event()

    async def hold(session):
        entered.set()
        await leave.wait()

    manager.on("before_destroy", hold)
    task = asyncio.create_task(call)
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert session.alive
    leave.set()
    await session.wait_ended()
    await manager.destroy()


async def test_a_call_that_nobody_awaits_is_warned_of():
    manager = make()
    with pytest.warns(RuntimeWarning, match=r"coroutine 'SessionManager\.create' was never awaited"):
        manager.create("key")  # type: ignore[unused-coroutine]
    session = await manager.create("key")
    with pytest.warns(RuntimeWarning, match=r"coroutine 'Session\.destroy' was never awaited"):
        session.destroy()  # type: ignore[unused-coroutine]
    assert session.alive
    await manager.destroy()


async def test_a_warning_that_is_an_error_reaches_the_hook(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(str(unraisable.exc_value)))
    manager = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            raise KeyError("under way")
        except KeyError as error:
            manager.create("key")  # type: ignore[unused-coroutine]
            assert sys.exception() is error
    assert seen == ["coroutine 'SessionManager.create' was never awaited"]
    await manager.destroy()


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


def test_another_loop_is_refused():
    manager = make()

    async def first():
        return await manager.create("key")

    async def second(session):
        for call in (manager.create(), session.start(), session.set_user(1, {}), session.destroy()):
            with pytest.raises(WrongLoopError):
                await call
        assert session.alive

    with asyncio.Runner() as runner:
        session = runner.run(first())
        runner.run(first_again(manager))
        with asyncio.Runner() as other:
            other.run(second(session))
        with pytest.raises(RuntimeError, match="no running event loop"):
            manager.create().send(None)
        runner.run(manager.destroy())


async def first_again(manager):
    """A loop that was stopped and runs once more is the same loop."""
    await (await manager.create()).destroy()


async def test_a_hook_of_somebody_else_makes_calls_slower_not_wrong():
    manager = make()
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(firstiter=lambda generator: None)
    try:
        session = await manager.create("key")
        await session.set_user(1, {})
        await session.destroy()
    finally:
        sys.set_asyncgen_hooks(*hooks)
    assert not session.alive
    await manager.destroy()


async def test_the_compiled_methods_are_those_of_the_very_class():
    """Then the interpreter calls them without a detour."""
    for cls, base in ((SessionManager, ManagerCore), (Session, SessionCore)):
        for name, method in vars(base).items():
            if type(method) is type(str.join):
                assert vars(cls)[name].__objclass__ is cls
                assert vars(cls)[name].__doc__ == method.__doc__
                assert next(iter(inspect.signature(vars(cls)[name]).parameters)) == "self"


def test_a_manager_that_was_never_initialised_is_no_crash():
    manager = SessionManager.__new__(SessionManager)
    for call in (lambda: manager.find_by_key("key"), manager.create):
        with pytest.raises(UsageError, match="never initialised"):
            call()


async def test_keywords_work():
    manager = make()
    session = await manager.create(key="key", replace=False)
    assert manager.find_by_key(key="key") is session
    newer = await manager.create("key", replace=True)
    assert not session.alive
    await newer.set_user(user_id=1, user_data={})
    newer.set(key="name", value=5)
    assert newer.get(key="name", default=6) == 5
    await newer.destroy(persist=False)
    await manager.destroy()
