"""When in the interval each session is saved: at a place of its own, spread evenly over all of them, and for ever."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cagey_sessions import Session, UsageError
from cagey_sessions._core import DEBUG, SessionTable

MANY = 300 if DEBUG else 10_000
ALL = 2**31
SEEDS = st.integers(0, 2**64 - 1)
INTERVALS = st.one_of(st.integers(1, 20), st.integers(1, 2**20), st.integers(1, 2**62))
TICKS = st.one_of(st.integers(0, 100), st.integers(0, 2**62))


def crowd(seed: int, now: int, interval: int, count: int = MANY) -> SessionTable:
    table = SessionTable(Session, None, seed=seed)
    table.advance(now, ALL)
    for user_id in range(count):
        table.identify(table.create(), user_id, {}, now, interval)
    return table


def next_tick(table: SessionTable) -> int:
    """Move time to where somebody is due, or passed over."""
    passed_over = table.counters.skipped
    while True:
        tick = table.next_deadline()
        assert tick is not None
        table.advance(tick, ALL)
        if table.has_due() or table.counters.skipped > passed_over:
            return tick


def save_all_due(table: SessionTable, now: int, interval: int) -> None:
    while (flight := table.take()) is not None:
        table.acknowledge(*flight, now, table.due_after(flight[0], now, interval))


def due_in_parts(table: SessionTable, start: int, part: int, parts: int) -> list[int]:
    """How many become due in each part of an interval that begins after `start`."""
    due = [table.counters.due]
    for number in range(1, parts + 1):
        table.advance(start + number * part, ALL)
        due.append(table.counters.due)
    return [after - before for before, after in itertools.pairwise(due)]


def expected(first: int, last: int, tick: int, interval: int) -> int:
    """The law, from the first deadline of a session and the last."""
    to_place = (first - tick) % interval or interval
    if tick < last:
        return tick + to_place
    return tick + interval - (interval - to_place) // 10


# One session


@given(SEEDS, TICKS, INTERVALS)
def test_the_first_deadline_lies_within_the_interval(seed, now, interval):
    """Never in the tick itself."""
    table = crowd(seed, now, interval, 1)
    assert not table.has_due()
    tick = next_tick(table)
    assert now < tick <= now + interval
    (session,) = table.sessions_now()
    assert table.due_after(session, now, interval) == tick


@given(SEEDS, TICKS, st.integers(1, 2**50), st.lists(st.tuples(st.booleans(), st.floats(0, 3)), max_size=10))
def test_whoever_is_saved_early_is_due_at_their_place_and_whoever_is_late_on_the_way_back(seed, now, interval, saves):
    """Early: somebody asked before the timer was due. The others are saved so much of an interval after that."""
    table = crowd(seed, now, interval, 1)
    (session,) = table.sessions_now()
    first = last = table.due_after(session, now, interval)
    for is_early, part in saves:
        now = last - 1 - int((last - now - 1) * part / 3) if is_early else last + int(interval * part)
        table.ask(session)
        flight = table.take()
        assert flight is not None
        deadline = table.due_after(session, now, interval)
        assert deadline == expected(first, last, now, interval)
        assert now < deadline <= now + interval
        table.acknowledge(*flight, now, deadline)
        last = deadline


@given(SEEDS, st.integers(1, 2**40), st.lists(st.floats(0, 3), max_size=10))
def test_whoever_is_passed_over_goes_the_same_way(seed, interval, lags):
    table = crowd(seed, 0, interval, 1)
    (session,) = table.sessions_now()
    first = last = table.due_after(session, 0, interval)
    table.ask(session)
    flight = table.take()
    assert flight is not None
    table.acknowledge(*flight, 0, last)
    for lag in lags:
        now = last + int(interval * lag)
        passed_over = table.counters.skipped
        table.advance(now, ALL, interval)
        assert table.counters.skipped == passed_over + 1
        last = expected(first, last, now, interval)
        table.advance(last - 1, ALL, interval)
        assert table.counters.skipped == passed_over + 1
    table.advance(last, ALL)
    assert table.has_due()


def test_whoever_is_saved_all_the_time_is_due_by_the_timer_once_in_an_interval():
    interval = 100
    table = crowd(7, 0, interval, 1)
    (session,) = table.sessions_now()
    due = 0
    for now in range(1, 10 * interval + 1):
        table.advance(now, ALL)
        due += table.state(session) == "due"
        table.ask(session)
        flight = table.take()
        assert flight is not None
        table.acknowledge(*flight, now, table.due_after(session, now, interval))
    assert due == 10


def test_a_save_that_takes_longer_than_it_is_to_the_next_deadline_is_followed_by_that():
    interval = 1000
    table = crowd(7, 0, interval, 1)
    (session,) = table.sessions_now()
    place = table.due_after(session, 0, interval)
    table.ask(session)
    flight = table.take()
    assert flight is not None
    table.advance(place + 5, ALL)
    table.acknowledge(*flight, place - 1, table.due_after(session, place - 1, interval))
    table.advance(place + 5, ALL)
    assert table.state(session) == "due"


@pytest.mark.parametrize("interval", [0, 2**64 - 1])
def test_an_interval_that_is_none_or_has_no_end_is_refused(interval):
    table = crowd(0, 0, 10, 1)
    (session,) = table.sessions_now()
    with pytest.raises(UsageError):
        table.due_after(session, 1, interval)


def test_who_was_forgotten_is_due_no_more():
    table = crowd(0, 0, 10, 1)
    (session,) = table.sessions_now()
    table.begin_end(session)
    table.forget(session)
    assert table.due_after(session, 5, 10) == 0


# All of them


@pytest.mark.parametrize("interval", [1000, 720_000, 2**40])
@pytest.mark.parametrize("start", [0, 123_456_789])
def test_a_crowd_that_comes_at_one_tick_is_spread_evenly(interval, start):
    table = crowd(3, start, interval)
    for tenth in due_in_parts(table, start, interval // 10, 10):
        assert abs(tenth - MANY // 10) <= 8


def test_a_crowd_is_spread_over_few_ticks_as_over_many():
    table = crowd(3, 0, 7)
    assert min(due_in_parts(table, 0, 1, 7)) >= MANY // 7 - 4


def test_who_stays_is_spread_evenly_whoever_has_left():
    chance = random.Random(5)
    interval = 10_000
    table = crowd(5, 0, interval)
    for round_ in range(5):
        for session in chance.sample(table.sessions_now(), len(table) // 2):
            table.begin_end(session)
            table.forget(session)
        for number in range(MANY // 3):
            table.identify(table.create(), f"{round_} {number}", {}, 0, interval)
    left = len(table)
    for tenth in due_in_parts(table, 0, interval // 10, 10):
        assert 0.6 * left < 10 * tenth < 1.4 * left


def test_after_everybody_was_saved_at_one_tick_they_are_spread_as_before():
    interval = 10_000
    table = crowd(3, 0, interval)
    for now in range(0, 23_000, 10):
        table.advance(now, ALL)
        save_all_due(table, now, interval)
    for session in table.sessions_now():
        table.ask(session)
    save_all_due(table, now, interval)
    for tenth in due_in_parts(table, now, interval // 10, 10):
        assert abs(tenth - MANY // 10) <= 8 + MANY // 1000


def test_after_a_stall_of_ten_intervals_they_find_their_places_again():
    """All are saved at one tick, and due in the last tenth of what follows; from then on they move apart."""
    interval, now = 10_000, 100_000
    table = crowd(3, 0, interval)
    places = {session: table.due_after(session, 0, interval) % interval for session in table.sessions_now()}
    deadlines = dict.fromkeys(places, now)
    most = MANY
    for round_ in range(100):
        after = {}
        for deadline in sorted(deadlines.values()):
            table.advance(deadline, ALL)
            flight = table.take()
            assert flight is not None
            following = table.due_after(flight[0], deadline, interval)
            assert 0.9 * interval <= following - deadline <= interval
            table.acknowledge(*flight, deadline, following)
            after[flight[0]] = following
        deadlines = after
        if round_ < 5:
            fullest = max(Counter(deadline * 50 // interval for deadline in deadlines.values()).values())
            assert fullest < 0.95 * most
            most = fullest
    assert all((deadline - places[session]) % interval < 10 for session, deadline in deadlines.items())


def test_neighbours_lie_the_golden_ratio_apart_and_a_seed_says_where_they_begin():
    """A seed means the same places on every machine."""
    begins = set()
    for seed in range(20):
        tables = [crowd(seed, 0, 2**32, 100) for _ in range(2)]
        places, again = [[table.due_after(each, 0, 2**32) for each in table.sessions_now()] for table in tables]
        assert places == again
        steps = {(after - before) % 2**32 for before, after in itertools.pairwise(places)}
        assert steps <= {0x9E3779B9, 0x9E3779BA}
        begins.add(places[0])
    assert len(begins) == 20
