"""All that the library does with asyncio itself: tasks, waiting until a time, and its share of each turn of the loop.

Time is that of the manager's clock, so that tests can move it. Tasks are made without the loop's task factory, because
an eager one would run their first step at once, in the middle of the caller's. Work that does not belong to one caller
is given a context of its own, so that it does not see the caller's context variables.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context
from typing import Any, TypeVar

from .clock import Clock, TimerHandle
from .options import SECOND

__all__ = ["Kept", "Loop", "leave"]

T = TypeVar("T")

SLICE = SECOND // 2000
"""How many nanoseconds in a turn the library may use before other callbacks get their turn."""


class Loop:
    """The event loop of one manager."""

    __slots__ = ("_clock", "_is_overrun", "_slice_ends", "_tasks", "overruns", "running")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.running: asyncio.AbstractEventLoop | None = None
        """The loop of asyncio, from the first awaited call on."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._slice_ends = 0
        self._is_overrun = False
        self.overruns: int = 0
        """How many turns took more than twice the time that the library may use."""

    @property
    def is_usable(self) -> bool:
        """Whether timers can be set."""
        return self.running is not None and not self.running.is_closed()

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Use this loop from now on."""
        self.running = loop

    def call_soon(self, callback: Callable[[], object], context: Context) -> None:
        """Call a function in the next turn of the loop."""
        assert self.running is not None
        self.running.call_soon(callback, context=context)

    # Tasks

    def spawn(self, work: Coroutine[Any, Any, T], name: str, context: Context | None = None) -> asyncio.Task[T]:
        """Start a task, and keep a reference to it until it is done: asyncio itself keeps only a weak one."""
        task = asyncio.Task(work, loop=self.running, name=f"cagey-sessions {name}", context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def keep(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> Kept:
        """Start a task that nobody waits for, and start it again a second after somebody else has cancelled it.

        Not at once: `asyncio.run` cancels every task when it ends, and a task begun then would be thrown away.
        """
        return Kept(self, self._clock, work, name, SECOND)

    # Waiting

    async def wait(self, future: asyncio.Future[Any], limit: int | None) -> bool:
        """Wait until a future is done or `limit` nanoseconds have passed, and return whether it is done.

        Neither the end of the time nor a cancellation of this call cancels the future.
        """
        if future.done():
            return True
        assert self.running is not None
        done: asyncio.Future[None] = self.running.create_future()

        def wake(_: object = None) -> None:
            if not done.done():
                done.set_result(None)

        timer = None if limit is None else self._clock.call_later(max(0, limit), wake, Context())
        future.add_done_callback(wake)
        # not `asyncio.wait_for`: that cancels the future, and measures by the time of the loop
        try:
            await done
        finally:
            future.remove_done_callback(wake)
            if timer is not None:
                timer.cancel()
        return future.done()

    async def sleep(self, delay: int) -> None:
        """Wait for `delay` nanoseconds of the clock."""
        assert self.running is not None
        await self.wait(self.running.create_future(), delay)

    # Turns

    async def take_turn(self) -> None:
        """Wait for a turn of the loop in which the library still has time left."""
        while self.is_turn_over():  # noqa: ASYNC110 - there is no event: other callbacks are to have their turn
            await asyncio.sleep(0)

    def is_turn_over(self) -> bool:
        """Whether the library has used up its share of this turn of the loop.

        The first call in a turn starts the measurement, so its answer is always no.
        """
        now = self._clock.now()
        if self._slice_ends == 0:
            self._slice_ends = now + SLICE
            assert self.running is not None
            self.running.call_soon(self._end_turn)
            return False
        if now > self._slice_ends + SLICE and not self._is_overrun:
            self._is_overrun = True
            self.overruns += 1
        return now > self._slice_ends

    def _end_turn(self) -> None:
        self._slice_ends = 0
        self._is_overrun = False


class Kept:
    """A task that begins again when somebody else has cancelled it; see `Loop.keep`."""

    def __init__(
        self, loop: Loop, clock: Clock, work: Callable[[], Coroutine[Any, Any, None]], name: str, pause: int
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._work = work
        self._name = name
        self._pause = pause
        self._timer: TimerHandle | None = None
        self._is_stopped = False
        self._task: asyncio.Task[None]
        self._begin()

    @property
    def is_done(self) -> bool:
        """Whether the work has come to its end, or was stopped by `stop`."""
        return self._task.done() and self._timer is None

    def stop(self) -> None:
        """Cancel the task for good."""
        self._is_stopped = True
        self._task.cancel()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin(self) -> None:
        self._timer = None
        if self._loop.is_usable:
            self._task = self._loop.spawn(self._work(), self._name, Context())
            self._task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() and not self._is_stopped and self._loop.is_usable:
            self._timer = self._clock.call_later(self._pause, self._begin, Context())


def leave(tasks: set[asyncio.Task[None]]) -> None:
    """Take the current task out of a set of workers. A worker calls this as its last step.

    A callback of the task would run one turn later, and code that counts the workers in between would start none.
    """
    with suppress(RuntimeError):  # a pending task that is collected as garbage is closed while no loop runs
        if (task := asyncio.current_task()) is not None:
            tasks.discard(task)
