"""Timers by themselves. What lives here: `TimingWheel`, called from Python, against the loops' own timers and a heap.
What must not: sessions, and a manager's wheel, which is driven from C.

A million timers 1 to 31 s away, in ticks of a millisecond, armed in shuffled order; what is touched later is touched in
another order, so it is not in the cache. The loops' timers get one context and one callback for all, for copying a
context for each costs them time. Loops put off a part of the work of cancelling until their next turn, so one turn is
on the clock: asyncio clears its heap there when half of it is cancelled. What ours puts off, moving a timer that was
refreshed, comes when its bucket is reached, once for however many refreshes; `timer_move` shows what that costs.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any

from cagey_sessions._core import TimingWheel

from ..rivals.heap import HeapTimers
from .base import SEED, Figure, Goal, Pair, Sizes, Workload, clock, deadlines_between, in_fresh_process, new_loop, plain
from .memory import grown_since, resident

FIRST, LAST = 1_000, 31_000
"""Milliseconds."""
FAR = 1_000_000
TICKS = 20_000
BATCH = 500

WHEELS: dict[str, Callable[[], Any]] = {"ours": TimingWheel, "heapq": HeapTimers}


def deadlines_of(count: int) -> list[int]:
    return deadlines_between(FIRST, LAST, count)


def size_for(rival: str, sizes: Sizes) -> int:
    """A million, but for the heap, which takes seconds to see a million off."""
    return sizes.many if rival == "heapq" else sizes.most


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


# Arming, and taking back


def order_of(count: int) -> list[int]:
    """The places of so many timers, in no order; made once, for shuffling a million takes longer than cancelling."""
    return random.Random(SEED + 3).sample(range(count), count)


def at_hand(timers: list[int], order: list[int]) -> list[int]:
    """Ids in that order, each an int made anew: whoever uses one has just found it in a session, say.

    As they are the ints lie about in memory, and to fetch one costs as much as what is measured.
    """
    return [timers[place] + 0 for place in order]


def time_wheel(make: Callable[[], Any], deadlines: list[int], order: list[int]) -> tuple[float, float]:
    wheel = make()
    start = clock()
    timers = [wheel.schedule(deadline) for deadline in deadlines]
    armed = clock() - start
    shuffled = at_hand(timers, order)
    start = clock()
    for timer in shuffled:
        wheel.cancel(timer)
    cancelled = clock() - start
    assert len(wheel) == 0
    return armed / len(timers), cancelled / len(timers)


def time_loop(kind: str, delays: list[float], order: list[int]) -> tuple[float, float]:
    with loop_of(kind) as loop:
        context = copy_context()
        start = clock()
        timers = [loop.call_later(delay, nothing, context=context) for delay in delays]
        armed = clock() - start
        shuffled = [timers[place] for place in order]
        start = clock()
        for timer in shuffled:
            timer.cancel()
        loop.run_until_complete(one_turn())
        cancelled = clock() - start
        return armed / len(timers), cancelled / len(timers)


@contextmanager
def arm_and_cancel(rival: str, sizes: Sizes) -> Iterator[Pair]:
    deadlines = deadlines_of(size_for(rival, sizes))
    delays = [3600 + deadline / 1000 for deadline in deadlines]
    order = order_of(len(deadlines))

    def base() -> tuple[float, float]:
        return time_wheel(WHEELS[rival], deadlines, order) if rival in WHEELS else time_loop(rival, delays, order)

    yield Pair(lambda: time_wheel(TimingWheel, deadlines, order), base)


# Putting off


class Armed:
    """A million timers of ours, or of a heap."""

    def __init__(self, rival: str, count: int) -> None:
        self.wheel = WHEELS[rival]()
        timers = [self.wheel.schedule(deadline) for deadline in deadlines_of(count)]
        self.touched = at_hand(timers, order_of(count))
        self.now = 0

    def later(self, count: int) -> list[int]:
        """Deadlines that are each later than any so far."""
        self.now += 1
        return deadlines_between(LAST * self.now, LAST * (self.now + 1), count)

    def refresh(self) -> tuple[float, float]:
        """They are put off, and one tick goes by; then a tenth is brought forward, so that each moves at once."""
        deadlines = self.later(len(self.touched))
        start = clock()
        self.give(self.touched, deadlines)
        self.wheel.advance(self.now, BATCH)
        put_off = clock() - start
        some = self.touched[: max(1, len(self.touched) // 10)]
        for timer in some:
            self.wheel.cancel(timer)
        armed = [self.wheel.schedule(deadline) for deadline in self.later(len(some))]
        some = at_hand(armed, order_of(len(armed)))
        deadlines = deadlines_of(len(some))
        start = clock()
        self.give(some, deadlines)
        moved = clock() - start
        self.touched[: len(some)] = some
        return put_off / len(self.touched), moved / len(some)

    def give(self, timers: list[int], deadlines: list[int]) -> None:
        for timer, deadline in zip(timers, deadlines, strict=True):
            self.wheel.refresh(timer, deadline)


class ArmedLoop:
    """The same with a loop's own timers."""

    def __init__(self, kind: str, count: int) -> None:
        self.loop = new_loop(kind)
        self.context = copy_context()
        # an hour more: nothing is to come due while the other side runs
        self.delays = [3600 + deadline / 1000 for deadline in deadlines_of(count)]
        self.timers = [self.loop.call_later(delay, nothing, context=self.context) for delay in self.delays]
        self.order = order_of(count)

    def refresh(self) -> tuple[float, float]:
        """The first is put off twice: then more than half of asyncio's heap is cancelled, and it is cleared."""
        touched = [self.timers[place] for place in self.order]
        delays, loop, context = self.delays, self.loop, self.context
        moved = []
        start = clock()
        for timer, delay in zip(touched, delays, strict=True):
            timer.cancel()
            moved.append(loop.call_later(delay, nothing, context=context))
        moved[0].cancel()
        moved[0] = loop.call_later(delays[0], nothing, context=context)
        loop.run_until_complete(one_turn())
        elapsed = clock() - start
        for place, timer in zip(self.order, moved, strict=True):
            self.timers[place] = timer
        return elapsed / len(touched), elapsed / len(touched)

    def turns(self) -> float:
        async def turn() -> float:
            start = clock()
            for _ in range(TICKS // 10):
                await asyncio.sleep(0)
            return (clock() - start) / (TICKS // 10)

        return self.loop.run_until_complete(turn())

    def close(self) -> None:
        for timer in self.timers:
            timer.cancel()
        self.loop.close()


@contextmanager
def refresh(rival: str, sizes: Sizes) -> Iterator[Pair]:
    count = size_for(rival, sizes)
    ours = Armed("ours", count)
    base = Armed(rival, count) if rival in WHEELS else ArmedLoop(rival, count)
    yield Pair(ours.refresh, base.refresh)
    if isinstance(base, ArmedLoop):
        base.close()


# Coming due


def time_expire(make: Callable[[], Any], deadlines: list[int]) -> float:
    wheel = make()
    for deadline in deadlines:
        wheel.schedule(deadline)
    left = len(deadlines)
    start = clock()
    while left:
        left -= len(wheel.advance(LAST, BATCH))
    return (clock() - start) / len(deadlines)


def time_callbacks(kind: str, deadlines: list[int]) -> float:
    """All at once, which is the loops' best: spread over ticks they pay for a turn of the loop at each."""
    with loop_of(kind) as loop:
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
def expire(rival: str, sizes: Sizes) -> Iterator[Pair]:
    deadlines = deadlines_of(size_for(rival, sizes))
    yield Pair(
        lambda: time_expire(TimingWheel, deadlines),
        lambda: time_expire(WHEELS[rival], deadlines) if rival in WHEELS else time_callbacks(rival, deadlines),
    )


# Time that goes by


class Ticking:
    """A wheel in which nothing comes due, and no bucket is reached, for as long as it is looked at."""

    def __init__(self, count: int) -> None:
        self.wheel = TimingWheel()
        for deadline in deadlines_of(count):
            self.wheel.schedule(FAR + deadline)
        self.now = 0

    def ticks(self) -> float:
        ticks = range(self.now + 1, self.now + TICKS + 1)
        self.now += TICKS
        advance = self.wheel.advance
        start = clock()
        for now in ticks:
            advance(now, BATCH)
        return (clock() - start) / TICKS


@contextmanager
def tick_idle(sizes: Sizes) -> Iterator[Pair]:
    ours, few, loop = Ticking(sizes.most), Ticking(sizes.most // 100), ArmedLoop("asyncio", sizes.most)

    def many() -> tuple[float, float]:
        cost = ours.ticks()
        return cost, cost

    yield Pair(many, lambda: (loop.turns(), few.ticks()))
    loop.close()


@contextmanager
def tick_idle_uvloop(sizes: Sizes) -> Iterator[Pair]:
    ours, loop = Ticking(sizes.most), ArmedLoop("uvloop", sizes.most)
    yield Pair(ours.ticks, loop.turns)
    loop.close()


# Memory


def bytes_per_timer(kind: str, count: int) -> float:
    deadlines = deadlines_of(count)
    if kind == "ours":
        before = resident()
        wheel = TimingWheel()
        for deadline in deadlines:
            wheel.schedule(deadline)
        return grown_since(before) / count
    loop, context = new_loop(kind), copy_context()
    before = resident()
    for deadline in deadlines:
        loop.call_later(3600 + deadline / 1000, nothing, context=context)
    return grown_since(before) / count


@contextmanager
def timer_bytes(rival: str, sizes: Sizes) -> Iterator[Pair]:
    yield Pair(
        lambda: in_fresh_process(bytes_per_timer, "ours", sizes.most),
        lambda: in_fresh_process(bytes_per_timer, rival, sizes.most),
    )


def rows(rival: str, arm: Goal, move: Goal, cancel: Goal, due: Goal) -> list[Workload]:
    """What is measured against a rival; the ids of the rows about asyncio go without its name."""
    suffix, needs = ("" if rival == "asyncio" else f"_{rival}"), ("uvloop" if rival == "uvloop" else "")
    later = "a store in a dict" if rival == "heapq" else "cancel + call_later"
    count = "many" if rival == "heapq" else "most"
    return [
        Workload(
            f"timer_schedule{suffix}",
            partial(arm_and_cancel, rival),
            arm,
            plain(f"{{{count}}} timers armed in shuffled order vs {rival}"),
            warm_ups=0,
            more=(Figure(f"timer_cancel{suffix}", cancel, plain(f"{{{count}}} cancelled, shuffled, vs {rival}")),),
            needs=needs,
        ),
        Workload(
            f"timer_refresh{suffix}",
            partial(refresh, rival),
            move,
            plain(f"{{{count}}} put off, shuffled, vs {rival}: {later}, and one turn; nodes move at their bucket"),
            warm_ups=0,
            more=(
                Figure(
                    f"timer_move{suffix}",
                    Goal(),
                    plain(f"brought forward, so that each node moves at once, vs {rival}: {later}"),
                ),
            ),
            needs=needs,
        ),
        Workload(
            f"timer_expire{suffix}",
            partial(expire, rival),
            due,
            plain(f"{{{count}}} armed in shuffled order come due, into lists of {BATCH}, vs {rival}, all at once"),
            warm_ups=0,
            needs=needs,
        ),
    ]


WORKLOADS = (
    *rows("asyncio", Goal(faster=20), Goal(faster=20), Goal(faster=3), Goal(faster=6)),
    *rows("uvloop", Goal(faster=10), Goal(faster=12), Goal(faster=2.5), Goal()),
    *rows("heapq", Goal(), Goal(), Goal(), Goal()),
    Workload(
        "tick_idle",
        tick_idle,
        Goal(ratio=0.05),
        plain("one tick with {most} armed and nothing due vs one turn of an asyncio loop with as many timers"),
        more=(
            Figure(
                "tick_idle_growth",
                Goal(ratio=1.26),
                plain("the same vs a tick with a hundredth of the timers: 1.26 is an exponent of 0.05"),
            ),
        ),
    ),
    Workload(
        "tick_idle_uvloop",
        tick_idle_uvloop,
        Goal(),
        plain("one tick with {most} armed and nothing due vs one turn of a uvloop loop with as many timers"),
        needs="uvloop",
    ),
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
