"""The timing wheel against a sorted list: when rows come out, in which order, and how far one call may walk.

The wheel is private to the table, so a session is its handle: `arm` brings one into the wheel with any deadline, and
whoever `take` hands out has come out of it.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import tracemalloc
import weakref
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cagey_sessions import Session, UsageError
from cagey_sessions._core import DEBUG, SessionTable
from support.model import END_OF_TIME, MOST_WALKS

MANY = 300 if DEBUG else 10_000
"""A debug build looks at every row after every call."""
ALL = 2**32 - 1
RIMS = [64**level for level in range(1, 11)]
TEN_YEARS = 10 * 365 * 24 * 3600 * 1000
LONG = [2**31, 2**32, TEN_YEARS, 2**63 - 1]

DELAYS = st.one_of(
    st.integers(0, 2),
    st.integers(0, 100),
    st.sampled_from([rim + by for rim in RIMS for by in (-1, 0, 1)]),
    st.sampled_from([rim * times + by for rim in RIMS[:9] for times in (2, 3, 63) for by in (-1, 0, 1)]),
    st.sampled_from([long + by for long in LONG for by in (-1, 0, 1)]),
)
STARTS = st.one_of(st.sampled_from([0, 63, 4095, 2**31 - 1, 2**32 - 1, 10**12]), st.integers(0, 2**62))
STRIDES = st.one_of(st.integers(0, 2), st.integers(0, 5000), DELAYS)


class Wheel:
    """A table used as a wheel and nothing else."""

    def __init__(self, start: int = 0) -> None:
        self.table = SessionTable(Session, None)
        self.table.advance(start, 1)
        self.users = 0

    def put(self, deadline: int | None = None) -> Session:
        """A new session, in the wheel if there is a deadline."""
        session = self.table.create()
        self.table.identify(session, self.users, {}, 0)
        self.users += 1
        if deadline is not None:
            self.arm(session, deadline)
        return session

    def arm(self, session: Session, deadline: int) -> None:
        """Put a session into the wheel, or move it there."""
        assert not self.table.has_due(False)
        self.table.ask(session)
        taken = self.table.take(False)
        assert taken is not None
        assert taken[0] is session
        self.table.acknowledge(*taken, 0, deadline)

    def drop(self, session: Session) -> None:
        self.table.begin_end(session)
        self.table.forget(session)

    def out(self) -> list[Session]:
        """Those who have come out of the wheel since the last call, in that order."""
        taken = []
        while (flight := self.table.take()) is not None:
            taken.append(flight[0])
            self.table.acknowledge(*flight, 0)
        return taken

    def advance(self, now: int, limit: int = ALL) -> list[Session]:
        assert self.table.advance(now, limit) < limit
        return self.out()


@pytest.mark.guarantee("I26")
@given(STARTS, st.lists(st.tuples(st.lists(DELAYS, max_size=4), STRIDES), max_size=12))
def test_rows_come_out_like_from_a_sorted_list(start, steps):
    """At the first `advance` that reaches their deadline, none early, none late, earlier deadlines first."""
    wheel, now = Wheel(start), start
    pending: list[tuple[int, int, Session]] = []
    deadlines: dict[Session, int] = {}
    for delays, stride in [*steps, ([], 2**63 + 1)]:
        for delay in delays:
            deadline = min(now + delay, END_OF_TIME - 1)
            session = wheel.put(deadline)
            deadlines[session] = deadline
            heapq.heappush(pending, (deadline, len(deadlines), session))
        assert wheel.table.armed == len(pending)
        now = min(now + stride, END_OF_TIME - 1)
        expected = []
        while pending and pending[0][0] <= now:
            expected.append(heapq.heappop(pending))
        out = wheel.advance(now)
        assert [deadlines[session] for session in out] == [deadline for deadline, _, _ in expected]
        assert set(out) == {session for _, _, session in expected}
    assert wheel.table.armed == len(pending)


@given(STARTS, st.lists(DELAYS, min_size=1, max_size=12), st.sampled_from([1, 2, 1000]))
def test_who_sleeps_until_next_deadline_wakes_on_time_and_not_too_often(start, delays, limit):
    """`next_deadline` is never late and, in the end, exact; it costs at most one wake-up a level for each deadline."""
    wheel, wakes = Wheel(start), 0
    deadlines = {wheel.put(start + delay): start + delay for delay in delays}
    while deadlines:
        tick = wheel.table.next_deadline()
        assert tick is not None
        assert tick <= min(deadlines.values()), "late"
        wakes += 1
        while wheel.table.advance(tick, limit) == limit:
            pass
        for session in wheel.out():
            assert deadlines.pop(session) == tick
    assert wheel.table.next_deadline() is None
    assert wakes <= MOST_WALKS * len(set(delays))


@pytest.mark.parametrize("deadline", [0, 1, 64, 4095, 4096, 999_999, 1_000_000])
def test_a_deadline_that_has_passed_already_is_due_now(deadline):
    """Neither lost behind the wheel's place nor kept until it comes round."""
    wheel = Wheel(1_000_000)
    session = wheel.put(deadline)
    assert wheel.table.armed == 1
    assert wheel.table.next_deadline() == 1_000_000
    assert wheel.advance(1_000_000) == [session]


