"""The calls that are done in one step: they are coroutines all the same, and what they do is what the slow way does."""

from __future__ import annotations

import asyncio
import collections.abc
import copy
import gc
import inspect
import os
import pickle
import sys
import time
import typing
import warnings

import pytest

from cagey_sessions import (
    AlreadyIdentifiedError,
    KeyTakenError,
    ManagerClosedError,
    OptionError,
    Session,
    SessionCall,
    SessionEndedError,
    SessionManager,
    UsageError,
    UserActiveError,
    WrongLoopError,
)
from cagey_sessions._core import ManagerCore, SessionCore, SessionTable
from support import inside, python


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
    assert isinstance(call, SessionCall)
    assert typing.get_args(SessionCall[Session]) == (Session,)
    session = await call
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        await call
    for call in (session.start(), session.set_user(1, {}), session.destroy()):
        assert asyncio.iscoroutine(call)
        assert await call is None
    await manager.destroy()


@pytest.mark.parametrize("take", [copy.copy, copy.deepcopy, pickle.dumps])
async def test_neither_a_manager_nor_a_call_is_copied_or_pickled(take):
    manager = make()
    with pytest.raises(TypeError, match="the sessions of one server: it cannot be copied or pickled"):
        take(manager)
    call = manager.create("key")
    with pytest.raises(TypeError, match="a coroutine cannot be copied or pickled"):
        take(call)
    session = await call
    assert manager.sessions() == [session]
    await manager.destroy()


async def test_a_call_is_called_by_its_name():
    manager = make()
    call = manager.create("key")
    assert "SessionManager.create" in repr(call)
    session = await call
    start = session.start()
    assert "Session.start" in repr(start)
    await start
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
    assert "a key is a non-empty str, not an int" in str(invalid)
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
        manager.create("key")
    session = await manager.create("key")
    with pytest.warns(RuntimeWarning, match=r"coroutine 'Session\.destroy' was never awaited"):
        session.destroy()  # type: ignore[unused-coroutine]
    assert session.alive
    manager.on("created", lambda session: None)
    with pytest.warns(RuntimeWarning, match=r"coroutine 'SessionManager\.create' was never awaited"):
        manager.create("key")
    with pytest.warns(RuntimeWarning, match=r"coroutine 'SessionManager\.open' was never awaited"):
        manager.open("alice")
    assert len(manager) == 1
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
            manager.create("key")
            assert sys.exception() is error
    assert seen == ["coroutine 'SessionManager.create' was never awaited"]
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


async def test_calls_that_are_awaited_after_the_end_of_the_manager_are_refused():
    """What was true when they were made is not true any more."""
    manager = make()
    session, other = await manager.create("key"), await manager.create()
    await other.set_user(2, {})
    calls = [manager.create("other"), session.start(), session.set_user(1, {})]
    ends = [session.destroy(), other.destroy(persist=True)]
    await manager.destroy()
    for call, refusal in zip(calls, (ManagerClosedError, SessionEndedError, SessionEndedError), strict=True):
        with pytest.raises(refusal):
            await call
    for call in ends:
        assert await call is None
    assert len(manager) == 0


async def test_a_call_that_is_closed_while_it_waits_leaves_the_end_to_go_on():
    manager = make()
    session = await manager.create()
    call = session.destroy()
    leave = asyncio.Event()

    async def hold(session):
        await leave.wait()

    manager.on("before_destroy", hold)
    call.send(None)
    call.close()
    with pytest.raises(RuntimeError, match="reuse"):
        call.send(None)
    assert session.alive
    leave.set()
    await session.wait_ended()
    await manager.destroy()


def step(call):
    """Do a call of one step here and now: its result."""
    with pytest.raises(StopIteration) as stopped:
        call.send(None)
    return stopped.value.value


