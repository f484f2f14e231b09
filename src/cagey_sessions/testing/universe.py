"""Virtual time, the event loops that run in it, and the order in which they get their turns.

It works as the simulations of FoundationDB (Zhou et al., SIGMOD 2021) and TigerBeetle do, and as trio's shuffled run
queue: one thread, no real time, and a seed that decides everything that is left open. Each server has an event loop of
its own: asyncio's, except for the time and the order of what is ready. So to kill a server its loop just gets no more
turns: no `finally` runs, and nothing is flushed.

Nothing here knows what the callbacks are for; the server is in `world.py`, the database in `store.py`.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import selectors
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from contextvars import Context
from random import Random
from typing import Any, TypeVar

from ..clock import TimerHandle

__all__ = ["StuckError", "Universe", "VirtualClock", "VirtualLoop"]

T = TypeVar("T")

START = 1_000_000_000_000
"""The nanosecond at which virtual time begins. It is not 0, so that a missing time is not taken for the first one."""


class StuckError(RuntimeError):
    """A test waits for something that can never happen: nothing is ready to run, and no timer is set."""


class _Event:
    __slots__ = ("callback", "cancelled")

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Universe:
    """Virtual time, and all event loops that run in it.

    Parameters
    ----------
    seed
        Decides the order of what is ready at the same time. The same seed and the same program give the same run.
    shuffle
        The chance, from 0 to 1, that a turn runs its callbacks in another order than asyncio would. At 0 the order
        within a loop is asyncio's own.
    tick
        How many nanoseconds pass each time a `VirtualClock` is read, as if the program took time to compute.
    """

    def __init__(self, seed: int | str = 0, *, shuffle: float = 0.0, tick: int = 0) -> None:
        self.random: Random = Random(seed)
        self.shuffle = shuffle
        self.tick = tick
        self.now: int = START
        self.steps: int = 0
        self._order = itertools.count()
        self._events: list[tuple[int, int, _Event]] = []
        self._loops: list[VirtualLoop] = []

    @property
    def seconds(self) -> float:
        """How many seconds have passed since the start."""
        return (self.now - START) / 1e9

    def call_later(self, delay: int, callback: Callable[[], None]) -> TimerHandle:
        """Run `callback` outside of any loop after `delay` nanoseconds."""
        event = _Event(callback)
        heapq.heappush(self._events, (self.now + delay, next(self._order), event))
        return event

    def add_loop(self) -> VirtualLoop:
        """Make an event loop in this universe."""
        loop = VirtualLoop(self)
        self._loops.append(loop)
        return loop

    def remove_loop(self, loop: VirtualLoop) -> None:
        """Give a loop no more turns; its tasks stay as they are."""
        self._loops.remove(loop)

    def step(self, until: int | None = None) -> bool:
        """Do one step: a turn of a loop that is ready, or else move time to the next moment at which one is.

        Returns False, and does nothing, if nothing would ever happen, or not up to `until`, in nanoseconds.
        """
        ready = [loop for loop in self._loops if loop.is_ready()]
        if not ready:
            moments = [when for loop in self._loops if (when := loop.next_timer()) is not None]
            while self._events and self._events[0][2].cancelled:
                heapq.heappop(self._events)
            if self._events:
                moments.append(self._events[0][0])
            if not moments or (until is not None and min(moments) > until):
                return False
            self.now = max(self.now, min(moments))
            self.steps += 1
            while self._events and self._events[0][0] <= self.now:
                _, _, event = heapq.heappop(self._events)
                if not event.cancelled:
                    event.callback()
            return True
        self.steps += 1
        (ready[0] if len(ready) == 1 else self.random.choice(ready)).turn()
        return True

    def run(self, work: asyncio.Future[T], limit: int | None = None) -> T:
        """Do steps until a future or task of one of the loops is done, and return its result.

        Raises `StuckError` if that can never happen, or does not within `limit` nanoseconds of virtual time.
        """
        until = None if limit is None else self.now + limit
        while not work.done():
            if not self.step(until):
                waits = "nothing that could still happen would end it" if until is None else "not in the time it had"
                raise StuckError(f"{_name(work)} does not come to its end: {waits}")
        return work.result()

    def advance(self, duration: int) -> None:
        """Let `duration` nanoseconds pass, with all that is due by then."""
        until = self.now + duration
        while self.step(until):
            pass
        self.now = max(self.now, until)
        while self.step(self.now):
            pass


class VirtualClock:
    """The `cagey_sessions.clock.Clock` of one loop."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def now(self) -> int:
        universe = self._loop.universe
        universe.now += universe.tick
        return universe.now

    def call_later(self, delay: int, callback: Callable[[], None], context: Context) -> TimerHandle:
        return self._loop.call_at((self._loop.universe.now + delay) / 1e9, callback, context=context)


class _NoSelector(selectors.BaseSelector):
    """Files that are never ready: virtual time has no sockets."""

    def __init__(self) -> None:
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = self._keys[fileobj] = selectors.SelectorKey(fileobj, -1, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop in virtual time. `Universe.add_loop` makes one, and only the universe runs it."""

    _ready: deque[asyncio.Handle]  # of asyncio's loop, which has no public way to reorder what is ready

    def __init__(self, universe: Universe) -> None:
        super().__init__(_NoSelector())
        self.universe = universe
        self.tasks: set[asyncio.Task[Any]] = set()
        """The tasks that were started by `start` and are not done."""
        self._timers: list[int] = []

    def time(self) -> float:
        return self.universe.now / 1e9

    def call_at(  # type: ignore[override]  # nobody calls it with types in hand
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        heapq.heappush(self._timers, -int(-when * 1e9 // 1))
        return super().call_at(when, callback, *args, context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Run a function in the loop's next turn, not in a thread: with one the run would depend on real time."""
        outcome: asyncio.Future[T] = self.create_future()

        def work() -> None:
            if outcome.cancelled():
                return
            try:
                outcome.set_result(func(*args))
            except Exception as error:
                outcome.set_exception(error)

        self.call_soon(work)
        return outcome

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task, which runs as the universe does its steps."""
        task = self.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def is_ready(self) -> bool:
        return bool(self._ready) or (bool(self._timers) and self._timers[0] <= self.universe.now)

    def next_timer(self) -> int | None:
        """When the next timer is due, in nanoseconds; also counts timers that were cancelled."""
        return self._timers[0] if self._timers else None

    def turn(self) -> None:
        """Do one turn of the loop: run what is ready now, and the timers that are due."""
        universe = self.universe
        while self._timers and self._timers[0] <= universe.now:
            heapq.heappop(self._timers)
        ready = self._ready
        if universe.shuffle and len(ready) > 1 and universe.random.random() < universe.shuffle:
            order = list(ready)
            universe.random.shuffle(order)
            ready.clear()
            ready.extend(order)
        self.stop()  # so that `run_forever` runs a single turn
        self.run_forever()


def _name(work: asyncio.Future[Any]) -> str:
    if isinstance(work, asyncio.Task):
        return f"{getattr(work.get_coro(), '__qualname__', work.get_name())}()"
    return "what is waited for"
