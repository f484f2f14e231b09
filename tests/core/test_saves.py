"""The life of a save: the exported table is what its comments say, and the table's calls are what it says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from cagey_sessions import Session, UsageError
from cagey_sessions._core import SAVE_EVENTS, SAVE_STATES, SAVE_TRANSITIONS, SessionTable

NEXT = {(before, event): after for before, event, after in SAVE_TRANSITIONS}
PAIRS = list(itertools.product(SAVE_STATES, SAVE_EVENTS))
FAR = 2**40


class Save:
    """One session, and the public call behind each event. Deadlines are always given: who may wait for one does."""

    def __init__(self, events: tuple[str, ...] = ()) -> None:
        self.table = SessionTable(Session, None)
        self.session = self.table.create("key")
        self.now = 0
        self.version = 0
        for event in events:
            self.do(event)

    def do(self, event: str) -> object:
        return getattr(self, event)()

    @property
    def state(self) -> str:
        return self.table.state(self.session)

    def identify(self) -> None:
        self.table.identify(self.session, 1, {}, self.now, 1)

    def become_due(self) -> int:
        """Nobody can call this but time: those who wait in the wheel become due."""
        self.now += FAR
        return self.table.advance(self.now, 100)

    def ask(self) -> None:
        self.table.ask(self.session)

    def take(self) -> object:
        """The lanes say whom `take` returns: nobody, if this session is in none."""
        taken = self.table.take()
        if taken is not None:
            assert taken[0] is self.session
            self.version = taken[1]
        return taken

    def acknowledge(self) -> bool:
        return self.table.acknowledge(self.session, self.version, self.now, self.now + 1)

    def fail(self) -> bool:
        return self.table.fail(self.session, self.version, self.now + 1)

    def end(self) -> None:
        self.table.begin_end(self.session)

    def forget(self) -> None:
        self.table.forget(self.session)

    def looks(self) -> tuple[Any, ...]:
        """All that can be seen of it."""
        table, session = self.table, self.session
        counters = table.counters
        gone = self.state == "gone"
        return (
            self.state,
            None if gone else (table.versions(session), table.failures(session)),
            None if gone or session.user_id is None else table.saved_at(session),
            *(getattr(counters, name) for name in dir(counters) if not name.startswith("_")),
            (len(table), table.armed, table.has_due(False), table.has_due(True), table.oldest_save),
            (table.find_by_key("key"), table.find_by_user(1), table.active_session(1), table.is_ending(session)),
        )


def paths() -> dict[tuple[str, bool], tuple[str, ...]]:
    """The shortest way of a session with a user to each state, waiting in the wheel and not, by public calls."""
    found: dict[tuple[str, bool], tuple[str, ...]] = {("none", False): ()}
    todo = [()]
    while todo:
        path = todo.pop(0)
        for event in SAVE_EVENTS:
            save = Save(path)
            if (save.state, event) in NEXT and (event != "become_due" or save.table.armed):
                save.do(event)
                place = (save.state, bool(save.table.armed))
                without_user = event == "end" and save.session.user_id is None
                if place not in found and not without_user:
                    found[place] = (*path, event)
                    todo.append(found[place])
    return found


PATHS = paths()
PLACES = [pytest.param(place, id=f"{place[0]}{'-in_the_wheel' if place[1] else ''}") for place in PATHS]


def test_states_and_events_are_those_of_the_table():
    """No name in the table that is not listed, none listed that is not in the table, no pair twice."""
    befores, events, afters = (set(column) for column in zip(*SAVE_TRANSITIONS, strict=True))
    assert befores | afters == set(SAVE_STATES)
    assert events == set(SAVE_EVENTS)
    assert len(NEXT) == len(SAVE_TRANSITIONS)
    assert len(set(SAVE_STATES)) == len(SAVE_STATES)
    assert len(set(SAVE_EVENTS)) == len(SAVE_EVENTS)


def rule_of(state: str, event: str) -> str | None:
    """The table's rules in other words: a state is whether the session is ending, a flight, and a wish."""
    if state in ("none", "gone"):
        return {("none", "identify"): "idle", ("none", "end"): "ending"}.get((state, event))
    ending = state.startswith("ending")
    flight = "saving" in state
    wish = "asked" if state.endswith("asked") else "due" if state == "due" else None
    match event:
        case "ask":
            wish = "asked"
        case "become_due" if not flight and wish is None:
            wish = "asked" if ending else "due"
        case "take" if not flight and wish is not None:
            flight, wish = True, None
        case "acknowledge" | "fail" if flight:
            flight = False
        case "end" if not ending:
            ending = True
            wish = None if wish == "due" else wish
        case "forget" if ending:
            return "gone"
        case _:
            return None
    parts = ["ending"] * ending + ["saving"] * flight + [wish] * (wish is not None)
    return "_".join(parts) or "idle"


