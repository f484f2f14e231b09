"""The table, its indexes and its wheel under random calls beside the model; all that can be seen is compared."""

from __future__ import annotations

import gc
import os
import random
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cagey_sessions import (
    AlreadyIdentifiedError,
    InvalidKeyError,
    InvalidUserIdError,
    KeyTakenError,
    Session,
    SessionEndedError,
)
from cagey_sessions._core import DEBUG
from support.model import END_OF_TIME
from support.twins import KEYS, USERS, Clingy, Data, Moody, Text, Twins, Unruly, fail

RIMS = [64**level for level in range(1, 11)]
TEN_YEARS = 10 * 365 * 24 * 3600 * 1000

STARTS = st.one_of(
    st.sampled_from([0, 1, 63, 64, 4095, 2**31 - 5000, 2**32 - 5000, 10**12, 2**62, 2**63 - 100]),
    st.integers(0, 2**63),
)
DELAYS = st.one_of(
    st.integers(0, 3),
    st.integers(0, 200),
    st.sampled_from([rim + by for rim in RIMS[:4] for by in (-1, 0, 1)]),
    st.sampled_from([rim * times + by for rim in RIMS[:9] for times in (1, 2, 63) for by in (-1, 0, 1)]),
    st.sampled_from([2**31, 2**32, TEN_YEARS, *(power + by for power in (2**60, 2**62, 2**63) for by in (-1, 0, 1))]),
)
STRIDES = st.one_of(
    st.integers(0, 3),
    st.integers(0, 200),
    st.sampled_from([rim + by for rim in RIMS[:4] for by in (-1, 0, 1)]),
    st.integers(0, 2**40),
)
LIMITS = st.sampled_from([0, 1, 1, 2, 3, 7, 1000])
INTERVALS = st.one_of(st.just(0), st.integers(1, 100), DELAYS)
# a deadline is at so many ticks from now, before or after, or there is none
DEADLINES = st.one_of(st.none(), DELAYS, st.integers(-5000, 0))
ANYBODY = st.integers(0, 40)
AGAIN = st.one_of(st.just(0), st.integers(1, 100), DELAYS.filter(bool))
DEEDS = st.lists(
    st.tuples(st.sampled_from(["arm", "move", "cancel", "mark"]), ANYBODY, INTERVALS), min_size=1, max_size=6
)
DIGESTS = st.sampled_from([1, 2, 2**64 - 1])
SOME_USER = st.one_of(st.sampled_from(USERS[:2]), st.sampled_from(USERS))


def key_at(place: int) -> str:
    return KEYS[place]


# by their places: the strategy is written out for each draw that a filter refuses, and some keys are very long
SOME_KEY = st.one_of(st.none(), st.sampled_from(KEYS[:3]), st.integers(0, len(KEYS) - 1).map(key_at))