@pytest.mark.parametrize("deadline", [-1, 2**64, "1"])
def test_a_deadline_that_cannot_be_represented_is_refused_and_nothing_changes(deadline):
    wheel = Wheel()
    session = wheel.put()
    for settle in ("acknowledge", "fail"):
        wheel.table.ask(session)
        flight = wheel.table.take()
        arguments = (*flight, 0) if settle == "acknowledge" else flight
        with pytest.raises((OverflowError, TypeError)):
            getattr(wheel.table, settle)(*arguments, deadline)
        assert wheel.table.state(session) == "saving"
        assert wheel.table.counters.in_flight == 1
        assert wheel.table.armed == 0
        assert getattr(wheel.table, settle)(*arguments, 1)
        assert wheel.advance(1) == [session]


@pytest.mark.parametrize("now", [0, 10, 2**63, 2**64 - 2])
@pytest.mark.parametrize("interval", [1, 2**63, 2**64 - 2, 2**64 - 1])
def test_an_interval_that_ends_past_the_end_of_time_is_refused(now, interval):
    """No first deadline may wrap around to the beginning."""
    for seed in range(5):
        table = SessionTable(Session, None, seed=seed)
        session = table.create()
        if now + interval >= END_OF_TIME:
            with pytest.raises(UsageError, match="end of time"):
                table.identify(session, 1, {}, now, interval)
            assert table.state(session) == "none"
            assert session.user_id is None
            assert table.find_by_user(1) is None
        else:
            table.identify(session, 1, {}, now, interval)
            table.advance(now, 100)
            assert not table.has_due()


def test_a_deadline_at_the_last_tick_of_time_is_a_deadline():
    """While a row is in the wheel `next_deadline` is not None, and at that tick the row comes out."""
    wheel = Wheel(END_OF_TIME - 10)
    session = wheel.put(END_OF_TIME)
    assert wheel.table.next_deadline() == END_OF_TIME
    assert wheel.advance(END_OF_TIME - 1) == []
    assert wheel.advance(END_OF_TIME) == [session]


@pytest.mark.parametrize("power", [31, 32])
def test_no_gap_and_no_burst_where_32_bits_of_milliseconds_end(power):
    """Saved every 1,000 ticks from five seconds before the rim to five seconds after it, as an engine would do it."""
    edge = 2**power - 1
    now, interval = edge - 5000, 1000
    table = SessionTable(Session, None, seed=53)
    table.advance(now, 1)
    saved_at: dict[Session, list[int]] = {}
    for user_id in range(20):
        session = table.create()
        table.identify(session, user_id, {}, now, interval)
        saved_at[session] = [now]
    while now < edge + 5000:
        tick = table.next_deadline()
        assert tick is not None
        assert tick > now or table.has_due(), "a wake-up that brings nothing"
        now = tick
        table.advance(now, ALL)
        while (flight := table.take()) is not None:
            saved_at[flight[0]].append(now)
            table.acknowledge(*flight, now, table.due_after(flight[0], now, interval))
    for ticks in saved_at.values():
        gaps = [after - before for before, after in itertools.pairwise(ticks)]
        assert 1 <= gaps[0] <= interval
        assert gaps[1:] == [interval] * (len(gaps) - 1)
        assert len(gaps) in (10, 11)