@pytest.mark.parametrize(("state", "event"), PAIRS)
def test_each_pair_follows_the_rules(state, event):
    """One save in flight; a wish during a flight outlives it; an end drops a timer's wish and keeps a caller's."""
    assert NEXT.get((state, event)) == rule_of(state, event)


def test_every_state_is_reached_by_public_calls():
    assert {state for state, _ in PATHS} == set(SAVE_STATES)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("event", SAVE_EVENTS)
def test_the_calls_do_what_the_table_says_and_what_it_does_not_list_changes_nothing(place, event):
    """A pair that is not listed raises a `UsageError`, or is an answer that says so, and changes nothing.

    Those that do not raise: a second `begin_end`; `advance` and `take`, which are about others then; and an answer to a
    save of a session that is gone, which gets False.
    """
    save = Save(PATHS[place])
    state, in_wheel = place
    assert save.state == state
    listed = (state, event) in NEXT and (event != "become_due" or in_wheel)
    before = save.looks()
    if listed:
        save.do(event)
        assert save.state == NEXT[state, event]
        wanted = {"asked": (True, True), "ending_asked": (True, True), "due": (False, True)}
        lanes = (save.table.has_due(False), save.table.has_due(True))
        assert lanes == wanted.get(save.state, (False, False))
        return
    if event == "end" and save.table.is_ending(save.session) and state != "gone":
        assert save.do(event) is None
    elif event in ("become_due", "take"):
        assert not save.do(event)
    elif event in ("acknowledge", "fail") and state == "gone":
        assert save.do(event) is False
    else:
        with pytest.raises(UsageError):
            save.do(event)
    assert save.looks() == before
    assert save.table._check() in (True, False)


def test_the_public_calls_together_use_every_row_of_the_table():
    used = set()
    for (state, in_wheel), path in PATHS.items():
        for event in SAVE_EVENTS:
            if (state, event) in NEXT and (event != "become_due" or in_wheel):
                save = Save(path)
                save.do(event)
                used.add((state, event, save.state))
    assert used == set(SAVE_TRANSITIONS)


@pytest.mark.parametrize("place", PLACES)
def test_no_state_has_a_second_save_in_flight(place):
    """From a state with a save in flight no event but its answer leads to where another could start."""
    save = Save(PATHS[place])
    if not save.table.counters.in_flight:
        return
    assert save.table.take() is None
    save.become_due()
    assert save.table.take() is None
    if (save.state, "ask") in NEXT:
        save.ask()
        assert save.table.take() is None
    save.end()
    assert save.table.take() is None
    assert save.table.counters.in_flight == 1


@pytest.mark.parametrize("settle", [Save.acknowledge, Save.fail])
@pytest.mark.parametrize("ending", [False, True], ids=["live", "ending"])
def test_who_asks_during_a_save_gets_a_later_one(settle: Callable[[Save], bool], ending: bool):
    """Whatever comes of the one in flight; and its deadline does not put the later one off."""
    save = Save(("identify", "ask", "take", "ask"))
    if ending:
        save.end()
    assert settle(save)
    assert save.table.armed == 0
    assert save.take() == (save.session, 2)


def test_versions_rise_and_only_an_acknowledgement_moves_the_acknowledged_one():
    save = Save(("identify",))
    assert save.table.versions(save.session) == (0, 0)
    for expected in (1, 2, 3):
        save.ask()
        assert save.take() == (save.session, expected)
        save.fail()
        assert save.table.versions(save.session) == (expected, 0)
        assert save.table.failures(save.session) == expected
    save.ask()
    save.take()
    save.now = 77
    save.acknowledge()
    assert save.table.versions(save.session) == (4, 4)
    assert save.table.failures(save.session) == 0
    assert save.table.saved_at(save.session) == save.table.oldest_save == 77


