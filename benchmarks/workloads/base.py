"""What a workload is. What lives here: sizes, goals, the clock, and the material of more than one room - keys, users,
managers. What must not: any scenario, and rounds, medians, verdicts (harness.py).
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import cagey_sessions

from ..rivals import port

SEED = 20_240_607
HOT = 1_000
"""How many keys or sessions the rows of pure call overhead go round."""
PASSES = 200
INTERVAL = "1d"
"""Far enough away that no save comes due while a row is measured."""

clock = time.perf_counter_ns if sys.platform == "win32" else time.thread_time_ns
"""CPU time of this thread: who else has the core meanwhile is not what is measured, and neither is waiting; only the
rows about lag look at a wall clock. Windows counts this one in steps of 15 ms."""

Manager: TypeAlias = cagey_sessions.SessionManager | port.SessionManager
SessionOf: TypeAlias = cagey_sessions.Session | port.Session
Costs: TypeAlias = float | tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the tables are: for most rows, and for those that are about a million; and how long lag is watched."""

    many: int
    most: int
    seconds: float = 0.02


FULL = Sizes(many=100_000, most=1_000_000, seconds=3.0)
QUICK = Sizes(many=4_000, most=40_000, seconds=0.2)


@dataclass(frozen=True, slots=True)
class Pair:
    """Each runs its side once; it returns the cost of one operation, or a tuple of one for each row of the workload."""

    ours: Callable[[], Costs]
    base: Callable[[], Costs]


@dataclass(frozen=True, slots=True)
class Goal:
    """What a row must reach; nothing at all where it is only reported.

    The ratio is ours / base, or base / ours where ours has to be faster. `added` bounds the difference of the two.
    `aim` is what the row was meant to reach, where that is out of reach: docs/performance.md says why.
    """

    faster: float | None = None
    ratio: float | None = None
    ours: float | None = None
    at_least: float | None = None
    added: float | None = None
    aim: str = ""

    @property
    def is_set(self) -> bool:
        return str(self) != ""

    def ratio_of(self, ours: float, base: float) -> float:
        return ours / base if self.faster is None else base / ours

    def holds(self, ours: float, ratio: float, added: float = 0.0) -> bool:
        return (
            (self.faster is None or ratio >= self.faster)
            and (self.ratio is None or ratio <= self.ratio)
            and (self.ours is None or ours <= self.ours)
            and (self.at_least is None or ours >= self.at_least)
            and (self.added is None or added <= self.added)
        )

    def __str__(self) -> str:
        parts = (
            "" if self.faster is None else f">= {self.faster:g}x faster",
            "" if self.ours is None else f"<= {self.ours:g}",
            "" if self.at_least is None else f">= {self.at_least:,.0f}",
            "" if self.added is None else f"<= {self.added:g} added",
            "" if self.ratio is None else f"<= {self.ratio:g} of base",
        )
        return " and ".join(part for part in parts if part) + (f" (aim: {self.aim})" if self.aim else "")


def plain(text: str) -> Callable[[Sizes], str]:
    """A note, with the sizes put in for ``{many}``, ``{half}`` of that, and ``{most}``."""
    return lambda sizes: text.format(many=f"{sizes.many:,}", half=f"{sizes.many // 2:,}", most=f"{sizes.most:,}")


@dataclass(frozen=True, slots=True)
class Figure:
    """One row."""

    id: str
    goal: Goal
    note: Callable[[Sizes], str]
    unit: str = "ns"


