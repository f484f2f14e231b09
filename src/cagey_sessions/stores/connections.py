"""Connections to an engine. What lives here: who has which, who waits for one, and the end of a call that takes too
long. What must not: what is said on them.

A connection has one call at a time. It is used again only if the call on it has come to its end, for on one that is a
reply behind everybody would get the answer meant for the one before.
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
    """Up to `most` connections of one store; `timeout` is in seconds.

    `connect` makes one, `is_live` tells whether one can take another call, `cut` ends one at once, whatever is under
    way on it, and `finish` ends one in good order.
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
        self._places = most
        self._waiting: dict[asyncio.Task[object], asyncio.Future[None]] = {}
        """Who waits for a place, in the order in which they came."""
        self._empty: asyncio.Future[None] | None = None
        self.is_closed: bool = False

    def add(self, connection: C) -> None:
        """Take over a connection that nobody uses."""
        self._idle.append(connection)

    async def run(self, work: Callable[[C], Coroutine[object, object, T]]) -> T:
        """Do work on a connection that nobody else has meanwhile; after `timeout` and a second it is cut.

        Raises what `connect` and the work raise, and `StoreUnavailableError` if no place is free in time.
        """
        task = asyncio.current_task()
        if task is None or task.get_loop() is not self._loop:
            raise WrongLoopError(f"this {self._name} was opened on another event loop")
        await self._enter(task)
        connection: C | None = None
        try:
            connection = await self._take(task)
            self._busy[task] = connection
            timer = self._loop.call_later(self._timeout + 1, self._cut, connection)
            try:
                return await work(connection)
            except (asyncio.CancelledError, TimeoutError):
                self._cut(connection)  # its reply is still to come
                raise
            finally:
                timer.cancel()
                del self._busy[task]
        finally:
            try:
                if connection is not None:
                    await self._give(connection)
            finally:
                self._leave()

    def abort(self, call: asyncio.Task[object]) -> None:
        """End what a task does in `run`, wherever it is by now."""
        connection, waiting, connecting = self._busy.get(call), self._waiting.get(call), self._connecting.get(call)
        if connection is not None:
            self._cut(connection)
        if connecting is not None and not connecting.expired():
            connecting.reschedule(self._loop.time())
        if waiting is not None and not waiting.done():
            waiting.set_exception(StoreUnavailableError(f"{self._name}: the call was given up before it began"))

    def cut_all(self) -> None:
        """End every connection, whatever is under way on it."""
        for connection in (*self._idle, *self._busy.values()):
            self._cut(connection)
        self._idle.clear()

    async def close(self) -> None:
        """Let what is under way come to its end, for `timeout` at the most, and end every connection."""
        self.is_closed = True
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(StoreUnavailableError(f"this {self._name} was closed"))
        try:
            async with asyncio.timeout(self._timeout):
                if self._places < self._most:
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
            return
        finally:
            self.cut_all()

    async def _take(self, task: asyncio.Task[object]) -> C:
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
        if self._is_live(connection):
            self._idle.append(connection)
        else:
            self._cut(connection)

    async def _enter(self, task: asyncio.Task[object]) -> None:
        if self.is_closed:
            raise StoreUnavailableError(f"this {self._name} is not open")
        if self._places:
            self._places -= 1
            return
        waiting = self._waiting[task] = self._loop.create_future()
        try:
            async with asyncio.timeout(self._timeout):
                await waiting
        except BaseException as error:
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self._leave()  # the place has come just too late
            if isinstance(error, TimeoutError):
                raise StoreUnavailableError(f"{self._name}: no connection was free in time") from None
            raise
        finally:
            del self._waiting[task]

    def _leave(self) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result(None)  # it has our place
                return
        self._places += 1
        if self._empty is not None and self._places == self._most and not self._empty.done():
            self._empty.set_result(None)
