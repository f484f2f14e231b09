"""What is measured: each scenario once, seeded, ours and its base side by side.

What lives here: the workloads, their sizes and their goals. What must not: rounds, medians, verdicts (harness.py), and
anything that makes a base slower than a user's own program would be.

A workload is a context manager over `Sizes` that yields a `Pair`: two functions, each of which runs its side once and
returns what one operation cost, in nanoseconds or bytes. Whatever is not part of the operation - populating, emptying,
making keys - happens outside the clock. The collector is off throughout; the harness collects between the sides.

The operations are written as a user's program writes them, in a `for` loop on the public method, and the loop counts on
both sides. Rows that await end with one turn of the event loop on both sides, so that work put off is counted too.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import cagey_sessions

from .rivals import port

__all__ = ["WORKLOADS", "Goal", "Pair", "Sizes", "Workload", "measurable"]

SEED = 20_240_607
HOT = 1_000
"""How many keys or sessions the rows of pure call overhead go round."""
PASSES = 200
INTERVAL = "1d"
"""Far enough away that no save comes due while a row is measured."""

clock = time.perf_counter_ns if sys.platform == "win32" else time.thread_time_ns
"""CPU time of this thread: no row waits for anything, and who else has the core meanwhile is not what is measured.
Windows counts that in steps of 15 ms."""

Manager: TypeAlias = cagey_sessions.SessionManager | port.SessionManager
SessionOf: TypeAlias = cagey_sessions.Session | port.Session


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the tables are: for most rows, and for those that are about a million."""

    many: int
    most: int


FULL = Sizes(many=100_000, most=1_000_000)
QUICK = Sizes(many=10_000, most=100_000)


@dataclass(frozen=True, slots=True)
class Pair:
    ours: Callable[[], float]
    base: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Goal:
    """What a row must reach. The ratio is ours / base, or base / ours where ours has to be faster."""

    faster: float | None = None
    ratio: float | None = None
    ours: float | None = None

    def ratio_of(self, ours: float, base: float) -> float:
        return ours / base if self.faster is None else base / ours

    def holds(self, ours: float, ratio: float) -> bool:
        return (
            (self.faster is None or ratio >= self.faster)
            and (self.ratio is None or ratio <= self.ratio)
            and (self.ours is None or ours <= self.ours)
        )

    def __str__(self) -> str:
        parts = (
            "" if self.faster is None else f">= {self.faster:g}x faster",
            "" if self.ours is None else f"<= {self.ours:g}",
            "" if self.ratio is None else f"<= {self.ratio:g} of base",
        )
        return " and ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Workload:
    id: str
    prepare: Callable[[Sizes], AbstractContextManager[Pair]]
    goal: Goal
    note: Callable[[Sizes], str]
    unit: str = "ns"
    rounds: int = 9
    warm_ups: int = 1


def measurable(workload: Workload) -> bool:
    """Whether this system can run a workload: resident memory is read from Linux' /proc."""
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


# Looking up


def time_find(manager: cagey_sessions.SessionManager, keys: Sequence[str], passes: int) -> float:
    start = clock()
    for _ in range(passes):
        for key in keys:
            manager.find_by_key(key)
    return (clock() - start) / (passes * len(keys))


def time_dict_get(index: dict[str, Any], keys: Sequence[str], passes: int) -> float:
    start = clock()
    for _ in range(passes):
        for key in keys:
            index.get(key)
    return (clock() - start) / (passes * len(keys))


@contextmanager
def populated(count: int) -> Iterator[tuple[cagey_sessions.SessionManager, dict[str, Any]]]:
    """Our manager with sessions under keys, and a bare dict with the same keys and values."""
    with asyncio.Runner() as runner:
        manager = make_ours()
        sessions = runner.run(create_all(manager, keys_of(count)))
        yield manager, {session.key: session for session in sessions}
        runner.run(destroy_all(manager, sessions))


@contextmanager
def find_hot(sizes: Sizes) -> Iterator[Pair]:
    with populated(sizes.many) as (manager, index):
        hot = random.Random(SEED).sample(list(index), HOT)
        yield Pair(
            lambda: time_find(manager, hot, PASSES),
            lambda: time_dict_get(index, hot, PASSES),
        )


@contextmanager
def find_1e6(sizes: Sizes) -> Iterator[Pair]:
    """Each key is looked up once, by a string that was made just before, as one that came off the network is.

    The strings are copies of copies: making them must not bring the keys in the tables into the cache.
    """
    with populated(sizes.most) as (manager, index):
        shuffled = list(index)
        random.Random(SEED).shuffle(shuffled)
        arrivals = "\n".join(shuffled).split("\n")
        share = len(arrivals) // 20
        starts = itertools.cycle(range(0, 20 * share, share))

        def fresh() -> list[str]:
            start = next(starts)
            return "\n".join(arrivals[start : start + share]).split("\n")

        yield Pair(
            lambda: time_find(manager, fresh(), 1),
            lambda: time_dict_get(index, fresh(), 1),
        )


# From create to destroy


async def time_create(make: Callable[[], Manager], keys: Sequence[str], users: Sequence[int]) -> float:
    manager = make()
    start = clock()
    for key in keys:
        await manager.create(key)
    await asyncio.sleep(0)
    elapsed = clock() - start
    found: list[Any] = [manager.find_by_key(key) for key in keys]
    await destroy_all(manager, found)
    return elapsed / len(keys)


