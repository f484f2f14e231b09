"""Sessions as a program uses them. What lives here: finding, creating, identifying, ending, the bag, and what events
cost that nobody listens to. What must not: saves, and time going on.

The operations are written as a user's program writes them, in a `for` loop on the public method, and the loop counts on
both sides. Rows that await end with one turn of the event loop on both sides, so that work put off is counted too.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import itertools
import random
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import cagey_sessions
from cagey_sessions.sessions import beginning, ending

from .base import (
    HOT,
    PASSES,
    SEED,
    Figure,
    Goal,
    Manager,
    Pair,
    Sizes,
    Workload,
    clock,
    create_all,
    destroy_all,
    identify_all,
    keys_of,
    make_ours,
    make_port,
    plain,
    users_of,
)

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


# Events

EMITTERS = (
    (beginning, beginning.Beginnings, ("create", "start", "set_user")),
    (ending, ending.Endings, ("end_at_once",)),
)
"""The methods that create + start + set_user + destroy are where somebody listens, and that look for who does."""
LOOKS, EMITS = ("has", "is_heard"), ("emit", "emit_identified")


class _Mute(ast.NodeTransformer):
    """Takes the events out of a method: nobody is looked for, and nothing is emitted."""

    def __init__(self) -> None:
        self.found = 0

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if isinstance(node.func, ast.Attribute) and node.func.attr in LOOKS:
            self.found += 1
            return ast.Constant(False)
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        awaited = node.value.value if isinstance(node.value, ast.Await) else None
        if isinstance(awaited, ast.Call) and isinstance(awaited.func, ast.Attribute) and awaited.func.attr in EMITS:
            self.found += 1
            return ast.Pass()
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        return ast.Pass() if ast.unparse(node.target) == "errors" else node

    def visit_If(self, node: ast.If) -> ast.stmt:
        if ast.unparse(node.test) == "errors":
            return ast.Pass()
        self.generic_visit(node)
        return ast.Pass() if ast.unparse(node.test) == "False" else node


def kinds_of(*, muted: bool) -> tuple[type[beginning.Beginnings], type[ending.Endings], int]:
    """The classes of those methods with them compiled anew from their source, without their events if `muted`; and how
    many looks and emits were taken out."""
    found = 0
    kinds: list[Any] = []
    for module, kind, names in EMITTERS:
        methods: dict[str, Any] = {}
        for name in names:
            tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(kind, name))))
            if muted:
                mute = _Mute()
                tree = ast.fix_missing_locations(mute.visit(tree))
                found += mute.found
            exec(compile(tree, f"<{name}>", "exec", dont_inherit=True), vars(module), methods)
        kinds.append(type("Variant", (kind,), methods))
    return kinds[0], kinds[1], found


async def time_life(keys: Sequence[str]) -> float:
    manager = make_ours()
    data = {"gold": 0}
    start = clock()
    for user, key in enumerate(keys):
        session = await manager.create(key)
        await session.start()
        await session.set_user(user, data)
        await session.destroy()
    elapsed = clock() - start
    await manager.destroy()
    return elapsed / len(keys)


async def time_coroutines(keys: Sequence[str], *, muted: bool) -> float:
    """What those calls are where somebody listens, or there is a store; if `muted`, made to emit nothing."""
    manager = make_ours()
    beginnings, endings = manager._beginnings, manager._endings
    beginnings.__class__, endings.__class__, found = kinds_of(muted=muted)
    assert found == 5 * muted, "these methods no longer look for listeners where this row thinks they do"
    data = {"gold": 0}
    start = clock()
    for user, key in enumerate(keys):
        session = await beginnings.create(key, False)
        await beginnings.start(session)
        await beginnings.set_user(session, user, data)
        await endings.end(session, None)
    elapsed = clock() - start
    await manager.destroy()
    return elapsed / len(keys)


@contextmanager
def emit_none(sizes: Sizes) -> Iterator[Pair]:
    keys = keys_of(sizes.many // 4)

    def coroutines(muted: bool) -> float:
        return asyncio.run(time_coroutines(keys, muted=muted))

    yield Pair(
        lambda: (asyncio.run(time_life(keys)), coroutines(muted=False)),
        lambda: (coroutines(muted=True),) * 2,
    )


WORKLOADS = (
    Workload(
        "find_hot",
        find_hot,
        Goal(ratio=1.35),
        plain("find_by_key vs dict.get, 1,000 keys of {many}, the loop included"),
    ),
    Workload(
        "find_1e6",
        find_1e6,
        Goal(ratio=1.15),
        plain("find_by_key vs dict.get, {most} keys, shuffled, fresh strings"),
    ),
    Workload(
        "create",
        partial(life, time_create),
        Goal(faster=2.7, aim="4x"),
        plain("await create(key) vs port, {many} sessions"),
    ),
    Workload(
        "identify",
        partial(life, time_identify),
        Goal(faster=4),
        plain("await set_user(int, data) vs port, {many} sessions, autosave armed"),
    ),
    Workload(
        "destroy",
        partial(life, time_destroy),
        Goal(faster=3.3, aim="5x"),
        plain("await destroy() vs port, {many} identified sessions, shuffled, freeing included"),
    ),
    Workload("bag_get", bag_get, Goal(ratio=1.5), plain("session.get vs dict.get, 1,000 sessions")),
    Workload("bag_set", bag_set, Goal(ratio=1.9), plain("session.set vs dict[...] =, 1,000 sessions")),
    Workload(
        "emit_none",
        emit_none,
        Goal(ratio=1.05),
        plain("create + start + set_user + destroy that nobody listens to vs its coroutines without events"),
        more=(Figure("emit_none_coroutines", Goal(), plain("those coroutines vs the same without events")),),
    ),
    Workload(
        "create_gc",
        partial(life, time_create),
        Goal(),
        plain("like create, with the collector on: {many} sessions"),
        collector=True,
    ),
)
