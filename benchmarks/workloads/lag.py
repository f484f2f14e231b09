"""For how long others wait. What lives here: the lag of a ticker in the loop that saves, against the same loop while
nothing is due. What must not: CPU time.

The ticker sleeps for a millisecond, again and again; how much later than that it wakes is the lag. One process, one
loop, the same million users on both sides: the manager's clock stands while the idle loop is looked at. Users are
frozen (`gc.freeze`) and the collector is on, as `docs/gc-and-memory.md` says a server should do it.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from .base import SEED, Figure, Goal, Pair, Sizes, Workload, plain
from .stored import SECOND, Server, running, small_data

PERIOD = 0.001
RATE = 33_333
"""Saves a second: a million in half a minute."""
HERD_INTERVAL = 30
AHEAD = 100
"""Ticks from arming to the moment that is watched."""
LEAD_IN = SECOND // 20
LEVEL = 4096
"""Ticks of a bucket of the wheel's level 2; with ticks of 10 ms, 41 s."""


async def watch(is_over: Callable[[float], bool]) -> list[float]:
    """The lags in milliseconds of a ticker that runs until the seconds since its start say so."""
    lags = []
    begin = now = time.perf_counter()
    while not is_over(now - begin):
        asleep = now
        await asyncio.sleep(PERIOD)
        now = time.perf_counter()
        lags.append((now - asleep - PERIOD) * 1000)
    return lags


def percentiles(lags: list[float]) -> tuple[float, float, float, float]:
    """p99, p99.9, p50 and the maximum."""
    lags = sorted(lags)
    last = len(lags) - 1
    return (*(max(1e-6, lags[int(last * part + 0.5)]) for part in (0.99, 0.999, 0.5)), lags[-1])


@contextmanager
def frozen(server: Callable[[], Server], count: int) -> Iterator[Any]:
    gc.disable()  # while they come: it would walk them again and again
    with running(server, count, small_data) as (made, runner):
        gc.collect()
        gc.freeze()
        gc.enable()
        try:
            yield made, runner
        finally:
            gc.unfreeze()


async def idle(seconds: float) -> list[float]:
    return await watch(lambda passed: passed >= seconds)


@contextmanager
def lag(sizes: Sizes) -> Iterator[Pair]:
    """The windows together are shorter than the interval, so each save is a user's first and has something to write."""
    interval = sizes.most * SECOND // RATE
    seconds = min(sizes.seconds, interval / SECOND / 6)

    async def load(server: Server) -> tuple[float, ...]:
        saved = server.table.counters.saved
        server.clock.go_on(server.clock.now())
        lags = await idle(seconds)
        server.clock.stop()
        return (*percentiles(lags), (server.table.counters.saved - saved) / seconds)

    with frozen(lambda: Server(interval), sizes.most) as (server, runner):
        yield Pair(
            lambda: runner.run(load(server)),
            lambda: (*percentiles(runner.run(idle(seconds))), RATE),
        )


async def time_cascade(server: Server, seed: int, seconds: float) -> tuple[float, int]:
    """The longest lag while everybody, in one bucket of level 2, moves down; and the tick at which all will be due."""
    tick = server.parts.autosave.tick
    crossing = (server.parts.autosave.now_tick() + AHEAD) // LEVEL * LEVEL + LEVEL
    instant = crossing + LEVEL // 2
    server.arm([instant] * len(server.sessions), seed)
    gc.collect()
    saved = server.table.counters.saved
    server.clock.go_on(crossing * tick - LEAD_IN)
    lags = await idle(seconds + LEAD_IN / SECOND)
    server.clock.stop()
    assert server.table.counters.saved == saved
    assert server.table.next_deadline() > crossing, "the crossing was not over"
    return max(lags), instant


async def time_herd(server: Server, instant: int) -> tuple[float, float]:
    """The longest lag while everybody is saved, and the seconds that it took."""
    tick = server.parts.autosave.tick
    until = server.table.counters.saved + len(server.sessions)
    server.clock.go_on(instant * tick - LEAD_IN)
    lags = await watch(lambda _: server.table.counters.saved >= until)
    took = (server.clock.now() - instant * tick) / SECOND
    server.clock.stop()
    return max(lags), took


@contextmanager
def herd(sizes: Sizes) -> Iterator[Pair]:
    """A cascade, and then the herd, of the same users: to have a million armed takes longer than either."""
    took = 0.0
    seeds = itertools.count(SEED + 1)
    seconds = min(sizes.seconds, 1.5)

    with frozen(lambda: Server(HERD_INTERVAL * SECOND), sizes.most) as (server, runner):

        def ours() -> tuple[float, ...]:
            nonlocal took
            cascade, instant = runner.run(time_cascade(server, next(seeds), seconds))
            lag, took = runner.run(time_herd(server, instant))
            return lag, len(server.sessions) / took, cascade

        def base() -> tuple[float, ...]:
            lag = max(runner.run(idle(min(took, sizes.seconds))))
            return lag, sizes.most / HERD_INTERVAL, max(runner.run(idle(seconds + LEAD_IN / SECOND)))

        yield Pair(ours, base)


Lag = partial(Workload, unit="ms", rounds=5, warm_ups=0, collector=True, needs="uvloop")

WORKLOADS = (
    Lag(
        "lag",
        lag,
        Goal(added=1),
        plain(f"p99 lag of a 1 ms ticker, {{most}} users, {RATE:,} saves/s, store that does nothing, uvloop, vs idle"),
        more=(
            Figure("lag_p999", Goal(added=2), plain("p99.9 of the same"), "ms"),
            Figure("lag_p50", Goal(), plain("p50 of the same"), "ms"),
            Figure("lag_max", Goal(), plain("the longest of the same"), "ms"),
            Figure("lag_rate", Goal(), plain("saves made meanwhile vs those due"), "/s"),
        ),
    ),
    Lag(
        "herd",
        herd,
        Goal(added=5),
        plain("longest lag while {most} are saved that are due at one instant, armed in shuffled order, vs idle"),
        more=(
            Figure(
                "herd_drain",
                Goal(at_least=150_000),
                plain(f"saves per second meanwhile vs the rate that an interval of {HERD_INTERVAL} s needs"),
                "/s",
            ),
            Figure(
                "cascade",
                Goal(added=3),
                plain("longest lag while {most} armed in shuffled order move down one level of the wheel, vs idle"),
                "ms",
            ),
        ),
    ),
)