def test_failures_are_counted_up_to_255():
    save = Save(("identify",))
    for expected in range(1, 300):
        save.ask()
        save.take()
        save.fail()
        assert save.table.failures(save.session) == min(expected, 255)


@pytest.mark.parametrize("answer", [Save.acknowledge, Save.fail])
def test_an_answer_to_another_version_is_refused(answer: Callable[[Save], bool]):
    """Neither an older nor a newer version than the one in flight is taken for it."""
    save = Save(("identify", "ask", "take", "fail", "ask", "take"))
    for version in (0, 1, 3, 2**64 - 1):
        save.version = version
        before = save.looks()
        with pytest.raises(UsageError, match="not in flight"):
            answer(save)
        assert save.looks() == before
    save.version = 2
    assert answer(save)


def test_a_session_that_takes_the_row_of_another_starts_from_nothing():
    """Version, failures and state are its own, and the answer to the other's save does not reach it."""
    save = Save(("identify", "ask", "take", "fail", "ask", "take", "end", "forget"))
    newcomer = save.table.create("key")
    assert save.table.state(newcomer) == "none"
    assert save.table.versions(newcomer) == (0, 0)
    assert save.table.failures(newcomer) == 0
    save.table.identify(newcomer, 1, {}, 5, 1)
    save.table.ask(newcomer)
    assert save.table.take() == (newcomer, 1)
    assert save.acknowledge() is False
    assert save.fail() is False
    assert save.table.state(newcomer) == "saving"
    assert save.table.saved_at(newcomer) == 5
    assert save.state == "gone"


def test_a_session_without_a_user_ends_without_a_save():
    save = Save(("end",))
    assert save.state == "ending"
    assert save.take() is None
    save.forget()
    assert save.state == "gone"
    assert len(save.table) == save.table.counters.identified == 0


@pytest.mark.parametrize("events", [(), ("end",)], ids=["live", "ending"])
def test_a_session_without_a_user_is_never_saved(events):
    """There is nothing to save and nobody to save it for, while it lives and while it ends."""
    save = Save(events)
    before = save.looks()
    with pytest.raises(UsageError):
        save.ask()
    assert save.looks() == before
    assert not save.table.has_due()


def test_the_lanes_take_turns_while_both_hold_somebody():
    """Neither starves: not those whose time has come, and not those who ask."""
    table = SessionTable(Session, None)
    urgent, periodic = [], []
    for user_id in range(20):
        session = table.create()
        table.identify(session, user_id, {}, 0, 1 if user_id % 2 else 0)
        (periodic if user_id % 2 else urgent).append(session)
    table.advance(1, 100)
    for session in urgent:
        table.ask(session)
    taken = [table.take()[0] for _ in range(20)]
    assert taken[0::2] == urgent
    assert taken[1::2] == periodic


def test_without_the_periodic_lane_only_those_who_asked_are_taken():
    table = SessionTable(Session, None)
    for user_id in range(3):
        table.identify(table.create(), user_id, {}, 0, 1)
    table.advance(1, 100)
    asks = table.find_by_user(1)
    table.ask(asks)
    assert table.has_due(False)
    assert table.take(False) == (asks, 1)
    assert not table.has_due(False)
    assert table.take(False) is None
    assert table.has_due()
    assert table.take() is not None


def test_the_oldest_save_is_that_of_the_longest_unsaved_user():
    """A user counts from the moment they are set; an acknowledgement, late or not, makes its user the youngest."""
    table = SessionTable(Session, None)
    assert table.oldest_save is None
    people = []
    for user_id in range(3):
        people.append(table.create())
        assert table.oldest_save == (0 if user_id else None)
        table.identify(people[-1], user_id, {}, user_id * 10)
    table.ask(people[0])
    table.take()
    assert table.oldest_save == 0
    table.acknowledge(people[0], 1, 25)
    assert table.oldest_save == 10
    with table.oldest_first() as walk:
        assert next(walk) is people[1]
        assert table.oldest_save == 10
        table.begin_end(people[1])
        table.forget(people[1])
        assert table.oldest_save == 20
        assert list(walk) == [people[2], people[0]]


def test_saved_at_of_a_newcomer_is_not_that_of_whoever_had_the_row_before():
    table = SessionTable(Session, None)
    before = table.create()
    table.identify(before, 1, {}, 12_345)
    table.begin_end(before)
    table.forget(before)
    assert table.saved_at(table.create()) == 0
