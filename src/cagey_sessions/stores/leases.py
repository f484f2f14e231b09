"""Leases of the nodes that share a store. What lives here: when they are renewed. What must not: what a lease is in an
engine, and what becomes of the users of a node that has none.

A lease (Gray and Cheriton, SOSP 1989) is a promise with an end: whoever has users renews it well before that. Renewal
does not depend on saves, and a failed one is tried again after a fifth of the time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextvars import Context

from ..errors import StoreUnavailableError

__all__ = ["Leases"]

_log = logging.getLogger("cagey_sessions")


class Leases:
    """The leases that one store keeps for its owners, each `seconds` long; `send(owner)` renews one in the engine."""

    def __init__(self, name: str, seconds: float, send: Callable[[str], Awaitable[None]]) -> None:
        self._name = name
        self._seconds = seconds
        self._send = send
        self._renewed: dict[str, float] = {}
        """When the lease of each owner was last renewed, by our clock, before it was asked for."""
        self._sending = asyncio.Lock()
        self._renewing: asyncio.Task[None] | None = None
        self._ended = False

    @property
    def owners(self) -> list[str]:
        return list(self._renewed)

    async def hold(self, owner: str) -> None:
        """See to it that an owner has a lease for longer than a claim takes, and goes on having one."""
        if not self._is_old(owner):
            return
        async with self._sending:
            if not self._is_old(owner):
                return  # somebody else has done it
            await self.renew(owner)
        if (self._renewing is None or self._renewing.done()) and not self._ended:
            self._renewing = asyncio.Task(
                self._go_on(), loop=asyncio.get_running_loop(), name="cagey-sessions lease", context=Context()
            )

    async def renew(self, owner: str) -> None:
        """Renew a lease, however old it is; raises what `send` raises, and `StoreUnavailableError`."""
        now = time.monotonic()
        try:
            async with asyncio.timeout(self._seconds / 6):
                await self._send(owner)
        except TimeoutError:
            raise StoreUnavailableError(f"{self._name} did not answer in time to renew a lease") from None
        self._renewed[owner] = now

    def _is_old(self, owner: str) -> bool:
        return time.monotonic() - self._renewed.get(owner, -self._seconds) >= self._seconds / 3

    async def _go_on(self) -> None:
        failed = False
        while True:
            # sooner than a third, for so long has one who is put in doubt just after a renewal
            await asyncio.sleep(self._seconds / (15 if failed else 4))
            failed = False
            for owner in self.owners:
                try:
                    async with self._sending:
                        await self.renew(owner)
                except Exception as error:  # whatever it is: without a lease the users are lost
                    failed = True
                    _log.warning("%s: a lease could not be renewed: %s", self._name, error)

    async def end(self) -> None:
        """Renew nothing any more."""
        self._ended = True
        renewing, self._renewing = self._renewing, None
        if renewing is not None:
            renewing.cancel()
            await asyncio.wait([renewing])
