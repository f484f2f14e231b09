"""Marks of changes in the core: who has none is passed over, is due again, and is missed by no walk."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cagey_sessions import Session
from cagey_sessions._core import SessionTable


class Marked:
    """What a counter would say: the mark of each change against the mark of the bytes last acknowledged."""

    def __init__(self) -> None:
        self.table = SessionTable(Session, None, stored=True)
        self.session = self.table.create()
        self.table.identify(self.session, 1, {}, 0, 1)
        self.table.own(self.session, 1, 1, 1)
        self.now = 1
        self.marks = self.fixed = self.acknowledged = 0
        self.version: int | None = None
        self.content = 1

    def settle(self, ok: bool) -> None:
        if self.version is None:
            return
        if ok:
            self.acknowledged = self.fixed
            assert self.table.acknowledge(self.session, self.version, self.now, self.now + 1)
        else:
            self.marks += self.marks == self.acknowledged  # whoever failed is marked
            assert self.table.fail(self.session, self.version, self.now + 1)
        self.version = None


@given(st.lists(st.sampled_from(["mark", "tick", "ask", "acknowledge", "fail"]), max_size=40))
def test_two_bits_do_what_a_counter_does(steps):
    world = Marked()
    table, session = world.table, world.session
    for step in steps:
        if step == "mark":
            session.mark_changed()
            world.marks += 1
        elif step == "ask":
            table.ask(session)
        elif step == "tick":
            world.now += 1
            skipped, state = table.counters.skipped, table.state(session)
            table.advance(world.now, 10, 1)
            if state == "idle":
                passed_over = world.marks == world.acknowledged
                assert table.counters.skipped - skipped == passed_over
                assert table.state(session) == ("idle" if passed_over else "due")
        else:
            world.settle(step == "acknowledge")
        if world.version is None and table.has_due():
            table.take()
            world.content += 1
            world.fixed = world.marks
            world.version = table.fix(session, world.content)
        table._check()


def test_who_was_never_saved_is_never_passed_over():
    table = SessionTable(Session, None, stored=True)
    session = table.create()
    table.identify(session, 1, {}, 0, 1)
    table.own(session, 1)
    table.advance(5, 10, 5)
    assert table.state(session) == "due"


def test_nobody_is_passed_over_during_a_walk_that_would_miss_them():
    table = SessionTable(Session, None, stored=True)
    session = table.create()
    table.identify(session, 1, {}, 0, 1)
    table.own(session, 1, 1, 1)
    table.advance(1, 10, 1)
    with table.oldest_first(to_the_end=True):
        table.advance(2, 10, 1)
    assert table.state(session) == "idle"
    with table.oldest_first():
        table.advance(3, 10, 1)
    assert table.state(session) == "due"


@pytest.mark.parametrize("again", [1, 2**63, 2**64 - 2])
def test_who_is_passed_over_is_due_again_and_in_no_call_twice(again):
    table = SessionTable(Session, None, stored=True)
    session = table.create()
    table.identify(session, 1, {}, 0, 1)
    table.own(session, 1, 1, 1)
    table.advance(10**6, 1000, again)
    assert table.counters.skipped == 1
    table.advance(5, 1000, again)  # a clock that went back
    assert table.counters.skipped == 1
    assert table.next_deadline() <= min(10**6 + again, 2**64 - 2)
    assert table.state(session) == "idle"
