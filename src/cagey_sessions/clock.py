"""Time. What lives here: what a clock is, and the one that runs servers. What must not: intervals, deadlines, ticks.

Time is an `int` of nanoseconds that never goes back and knows no calendar, so that sums are exact and the wall clock
may jump as it likes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextvars import Context
from typing import Protocol

__all__ = ["Clock", "SystemClock", "TimerHandle"]


class TimerHandle(Protocol):
    """A wake-up that can be taken back."""

    def cancel(self) -> None:
        """Take it back; nothing happens if it is over."""
        ...


class Clock(Protocol):
    """What a manager needs of time. A test passes one of its own as ``clock=``."""

    def now(self) -> int:
        """Nanoseconds since some fixed moment, never going back."""
        ...

    def call_later(self, delay: int, callback: Callable[[], None], context: Context) -> TimerHandle:
        """Run `callback` on the running loop after `delay` nanoseconds; 0 means in the loop's next turn."""
        ...


class SystemClock:
    """The system's monotonic clock and the running loop's timers.

    `now` reads the clock itself: a loop's own time stands still while a callback blocks it, and uvloop's is rounded to
    milliseconds.
    """

    def now(self) -> int:
        return time.monotonic_ns()

    def call_later(self, delay: int, callback: Callable[[], None], context: Context) -> TimerHandle:
        loop = asyncio.get_running_loop()
        return loop.call_later(delay / 1e9, callback, context=context)
