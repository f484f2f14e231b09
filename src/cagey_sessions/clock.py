"""The clock of a manager: the `Clock` protocol, and `SystemClock`, which servers run on.

Time is an `int` of nanoseconds from some fixed moment, and never goes back. As an int it makes sums exact; as a
monotonic time it is not affected when somebody sets the wall clock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextvars import Context
from typing import Protocol

__all__ = ["Clock", "SystemClock", "TimerHandle"]


class TimerHandle(Protocol):
    """A wake-up that can be cancelled."""

    def cancel(self) -> None:
        """Cancel the wake-up; does nothing once it has run or was cancelled."""
        ...


class Clock(Protocol):
    """The time as a manager sees it. A test passes a clock of its own as ``clock=`` and moves it by hand."""

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
