"""What a save costs. What lives here: the way of one save through the manager, without lag and without a database. What
must not: stores that do anything.

Everybody is due at once, by a clock that is set forward; the manager takes, fixes, batches and settles as it always
does, in its slices, and CPU time is counted until the last is acknowledged.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson

from ..rivals import port
from .base import (
    SEED,
    Goal,
    Pair,
    Sizes,
    Workload,
    best_loop,
    clock,
    create_all,
    destroy_all,
    identify_all,
    keys_of,
    make_port,
    new_loop,
    plain,
    users_of,
)
from .stored import SECOND, Server, running, tree_data

INTERVAL = 30 * SECOND
TASKS_AT_A_TIME = 500
"""How many tasks of the base are begun in one turn: with more the tasks themselves fall out of the cache."""


# One task per save


@contextmanager
def tasks(count: int) -> Iterator[Any]:
    """The port with everybody identified: a function that saves each once, and what that cost."""
    with asyncio.Runner(loop_factory=lambda: new_loop(best_loop())) as runner:

        async def start() -> tuple[port.SessionManager, list[port.Session]]:
            manager = make_port()
            sessions = await create_all(manager, keys_of(count))
            await identify_all(sessions, users_of(count))
            random.Random(SEED).shuffle(sessions)
            return manager, sessions

        async def save_each() -> float:
            """As its timers would: a task, the listener, the next timer. The timers themselves are left out."""
            due, saving = manager._due, manager._tasks
            begin = clock()
            for first in range(0, len(sessions), TASKS_AT_A_TIME):
                for session in sessions[first : first + TASKS_AT_A_TIME]:
                    due(session)
                while saving:  # noqa: ASYNC110 - a turn of the loop is all they need
                    await asyncio.sleep(0)
            return (clock() - begin) / len(sessions)

        manager, sessions = runner.run(start())
        yield lambda: runner.run(save_each())
        runner.run(destroy_all(manager, sessions))


@contextmanager
def save_overhead(sizes: Sizes) -> Iterator[Pair]:
    """The data is a small number, another one in each round: the check and the dump of that are on our account."""
    rounds = itertools.count(1)

    async def save_all(server: Server) -> float:
        number = next(rounds)
        for session in server.sessions:
            session.user_data = number
        begin = clock()
        await server.save_all()
        return (clock() - begin) / len(server.sessions)

    with (
        running(lambda: Server(INTERVAL), sizes.many, lambda number: -1) as (server, runner),
        tasks(sizes.many) as base,
    ):
        yield Pair(lambda: runner.run(save_all(server)), base)


# With the bytes


@contextmanager
def save_total(sizes: Sizes) -> Iterator[Pair]:
    """Both sides visit trees that have left the cache long ago, in an order that has nothing to do with memory."""

    async def save_all(server: Server) -> float:
        for session in server.sessions:
            session.user_data["gold"] += 1
        begin = clock()
        await server.save_all()
        return (clock() - begin) / len(server.sessions)

    with running(lambda: Server(INTERVAL), sizes.many, tree_data) as (server, runner):
        yield Pair(lambda: runner.run(save_all(server)), bare_dumps(server))


def bare_dumps(server: Server) -> Any:
    """orjson on everybody's data, cold, each result dropped at once."""
    trees = [session.user_data for session in server.sessions]
    random.Random(SEED).shuffle(trees)

    def dump() -> float:
        dumps = orjson.dumps
        begin = clock()
        for tree in trees:
            dumps(tree)
        return (clock() - begin) / len(trees)

    return dump


@contextmanager
def save_clean(sizes: Sizes) -> Iterator[Pair]:
    async def save_all(server: Server) -> float:
        skipped = server.table.counters.skipped
        begin = clock()
        await server.save_all()
        elapsed = clock() - begin
        assert server.table.counters.skipped == skipped + len(server.sessions)
        return elapsed / len(server.sessions)

    with running(lambda: Server(INTERVAL, tracking="marked"), sizes.many, tree_data) as (server, runner):
        runner.run(server.save_all())  # the first save of each is made, mark or not
        yield Pair(lambda: runner.run(save_all(server)), bare_dumps(server))


WORKLOADS = (
    Workload(
        "save_overhead",
        save_overhead,
        Goal(faster=4, aim="30x"),
        plain("one due session taken, batched, settled; the data is one number, no store; vs one task per save (port)"),
    ),
    Workload(
        "save_total",
        save_total,
        Goal(ratio=1.6, aim="1.25"),
        plain("one due session saved with check, encoding and copy, no store, vs bare orjson, {many} cold trees"),
    ),
    Workload(
        "save_clean",
        save_clean,
        Goal(ratio=0.05),
        plain('one due session without a mark (tracking="marked") vs bare orjson on its data'),
    ),
)
