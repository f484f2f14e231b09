"""Walks over sessions by age, while those change: whom a walk meets, in which order, and that it ends."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cagey_sessions import Session
from cagey_sessions._core import DEBUG, SessionTable


def crowd(count: int) -> tuple[SessionTable, list[Session]]:
    """So many identified sessions, the oldest first."""
    table = SessionTable(Session, None)
    people = []
    for user_id in range(count):
        people.append(table.create())
        table.identify(people[-1], user_id, {}, user_id)
    return table, people


def save(table: SessionTable, session: Session, success: bool = True) -> None:
    table.ask(session)
    flight = table.take(False)
    assert flight is not None
    assert table.acknowledge(*flight, 100) if success else table.fail(*flight)


def end(table: SessionTable, session: Session) -> None:
    table.begin_end(session)
    table.forget(session)


@pytest.mark.parametrize("to_the_end", [False, True])
def test_a_walk_meets_everybody_oldest_first(to_the_end):
    table, people = crowd(5)
    save(table, people[0])
    save(table, people[2], success=False)
    assert list(table.oldest_first(to_the_end=to_the_end)) == [*people[1:], people[0]]


@pytest.mark.parametrize("to_the_end", [False, True])
def test_a_walk_is_over_either_the_anonymous_or_the_identified(to_the_end):
    table, people = crowd(3)
    strangers = [table.create() for _ in range(3)]
    assert list(table.oldest_first(to_the_end=to_the_end)) == people
    assert list(table.oldest_first(identified=False, to_the_end=to_the_end)) == strangers
    table.identify(strangers[0], "known", {}, 9)
    assert list(table.oldest_first(to_the_end=to_the_end)) == [*people, strangers[0]]
    assert list(table.oldest_first(identified=False, to_the_end=to_the_end)) == strangers[1:]


def test_a_walk_ends_although_everybody_is_saved_as_soon_as_they_are_met():
    """Each is met once, and those who come meanwhile are not."""
    table, people = crowd(5)
    met = []
    with table.oldest_first() as walk:
        for session in walk:
            met.append(session)
            save(table, session)
            table.identify(table.create(), f"newcomer {len(met)}", {}, 9)
    assert met == people


def test_who_is_saved_before_their_turn_is_not_met():
    table, people = crowd(5)
    walk = table.oldest_first()
    assert next(walk) is people[0]
    save(table, people[3])
    save(table, people[1], success=False)
    assert list(walk) == [people[1], people[2], people[4]]
    walk.close()


def test_a_walk_to_the_end_misses_nobody_and_may_meet_a_session_twice():
    table, people = crowd(4)
    with table.oldest_first(to_the_end=True) as walk:
        assert next(walk) is people[0]
        save(table, people[0])
        save(table, people[2])
        newcomer = table.create()
        table.identify(newcomer, "newcomer", {}, 9)
        assert list(walk) == [people[1], people[3], people[0], people[2], newcomer]
        save(table, people[1])
        assert list(walk) == [people[1]]


@pytest.mark.parametrize("to_the_end", [False, True])
def test_who_has_gone_before_their_turn_is_not_met(to_the_end):
    """Not even if another has their row by then; neither the one behind nor the one ahead of them is skipped."""
    table, people = crowd(6)
    walk = table.oldest_first(to_the_end=to_the_end)
    assert next(walk) is people[0]
    for number in (0, 1, 3, 5):
        end(table, people[number])
    newcomer = table.create()
    table.identify(newcomer, "newcomer", {}, 9)
    assert list(walk) == [people[2], people[4], *([newcomer] if to_the_end else [])]
    walk.close()


@given(st.integers(0, 6), st.lists(st.integers(0, 2), max_size=30))
def test_walks_do_not_disturb_each_other(count, turns):
    """Three at a time, step by step in any order: each meets everybody, in order, and then stays at its end."""
    table, people = crowd(count)
    walks = [table.oldest_first(), table.oldest_first(to_the_end=True), table.oldest_first()]
    met: list[list[Any]] = [[], [], []]
    for turn in turns:
        session = next(walks[turn], None)
        if session is None:
            assert met[turn] == people
        else:
            met[turn].append(session)
    for walk, sessions in zip(walks, met, strict=True):
        sessions += walk
        assert sessions == people
        assert next(walk, None) is None
        walk.close()
    assert list(table.oldest_first()) == people


def test_a_closed_walk_meets_nobody_and_closing_it_twice_is_closing_it_once():
    table, people = crowd(3)
    with table.oldest_first() as walk:
        assert iter(walk) is walk
        next(walk)
        walk.close()
        assert list(walk) == []
    walk.close()
    assert list(walk) == []
    assert list(table.oldest_first()) == people


def test_walks_that_are_closed_leave_nothing_behind():
    """Their two rows are used again."""
    table, people = crowd(10)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(300 if DEBUG else 10_000):
            with table.oldest_first() as walk, table.oldest_first(to_the_end=True) as other:
                next(walk)
                next(other)
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after - before < 10_000
    assert list(table.oldest_first()) == people
    assert table.sessions_now() == people


def test_an_abandoned_walk_does_no_harm():
    """It is never closed, and its marks stay: nobody meets them, and what is oldest is found behind them."""
    table, people = crowd(5)
    for _ in range(100):
        next(table.oldest_first())
        next(table.oldest_first(to_the_end=True))
    assert list(table.oldest_first()) == people
    assert table.oldest_save == 0
    for session in people:
        end(table, session)
    assert table.oldest_save is None
    assert len(table) == 0
    table._check()


def test_a_walk_keeps_its_table():
    walk = crowd(2)[0].oldest_first()
    assert [session.user_id for session in walk] == [0, 1]
