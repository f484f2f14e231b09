"""Timers by themselves. What lives here: `TimingWheel`, called from Python, against the loops' own timers and a heap.
What must not: sessions, and a manager's wheel, which is driven from C.

A million timers 1 to 31 s away, in ticks of a millisecond, armed in shuffled order. A round takes a twentieth of them
back and puts off another; each time those that were left alone for longest, in an order that is neither that of arming
nor that of memory, so they are not in the cache. The loops' timers get one context and one callback for all, for
copying a context for each costs them time.

Arming is into memory that is new, on both sides. Of a wheel's timers a million are armed, for to get the memory of a
few takes one time or another; of a loop's a twentieth, beside the million, which costs as much for each and not
seconds.

Loops put off a part of the work of cancelling until a later turn. uvloop does it in the next one, which is on the
clock. asyncio clears its heap when half of it is cancelled, once in a million cancels here: `ArmedLoop.clear` has it do
that in each round, and each cancel is charged its share. What ours puts off, moving a timer that was refreshed, comes
when its bucket is reached, once for however many refreshes; `timer_move` shows what that costs.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from asyncio import base_events
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any
from unittest import mock

from cagey_sessions._core import TimingWheel

from ..rivals.heap import HeapTimers
from .base import SEED, Figure, Goal, Pair, Sizes, Workload, both_at_a_time, clock, deadlines_between, new_loop, plain
from .memory import grown_since, resident

FIRST, LAST = 1_000, 31_000
"""Milliseconds."""
TICKS = 20_000
BATCH = 500
PARTS = 10
"""One of so many comes due in a round,"""
TOUCHED = 20
"""and one of so many is taken back, and another put off."""

WHEELS: dict[str, Callable[[], Any]] = {"ours": TimingWheel, "heapq": HeapTimers}


def deadlines_of(count: int) -> list[int]:
    return deadlines_between(FIRST, LAST, count)


def size_for(rival: str, sizes: Sizes) -> int:
    """A million, but for the heap, which takes seconds to see a million off."""
    return sizes.many if rival == "heapq" else sizes.most


def delays_of(count: int) -> list[float]:
    """An hour more: nothing is to come due while the other side runs."""
    return [3600 + deadline / 1000 for deadline in deadlines_of(count)]


def nothing() -> None:
    """What a timer calls."""


async def one_turn() -> None:
    await asyncio.sleep(0)


@contextmanager
def loop_of(kind: str) -> Iterator[asyncio.AbstractEventLoop]:
    loop = new_loop(kind)
    try:
        yield loop
    finally:
        loop.close()


# Arming, taking back, putting off


class Population:
    """Timers in parts, each in no order; a part that was touched is touched again after all the others."""

    def __init__(self, timers: list[Any]) -> None:
        self.source = random.Random(SEED)
        self.size = max(1, len(timers) // TOUCHED)
        self.parts: deque[list[Any]] = deque()
        self.give(timers)

    def take(self) -> list[Any]:
        return self.parts.popleft()

    def give(self, timers: list[Any]) -> None:
        shuffled = self.source.sample(timers, len(timers))
        self.parts.extend(shuffled[first : first + self.size] for first in range(0, len(timers), self.size))


def at_hand(timers: list[int]) -> list[int]:
    """Ids, each an int made anew: whoever uses one has just found it in a session, say.

    As they are the ints lie about in memory, and to fetch one costs as much as what is measured.
    """
    return [timer + 0 for timer in timers]


class Armed:
    """A million timers of ours, or of a heap."""

    def __init__(self, rival: str, count: int) -> None:
        self.make = WHEELS[rival]
        self.wheel = self.make()
        self.deadlines = deadlines_of(count)
        self.population = Population([self.wheel.schedule(deadline) for deadline in self.deadlines])

    def touch(self) -> tuple[float, ...]:
        """What it costs to arm a timer, to take it back, to put it off, and to bring it forward."""
        return self.schedule(), self.cancel(), *self.refresh()

    def schedule(self) -> float:
        schedule = self.make().schedule
        start = clock()
        armed = [schedule(deadline) for deadline in self.deadlines]
        return (clock() - start) / len(armed)

    def cancel(self) -> float:
        touched = at_hand(self.population.take())
        cancel = self.wheel.cancel
        start = clock()
        for timer in touched:
            cancel(timer)
        elapsed = clock() - start
        self.population.give([self.wheel.schedule(deadline) for deadline in deadlines_of(len(touched))])
        return elapsed / len(touched)

    def refresh(self) -> tuple[float, float]:
        """They are put off; then a tenth of them is armed anew and brought forward, so that each moves at once."""
        touched = at_hand(self.population.take())
        later = deadlines_between(LAST, 2 * LAST, len(touched))
        put_off = self.give(touched, later)
        some = len(touched) // 10 + 1
        for timer in touched[:some]:
            self.wheel.cancel(timer)
        fresh = [self.wheel.schedule(deadline) for deadline in later[:some]]
        random.Random(SEED).shuffle(fresh)
        moved = self.give(at_hand(fresh), deadlines_of(len(fresh)))
        self.population.give(fresh + touched[some:])
        return put_off, moved

    def give(self, timers: list[int], deadlines: list[int]) -> float:
        refresh = self.wheel.refresh
        start = clock()
        for timer, deadline in zip(timers, deadlines, strict=True):
            refresh(timer, deadline)
        return (clock() - start) / len(timers)


class ArmedLoop:
    """The same with a loop's own timers."""

    def __init__(self, kind: str, count: int) -> None:
        self.loop = new_loop(kind)
        self.context = copy_context()
        self.kept: list[Any] = []  # armed or cancelled: a handle let go of is where the next one is made, out of cache
        self.population = Population(self.arm(count)[0])
        self.armed = count

    def touch(self) -> tuple[float, ...]:
        scheduled, cancelled, refreshed = self.schedule(), self.cancel(), self.refresh()
        share = self.clear() / self.armed
        return scheduled, cancelled + share, refreshed + share, refreshed + share

    def arm(self, count: int) -> tuple[list[Any], float]:
        delays, call_later, context = delays_of(count), self.loop.call_later, self.context
        start = clock()
        armed = [call_later(delay, nothing, context=context) for delay in delays]
        return armed, clock() - start

    def take_back(self, timers: list[Any]) -> float:
        start = clock()
        for timer in timers:
            timer.cancel()
        self.loop.run_until_complete(one_turn())
        return clock() - start

    def schedule(self) -> float:
        armed, elapsed = self.arm(self.population.size)
        self.kept += armed
        self.armed += len(armed)
        return elapsed / len(armed)

    def cancel(self) -> float:
        touched = self.population.take()
        elapsed = self.take_back(touched)
        self.kept += touched
        self.population.give(self.arm(len(touched))[0])
        return elapsed / len(touched)

    def refresh(self) -> float:
        touched = self.population.take()
        delays, call_later, context = delays_of(len(touched)), self.loop.call_later, self.context
        moved = []
        start = clock()
        for timer, delay in zip(touched, delays, strict=True):
            timer.cancel()
            moved.append(call_later(delay, nothing, context=context))
        self.loop.run_until_complete(one_turn())
        elapsed = clock() - start
        self.kept += touched
        self.population.give(moved)
        return elapsed / len(touched)

    def clear(self) -> float:
        """asyncio clears its heap, by its own code, but sooner: with a tenth of as many cancelled as stay.

        A loop that does not put this off has nothing to do here.
        """
        with mock.patch.object(base_events, "_MIN_CANCELLED_TIMER_HANDLES_FRACTION", 0):
            start = clock()
            self.loop.run_until_complete(one_turn())
            return clock() - start

    def turns(self) -> float:
        async def turn() -> float:
            start = clock()
            for _ in range(TICKS // 10):
                await asyncio.sleep(0)
            return (clock() - start) / (TICKS // 10)

        return self.loop.run_until_complete(turn())

    def close(self) -> None:
        for timers in (self.kept, *self.population.parts):
            for timer in timers:
                timer.cancel()
        self.loop.close()


@contextmanager
def touch(rival: str, sizes: Sizes) -> Iterator[Pair]:
    count = size_for(rival, sizes)
    ours = Armed("ours", count)
    base = Armed(rival, count) if rival in WHEELS else ArmedLoop(rival, count)
    yield Pair(ours.touch, base.touch)
    if isinstance(base, ArmedLoop):
        base.close()


# Coming due


class Coming:
    """A million timers of ours, or of a heap, of which the next tenth comes due in each round; as many are armed again
    behind the last, outside the clock.

    That is a million at any moment, and each has left the cache when its turn comes. All of a tenth are due at once,
    which is the best that can happen to a loop: spread over ticks it pays for a turn at each.
    """

    def __init__(self, rival: str, count: int) -> None:
        self.size = max(1, count // PARTS)
        self.span = (LAST - FIRST) // PARTS
        self.now = FIRST
        self.start(rival)
        deadlines = [deadline for part in range(PARTS) for deadline in self.part(part)]
        random.Random(SEED).shuffle(deadlines)
        self.arm(deadlines)

    def start(self, rival: str) -> None:
        self.wheel = WHEELS[rival]()

    def part(self, number: int) -> list[int]:
        """Deadlines of those that come due after so many other parts."""
        first = self.now + number * self.span
        return deadlines_between(first, first + self.span, self.size, seed=SEED + first)

    def expire(self) -> float:
        begin = clock()
        self.advance(self.now + self.span - 1)
        elapsed = clock() - begin
        self.now += self.span
        self.arm(self.part(PARTS - 1))
        return elapsed / self.size

    def arm(self, deadlines: list[int]) -> None:
        for deadline in deadlines:
            self.wheel.schedule(deadline)

    def advance(self, now: int) -> None:
        left = self.size
        while left:
            left -= len(self.wheel.advance(now, BATCH))

    def close(self) -> None:
        pass


class ComingLoop(Coming):
    """The same with the timers of an asyncio loop, whose clock stands between the rounds."""

    def start(self, rival: str) -> None:
        self.loop = new_loop(rival)
        self.context = copy_context()
        self.seconds = 0.0
        self.loop.time = lambda: self.seconds  # type: ignore[method-assign]

    def arm(self, deadlines: list[int]) -> None:
        for deadline in deadlines:
            self.loop.call_at(deadline / 1000, nothing, context=self.context)

    def advance(self, now: int) -> None:
        self.seconds = (now + 0.5) / 1000
        self.loop.call_at((now + 0.25) / 1000, self.loop.stop)
        self.loop.run_forever()

    def close(self) -> None:
        self.loop.close()
        del self.loop.time  # it refers to this


@contextmanager
def expire(rival: str, sizes: Sizes) -> Iterator[Pair]:
    count = size_for(rival, sizes)
    ours = Coming("ours", count)
    base = Coming(rival, count) if rival in WHEELS else ComingLoop(rival, count)
    yield Pair(ours.expire, base.expire)
    base.close()


def time_wheel(deadlines: list[int]) -> float:
    wheel = TimingWheel()
    for deadline in deadlines:
        wheel.schedule(deadline)
    left = len(deadlines)
    start = clock()
    while left:
        left -= len(wheel.advance(LAST, BATCH))
    return (clock() - start) / len(deadlines)


def time_uvloop(deadlines: list[int]) -> float:
    with loop_of("uvloop") as loop:
        context = copy_context()
        armed = loop.time()
        for deadline in deadlines:
            loop.call_at(armed + deadline / 1e6, nothing, context=context)
        loop.call_at(armed + (LAST + 2_000) / 1e6, loop.stop)
        time.sleep(max(0.0, armed + (LAST + 5_000) / 1e6 - loop.time()))
        start = clock()
        loop.run_forever()
        return (clock() - start) / len(deadlines)


@contextmanager
def expire_whole(sizes: Sizes) -> Iterator[Pair]:
    """The clock of a uvloop cannot be made to stand, so all of the million are armed and come due in each round."""
    deadlines = deadlines_of(sizes.most)
    yield Pair(lambda: time_wheel(deadlines), lambda: time_uvloop(deadlines))


# Memory


def bytes_per_timer(kind: str, count: int) -> float:
    gc.disable()
    if kind == "ours":
        deadlines = deadlines_of(count)
        before = resident()
        wheel = TimingWheel()
        for deadline in deadlines:
            wheel.schedule(deadline)
        return grown_since(before) / count
    delays, loop, context = delays_of(count), new_loop(kind), copy_context()
    before = resident()
    for delay in delays:
        loop.call_later(delay, nothing, context=context)
    return grown_since(before) / count


@contextmanager
def timer_bytes(rival: str, sizes: Sizes) -> Iterator[Pair]:
    yield both_at_a_time(partial(bytes_per_timer, "ours", sizes.most), partial(bytes_per_timer, rival, sizes.most))


def rows(rival: str, arm: Goal, move: Goal, cancel: Goal, due: Goal) -> list[Workload]:
    """What is measured against a rival; the ids of the rows about asyncio go without its name."""
    suffix, needs = ("" if rival == "asyncio" else f"_{rival}"), ("uvloop" if rival == "uvloop" else "")
    later = "a store in a dict" if rival == "heapq" else "cancel + call_later"
    share = ", its share of clearing the heap included" if rival == "asyncio" else ""
    count = "{many}" if rival == "heapq" else "{most}"
    among = f"among {count}, shuffled, vs {rival}"
    return [
        Workload(
            f"timer_schedule{suffix}",
            partial(touch, rival),
            arm,
            plain(f"a timer armed {among}"),
            warm_ups=0,
            more=(
                Figure(f"timer_cancel{suffix}", cancel, plain(f"one cancelled {among}{share}")),
                Figure(
                    f"timer_refresh{suffix}",
                    move,
                    plain(f"one put off {among}: {later}{share}; nodes move at their bucket"),
                ),
                Figure(
                    f"timer_move{suffix}",
                    Goal(),
                    plain(f"one brought forward, so that its node moves at once, vs {rival}: {later}"),
                ),
            ),
            needs=needs,
        ),
        Workload(
            f"timer_expire{suffix}",
            expire_whole if rival == "uvloop" else partial(expire, rival),
            due,
            plain(
                f"{count} armed in shuffled order come due, into lists of {BATCH}, vs {rival}, all at once"
                if rival == "uvloop"
                else f"a tenth of {count} comes due at once, into lists of {BATCH}, vs {rival}; armed shuffled"
            ),
            warm_ups=0,
            needs=needs,
        ),
    ]


WORKLOADS = (
    *rows("asyncio", Goal(faster=14, aim="20x"), Goal(faster=7, aim="20x"), Goal(faster=3), Goal(faster=6)),
    *rows("uvloop", Goal(faster=7, aim="10x"), Goal(faster=7, aim="12x"), Goal(faster=2.5), Goal()),
    *rows("heapq", Goal(), Goal(), Goal(), Goal()),
    *(
        Workload(
            "timer_bytes" if rival == "asyncio" else f"timer_bytes_{rival}",
            partial(timer_bytes, rival),
            Goal(),
            plain(f"resident memory per timer over {{most}} vs {rival}; ours has room for a session's row"),
            unit="B",
            rounds=1,
            warm_ups=0,
            needs="uvloop" if rival == "uvloop" else "",
        )
        for rival in ("asyncio", "uvloop")
    ),
)
