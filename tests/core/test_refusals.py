"""Refused calls of the core: of raw sessions, of another table's, in another thread, process or interpreter."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import subprocess
import sys
import sysconfig
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from cagey_sessions import Session, UsageError, WrongLoopError
from cagey_sessions._core import SessionTable
from support.core_objects import identified, python

# A raw object


RAW: dict[str, Callable[[Any], Any]] = {
    # name: what to do with it; an error or one of the answers below
    "key": lambda session: session.key,
    "user_id": lambda session: session.user_id,
    "end_reason": lambda session: session.end_reason,
    "alive": lambda session: session.alive,
    "user_data": lambda session: session.user_data,
    "set": lambda session: session.set("name", 1),
    "get": lambda session: session.get("name"),
    "mark_changed": lambda session: session.mark_changed(),
    "start": lambda session: asyncio.run(session.start()),
    "set_user": lambda session: asyncio.run(session.set_user(1, {})),
    "login": lambda session: asyncio.run(session.login(1, default={})),
    "persist_now": lambda session: asyncio.run(session.persist_now()),
    "destroy": lambda session: asyncio.run(session.destroy()),
    "wait_ended": lambda session: asyncio.run(session.wait_ended()),
    "on": lambda session: session.on("started", print),
    "once": lambda session: session.once("started", print),
    "off": lambda session: session.off("started", print),
    "_host": lambda session: session._host,
    "_listeners": lambda session: session._listeners,
    "_require_alive": lambda session: session._require_alive(),
    "_add": lambda session: session._add("started", print, once=False),
    "_own_listeners": lambda session: session._own_listeners(),
    "_end": lambda session: session._end("never began"),
}
ANSWERS = {"alive": False} | dict.fromkeys(["key", "user_id", "end_reason", "_listeners", "_end"])


def test_every_name_of_a_session_is_tried_on_a_raw_one():
    """A name added to `Session` has to be added here too."""
    of_typing = {"_is_protocol"}
    assert {name for name in dir(Session) if not name.startswith("__")} - of_typing == set(RAW)


@pytest.mark.parametrize("name", RAW)
def test_a_raw_session_never_crashes(name):
    session = Session.__new__(Session)
    for _ in range(2):
        if name in ANSWERS:
            answer = RAW[name](session)
            assert answer is ANSWERS[name] or name == "end_reason"
        else:
            with pytest.raises(UsageError, match=r"belongs to no manager; sessions are made by `await manager\.create"):
                RAW[name](session)
        session._end("never began")  # and once more, after an end it never had


def test_a_raw_session_has_the_manners_of_an_object():
    session = Session.__new__(Session)
    assert repr(session) == "<Session of no manager>"
    assert session == session
    assert session != Session.__new__(Session)
    assert isinstance(hash(session), int)
    assert weakref.ref(session)() is session
    assert gc.is_tracked(session)
    with pytest.raises(UsageError):
        session.user_data = {}
    gc.collect()


OPERATIONS: dict[str, Callable[[SessionTable, Any], Any]] = {
    # name: a call that takes a session, as that session's turn would have it
    "failures": lambda table, session: table.failures(session),
    "versions": lambda table, session: table.versions(session),
    "saved_at": lambda table, session: table.saved_at(session),
    "identify": lambda table, session: table.identify(session, 77, {}, 0),
    "ask": lambda table, session: table.ask(session),
    "due_after": lambda table, session: table.due_after(session, 1, 1),
    "acknowledge": lambda table, session: table.acknowledge(session, 1, 0),
    "fail": lambda table, session: table.fail(session, 1),
    "begin_end": lambda table, session: table.begin_end(session),
    "forget": lambda table, session: table.forget(session),
    "state": lambda table, session: table.state(session),
    "is_ending": lambda table, session: table.is_ending(session),
    "lose": lambda table, session: table.lose(session),
    "is_lost": lambda table, session: table.is_lost(session),
    "set_final": lambda table, session: table.set_final(session, False),
    "is_silent": lambda table, session: table.is_silent(session),
    "is_final": lambda table, session: table.is_final(session),
    "set_released": lambda table, session: table.set_released(session, True),
    "is_released": lambda table, session: table.is_released(session),
    "own": lambda table, session: table.own(session, 1, 1, 1),
    "epoch": lambda table, session: table.epoch(session),
    "fix": lambda table, session: table.fix(session, 1),
    "is_marked": lambda table, session: table.is_marked(session),
    "is_current": lambda table, session: table.is_current(session, 1),
    "stored": lambda table, session: table.stored(session),
    "is_stored": lambda table, session: table.is_stored(session, 1, 1),
}


def test_every_call_that_takes_a_session_is_tried():
    with_session = {
        name
        for name, method in inspect.getmembers(SessionTable)
        if not name.startswith("_") and callable(method) and "session" in inspect.signature(method).parameters
    }
    assert with_session == set(OPERATIONS)


OF_THE_GONE = {
    "state": "gone",
    "is_ending": True,
    "is_lost": True,
    "is_final": False,
    "is_released": True,
    "is_silent": False,
}
"""What can be asked of a session that was forgotten, from any thread, and the answer."""


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_raw_session_is_refused_by_the_table(name):
    """Or, by the two that only ask whether it is over, said to be."""
    table = SessionTable(Session, None)
    try:
        answer = OPERATIONS[name](table, Session.__new__(Session))
    except UsageError:
        pass
    else:
        assert answer == OF_THE_GONE[name]
    assert len(table) == table.armed == table.counters.due == 0


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_session_of_another_table_is_refused(name):
    """Its row number means somebody else's row here, or lies past the end of the rows."""
    table, other = SessionTable(Session, None), SessionTable(Session, None)
    session, resident = identified(other), identified(table)
    assert table.state(resident) == "idle"
    with pytest.raises(UsageError, match="another manager"):
        OPERATIONS[name](table, session)
    assert table.state(resident) == other.state(session) == "idle"


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("what", [None, 1, "session", object()])
def test_what_is_no_session_is_refused(name, what):
    with pytest.raises(TypeError):
        OPERATIONS[name](SessionTable(Session, None), what)