@dataclass(frozen=True, slots=True)
class Workload:
    """A scenario: its first row, and the others that come out of the same run.

    `prepare` is a context manager over `Sizes` that yields a `Pair`. Whatever is not part of the operation -
    populating, emptying, making keys - happens outside the clock.
    """

    id: str
    prepare: Callable[[Sizes], AbstractContextManager[Pair]]
    goal: Goal
    note: Callable[[Sizes], str]
    unit: str = "ns"
    rounds: int = 9
    warm_ups: int = 1
    more: tuple[Figure, ...] = ()
    collector: bool = False
    """Whether it is left on, as in a user's program; it is off otherwise, and run between the sides."""
    needs: str = ""
    """A package that has to be there."""
    is_there: Callable[[], bool] = lambda: True
    """Whether the engine answers that it is about."""

    @property
    def figures(self) -> tuple[Figure, ...]:
        return (Figure(self.id, self.goal, self.note, self.unit), *self.more)

    def with_rounds(self, rounds: int) -> Workload:
        return replace(self, rounds=rounds, warm_ups=min(self.warm_ups, rounds - 1))


STATM = Path("/proc/self/statm")


def measurable(workload: Workload) -> bool:
    """Whether this system can run a workload: resident memory is read from Linux' /proc."""
    if workload.needs and find_spec(workload.needs) is None:
        return False
    if not workload.is_there():
        return False
    return workload.unit != "B" or STATM.exists()


# Material


def keys_of(count: int) -> list[str]:
    """Keys like the cookies of a web server: 128 random bits in hexadecimal."""
    source = random.Random(SEED)
    return [f"{source.getrandbits(128):032x}" for _ in range(count)]


def users_of(count: int) -> list[int]:
    """User ids like the primary keys of a database: integers, in the order in which their humans come."""
    users = [1_000_000 + number for number in range(count)]
    random.Random(SEED + 1).shuffle(users)
    return users


def deadlines_between(first: int, last: int, count: int, seed: int = SEED) -> list[int]:
    """Ticks from `first` to before `last`, in no order."""
    return random.Random(seed).choices(range(first, last), k=count)


def save_nothing(session: object) -> None:
    """A `persist_user_data` listener."""


def make_ours() -> cagey_sessions.SessionManager:
    manager = cagey_sessions.SessionManager(interval=INTERVAL)
    manager.on("persist_user_data", save_nothing)
    return manager


def make_port() -> port.SessionManager:
    manager = port.SessionManager(interval=INTERVAL)
    manager.on("persist_user_data", save_nothing)
    return manager


async def create_all(manager: Manager, keys: Sequence[str]) -> list[Any]:
    return [await manager.create(key) for key in keys]


async def identify_all(sessions: Sequence[SessionOf], users: Sequence[int]) -> None:
    data = {"gold": 0}  # one object for all: what a user's data costs is the same whoever keeps it
    for session, user in zip(sessions, users, strict=True):
        await session.set_user(user, data)


async def destroy_all(manager: Manager, sessions: list[SessionOf]) -> None:
    while sessions:
        await sessions.pop().destroy()
    await manager.destroy()


def new_loop(kind: str) -> asyncio.AbstractEventLoop:
    if kind == "uvloop":
        import uvloop  # noqa: PLC0415 - not everywhere

        return uvloop.new_event_loop()
    return asyncio.new_event_loop()


def best_loop() -> str:
    """The faster of the two that is installed."""
    return "uvloop" if find_spec("uvloop") is not None else "asyncio"


def fresh_process() -> ProcessPoolExecutor:
    """A process of its own, for what must not see freed memory of an earlier row used again."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def both_at_a_time(ours: Callable[[], float], base: Callable[[], float]) -> Pair:
    """Each side in a fresh process, and both of them at once: no time is taken, and it takes half as long."""
    under_way: list[Future[float]] = []

    def run_ours() -> float:
        with ThreadPoolExecutor(2) as both:
            one, other = both.submit(in_fresh_process, ours), both.submit(in_fresh_process, base)
            under_way.append(other)
            return one.result()

    def run_base() -> float:
        if under_way:
            return under_way.pop().result()
        return in_fresh_process(base)  # asked for without ours

    return Pair(run_ours, run_base)


def in_fresh_process(work: Callable[..., float], *args: Any) -> float:
    with fresh_process() as pool:
        result = pool.submit(work, *args).result()
        pool.submit(os._exit, 0)  # without ending a million of anything one by one
        return result
