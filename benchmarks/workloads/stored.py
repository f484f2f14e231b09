"""A manager with a store, made ready to be measured. What lives here: a store that does nothing, a clock that can be
stopped and set forward, and a quick way to a million users. What must not: scenarios.

Users come in by the steps of a login that follow the answer of the store (`Ownership._identify`), for a million logins
would take minutes. From there on everything is the manager's own.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from typing import Any

import cagey_sessions
from cagey_sessions.errors import StoreUnavailableError
from cagey_sessions.sessions.loading import Loaded
from cagey_sessions.stores import Claim, Outcome, Record, Store, Verdict

from .base import SEED, best_loop, new_loop, users_of

SECOND = 1_000_000_000
EPOCH = 1
SILENT = logging.getLogger("benchmarks")
SILENT.addHandler(logging.NullHandler())
SILENT.propagate = False


class NoStore(Store):
    """Says that it has saved everything."""

    loss_class = "everything is lost"

    def __init__(self) -> None:
        self.saved = Verdict(Outcome.SAVED)

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def claim_many(self, user_ids: Sequence[int | str], owner: str) -> list[Claim]:
        return [Claim(user_id, EPOCH, None) for user_id in user_ids]

    async def save_many(self, records: Sequence[Record]) -> list[Verdict]:
        return [self.saved] * len(records)

    async def release_many(self, claims: Sequence[tuple[int | str, int]], owner: str) -> list[bool]:
        return [True] * len(claims)

    async def erase(self, user_id: int | str, owner: str = "") -> bool:
        return False

    async def load(self, user_id: int | str) -> Record | None:
        return None

    async def scan(self) -> AsyncIterator[Record]:
        return
        yield


class DownStore(NoStore):
    """Lets everybody in, and cannot be reached when something is to be saved."""

    async def save_many(self, records: Sequence[Record]) -> list[Verdict]:
        raise StoreUnavailableError("down")


class _Timer:
    """A wake-up by the bench's clock."""

    __slots__ = ("_callback", "_clock", "_context", "_handle", "when")

    def __init__(self, clock: BenchClock, when: int, callback: Callable[[], None], context: Context) -> None:
        self.when = when
        self._clock = clock
        self._callback = callback
        self._context = context
        self._handle: asyncio.TimerHandle | None = None

    def set(self, loop: asyncio.AbstractEventLoop) -> None:
        delay = max(0, self.when - self._clock.now()) / SECOND
        self._handle = loop.call_later(delay, self._run, context=self._context)

    def unset(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _run(self) -> None:
        self._clock.timers.pop(self, None)
        self._callback()

    def cancel(self) -> None:
        self._clock.timers.pop(self, None)
        self.unset()


class BenchClock:
    """The system's clock, which can be stopped, so that nothing comes due, and goes on from a later time.

    It costs a manager a little more than `SystemClock`.
    """

    def __init__(self) -> None:
        self._offset = 0
        self._stopped_at: int | None = time.monotonic_ns()
        self.timers: dict[_Timer, None] = {}

    def now(self) -> int:
        stopped_at = self._stopped_at
        return time.monotonic_ns() + self._offset if stopped_at is None else stopped_at

    def call_later(self, delay: int, callback: Callable[[], None], context: Context) -> _Timer:
        timer = _Timer(self, self.now() + delay, callback, context)
        self.timers[timer] = None
        if self._stopped_at is None:
            timer.set(asyncio.get_running_loop())
        return timer

    def stop(self) -> None:
        self._stopped_at = self.now()
        for timer in self.timers:
            timer.unset()

    def go_on(self, at: int) -> None:
        """From within the loop: time goes on, from `at`."""
        assert self._stopped_at is not None
        assert at >= self._stopped_at
        self._offset, self._stopped_at = at - time.monotonic_ns(), None
        loop = asyncio.get_running_loop()
        for timer in self.timers:
            timer.set(loop)


def small_data(number: int) -> dict[str, Any]:
    """What a player of a small game has: about 55 bytes of JSON."""
    return {"name": f"player{number}", "gold": number % 1000, "level": number % 60, "at": [number % 512, number % 300]}


def tree_data(number: int) -> dict[str, Any]:
    """What a player of a role-playing game has: about 310 bytes of JSON."""
    source = random.Random(SEED + number)
    return {
        "name": f"player{number}",
        "gold": source.randrange(100_000),
        "position": {"map": f"map{source.randrange(40)}", "x": source.random() * 512, "y": source.random() * 512},
        "inventory": [{"item": source.randrange(5000), "count": source.randrange(1, 99)} for _ in range(4)],
        "quests": {f"quest{source.randrange(300)}": source.randrange(5) for _ in range(3)},
        "friends": [source.randrange(1_000_000) for _ in range(5)],
    }


class Server:
    """A manager with a store that does nothing, and users in it; its clock stands."""

    def __init__(self, interval: int, *, store: Store | None = None, **settings: Any) -> None:
        """`interval` in nanoseconds."""
        random.seed(SEED)  # a table spreads first deadlines by a seed that it takes from there
        self.clock = BenchClock()
        self.manager: cagey_sessions.SessionManager[Any] = cagey_sessions.SessionManager(
            store=store or NoStore(), interval=interval / SECOND, clock=self.clock, log=SILENT, **settings
        )
        self.interval = interval
        self.parts = self.manager._server
        self.table = self.parts.table
        self.sessions: list[Any] = []

    async def fill(self, count: int, data_of: Callable[[int], Any]) -> None:
        assert self.parts.link is not None
        await self.manager.create()  # binds the loop
        await self.parts.link.open()
        identify, create = self.manager._logins._identify, self.manager.create
        for number, user in enumerate(users_of(count)):
            session = await create()
            identify(session, Loaded(user, EPOCH, 0, 0, 0, data_of(number), losses=0))
            self.sessions.append(session)

    def arm(self, ticks: Sequence[int], seed: int) -> None:
        """Give the users these deadlines, in shuffled order, by a save that is acknowledged without a store.

        It fixes bytes with a digest that no data has, so what is saved next is a change.
        """
        table, now = self.table, self.parts.autosave.now_tick()
        shuffled = self.sessions.copy()
        random.Random(seed).shuffle(shuffled)
        for session, tick in zip(shuffled, ticks, strict=True):
            table.ask(session)
            taken = table.take(False)
            assert taken is not None
            assert taken[0] is session
            table.acknowledge(session, table.fix(session, tick), now, tick)
        self.parts.autosave.arm()

    async def save_all(self) -> None:
        """Set the clock forward by an interval, have everybody saved who is due by then, and stop the clock."""
        counters = self.table.counters
        until = counters.saved + len(self.sessions)
        self.clock.go_on(self.clock.now() + self.interval + SECOND // 10)
        while counters.saved < until:  # noqa: ASYNC110 - sleeping costs no CPU time; looking every turn would
            await asyncio.sleep(0.002)
        self.clock.stop()

    def abandon(self) -> None:
        """Let go of a million users without their last saves."""
        self.clock.stop()
        self.parts.autosave.close()
        self.parts.warning.detach()
        self.parts.listeners.clear()
        self.sessions.clear()


@contextmanager
def running(server: Callable[[], Server], count: int, data_of: Callable[[int], Any], loop: str = "") -> Iterator[Any]:
    """A server with users, and the runner of its loop."""
    with asyncio.Runner(loop_factory=lambda: new_loop(loop or best_loop())) as runner:

        async def start() -> Server:
            made = server()
            await made.fill(count, data_of)
            return made

        made = runner.run(start())
        try:
            yield made, runner
        finally:
            made.abandon()
            del made
            gc.collect()
