"""Time that goes by. What lives here: a tick of `TimingWheel` in which nothing comes due, against a turn of a loop with
as many timers, and against a tick with a hundredth of them. What must not: timers that move or come due (`timers`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cagey_sessions._core import TimingWheel

from .base import Figure, Goal, Pair, Sizes, Workload, clock, plain
from .timers import BATCH, TICKS, ArmedLoop, deadlines_of

FAR = 1_000_000
"""Milliseconds."""


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


WORKLOADS = (
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
)
