"""The turn with a user: calls of this process that load, edit, erase or release the same user go one after the other.

A turn is a lock for one user that is fair, bounded by a deadline, and known to deadlock detection: code that runs
inside the call that has the turn is refused when it waits for the same turn.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..clock import Clock
from ..errors import StoreUnavailableError, WouldDeadlockError
from ..events.deadlocks import Frame, Kind, Wait, listening, waiting_for, would_deadlock
from ..loop import Loop
from ..wording import quote

__all__ = ["Turns"]


class _Turn:
    """The turn with one user: one call has it, others wait in the order in which they came."""

    __slots__ = ("calls", "is_taken", "waiting")

    def __init__(self) -> None:
        self.is_taken = False
        self.calls = 0
        """How many calls have the turn or wait for it."""
        self.waiting: deque[asyncio.Future[None]] = deque()

    def give(self) -> None:
        """The call that has the turn is done: the next one that still waits has it."""
        while self.waiting:
            called = self.waiting.popleft()
            if not called.done():
                called.set_result(None)
                return
        self.is_taken = False


class Turns:
    """The turns with all users of one manager."""

    def __init__(self, loop: Loop, clock: Clock) -> None:
        self._loop = loop
        self._clock = clock
        self._turns: dict[int | str, _Turn] = {}

    def __bool__(self) -> bool:
        """Whether any call has a turn."""
        return bool(self._turns)

    def is_taken(self, user_id: int | str) -> bool:
        """Whether a call of this process has the turn with a user, or waits for it."""
        return user_id in self._turns

    @asynccontextmanager
    async def take(self, user_id: int | str, until: int | None = None) -> AsyncIterator[Frame]:
        """Within this block no other call of this process loads, edits or erases the same user.

        Waits for the turn until then, in nanoseconds of the clock, or without end. Raises `WouldDeadlockError` where
        the call that has the turn waits for this very code, over however many steps, and `StoreUnavailableError`.
        """
        turn = self._turns.setdefault(user_id, _Turn())
        target = Wait(turn, Kind.TURN)
        if would_deadlock(target):
            raise WouldDeadlockError(
                f"a call that is at work on user {quote(user_id)} waits for this very code, which would wait for that "
                "call; do it outside of that listener or edit block"
            )
        turn.calls += 1
        try:
            with waiting_for(target):
                await self._wait(turn, user_id, until)
            try:
                with listening(target, None) as frame:
                    yield frame
            finally:
                turn.give()
        finally:
            turn.calls -= 1
            if not turn.calls:
                del self._turns[user_id]

    async def _wait(self, turn: _Turn, user_id: int | str, until: int | None) -> None:
        if not turn.is_taken:
            turn.is_taken = True
            return
        called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        turn.waiting.append(called)
        try:
            if not await self._loop.wait(called, None if until is None else until - self._clock.now()):
                raise StoreUnavailableError(
                    f"another call is at work on user {quote(user_id)} and has not come to its end; try again later"
                )
        except BaseException:
            if not called.cancel():
                turn.give()  # the turn came at the same time as the cancellation
            raise
