"""The connections of a store to its engine: a pool that knows which call is on which connection.

The drivers' own pools do not suffice: to end one call that hangs, its connection has to be found and closed. A
connection has one call at a time, and is used again only if that call came to its end. If its reply were still to come,
every later call would get the answer to the one before it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Generic, TypeVar

from ..errors import StoreUnavailableError, WrongLoopError

__all__ = ["Connections"]

C = TypeVar("C")
T = TypeVar("T")


class Connections(Generic[C]):
    """Up to `most` connections of one store, made when they are needed; `timeout` is in seconds.

    `connect` makes a connection, and `is_live` says whether it can take another call. `cut` closes it at once, whatever
    is under way on it; `finish` closes it in good order.
    """

    def __init__(
        self,
        name: str,
        *,
        most: int,
        timeout: float,
        connect: Callable[[], Awaitable[C]],
        is_live: Callable[[C], bool],
        cut: Callable[[C], None],
        finish: Callable[[C], Awaitable[None]],
    ) -> None:
        self._name = name
        self._most = most
        self._timeout = timeout
        self._connect = connect
        self._is_live = is_live
        self._cut = cut
        self._finish = finish
        self._loop = asyncio.get_running_loop()
        self._idle: list[C] = []
        self._busy: dict[asyncio.Task[object], C] = {}
        self._connecting: dict[asyncio.Task[object], asyncio.Timeout] = {}
        self._free_slots = most
        self._waiting: dict[asyncio.Task[object], asyncio.Future[None]] = {}
        """The tasks that wait for a slot, in the order in which they came."""
        self._empty: asyncio.Future[None] | None = None  # `close` waits on it until no call is under way
        self.is_closed: bool = False

    def add(self, connection: C) -> None:
        """Add an idle connection that was made outside, for example to look at the engine first."""
        self._idle.append(connection)

    async def run(self, work: Callable[[C], Coroutine[object, object, T]]) -> T:
        """Await `work(connection)` on a connection that no other call has meanwhile, and return what it returns.

        After `timeout` and one second the connection is cut, so that the work fails. Raises what `connect` and the work
        raise, `StoreUnavailableError` if no connection is free within `timeout`, and `WrongLoopError`.
        """
        task = asyncio.current_task()
        if task is None or task.get_loop() is not self._loop:  # futures of this loop cannot be awaited on another
            raise WrongLoopError(f"this {self._name} was opened on another event loop")
        await self._acquire_slot(task)
        connection: C | None = None
        try:
            connection = await self._take(task)
            self._busy[task] = connection
            # a second later than the engine's own limit, which ends a statement without the loss of the connection
            timer = self._loop.call_later(self._timeout + 1, self._cut, connection)
            try:
                return await work(connection)
            except (asyncio.CancelledError, TimeoutError):
                self._cut(connection)  # the reply is still to come, and would be taken for that of the next call
                raise
            finally:
                timer.cancel()
                del self._busy[task]
        finally:
            try:
                if connection is not None:
                    await self._give(connection)
            finally:
                self._release_slot()

    def abort(self, call: asyncio.Task[object]) -> None:
        """End the `run` of a task, whether it waits for a slot, is connecting, or is at work on a connection."""
        connection, waiting, connecting = self._busy.get(call), self._waiting.get(call), self._connecting.get(call)
        if connection is not None:
            self._cut(connection)
        if connecting is not None and not connecting.expired():
            connecting.reschedule(self._loop.time())
        if waiting is not None and not waiting.done():
            waiting.set_exception(StoreUnavailableError(f"{self._name}: the call was given up before it began"))

    def cut_all(self) -> None:
        """Close every connection at once, whatever is under way on it."""
        for connection in (*self._idle, *self._busy.values()):
            self._cut(connection)
        self._idle.clear()

    async def close(self) -> None:
        """Wait up to `timeout` for the calls under way, and close every connection. Begins no new call."""
        self.is_closed = True
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(StoreUnavailableError(f"this {self._name} was closed"))
        try:
            async with asyncio.timeout(self._timeout):
                if self._free_slots < self._most:
                    self._empty = self._loop.create_future()
                    await self._empty
                while self._idle:
                    connection = self._idle.pop()
                    try:
                        await self._finish(connection)
                    except BaseException:
                        self._cut(connection)
                        raise
        except Exception:
            return  # what could not be closed in good order, or in time, is cut
        finally:
            self.cut_all()

    async def _take(self, task: asyncio.Task[object]) -> C:
        """An idle connection that still lives, or a new one."""
        while self._idle:
            connection = self._idle.pop()
            if self._is_live(connection):
                return connection
            self._cut(connection)
        try:
            async with asyncio.timeout(None) as self._connecting[task]:  # `abort` gives it an end
                return await self._connect()
        finally:
            del self._connecting[task]

    async def _give(self, connection: C) -> None:
        """Put a connection back after a call, or close it if it cannot take another."""
        if self._is_live(connection):
            self._idle.append(connection)
        else:
            self._cut(connection)

    async def _acquire_slot(self, task: asyncio.Task[object]) -> None:
        if self.is_closed:
            raise StoreUnavailableError(f"this {self._name} is not open")
        if self._free_slots:
            self._free_slots -= 1
            return
        waiting = self._waiting[task] = self._loop.create_future()
        try:
            async with asyncio.timeout(self._timeout):
                await waiting
        except BaseException as error:
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self._release_slot()  # the slot was handed over just too late: pass it on
            if isinstance(error, TimeoutError):
                raise StoreUnavailableError(f"{self._name}: no connection was free in time") from None
            raise
        finally:
            del self._waiting[task]

    def _release_slot(self) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result(None)  # handed over: a task that comes meanwhile must not get in before it
                return
        self._free_slots += 1
        if self._empty is not None and self._free_slots == self._most and not self._empty.done():
            self._empty.set_result(None)
