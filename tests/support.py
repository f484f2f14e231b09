"""What the tests share: a clock that is turned by hand, and a database that does what it is told."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from cagey_sessions.options import parse_duration

SECOND = 1_000_000_000


class _Timer:
    def __init__(self, when: int, callback: Callable[[], None], context: Context) -> None:
        self.when = when
        self.callback = callback
        self.context = context
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


async def turns(count: int = 25) -> None:
    """Let the loop turn until what can go on without time has gone on."""
    for _ in range(count):
        await asyncio.sleep(0)


class ManualClock:
    """Time that stands still until `advance` moves it from timer to timer, or `jump` moves it past them all."""

    def __init__(self, start: int = 0) -> None:
        self._now = start
        self._order = itertools.count()
        self._timers: list[tuple[int, int, _Timer]] = []
        self.fired = 0

    def now(self) -> int:
        return self._now

    def call_later(self, delay: int, callback: Callable[[], None], context: Context) -> _Timer:
        timer = _Timer(self._now + delay, callback, context)
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    @property
    def pending(self) -> int:
        return sum(not timer.cancelled for _, _, timer in self._timers)

    async def advance(self, duration: Any) -> None:
        """Let time pass, each timer at its moment, with room for the loop after each."""
        until = self._now + parse_duration(duration, "duration", shortest=0)
        await turns()
        while self._timers and self._timers[0][0] <= until:
            when, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, when)
            if not timer.cancelled:
                self.fired += 1
                timer.context.run(timer.callback)
                await turns()
        self._now = until
        await turns()

    async def jump(self, duration: Any) -> None:
        """A stall: time passes, and only then do the timers run, all of them late."""
        self._now += parse_duration(duration, "duration", shortest=0)
        await self.advance(0)

    async def sleep(self, duration: Any) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not future.done():
                future.set_result(None)

        self.call_later(parse_duration(duration, "duration", shortest=0), wake, Context())
        await future


@dataclass
class Write:
    user_id: int | str
    body: str
    start: int
    end: int | None = None
    error: BaseException | None = None


class Db:
    """A database behind a `persist_user_data` listener: it fixes the bytes first, then takes its time, then stores.

    `script` holds what the next writes do, in order, for all users or by user: a delay (``"50ms"``), an exception to
    raise, ``"hang"`` (until `release` is set), or a callable awaited in place of the delay. Without one a write takes
    `delay`. Two writes of one user at a time fail the test.
    """

    def __init__(self, clock: ManualClock, delay: Any = 0) -> None:
        self.clock = clock
        self.delay = delay
        self.script: list[Any] = []
        self.script_of: dict[int | str, list[Any]] = {}
        self.always: dict[int | str, Any] = {}
        self.stored: dict[int | str, Any] = {}
        self.log: list[Write] = []
        self.release = asyncio.Event()
        self.open = 0
        self.most_open = 0
        self._open_users: set[int | str] = set()

    async def save(self, session: Any) -> None:
        user_id, body = session.user_id, json.dumps(session.user_data)
        assert user_id is not None, "a save without a user"
        assert user_id not in self._open_users, f"two writes of user {user_id!r} in flight"
        write = Write(user_id, body, self.clock.now())
        self.log.append(write)
        self._open_users.add(user_id)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            if self.always.get(user_id) is not None:
                step = self.always[user_id]
            elif self.script_of.get(user_id):
                step = self.script_of[user_id].pop(0)
            else:
                step = self.script.pop(0) if self.script else self.delay
            if isinstance(step, BaseException):
                raise step
            if step == "hang":
                await self.release.wait()
            elif callable(step):
                await step()
            elif step:
                await self.clock.sleep(step)
            self.stored[user_id] = json.loads(body)
        except BaseException as error:
            write.error = error
            raise
        finally:
            write.end = self.clock.now()
            self.open -= 1
            self._open_users.discard(user_id)

    def writes(self, user_id: int | str) -> list[Any]:
        """The bodies of a user's writes, in the order they began."""
        return [json.loads(write.body) for write in self.log if write.user_id == user_id]


async def let_time_pass(clock: ManualClock, work: Any, limit: Any = "60s") -> Any:
    """Await something that needs time to go on, moving the clock from timer to timer until it is done."""
    task = asyncio.ensure_future(work)
    until = clock.now() + parse_duration(limit, "limit")
    await turns()
    while not task.done() and clock.now() < until:
        await clock.advance(min(0.05, (until - clock.now()) / SECOND))
    assert task.done(), f"not done after {limit}"
    return await task