def test_after_a_jump_of_two_hours_each_is_handed_out_once():
    """Ten missed intervals are one save, however many rows one call may walk; and none waits for all others."""
    table = SessionTable(Session, None, seed=55)
    people = set()
    for user_id in range(MANY):
        session = table.create()
        table.identify(session, user_id, {}, 0, 720_000)
        people.add(session)
    now = 7_200_000
    assert table.advance(now, 100) == 100
    assert table.counters.due > 0, "the first are handed out before all are walked"
    for _ in range(MOST_WALKS * MANY // 100):
        walked = table.advance(now, 100)
        if walked < 100:
            break
    assert walked < 100
    out = []
    while (flight := table.take()) is not None:
        out.append(flight[0])
        table.acknowledge(*flight, now, now + 720_000)
        table.advance(now, 100)
    assert len(out) == len(people)
    assert set(out) == people
    assert table.armed == len(people)


@given(st.integers(1, 40), st.integers(1, 10), st.data())
def test_a_neighbour_removed_while_a_bucket_is_half_done_strands_nobody(count, limit, data):
    """Caffeine 3e66fe9de: whoever is behind the removed one, or the removed one's next, comes out all the same."""
    level = data.draw(st.integers(1, 5), "level")
    start = RIMS[level - 1]
    offsets = st.one_of(st.integers(0, 2), st.integers(0, min(start, 4096) - 1))
    wheel = Wheel()
    people = [wheel.put(start + data.draw(offsets)) for _ in range(count)]
    wheel.table.advance(start, limit)
    out = wheel.out()
    waiting = [session for session in people if session not in out]
    places = st.integers(0, len(waiting) - 1)  # hypothesis keeps what it chooses from: not the sessions
    for victim in [waiting[at] for at in data.draw(st.lists(places, unique=True) if waiting else st.just([]))]:
        waiting.remove(victim)
        if data.draw(st.booleans(), "moved and not removed"):
            wheel.arm(victim, start)
            waiting.append(victim)
        else:
            wheel.drop(victim)
    assert wheel.table.armed == len(waiting)
    walked = limit
    while walked == limit:
        walked = wheel.table.advance(2 * start, limit)
        assert wheel.table._check() is DEBUG
    out = wheel.out()
    assert len(out) == len(waiting)
    assert set(out) == set(waiting)
    assert wheel.table.armed == 0


@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 4095), st.integers(1, 2))
def test_a_half_done_bucket_hides_no_nearer_deadline(count, limit, nearer, level):
    """Caffeine 7cc9f1f41: a deadline that arrives while a far bucket is half done is neither hidden nor late."""
    start = RIMS[level]
    wheel = Wheel()
    for _ in range(count):
        wheel.put(2 * start - 1)
    unfinished = wheel.table.advance(start, limit) == limit
    nearer = start + nearer % (start - 1)
    session = wheel.put(nearer)
    tick = wheel.table.next_deadline()
    assert tick is not None
    assert tick <= nearer
    while unfinished:
        unfinished = wheel.table.advance(start, limit) == limit
    if nearer > start:
        assert wheel.advance(nearer - 1) == []
    assert wheel.out() + wheel.advance(nearer) == [session]
    assert len(wheel.advance(2 * start - 1)) == count


