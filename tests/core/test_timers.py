"""`TimingWheel` against a dict of deadlines: what is due, when, and which ids are refused."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cagey_sessions import UsageError
from cagey_sessions._core import TimingWheel
from support.model import END_OF_TIME

RIMS = [64**level + by for level in range(1, 11) for by in (-1, 0, 1)]
DELAYS = st.one_of(st.integers(0, 100), st.sampled_from(RIMS), st.integers(0, 2**62))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("schedule"), DELAYS),
        st.tuples(st.just("refresh"), st.integers(0, 1000), DELAYS),
        st.tuples(st.just("cancel"), st.integers(0, 1000)),
        st.tuples(st.just("advance"), DELAYS, st.sampled_from([1, 2, 7, 1000])),
    ),
    max_size=60,
)


def advance(wheel: TimingWheel, now: int, limit: int) -> list[int]:
    due = wheel.advance(now, limit)
    assert len(due) <= limit
    while (tick := wheel.next_deadline()) is not None and tick <= now:
        due += wheel.advance(now, limit)
    return due


@given(st.sampled_from([0, 63, 2**32 - 1, 10**12]), STEPS)
def test_what_is_due_is_what_a_dict_says(start, steps):
    """Whatever was put off, brought forward or cancelled: none early, none late, each once."""
    wheel, now = TimingWheel(start), start
    deadlines: dict[int, int] = {}

    def expect(now: int, limit: int) -> None:
        due = advance(wheel, now, limit)
        assert sorted(due) == sorted(timer for timer, deadline in deadlines.items() if deadline <= now)
        order = [deadlines.pop(timer) for timer in due]
        assert [max(deadline, started) for deadline in order] == sorted(max(deadline, started) for deadline in order)

    for name, *arguments in steps:
        started = now
        if name == "schedule":
            deadline = min(now + arguments[0], END_OF_TIME - 1)
            timer = wheel.schedule(deadline)
            assert timer not in deadlines
            deadlines[timer] = deadline
        elif name == "advance":
            now = min(now + arguments[0], END_OF_TIME - 1)
            expect(now, arguments[1])
        elif deadlines:
            timer = list(deadlines)[arguments[0] % len(deadlines)]
            if name == "refresh":
                deadlines[timer] = min(now + arguments[1], END_OF_TIME - 1)
                wheel.refresh(timer, deadlines[timer])
            else:
                wheel.cancel(timer)
                del deadlines[timer]
        assert len(wheel) == len(deadlines)
        tick = wheel.next_deadline()
        assert (tick is None) == (not deadlines)
        assert tick is None or tick <= max(now, min(deadlines.values()))
    started = now
    expect(END_OF_TIME - 1, 1000)
    assert not deadlines


def test_a_timer_put_off_many_times_moves_once():
    wheel = TimingWheel()
    timer = wheel.schedule(10)
    for deadline in range(11, 1000):
        wheel.refresh(timer, deadline)
    assert wheel.next_deadline() == 10
    assert wheel.advance(10, 1) == []
    assert wheel.next_deadline() > 10
    assert advance(wheel, 998, 10) == []
    assert advance(wheel, 999, 10) == [timer]


@pytest.mark.parametrize("timer", [0, 1, 703, 704, 705, 10**6, 2**32 - 1])
def test_an_id_that_names_no_timer_is_refused(timer):
    wheel = TimingWheel()
    for change in (wheel.cancel, lambda timer: wheel.refresh(timer, 1)):
        with pytest.raises(UsageError):
            change(timer)
    assert wheel.next_deadline() is None


def test_an_id_is_refused_once_it_was_due_or_cancelled():
    wheel = TimingWheel()
    first, second = wheel.schedule(1), wheel.schedule(2)
    assert wheel.advance(1, 10) == [first]
    wheel.cancel(second)
    for timer in (first, second):
        with pytest.raises(UsageError):
            wheel.cancel(timer)


def test_the_end_of_time_is_no_deadline():
    wheel = TimingWheel()
    timer = wheel.schedule(5)
    with pytest.raises(UsageError):
        wheel.schedule(2**64 - 1)
    with pytest.raises(UsageError):
        wheel.refresh(timer, 2**64 - 1)
    with pytest.raises(OverflowError):
        wheel.refresh(timer, -1)
    assert wheel.next_deadline() == 5


def test_a_wheel_is_neither_copied_nor_pickled():
    with pytest.raises(TypeError):
        pickle.dumps(TimingWheel())
