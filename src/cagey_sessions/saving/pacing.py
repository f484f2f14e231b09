"""`Pacing`: how fast periodic saves go on after an outage, when every session is due at once.

It is a token bucket whose rate is a little higher than that of normal operation. Which sessions are saved, and how, is
decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context

from .._core import SessionTable
from ..clock import Clock, TimerHandle
from ..options import SECOND

__all__ = ["Pacing"]

RATE = 1.25
"""After an outage periodic saves run at this multiple of users / interval. Above 1 the backlog shrinks. Not far above
1, because sessions that are saved together now are due together an interval later, and the store is not made for that;
from one interval to the next they drift back to their own places."""
STEP = SECOND // 100
"""How long a worker waits for the next tokens."""


class Pacing:
    """A token bucket for periodic saves, from the end of an outage until no session is left that had to wait."""

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
        """An outage is over, and all sessions are due."""
        self.is_active = self._interval is not None
        self._tokens = 1.0
        self._grown_at = self._clock.now()

    def end(self) -> None:
        """No session is left that had to wait."""
        self.is_active = False

    def allows(self) -> bool:
        """Whether another session may be saved now; if not, `kick` is called when it is time to try again."""
        self._grow()
        if self._tokens >= 1:
            return True
        if self._timer is None:  # one timer for all workers that are refused
            self._timer = self._clock.call_later(STEP, self._step, Context())
        return False

    def spend(self) -> None:
        """A session is saved."""
        self._tokens -= 1

    def _grow(self) -> None:
        assert self._interval is not None
        now = self._clock.now()
        rate = self._table.counters.identified * RATE / self._interval
        # tokens for two steps at most: a loop that stood still must not let a burst through
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
