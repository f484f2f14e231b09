"""Taking turns with the rest of the program. What lives here: the share that our work has of one turn of the event
loop. What must not: the work.
"""

from __future__ import annotations

import asyncio

from .clock import Clock
from .options import SECOND

__all__ = ["TimeSlice"]

SLICE = SECOND // 2000
"""How long our work may hold the loop before others get a turn."""


class TimeSlice:
    """What is left of our share of this turn, for all who work for one manager."""

    __slots__ = ("_clock", "_ends", "_is_overrun", "_loop", "overruns")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ends = 0
        self._is_overrun = False
        self.overruns: int = 0

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Share the turns of this loop from now on."""
        self._loop = loop

    async def wait(self) -> None:
        """Return in a turn of the loop that has time left for our work."""
        while self.is_spent():  # noqa: ASYNC110 - there is no event: other callbacks are to have their turn
            await asyncio.sleep(0)

    def is_spent(self) -> bool:
        """Whether this turn of the loop has had its share of our work. The first question of a turn is answered no."""
        now = self._clock.now()
        if self._ends == 0:
            self._ends = now + SLICE
            assert self._loop is not None
            self._loop.call_soon(self._end_turn)
            return False
        if now > self._ends + SLICE and not self._is_overrun:
            self._is_overrun = True
            self.overruns += 1
        return now > self._ends

    def _end_turn(self) -> None:
        self._ends = 0
        self._is_overrun = False