# Thread and process


GUARDED: dict[str, Callable[[SessionTable, Any], Any]] = {
    # any thread may ask whether a session is over
    **{name: call for name, call in OPERATIONS.items() if name not in OF_THE_GONE},
    "create": lambda table, session: table.create(),
    "hold": lambda table, session: table.hold(7, {}),
    "find_by_key": lambda table, session: table.find_by_key("key"),
    "find_by_user": lambda table, session: table.find_by_user(1),
    "sessions_now": lambda table, session: table.sessions_now(),
    "advance": lambda table, session: table.advance(10, 10),
    "take": lambda table, session: table.take(),
    "oldest_first": lambda table, session: table.oldest_first(),
    "user_data": lambda table, session: session.user_data,
    "user_data=": lambda table, session: setattr(session, "user_data", {}),
    "set": lambda table, session: session.set("name", 1),
    "mark_changed": lambda table, session: session.mark_changed(),
    "_require_alive": lambda table, session: session._require_alive(),
}


def elsewhere(call: Callable[[], Any]) -> BaseException | None:
    """What a call raises in another thread."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


@pytest.mark.parametrize("name", GUARDED)
def test_another_thread_is_refused_once_the_table_is_bound(name):
    """Before `bind_thread` any thread may use it; afterwards whatever changes it, or hands out data, is refused."""
    table = SessionTable(Session, None)
    session = identified(table)
    assert not isinstance(elsewhere(lambda: GUARDED[name](table, session)), WrongLoopError)

    table = SessionTable(Session, None)
    session = identified(table)
    table.ask(session)
    table.bind_thread()
    error = elsewhere(lambda: GUARDED[name](table, session))
    assert type(error) is WrongLoopError
    assert "another thread" in str(error)
    assert isinstance(error, RuntimeError)
    assert table.take() == (session, 1), "nothing has changed"


@pytest.mark.parametrize("use", ["next", "close"])
def test_a_walk_is_refused_in_another_thread(use):
    """Each step of it, and its end, moves rows."""
    table = SessionTable(Session, None)
    people = [identified(table, user_id) for user_id in range(3)]
    table.bind_thread()
    walk = table.oldest_first()
    error = elsewhere(lambda: next(walk) if use == "next" else walk.close())
    assert type(error) is WrongLoopError
    assert list(walk) == people


# a fork is what this is about, and Windows has none
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_is_refused_and_the_parent_is_not():
    """A child has a copy of every row: used there, each user would be saved twice."""
    script = """
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)

    table = SessionTable(Session, None)
    session = table.create("key")
    table.identify(session, 1, {}, 0, 10)
    unbound = SessionTable(Session, None)
    table.bind_thread()
    calls = {
        "create": table.create,
        "find_by_key": lambda: table.find_by_key("key"),
        "advance": lambda: table.advance(10, 10),
        "ask": lambda: table.ask(session),
        "end": lambda: table.begin_end(session),
        "user_data": lambda: session.user_data,
        "set": lambda: session.set("a", 1),
        "walk": table.oldest_first,
    }
    child = os.fork()
    if child == 0:
        for name, call in calls.items():
            try:
                call()
            except WrongLoopError as error:
                assert "fork" in str(error), error
            else:
                os._exit(1)
        unbound.create()
        mine = SessionTable(Session, None)
        mine.bind_thread()
        mine.create("key")
        grandchild = os.fork()
        if grandchild == 0:
            try:
                mine.create()
            except WrongLoopError:
                os._exit(0)
            os._exit(1)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(table.find_by_key("key") is session, table.advance(10, 10) > 0, table.take() == (session, 1))
    """
    assert python(script) == "0\nTrue True True\n"


def test_a_session_made_on_one_thread_is_not_moved_on_by_another():
    """Nor corrupted: whatever the other one tries is refused, and this one goes on."""
    table = SessionTable(Session, None)
    session = identified(table)
    table.bind_thread()
    for call in (lambda: table.advance(10, 10), table.take, lambda: table.begin_end(session), table.create):
        assert type(elsewhere(call)) is WrongLoopError
    assert table.advance(10, 10) > 0
    assert table.take() == (session, 1)


def test_a_second_interpreter_hears_that_there_is_one_core_in_a_process():
    script = """
    try:
        import _interpreters as interpreters
    except ImportError:
        import _xxsubinterpreters as interpreters
    other = interpreters.create()
    try:
        said = interpreters.run_string(other, "import cagey_sessions")
    except Exception as error:
        said = error
    interpreters.destroy(other)
    print("core of cagey-sessions cannot be loaded" in str(said), len(SessionTable(Session, None)))
    """
    assert python(script) == "True 0\n"


# the import gives the lock back to a Python that runs without; the others never lose it
@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a lock anyway")
def test_a_free_threaded_python_gets_its_lock_back():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, cagey_sessions; print(sys._is_gil_enabled())"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "True\n"
    assert "global interpreter lock" in done.stderr