async def time_identify(make: Callable[[], Manager], keys: Sequence[str], users: Sequence[int]) -> float:
    manager = make()
    sessions = await create_all(manager, keys)
    data = {"gold": 0}
    start = clock()
    for session, user in zip(sessions, users, strict=True):
        await session.set_user(user, data)
    await asyncio.sleep(0)
    elapsed = clock() - start
    await destroy_all(manager, sessions)
    return elapsed / len(keys)


async def time_destroy(make: Callable[[], Manager], keys: Sequence[str], users: Sequence[int]) -> float:
    """The sessions leave in no order, and the last reference to each goes with it: freeing them is part of it."""
    manager = make()
    sessions = await create_all(manager, keys)
    await identify_all(sessions, users)
    random.Random(SEED).shuffle(sessions)
    start = clock()
    while sessions:
        await sessions.pop().destroy()
    await asyncio.sleep(0)
    elapsed = clock() - start
    await manager.destroy()
    return elapsed / len(keys)


@contextmanager
def life(timed: Callable[[Callable[[], Manager], Sequence[str], Sequence[int]], Any], sizes: Sizes) -> Iterator[Pair]:
    keys, users = keys_of(sizes.many), users_of(sizes.many)
    yield Pair(
        lambda: asyncio.run(timed(make_ours, keys, users)),
        lambda: asyncio.run(timed(make_port, keys, users)),
    )


# The bag


@contextmanager
def bags() -> Iterator[tuple[list[cagey_sessions.Session], list[dict[str, Any]]]]:
    with asyncio.Runner() as runner:
        manager = make_ours()
        sessions = runner.run(create_all(manager, keys_of(HOT)))
        for session in sessions:
            session.set("room", session)
        yield sessions, [{"room": session} for session in sessions]
        runner.run(destroy_all(manager, sessions))


@contextmanager
def bag_get(sizes: Sizes) -> Iterator[Pair]:
    def ours() -> float:
        start = clock()
        for _ in range(PASSES):
            for session in sessions:
                session.get("room")
        return (clock() - start) / (PASSES * HOT)

    def base() -> float:
        start = clock()
        for _ in range(PASSES):
            for bag in dicts:
                bag.get("room")
        return (clock() - start) / (PASSES * HOT)

    with bags() as (sessions, dicts):
        yield Pair(ours, base)


@contextmanager
def bag_set(sizes: Sizes) -> Iterator[Pair]:
    def ours() -> float:
        start = clock()
        for _ in range(PASSES):
            for session in sessions:
                session.set("room", 1)
        return (clock() - start) / (PASSES * HOT)

    def base() -> float:
        start = clock()
        for _ in range(PASSES):
            for bag in dicts:
                bag["room"] = 1
        return (clock() - start) / (PASSES * HOT)

    with bags() as (sessions, dicts):
        yield Pair(ours, base)


# Memory

STATM = Path("/proc/self/statm")


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def grow(make: Callable[[], Manager], count: int) -> float:
    keys, users = keys_of(count), users_of(count)
    manager = make()
    await identify_all(await create_all(manager, keys[:100]), users[:100])
    gc.collect()
    before = resident()
    data = {"gold": 0}
    for key, user in zip(keys[100:], users[100:], strict=True):
        session = await manager.create(key)
        await session.set_user(user, data)
    gc.collect()
    grown = resident() - before
    await destroy_all(manager, [found for key in keys if (found := manager.find_by_key(key))])
    return grown / (count - 100)


def bytes_per_session(make: Callable[[], Manager], count: int) -> float:
    """Run in a process of its own: in this one freed memory of an earlier row would be used again, unseen."""
    gc.disable()
    return asyncio.run(grow(make, count))


def in_fresh_process(work: Callable[..., float], *args: Any) -> float:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


@contextmanager
def memory(sizes: Sizes) -> Iterator[Pair]:
    yield Pair(
        lambda: in_fresh_process(bytes_per_session, make_ours, sizes.most),
        lambda: in_fresh_process(bytes_per_session, make_port, sizes.most),
    )


WORKLOADS = (
    Workload(
        "find_hot",
        find_hot,
        Goal(ratio=1.35),
        lambda sizes: f"find_by_key vs dict.get, {HOT:,} keys of {sizes.many:,}, the loop included",
    ),
    Workload(
        "find_1e6",
        find_1e6,
        Goal(ratio=1.15),
        lambda sizes: f"find_by_key vs dict.get, {sizes.most:,} keys, shuffled, fresh strings",
    ),
    Workload(
        "create",
        partial(life, time_create),
        Goal(faster=4),
        lambda sizes: f"await create(key) vs port, {sizes.many:,} sessions",
    ),
    Workload(
        "identify",
        partial(life, time_identify),
        Goal(faster=4),
        lambda sizes: f"await set_user(int, data) vs port, {sizes.many:,} sessions, autosave armed",
    ),
    Workload(
        "destroy",
        partial(life, time_destroy),
        Goal(faster=5),
        lambda sizes: f"await destroy() vs port, {sizes.many:,} identified sessions, shuffled, freeing included",
    ),
    Workload("bag_get", bag_get, Goal(ratio=1.5), lambda sizes: f"session.get vs dict.get, {HOT:,} sessions"),
    Workload("bag_set", bag_set, Goal(ratio=1.9), lambda sizes: f"session.set vs dict[...] =, {HOT:,} sessions"),
    Workload(
        "bytes",
        memory,
        Goal(ours=200, ratio=0.5),
        lambda sizes: f"identified session with a key vs port, growth of resident memory over {sizes.most:,}",
        unit="B",
        rounds=3,  # a fresh process each time: they differ by less than 1 %
        warm_ups=0,
    ),
)
