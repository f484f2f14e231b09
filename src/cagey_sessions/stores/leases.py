"""Renews the leases of a shared store, so that other servers do not take this one for dead.

A lease (Gray and Cheriton, SOSP 1989) is a promise with an end: a server that has users renews it well before it runs
out. Renewal does not depend on saves: a server whose users change nothing keeps them, too. Renewals come after a
quarter of the lease, and after a fifteenth once one has failed.

What a lease is in an engine, and when an owner without one is dead, is in ``postgres/engine.py`` and
``redis/engine.py``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextvars import Context
from functools import partial

from ..errors import StoreUnavailableError

__all__ = ["Leases"]

_log = logging.getLogger("cagey_sessions")


class Leases:
    """The leases of one store's owners, each `seconds` long; `send(owner)` renews one in the engine."""

    def __init__(self, name: str, seconds: float, send: Callable[[str], Awaitable[None]]) -> None:
        self._name = name
        self._seconds = seconds
        self._send = send
        self._renewed: dict[str, float] = {}
        """By owner, when the last renewal that succeeded was sent, by our clock. Until then plus `seconds` it holds."""
        self._sending = asyncio.Lock()
        self._renewing: asyncio.Task[None] | None = None
        self._ended = False

    @property
    def owners(self) -> list[str]:
        """The owners that have a lease, as far as this store has asked for one."""
        return list(self._renewed)

    async def hold(self, owner: str) -> None:
        """Make sure that an owner's lease holds for longer than a claim takes, and is renewed from now on.

        Called before each claim: a user who is claimed under a lease that has run out could be taken at once. Raises
        what `renew` raises.
        """
        if not self._is_old(owner):
            return
        async with self._sending:
            if not self._is_old(owner):
                return  # another task has renewed it while this one waited for the lock
            await self.renew(owner)
        if (self._renewing is None or self._renewing.done()) and not self._ended:
            self._begin(asyncio.get_running_loop())

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._ended or loop.is_closed() or (self._renewing is not None and not self._renewing.done()):
            return
        self._renewing = asyncio.Task(self._renew_forever(), loop=loop, name="cagey-sessions lease", context=Context())
        self._renewing.add_done_callback(partial(self._on_done, loop))

    def _on_done(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
        """Begin again if somebody else has cancelled the task: without a lease the users would be taken.

        After a pause, because `asyncio.run` cancels every task when it ends, and a task begun then would be thrown
        away.
        """
        if task.cancelled() and not self._ended and not loop.is_closed():
            loop.call_later(self._seconds / 15, self._begin, loop)

    async def renew(self, owner: str) -> None:
        """Renew a lease, however old it is.

        Raises what `send` raises, and `StoreUnavailableError` if that takes longer than a sixth of the lease.
        """
        now = time.monotonic()  # before it is sent: the engine counts from some moment after this
        try:
            async with asyncio.timeout(self._seconds / 6):
                await self._send(owner)
        except TimeoutError:
            raise StoreUnavailableError(f"{self._name} did not answer in time to renew a lease") from None
        self._renewed[owner] = now

    def _is_old(self, owner: str) -> bool:
        return time.monotonic() - self._renewed.get(owner, -self._seconds) >= self._seconds / 3

    async def _renew_forever(self) -> None:
        failed = False
        while True:
            # Sooner than a third of the lease: that is how long an owner has that is put in doubt just after a renewal.
            await asyncio.sleep(self._seconds / (15 if failed else 4))
            failed = False
            for owner in self.owners:
                try:
                    async with self._sending:
                        await self.renew(owner)
                except Exception as error:  # whatever it is, go on: without a lease the users would be taken
                    failed = True
                    _log.warning("%s: a lease could not be renewed: %s", self._name, error)

    async def end(self) -> None:
        """Stop renewing."""
        self._ended = True
        renewing, self._renewing = self._renewing, None
        if renewing is not None:
            renewing.cancel()
            await asyncio.wait([renewing])
