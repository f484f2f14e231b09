"""Code that runs in the middle of a call of the core and changes what that is about: it meets a whole table."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from cagey_sessions import KeyTakenError, Session
from cagey_sessions._core import DEBUG, SessionTable
from support.core_objects import python


def test_a_deadline_whose_conversion_calls_back_changes_only_what_it_should():
    """Turning a number into a tick may run code, and that code may make the rows move."""
    script = """
    class Deadline:
        def __index__(self):
            for _ in range(MANY):
                table.create()
            return 5
        __int__ = __index__

    for answer in ("acknowledge", "fail"):
        table = SessionTable(Session, None)
        session = table.create()
        table.identify(session, 1, {}, 0)
        table.ask(session)
        flight = table.take()
        arguments = (*flight, 0) if answer == "acknowledge" else flight
        try:
            getattr(table, answer)(*arguments, Deadline())
        except (TypeError, UsageError):
            expected = ("saving", 0, 1)
        else:
            expected = ("idle", 1, 0)
        print((table.state(session), table.armed, table.counters.in_flight) == expected)
    """
    assert python(script) == "True\nTrue\n"


def test_a_collection_in_the_middle_of_a_call_does_not_disturb_it():
    """Up to Python 3.11 any allocation may run finalizers, and one of them may make the rows move."""
    script = """
    class Trap:
        def __init__(self, table):
            self.me, self.table = self, table

        def __del__(self):
            for _ in range(MANY):
                self.table.create()

    def run(call, trapped):
        table = SessionTable(Session, None)
        session = table.create("key")
        no_free_tuples = [(n, n) for n in range(5000)]
        before, step = call
        before(table, session)
        gc.collect()
        gc.disable()
        if trapped:
            Trap(table)
        gc.set_threshold(1)
        gc.enable()
        try:
            step(table, session)
        finally:
            gc.set_threshold(700)
        gc.collect()
        for _ in range(0 if trapped else MANY):
            table.create()
        counters = table.counters
        state = table.state(session)
        table._check()
        return (
            state, state != "gone" and table.versions(session), table.armed, len(table), table.take(),
            table.find_by_key("key") is session, table.find_by_user(1) is session,
            [getattr(counters, name) for name in dir(counters) if name[0] != "_"],
        )

    def identified(table, session):
        table.identify(session, 1, {}, 0, 10)

    def asked(table, session):
        identified(table, session)
        table.ask(session)

    def saving(table, session):
        asked(table, session)
        table.take()

    def ending(table, session):
        asked(table, session)
        table.begin_end(session)

    calls = {
        "identify": (lambda *_: None, identified),
        "ask": (identified, lambda table, session: table.ask(session)),
        "advance": (identified, lambda table, session: table.advance(100, 100)),
        "take": (asked, lambda table, session: table.take()),
        "acknowledge": (saving, lambda table, session: table.acknowledge(session, 1, 5, 10)),
        "fail": (saving, lambda table, session: table.fail(session, 1, 10)),
        "begin_end": (asked, lambda table, session: table.begin_end(session)),
        "forget": (ending, lambda table, session: table.forget(session)),
        "walk": (identified, lambda table, session: list(table.oldest_first())),
    }
    for name, call in calls.items():
        alone, trapped = ([repr(part) for part in run(call, trap)] for trap in (False, True))
        if alone != trapped:
            print(name, alone, trapped)
    """
    assert python(script) == ""


def test_sessions_made_while_a_session_is_made_meet_a_whole_table():
    """By its class, or by a collection on the way: no row is on no list while code of others runs."""

    class Nested(Session):
        def __new__(cls) -> Any:
            if depth and depth.pop():
                table.create("inner")
                assert table._check() is DEBUG
            return super().__new__(cls)

    depth = [True]
    table = SessionTable(Nested, None)
    outer = table.create("outer")
    assert table.find_by_key("outer") is outer
    assert len(table) == 2
    depth.append(True)
    with pytest.raises(KeyTakenError):
        table.create("inner")
    assert table._check() is DEBUG


def test_a_walk_that_makes_room_lets_others_meet_a_whole_table():
    """The second mark may find no free row; making room allocates, and up to Python 3.11 that may run finalizers."""
    table = SessionTable(Session, None)
    for _ in range(63):
        table.create()
    seen = []
    no_free_lists = [[number] for number in range(200)]

    def look(phase: str, _: object) -> None:
        seen.append(table._check())

    thresholds = gc.get_threshold()
    gc.collect()
    gc.callbacks.append(look)
    gc.set_threshold(1)
    try:
        walk = table.oldest_first(False)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(look)
    assert all(each is DEBUG for each in seen)
    assert len(list(walk)) == 63
    walk.close()
    assert no_free_lists
