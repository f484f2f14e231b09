"""Versions that stand for bytes: what is written again, what is written anew, and what need not be written."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cagey_sessions import Session, UnsavableError, UsageError
from cagey_sessions._core import SessionTable


def stored_table() -> tuple[SessionTable, Any]:
    table = SessionTable(Session, None, stored=True)
    session = table.create("key")
    table.identify(session, 1, {}, 0)
    return table, session


def take(table: SessionTable, session: Any) -> int:
    table.ask(session)
    taken = table.take()
    assert taken is not None
    assert taken[0] is session
    return taken[1]


def test_the_first_bytes_of_a_new_user_are_written_whatever_they_are():
    for digest in (0, 1, 2**64 - 1):
        table, session = stored_table()
        table.own(session, 7)
        assert table.epoch(session) == 7
        assert not table.is_current(session, digest)
        assert take(table, session) == 0
        assert table.fix(session, digest) == 1


def test_what_was_loaded_and_not_changed_is_not_written():
    table, session = stored_table()
    table.own(session, 3, 41, 1000)
    assert table.versions(session) == (41, 41)
    assert table.is_current(session, 1000)
    assert take(table, session) == 41
    assert table.fix(session, 1000) == 0
    assert table.acknowledge(session, 41, 5)
    assert table.saved_at(session) == 5


def test_the_same_bytes_are_repeated_under_the_same_version_until_they_are_acknowledged():
    table, session = stored_table()
    table.own(session, 3, 41, 1000)
    for _ in range(3):
        take(table, session)
        assert table.fix(session, 2000) == 42
        assert table.fail(session, 42)
        assert not table.is_current(session, 2000)
    take(table, session)
    assert table.fix(session, 2000) == 42
    assert table.acknowledge(session, 42, 5)
    assert table.is_current(session, 2000)
    take(table, session)
    assert table.fix(session, 2000) == 0


def test_bytes_changed_back_after_a_write_of_unknown_outcome_are_written_again():
    """The store may hold either: the digest last acknowledged proves nothing any more."""
    table, session = stored_table()
    table.own(session, 3, 41, 1000)
    take(table, session)
    assert table.fix(session, 2000) == 42
    table.fail(session, 42)
    assert not table.is_current(session, 1000)
    take(table, session)
    assert table.fix(session, 1000) == 43


def test_after_the_last_version_only_its_own_bytes_are_taken():
    table, session = stored_table()
    table.own(session, 3, 2**53 - 2, 1000)
    take(table, session)
    assert table.fix(session, 2000) == 2**53 - 1
    table.fail(session, 2**53 - 1)
    take(table, session)
    with pytest.raises(UnsavableError, match="last version") as caught:
        table.fix(session, 3000)
    assert caught.value.user_id == 1
    assert table.versions(session) == (2**53 - 1, 2**53 - 2)
    assert table.fix(session, 2000) == 2**53 - 1, "a repeat is no new version"
    table.acknowledge(session, 2**53 - 1, 5)
    take(table, session)
    assert table.fix(session, 2000) == 0


def test_a_later_claim_keeps_version_and_digest():
    table, session = stored_table()
    table.own(session, 3, 41, 1000)
    table.own(session, 4)
    assert (table.epoch(session), table.versions(session), table.is_current(session, 1000)) == (4, (41, 41), True)


def test_a_newcomer_in_a_used_row_starts_from_nothing():
    table, session = stored_table()
    table.own(session, 9, 5, 1000)
    table.begin_end(session)
    table.forget(session)
    newcomer = table.create()
    table.identify(newcomer, 2, {}, 0)
    assert (table.epoch(newcomer), table.versions(newcomer)) == (0, (0, 0))
    assert not table.is_current(newcomer, 1000)


def test_what_was_noted_survives_the_growth_of_the_table():
    table, session = stored_table()
    table.own(session, 9, 5, 1000)
    others = [table.create() for _ in range(1000)]
    for number, other in enumerate(others):
        table.identify(other, f"other {number}", {}, 0)
        table.own(other, number, number + 1, number)
    assert (table.epoch(session), table.is_current(session, 1000)) == (9, True)
    assert all(table.epoch(other) == number for number, other in enumerate(others))


def test_without_a_store_there_is_nothing_to_fix():
    table = SessionTable(Session, None)
    session = table.create()
    table.identify(session, 1, {}, 0)
    for call in (
        lambda: table.own(session, 1),
        lambda: table.epoch(session),
        lambda: table.fix(session, 1),
        lambda: table.is_current(session, 1),
    ):
        with pytest.raises(UsageError, match="made without a store"):
            call()


def test_only_the_bytes_of_a_save_in_flight_are_fixed():
    table, session = stored_table()
    with pytest.raises(UsageError, match="in flight"):
        table.fix(session, 1)
    assert table.versions(session) == (0, 0)


@given(
    loaded=st.booleans(),
    steps=st.lists(st.tuples(st.sampled_from("ABC"), st.sampled_from(["stored", "lost", "refused"])), max_size=40),
)
def test_what_is_skipped_is_in_the_store(loaded, steps):
    """A store that keeps what reaches it and sometimes loses the answer: whatever counts as unchanged is there, and no
    version is ever used for other bytes.
    """
    table, session = stored_table()
    content = "A" if loaded else None
    table.own(session, 1, *((1, hash("A") % 2**64) if loaded else ()))
    bytes_of = {1: "A"} if loaded else {}
    last = 1 if loaded else 0
    for body, outcome in steps:
        version = take(table, session)
        fixed = table.fix(session, hash(body) % 2**64)
        if fixed == 0:
            assert content == body
            assert table.acknowledge(session, version, 0)
            continue
        assert bytes_of.setdefault(fixed, body) == body, "a version was used for other bytes"
        assert fixed >= last
        last = fixed
        if outcome != "refused":
            content = body
        if outcome == "stored":
            assert table.acknowledge(session, fixed, 0)
        else:
            assert table.fail(session, fixed)


def test_the_three_lanes_take_turns_while_they_hold_somebody():
    """Neither starves: who asks, who leaves, and whose time has come."""
    table = SessionTable(Session, None)
    people: list[list[Any]] = [[], [], []]
    for user_id in range(30):
        session = table.create()
        table.identify(session, user_id, {}, 0, 1 if user_id % 3 == 2 else 0)
        people[user_id % 3].append(session)
    table.advance(1, 100)
    for session in people[0]:
        table.ask(session)
    for session in people[1]:
        table.ask(session)
        table.begin_end(session)
    taken = [table.take()[0] for _ in range(30)]
    assert [taken[0::3], taken[1::3], taken[2::3]] == people


def test_what_is_doubted_is_written_again_as_the_next_version():
    table, session = stored_table()
    table.own(session, 3, 41, 1000)
    assert table.doubt(0, 10**6) == 0
    assert not table.is_current(session, 1000)
    assert table.is_stored(session, 41, 1000), "of what the store had there is no doubt"
    assert table.is_marked(session)
    take(table, session)
    assert table.fix(session, 1000) == 42
    assert table.acknowledge(session, 42, 5)
    assert table.is_current(session, 1000)
    take(table, session)
    assert table.fix(session, 1000) == 0, "once is enough"


def test_a_doubt_leaves_alone_what_is_on_its_way():
    table, session = stored_table()
    table.own(session, 3, 41, 1000)
    take(table, session)
    assert table.fix(session, 2000) == 42
    assert table.doubt(0, 10**6) == 0
    assert table.fail(session, 42)
    take(table, session)
    assert table.fix(session, 2000) == 42, "the same bytes are the same version"


@pytest.mark.parametrize("limit", [1, 7, 50, 1000])
def test_everybody_is_doubted_whatever_the_portions(limit):
    table = SessionTable(Session, None, stored=True)
    sessions = [table.create() for _ in range(100)]
    for user, session in enumerate(sessions):
        table.identify(session, user, {}, 0)
        table.own(session, 1, 1, user)
    for session in sessions[::3]:
        table.begin_end(session)
        table.forget(session)
    place, calls = 0, 0
    while True:
        place = table.doubt(place, limit)
        calls += 1
        if place == 0:
            break
    assert calls >= 100 // limit
    for user, session in enumerate(sessions):
        if user % 3:
            assert not table.is_current(session, user)


def test_without_a_store_there_is_nothing_to_doubt():
    with pytest.raises(UsageError):
        SessionTable(Session, None).doubt(0, 10)