@pytest.mark.guarantee("I27")
def test_one_call_walks_at_most_limit_rows_cascades_included():
    """A far bucket with 10,000 rows is taken apart a hundred at a time, and the rest is first in line."""
    wheel = Wheel()
    people = [wheel.put(64**3 + 1 + number % 4000) for number in range(MANY)]
    nearer = wheel.put(64**3)
    assert wheel.table.next_deadline() == 64**3
    walked = []
    while True:
        due = wheel.table.counters.due
        walked.append(wheel.table.advance(64**3, 100))
        assert wheel.table.counters.due - due <= walked[-1]
        assert wheel.table.armed + wheel.table.counters.due == MANY + 1
        if walked[-1] < 100:
            break
        assert wheel.table.next_deadline() == 64**3, "the rest is first in line"
    # none but `nearer` was due: each other row was walked once, from its far bucket into a nearer one
    assert walked == [100] * (MANY // 100) + [1]
    assert wheel.out() == [nearer]
    late = wheel.table.advance(64**3 + 4000, ALL)
    assert MANY <= late <= 2 * MANY
    assert set(wheel.out()) == set(people)


def test_no_row_is_walked_without_a_limit():
    wheel = Wheel()
    session = wheel.put(10)
    assert wheel.table.advance(10, 0) == 0
    assert not wheel.table.has_due()
    assert wheel.advance(10) == [session]


@pytest.mark.parametrize("edge", [*RIMS[:5], TEN_YEARS, 2**31, 2**32])
def test_a_session_armed_a_thousand_times_has_one_deadline_the_last(edge):
    """Around the edges of buckets and of levels: one entry in the wheel, and it comes out at the last deadline only."""
    wheel = Wheel(max(edge - 100, 0))
    session, other = wheel.put(edge), wheel.put(edge + 63)
    for number in range(1000):
        deadline = edge + (number * 37) % 200 - 50
        wheel.arm(session, deadline)
        assert wheel.table.armed == 2
    assert deadline == edge + (999 * 37) % 200 - 50
    wheel.arm(session, edge + 64)
    assert wheel.advance(edge + 62) == []
    assert wheel.advance(edge + 63) == [other]
    assert wheel.advance(edge + 64) == [session]
    assert wheel.advance(edge + 2**40) == []


def test_a_hundred_sessions_that_come_and_go_hold_a_hundred_entries_at_most():
    """A deadline that is given up is not left behind until it passes."""
    wheel = Wheel()
    people = [wheel.put() for _ in range(100)]
    for round_ in range(10 if DEBUG else 200):
        for session in people:
            wheel.arm(session, round_ + 30_000)
            assert wheel.table.armed <= 100
    for session in people:
        wheel.table.ask(session)
    assert wheel.table.armed == 0


def test_an_ended_session_leaves_nothing_in_the_wheel_and_its_data_is_freed_at_once():
    """Without the collector, and long before the deadline; and the memory of its row is used again."""

    class Payload:
        pass

    table = SessionTable(Session, None)

    def come_and_go(user_id: int) -> tuple[weakref.ref[Any], weakref.ref[Any]]:
        session = table.create("key")
        table.identify(session, user_id, Payload(), 0, 3_600_000)
        session.set("client", session.user_data)
        assert table.armed == 1
        payload, handle = weakref.ref(session.user_data), weakref.ref(session)
        table.begin_end(session)
        assert table.armed == 0
        table.forget(session)
        session._end("destroyed")
        return payload, handle

    gc.disable()
    try:
        come_and_go(0)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for user_id in range(MANY):
            payload, handle = come_and_go(user_id)
            assert payload() is None
            assert handle() is None
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
        gc.enable()
    assert after - before < 10_000
    assert table.next_deadline() is None


def test_the_data_of_an_ended_session_is_freed_although_its_handle_is_kept():
    class Payload:
        pass

    table = SessionTable(Session, None)
    session = table.create()
    table.identify(session, 1, Payload(), 0, 10)
    payload = weakref.ref(session.user_data)
    table.begin_end(session)
    assert payload() is not None, "the last save needs it"
    table.forget(session)
    session._end("destroyed")
    assert payload() is None


def test_who_ends_in_the_tick_that_would_save_them_is_counted_down_once():
    """The first of eleven ends the other ten: none of them is saved, and the counters are exact."""
    wheel = Wheel()
    people = [wheel.put(100) for _ in range(11)]
    wheel.table.advance(100, ALL)
    assert wheel.table.counters.due == 11
    first = wheel.table.take()
    assert first is not None
    for session in people:
        if session is not first[0]:
            wheel.drop(session)
    assert wheel.table.counters.due == wheel.table.armed == 0
    assert wheel.table.counters.in_flight == 1
    assert wheel.table.take() is None
    assert not wheel.table.has_due()
