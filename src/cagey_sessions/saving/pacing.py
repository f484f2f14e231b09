"""How fast to go on after an outage. What lives here: the rate of saves while many have waited, and when the next may
come. What must not: who is saved, or how.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context

from .._core import SessionTable
from ..clock import Clock, TimerHandle
from ..options import SECOND

__all__ = ["Pacing"]

RATE = 1.25
"""After an outage periodic saves come at this multiple of users / interval: above 1 the backlog melts, and what is
saved together in this interval comes nearly together in the next, where it must not be more than the store is made for;
from one interval to the next everybody comes nearer to their own place again."""
STEP = SECOND // 100


class Pacing:
    """A token bucket for periodic saves, from an outage until nobody is left of those who had to wait."""

    def __init__(self, clock: Clock, table: SessionTable, interval: int | None, kick: Callable[[], None]) -> None:
        self._clock = clock
        self._table = table
        self._interval = interval
        self._kick = kick
        self._tokens = 0.0
        self._grown_at = 0
        self._timer: TimerHandle | None = None
        self.is_active: bool = False

    def begin(self) -> None:
        """An outage is over: everybody is due at once."""
        self.is_active = self._interval is not None
        self._tokens = 1.0
        self._grown_at = self._clock.now()

    def end(self) -> None:
        """Nobody is left of those who had to wait."""
        self.is_active = False

    def allows(self) -> bool:
        """Whether another may be saved now; if not, `kick` is called when it is time to ask again."""
        self._grow()
        if self._tokens >= 1:
            return True
        if self._timer is None:
            self._timer = self._clock.call_later(STEP, self._step, Context())
        return False

    def spend(self) -> None:
        """One is saved."""
        self._tokens -= 1

    def _grow(self) -> None:
        assert self._interval is not None
        now = self._clock.now()
        rate = self._table.counters.identified * RATE / self._interval
        self._tokens = min(self._tokens + (now - self._grown_at) * rate, max(1.0, 2 * STEP * rate))
        self._grown_at = now

    def _step(self) -> None:
        self._timer = None
        self._kick()

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
