"""Memory, and the collector that walks it. What lives here: resident memory per session, growth while the store is
down, and what a full collection costs. What must not: anything that runs in this process, where freed memory of an
earlier row would be used again, unseen.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import orjson

from cagey_sessions.saving.to_store import MOST_BYTES

from .base import (
    STATM,
    Figure,
    Goal,
    Manager,
    Pair,
    Sizes,
    Workload,
    both_at_a_time,
    clock,
    create_all,
    fresh_process,
    identify_all,
    in_fresh_process,
    keys_of,
    make_ours,
    make_port,
    plain,
    users_of,
)
from .stored import SECOND, DownStore, Server, running, tree_data

kept: list[Any] = []
"""In a process of its own: whatever is to be collected, or rather not, and must not be taken apart at the end."""


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grown_since(before: int) -> int:
    """At least one byte, so that a ratio can be taken of so few that they fit into pages that were there."""
    return max(1, resident() - before)


# A session


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
    kept.append(manager)
    return grown_since(before) / (count - 100)


def bytes_per_session(make: Callable[[], Manager], count: int) -> float:
    gc.disable()
    return asyncio.run(grow(make, count))


@contextmanager
def memory(sizes: Sizes) -> Iterator[Pair]:
    yield both_at_a_time(
        partial(bytes_per_session, make_ours, sizes.most), partial(bytes_per_session, make_port, sizes.most)
    )


# The store is down

IN_FLIGHT = 4
BYTES_PER_USER = 16
BETWEEN_LOOKS = 0.02


def bytes_while_down(count: int, seconds: float) -> float:
    """Growth per user at its highest, from the moment everybody is due, while all attempts fail."""

    async def wait(server: Server) -> float:
        gc.collect()
        before = highest = resident()
        server.clock.go_on(server.clock.now() + server.interval)
        for _ in range(int(seconds / BETWEEN_LOOKS)):
            await asyncio.sleep(BETWEEN_LOOKS)
            highest = max(highest, resident())
        assert server.table.counters.saved == 0
        assert server.table.counters.due > 0
        return (highest - before) / count

    settings: dict[str, Any] = {"store": DownStore(), "max_in_flight": IN_FLIGHT}
    with running(lambda: Server(30 * SECOND, **settings), count, tree_data) as (server, runner):
        return runner.run(wait(server))


@contextmanager
def down_memory(sizes: Sizes) -> Iterator[Pair]:
    yield Pair(
        lambda: in_fresh_process(bytes_while_down, sizes.many, min(1.5, max(0.3, sizes.seconds))),
        lambda: IN_FLIGHT * MOST_BYTES / sizes.many + BYTES_PER_USER,
    )


# The collector


class Thing:
    """What a program keeps in the bag: a connection, a room."""


def keep(make: Callable[[], Manager], count: int) -> None:
    gc.disable()
    runner = asyncio.Runner()

    async def populate() -> tuple[Manager, list[Any]]:
        manager = make()
        sessions = await create_all(manager, keys_of(count))
        thing = Thing()
        for number, (session, user) in enumerate(zip(sessions, users_of(count), strict=True)):
            await session.set_user(user, {"gold": number, "items": [number]})
            session.set("room", thing)
        return manager, sessions

    kept.append((runner, *runner.run(populate())))


def time_collection() -> tuple[float, float]:
    """Milliseconds of a full collection, as it is and with everything frozen."""
    start = clock()
    gc.collect()
    elapsed = clock() - start
    gc.freeze()
    start = clock()
    gc.collect()
    frozen = clock() - start
    gc.unfreeze()
    return elapsed / 1e6, frozen / 1e6


@contextmanager
def collections(sizes: Sizes) -> Iterator[Pair]:
    with fresh_process() as ours, fresh_process() as base:
        filling = [ours.submit(keep, make_ours, sizes.most), base.submit(keep, make_port, sizes.most)]
        for filled in filling:
            filled.result()
        yield Pair(lambda: ours.submit(time_collection).result(), lambda: base.submit(time_collection).result())
        for pool in (ours, base):
            pool.submit(os._exit, 0)  # without ending a million sessions one by one


# What the collector does to a server that fills up

THRESHOLDS = (50_000, 50, 100)


class Filling:
    """In a process of its own: users who are here, and the stored data of half as many who are about to come."""

    def __init__(self, count: int) -> None:
        gc.disable()
        self.runner = asyncio.Runner()
        self.bodies = [orjson.dumps(tree_data(number)) for number in range(count)]
        self.manager, self.sessions = self.runner.run(self.start(count))
        gc.collect()
        self.began, self.passes = 0, [0.0]
        gc.callbacks.append(self.note)

    async def start(self, count: int) -> tuple[Manager, list[Any]]:
        manager = make_ours()
        return manager, [await self.login(manager, user) for user in range(count)]

    async def login(self, manager: Manager, user: int) -> Any:
        session = await manager.create()
        await session.set_user(user, orjson.loads(self.bodies[user % len(self.bodies)]))
        return session

    def note(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self.began = clock()
        else:
            self.passes.append((clock() - self.began) / 1e6)

    async def fill(self) -> tuple[float, float]:
        users = range(len(self.sessions), len(self.sessions) * 3 // 2)
        self.passes = [0.0]
        gc.enable()
        joined = [await self.login(self.manager, user) for user in users]
        gc.disable()
        longest, total = max(self.passes), sum(self.passes)
        for session in joined:
            await session.destroy()
        return longest, total


def begin_filling(count: int) -> None:
    kept.append(Filling(count))


def time_filling(how: str) -> tuple[float, float]:
    """Milliseconds: the longest pass of the collector, and all of them."""
    filling, thresholds = kept[-1], gc.get_threshold()
    gc.collect()
    if how == "frozen":
        gc.freeze()
    elif how == "thresholds":
        gc.set_threshold(*THRESHOLDS)
    longest, total = filling.runner.run(filling.fill())
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    gc.collect()
    return max(longest, 1e-3), max(total, 1e-3)


@contextmanager
def joining(sizes: Sizes) -> Iterator[Pair]:
    with fresh_process() as process:
        process.submit(begin_filling, sizes.many // 2).result()

        def ours() -> tuple[float, ...]:
            frozen = process.submit(time_filling, "frozen").result()
            return (*frozen, *process.submit(time_filling, "thresholds").result())

        def base() -> tuple[float, ...]:
            return process.submit(time_filling, "").result() * 2

        yield Pair(ours, base)
        process.submit(os._exit, 0)


WORKLOADS = (
    Workload(
        "bytes",
        memory,
        Goal(ours=200, ratio=0.5),
        plain("identified session with a key vs port, growth of resident memory over {most}"),
        unit="B",
        rounds=1,  # a fresh process each time: they differ by less than 1 %
        warm_ups=0,
    ),
    Workload(
        "down_memory",
        down_memory,
        Goal(ratio=1),
        plain(
            f"growth per user while the store is down and {{many}} are due vs what is allowed: {IN_FLIGHT} batches of "
            f"1 MiB and {BYTES_PER_USER} B a user"
        ),
        unit="B",
        rounds=1,
        warm_ups=0,
    ),
    Workload(
        "gc",
        collections,
        Goal(),
        plain("full collection over {most} sessions, each with user data and a bag, vs port"),
        unit="ms",
        rounds=3,  # seconds each, and they differ little
        warm_ups=0,
        more=(Figure("gc_frozen", Goal(), plain("the same after gc.freeze(), vs port"), "ms"),),
    ),
    Workload(
        "gc_join",
        joining,
        Goal(),
        plain("longest pass of the collector while half as many join {half} users: frozen before vs as it is"),
        unit="ms",
        more=(
            Figure("gc_join_total", Goal(), plain("all passes of the same"), "ms"),
            Figure(
                "gc_join_thresholds",
                Goal(),
                plain(f"longest pass of the same: gc.set_threshold{THRESHOLDS} vs as it is"),
                "ms",
            ),
            Figure("gc_join_thresholds_total", Goal(), plain("all passes of the same"), "ms"),
        ),
    ),
)