class Machine(RuleBasedStateMachine):
    """What both machines share. Nothing but the rules differs: the more of them, the thinner each is spread."""

    twins: Twins

    def teardown(self) -> None:
        self.twins.over = True

    @invariant()
    def both_look_the_same(self) -> None:
        self.twins.compare()

    def some_live(self) -> bool:
        return bool(self.twins.live)

    def pick(self, number: int) -> Session:
        return self.twins.live[number % len(self.twins.live)]

    def deadline(self, delay: int | None) -> int | None:
        return None if delay is None else min(max(self.twins.now + delay, 0), END_OF_TIME - 1)

    def move_clock(self, stride: int) -> None:
        self.twins.now = min(self.twins.now + stride, END_OF_TIME - 2)

    @rule(stride=STRIDES, limit=LIMITS, again=AGAIN)
    def time_passes(self, stride: int, limit: int, again: int) -> None:
        self.move_clock(stride)
        self.twins.advance(self.twins.now, limit, again)

    @rule(stride=STRIDES, limit=st.integers(1, 3), again=AGAIN, deeds=DEEDS)
    def things_happen_in_a_drain(
        self, stride: int, limit: int, again: int, deeds: list[tuple[str, int, int | None]]
    ) -> None:
        """Rows are armed, moved and cancelled between two calls that stop at their limits."""
        twins = self.twins
        self.move_clock(stride)
        for deed, number, delay in deeds:
            twins.advance(twins.now, limit, again)
            if not twins.live:
                break
            session = self.pick(number)
            if deed == "arm":
                twins.create(None)
                twins.identify(twins.live[-1], f"drained {len(twins.person)}", delay or 0, Data())
            elif deed == "move":
                twins.ask(session)
                twins.take(False)
                if twins.flights:
                    twins.settle(twins.flights.pop(number % len(twins.flights)), True, self.deadline(delay))
            elif deed == "mark":
                twins.mark(session)
            elif len(twins.live) > 1:
                twins.begin_end(session)
                twins.forget(session)
            twins.compare_next_deadline()
        twins.finish(limit)

    @rule(number=ANYBODY, by=st.integers(-1, 1), limit=LIMITS)
    def time_passes_to_a_deadline(self, number: int, by: int, limit: int) -> None:
        deadlines = sorted(person.timer.high for person in self.twins.model.people if person.timer is not None)
        if deadlines:
            self.move_clock(max(deadlines[number % len(deadlines)] + by - self.twins.now, 0))
            self.twins.advance(self.twins.now, limit)

    @rule(limit=st.sampled_from([1, 2, 5, 1000]))
    def what_is_due_is_handed_out(self, limit: int) -> None:
        self.twins.finish(limit)


