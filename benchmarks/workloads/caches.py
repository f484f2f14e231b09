"""A session store made of a cache. What lives here: creating, finding and ending sessions against putting, getting and
expiring entries with a time to live. What must not: goals: a cache does less, and may well be faster.

Ours is a session with a key, a user and a timer for its saves; ending is one `destroy` for each. All three parts visit
the keys in another shuffled order.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from ..rivals.caches import RIVALS
from .base import SEED, Figure, Goal, Pair, Sizes, Workload, clock, keys_of, make_ours, plain, users_of


async def session_costs(keys: list[str], shuffled: list[str], users: list[int]) -> tuple[float, float, float]:
    manager = make_ours()
    data = {"gold": 0}
    start = clock()
    for key, user in zip(keys, users, strict=True):
        session = await manager.create(key)
        await session.set_user(user, data)
    put = clock() - start
    del session
    start = clock()
    for key in shuffled:
        manager.find_by_key(key)
    get = clock() - start
    found: list[Any] = [manager.find_by_key(key) for key in shuffled]
    start = clock()
    while found:
        await found.pop().destroy()
    end = clock() - start
    await manager.destroy()
    return put / len(keys), get / len(keys), end / len(keys)


def cache_costs(rival: str, keys: list[str], shuffled: list[str]) -> tuple[float, float, float]:
    cache, value = RIVALS[rival](len(keys)), {"gold": 0}
    start = clock()
    cache.put(keys, value)
    put = clock() - start
    start = clock()
    cache.get(shuffled)
    get = clock() - start
    cache.before_expire(keys, value)
    start = clock()
    cache.expire(shuffled)
    end = clock() - start
    cache.close()
    return put / len(keys), get / len(keys), end / len(keys)


@contextmanager
def against_all(sizes: Sizes) -> Iterator[Pair]:
    count = sizes.many // 2
    keys, users = keys_of(count), users_of(count)
    shuffled = "\n".join(random.Random(SEED).sample(keys, count)).split("\n")

    def base() -> tuple[float, ...]:
        return tuple(cost for rival in HERE for cost in cache_costs(rival, keys, shuffled))

    yield Pair(lambda: asyncio.run(session_costs(keys, shuffled, users)) * len(HERE), base)


HERE = [rival for rival in RIVALS if find_spec(rival) is not None]


def figures_of(rival: str) -> tuple[Figure, ...]:
    ends = "removed one by one" if rival in ("moka_py", "theine") else "expired"
    return (
        Figure(rival, Goal(), plain(f"create + set_user vs put with a time to live, {{half}}, {rival}")),
        Figure(f"{rival}_get", Goal(), plain(f"find_by_key vs get, {{half}} shuffled, {rival}")),
        Figure(f"{rival}_expire", Goal(), plain(f"destroy vs entries {ends}, {{half}} shuffled, {rival}")),
    )


FIGURES = [figure for rival in HERE for figure in figures_of(rival)]

WORKLOADS: tuple[Workload, ...] = ()
if FIGURES:
    first, *others = FIGURES
    WORKLOADS = (Workload(first.id, against_all, first.goal, first.note, more=tuple(others)),)