@pytest.mark.parametrize("meddle", ["end", "identify", "take the user", "make many", "step"])
async def test_a_clock_that_meddles_with_the_session_that_gets_a_user_meets_a_whole_table(meddle):
    """Whoever is asked for the time in the middle of a call may do anything, also what that call was to do."""
    now = time.monotonic_ns
    todo = []

    class Clock:
        def now(self):
            while todo:
                todo.pop()()
            return now()

        def call_later(self, delay, callback, context):
            return asyncio.get_running_loop().call_later(delay / 1e9, callback, context=context)

    manager = SessionManager(interval="1h", clock=Clock())
    manager.on("persist_user_data", lambda session: None)
    session, other = await manager.create("key"), await manager.create()
    does = {
        "end": lambda: step(session.destroy()),
        "identify": lambda: step(session.set_user(2, {})),
        "take the user": lambda: step(other.set_user(1, {})),
        "make many": lambda: [step(manager.create()) for _ in range(5000)],
        "step": lambda: call.send(None),
    }
    refusal = {
        "end": SessionEndedError,
        "identify": AlreadyIdentifiedError,
        "take the user": UserActiveError,
        "step": RuntimeError,
    }
    todo.append(does[meddle])
    call = session.set_user(1, {})
    if meddle in refusal:
        with pytest.raises(refusal[meddle]):
            await call
    else:
        await call
        assert manager.find_by_user(1) is session
    assert not todo
    assert manager.statistics().live == len(manager) == len(manager.sessions())
    inside(manager).table._check()
    await manager.destroy(False)


async def test_a_warning_of_an_unawaited_call_may_use_the_manager(monkeypatch):
    """It is shown while the call is freed, and whoever shows it may do anything."""
    manager = make()
    session = await manager.create("key")
    made, found = [], []

    def calls():
        return [type(each).__name__ for each in gc.get_objects()].count("SessionCall")

    def show(*_, **__):
        found.append(calls())
        gc.collect()
        made.append(step(manager.create()))
        step(session.destroy())

    gc.collect()
    before = calls()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        session.start()  # type: ignore[unused-coroutine]
    assert found == [before], "what is being freed is in nobody's reach"
    assert len(made) == 1 and made[0].alive and not session.alive
    assert len(manager) == 1
    await manager.destroy()


# a fork is what this is about, and Windows has none
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_call_made_before_a_fork_is_refused_in_the_child():
    """What the loop leaves in the thread while it runs is there too."""
    script = """
        import asyncio, os, warnings
        from cagey_sessions import SessionManager

        warnings.simplefilter("ignore", DeprecationWarning)

        async def main():
            manager = SessionManager(interval="1h")
            manager.on("persist_user_data", lambda session: None)
            session = await manager.create("key")
            calls = [manager.create(), session.start(), session.set_user(1, {}), session.destroy()]
            child = os.fork()
            if child == 0:
                for call in calls:
                    try:
                        call.send(None)
                    except RuntimeError as error:
                        assert "no running event loop" in str(error)
                    else:
                        os._exit(1)
                os._exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            for call in calls:
                await call
            await manager.destroy()

        asyncio.run(main())
        """
    assert python(script).stdout == "0\n"


async def test_what_is_neither_true_nor_false_is_refused_and_never_asked():
    """Whether it is true may be decided by anything, also by code that ends the session meanwhile."""

    class Asked:
        def __bool__(self):
            raise AssertionError("asked")

    manager = SessionManager()
    manager.on("persist_user_data", lambda session: None)
    anonymous, session = await manager.create("key"), await manager.create()
    await session.set_user(1, {})
    for persist in (Asked(), 0, 1, "", "no", [], object):
        for call in (anonymous.destroy, session.destroy, manager.destroy):
            with pytest.raises(OptionError, match="persist is True or False"):
                await call(persist)
        with pytest.raises(OptionError, match="replace is True or False"):
            await manager.create("key", replace=persist)
    assert (len(manager), anonymous.alive, session.alive) == (2, True, True)
    assert manager.find_by_key("key") is anonymous
    await manager.destroy()


def test_a_session_type_that_makes_one_twice_is_refused():
    class Same(Session):
        made = None

        def __new__(cls):
            cls.made = cls.made or super().__new__(cls)
            return cls.made

    table = SessionTable(Same, None)
    session = table.create("a")
    with pytest.raises(TypeError):
        table.create("b")
    assert len(table) == 1 and table.find_by_key("a") is session


async def test_an_exception_is_thrown_by_type_and_value():
    manager = make()
    with pytest.raises(ValueError, match="thrown"):
        manager.create().throw(ValueError, "thrown")
    await manager.destroy()