class TableMachine(Machine):
    """Every call of the table."""

    crowds = 0
    steps_left = 25

    @initialize(
        seed=st.integers(0, 2**64 - 1), start=STARTS, intervals=st.lists(INTERVALS, max_size=8), stored=st.booleans()
    )
    def begin(self, seed: int, start: int, intervals: list[int], stored: bool) -> None:
        self.twins = Twins(seed, start, stored)
        for number, interval in enumerate(intervals):
            self.twins.create(None)
            self.twins.identify(self.twins.live[-1], f"early {number}", interval, Data())

    @rule(key=SOME_KEY)
    def create(self, key: str | None) -> None:
        self.twins.create(key)

    @rule(key=SOME_KEY, user_id=SOME_USER, interval=INTERVALS)
    def arrive(self, key: str | None, user_id: int | str, interval: int) -> None:
        if self.twins.create(key):
            self.twins.identify(self.twins.live[-1], user_id, interval, Data())

    @rule(user_id=SOME_USER, data=st.booleans() | st.just(True))
    def hold(self, user_id: int | str, data: bool) -> None:
        self.twins.hold(user_id, Data() if data else None)

    @precondition(lambda self: self.crowds < 1)
    @rule(interval=INTERVALS)
    def a_crowd_comes(self, interval: int) -> None:
        """So many that the rows move to another place in memory."""
        self.crowds += 1
        for number in range(70):
            self.twins.create(None)
            if number % 8:
                session = self.twins.live[-1]
                self.twins.identify(session, f"crowd {number}", interval, Data())

    @precondition(Machine.some_live)
    @rule(number=ANYBODY, user_id=SOME_USER, interval=INTERVALS, data=st.booleans() | st.just(True))
    def identify(self, number: int, user_id: int | str, interval: int, data: bool) -> None:
        self.twins.identify(self.pick(number), user_id, interval, Data() if data else None)

    @precondition(Machine.some_live)
    @rule(numbers=st.lists(ANYBODY, min_size=1, max_size=4))
    def ask(self, numbers: list[int]) -> None:
        for number in numbers:
            self.twins.ask(self.pick(number))

    @rule(stride=STRIDES)
    def the_clock_runs_on(self, stride: int) -> None:
        """The engine's clock does not wait for it to advance the wheel."""
        self.move_clock(stride)

    @rule(back=st.integers(1, 10_000), limit=LIMITS, again=AGAIN)
    def the_clock_goes_back(self, back: int, limit: int, again: int) -> None:
        self.twins.advance(max(self.twins.now - back, 0), limit, again)

    @precondition(Machine.some_live)
    @rule(number=ANYBODY, how=st.sampled_from(["mark", "data", "clingy"]))
    def mark(self, number: int, how: str) -> None:
        data = {"mark": None, "data": Data(), "clingy": Clingy(self.twins)}[how]
        self.twins.mark(self.pick(number), data)

    @precondition(lambda self: self.twins.model.stored and self.twins.live)
    @rule(number=ANYBODY, version=st.integers(1, 3), digest=DIGESTS, stored=DIGESTS)
    def load(self, number: int, version: int, digest: int, stored: int) -> None:
        """What is loaded belongs to a user nobody has saved."""
        session = self.pick(number)
        if self.twins.table.state(session) in ("none", "idle") and self.twins.person[session].version == 0:
            self.twins.own(session, version, digest, stored)

    @precondition(lambda self: self.twins.model.stored and self.twins.flights)
    @rule(number=ANYBODY, digest=DIGESTS)
    def fix(self, number: int, digest: int) -> None:
        self.twins.fix(number % len(self.twins.flights), digest)

    @precondition(lambda self: self.twins.model.stored and self.twins.live)
    @rule(number=ANYBODY, digest=DIGESTS, meanwhile=st.booleans(), success=st.booleans() | st.just(True))
    def save(self, number: int, digest: int, meanwhile: bool, success: bool) -> None:
        """From the wish to the answer, after which the user may be passed over: if no change came in between."""
        self.twins.ask(self.pick(number))
        self.twins.take(False)
        if self.twins.flights:
            self.twins.fix(-1, digest)
            if meanwhile:
                self.twins.mark(self.twins.flights[-1][0])
            self.twins.settle(self.twins.flights.pop(), success, self.deadline(10))

    @rule(visitors=st.sampled_from([1, 1, 3, 70]))
    def somebody_meddles(self, visitors: int) -> None:
        """Visitors come and go in the middle of the next call, if the collector runs there."""
        self.twins.meddling = visitors

    @rule(outer=SOME_KEY, inner=SOME_KEY)
    def create_within_create(self, outer: str | None, inner: str | None) -> None:
        self.twins.create_within_create(outer, inner)

    @rule(key=SOME_KEY)
    def create_fails(self, key: str | None) -> None:
        Moody.before = fail
        with pytest.raises((Unruly, KeyTakenError)):
            self.twins.table.create(key)
        Moody.before = None

    @rule(number=ANYBODY, text=st.sampled_from(KEYS[:3]))
    def objects_of_users_raise(self, number: int, text: str) -> None:
        """Nobody looks at such keys and ids."""
        table = self.twins.table
        for call in (table.create, table.find_by_key, table.find_by_user):
            with pytest.raises((InvalidKeyError, InvalidUserIdError)):
                call(Text(text))
        if self.twins.live:
            with pytest.raises((InvalidUserIdError, SessionEndedError, AlreadyIdentifiedError)):
                table.identify(self.pick(number), Text(text), Data(), self.twins.now, 5)

    @rule(periodic=st.booleans() | st.just(True), times=st.integers(1, 4))
    def take(self, periodic: bool, times: int) -> None:
        for _ in range(times):
            self.twins.take(periodic)

    @precondition(lambda self: self.twins.flights)
    @rule(number=ANYBODY, success=st.booleans(), delays=st.lists(DEADLINES, min_size=1, max_size=4), interval=AGAIN)
    def settle(self, number: int, success: bool, delays: list[int | None], interval: int) -> None:
        flights = self.twins.flights
        for delay in delays[: len(flights)]:
            self.twins.settle(flights.pop(number % len(flights)), success, self.deadline(delay), interval)

    @precondition(lambda self: self.twins.settled or self.twins.flights)
    @rule(number=ANYBODY, success=st.booleans(), delay=DEADLINES, newer=st.integers(-1, 1))
    def settle_again(self, number: int, success: bool, delay: int | None, newer: int) -> None:
        """An answer that comes twice, or to a version that was never taken."""
        flights = [*self.twins.flights, *self.twins.settled]
        session, version = flights[number % len(flights)]
        if version + newer >= 0 and (session, version + newer) not in self.twins.flights:
            self.twins.settle((session, version + newer), success, self.deadline(delay))

    @precondition(lambda self: self.twins.person)
    @rule(number=ANYBODY, interval=INTERVALS, by=st.integers(-100, 100))
    def look_when_somebody_is_due_again(self, number: int, interval: int, by: int) -> None:
        people = list(self.twins.person)
        self.twins.due_after(people[number % len(people)], min(max(self.twins.now + by, 0), END_OF_TIME), interval)

    @precondition(Machine.some_live)
    @rule(number=ANYBODY)
    def begin_end(self, number: int) -> None:
        self.twins.begin_end(self.pick(number))

    @precondition(Machine.some_live)
    @rule(number=ANYBODY, flag=st.sampled_from(("lose", "final", "released")), on=st.booleans())
    def flag(self, number: int, flag: str, on: bool) -> None:
        session = self.pick(number)
        if flag == "lose":
            self.twins.lose(session)
        elif flag == "final":
            self.twins.set_final(session, on)
        else:
            self.twins.set_released(session, on)

    @precondition(Machine.some_live)
    @rule(number=ANYBODY, begin=st.booleans() | st.just(True))
    def forget(self, number: int, begin: bool) -> None:
        session = self.pick(number)
        if begin:
            self.twins.begin_end(session)
        self.twins.forget(session)

    @precondition(lambda self: self.twins.gone)
    @rule(number=ANYBODY, let_go=st.booleans(), user_id=SOME_USER)
    def use_a_stale_handle(self, number: int, let_go: bool, user_id: int | str) -> None:
        gone = self.twins.gone
        session = gone[-1 - number % len(gone)]
        if let_go:
            self.twins.let_go(session)
        self.twins.identify(session, user_id, 1, Data())
        self.twins.ask(session)
        self.twins.begin_end(session)
        self.twins.lose(session)
        self.twins.set_final(session, True)
        self.twins.set_released(session, True)
        self.twins.forget(session)
        self.twins.settle((session, self.twins.person[session].version), True, None)

    @precondition(lambda self: len(self.twins.walks) < 4)
    @rule(identified=st.booleans() | st.just(True), to_the_end=st.booleans())
    def start_walk(self, identified: bool, to_the_end: bool) -> None:
        self.twins.start_walk(identified, to_the_end)

    @precondition(lambda self: self.twins.walks)
    @rule(number=ANYBODY, steps=st.sampled_from([1, 1, 2, 3, 1000]))
    def walk_on(self, number: int, steps: int) -> None:
        walk = self.twins.walks[number % len(self.twins.walks)]
        for _ in range(steps):
            if not self.twins.step_walk(walk):
                return
        assert steps < 1000, "no end to a walk"

    @precondition(lambda self: self.twins.walks)
    @rule(number=ANYBODY, close=st.booleans() | st.just(True))
    def stop_walking(self, number: int, close: bool) -> None:
        """By `close`, or by forgetting the walk, marks and all."""
        walk = self.twins.walks.pop(number % len(self.twins.walks))
        if close:
            self.twins.stop_walk(walk)

    @precondition(lambda self: self.steps_left == 0)
    @rule()
    def everything_ends(self) -> None:
        self.steps_left = 25
        self.twins.everything_ends()

    @invariant()
    def count_steps(self) -> None:
        self.steps_left = max(self.steps_left - 1, 0)


class WheelMachine(Machine):
    """Rows in and out of the wheel, and nothing else: a dozen sessions, moved by the calls that move them."""

    @initialize(start=STARTS, delays=st.lists(DELAYS, min_size=1, max_size=12))
    def begin(self, start: int, delays: list[int]) -> None:
        self.twins = Twins(0, start)
        for number in range(12):
            self.twins.create(None)
            self.twins.identify(self.twins.live[-1], number, 0, Data())
        self.arm(0, delays)

    @rule(number=ANYBODY, delays=st.lists(DELAYS | st.integers(-5000, 0), min_size=1, max_size=6))
    def arm(self, number: int, delays: list[int]) -> None:
        """Arm rows, or move them if they were armed, or out of a lane."""
        for place, delay in enumerate(delays):
            self.twins.ask(self.pick(number + place))
            while self.twins.table.has_due(False):
                self.twins.take(False)
            for flight in self.twins.flights:
                self.twins.settle(flight, True, self.deadline(delay))
            self.twins.flights.clear()

    @rule(number=ANYBODY)
    def disarm(self, number: int) -> None:
        """End a session in the wheel or a lane; another takes its row."""
        session = self.pick(number)
        user_id = session.user_id
        self.twins.begin_end(session)
        self.twins.forget(session)
        self.twins.create(None)
        if user_id is not None:  # the deadline of one who came in a drain may lie past the end of time
            self.twins.identify(self.twins.live[-1], user_id, 0, Data())

    @rule(limit=LIMITS.filter(bool))
    def wake_up_as_the_engine_does(self, limit: int) -> None:
        tick = self.twins.table.next_deadline()
        if tick is not None:
            self.twins.now = max(self.twins.now, tick)
            self.twins.advance(self.twins.now, limit)

    @rule()
    def save_those_who_are_due(self) -> None:
        while self.twins.model.due:
            self.twins.take(True)
        for flight in self.twins.flights:
            self.twins.settle(flight, False, self.deadline(30))
        self.twins.flights.clear()


TestTable = TableMachine.TestCase
TestWheel = WheelMachine.TestCase


# the clock that could interrupt is a timer of signals, and Windows has none: there is nothing to look at
@pytest.mark.skipif(not hasattr(signal, "getitimer"), reason="this system has no such timer")
@given(st.integers())
@settings(max_examples=1)
def test_no_clock_interrupts_a_history(number):
    """What it had broken off would count as a history that fails, and pass when it is tried again."""
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.guarantee("I9")
def test_a_thousand_sessions_in_random_interleaving():
    """Create, re-arm, disarm, ask, end and tick on 1,000 sessions: wheel, table and model agree throughout.

    As many steps as the profile has examples, times 100.
    """
    chance = random.Random(57)
    twins = Twins(57, 10**12)
    free: list[int] = []

    def come(user_id: int) -> None:
        twins.create(str(user_id))
        twins.identify(twins.live[-1], user_id, chance.choice([1, 64, 1000, 30_000]), Data())

    for user_id in range(1000 if not DEBUG else 200):
        come(user_id)
    steps = settings().max_examples * 100
    for step in range(steps):
        session = chance.choice(twins.live)
        match chance.randrange(8):
            case 0:
                twins.now += chance.choice([0, 1, 10, 64, 500, 5000])
                twins.advance(twins.now, chance.choice([1, 10, 100, 10_000]))
            case 1:
                twins.ask(session)
            case 2 | 3:
                twins.take(chance.random() < 0.8)
            case 4 | 5 if twins.flights:
                flight = twins.flights.pop(chance.randrange(len(twins.flights)))
                deadline = chance.choice([None, -10, 0, 1, 63, 64, 65, 4096, 30_000, 10**9])
                twins.settle(flight, chance.random() < 0.7, None if deadline is None else twins.now + deadline)
            case 6:
                twins.begin_end(session)
            case 7 if twins.person[session].ending:
                twins.forget(session)
                twins.let_go(session)
                free.append(session.user_id)
                come(free.pop(chance.randrange(len(free))))
        if step % 500 == 0:
            twins.compare()
    twins.compare()
    twins.everything_ends()
    twins.compare()


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("threshold", range(1, 12))
def test_a_look_at_the_table_outlives_a_collection_in_its_middle(threshold, stored):
    """Found at night: on a debug build what visitors had left behind was counted only in part."""
    twins = Twins(0, 0, stored)
    for _ in range(3):
        twins.meddling = 1
        with twins.meddled():
            gc.set_threshold(threshold, 1000, 1000)
            for _ in range(20):
                twins.table.create()


def test_the_nightly_profile_takes_a_hundred_thousand_steps():
    nightly = settings.get_profile("nightly")
    assert nightly.max_examples * nightly.stateful_step_count >= 10**5 or "CAGEY_TEST_EXAMPLES" in os.environ
