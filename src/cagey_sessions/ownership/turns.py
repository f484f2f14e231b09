"""Turns: calls of this process that load, edit, erase or release the same user go one after the other.

A turn is a lock for one user. It is fair, a caller waits for it until a deadline, and deadlock detection knows it: code
that runs inside the call that has the turn, and waits for the same turn, is refused.

See also `claims`, for the same among servers, and `events.deadlocks`.
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
    """The turn with one user: one call has it, and the others wait in the order in which they came."""

    __slots__ = ("calls", "is_taken", "waiting")

    def __init__(self) -> None:
        self.is_taken = False
        self.calls = 0
        """How many calls have the turn or wait for it."""
        self.waiting: deque[asyncio.Future[None]] = deque()

    def give(self) -> None:
        """Give the turn to the next call that still waits. It stays taken, so no call that comes later can slip in."""
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
        """In this block no other call of this process loads, edits or erases the same user.

        Waits for the turn until `until`, in nanoseconds of the clock, or for ever if that is None. Raises
        `WouldDeadlockError` if the call that has the turn waits, over any number of steps, for the code that calls
        this; and `StoreUnavailableError` at `until`.
        """
        turn = self._turns.setdefault(user_id, _Turn())  # users that no call is at work on have none
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
                turn.give()  # also when a caller was cancelled: the next call must not wait for ever
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
            # if it cannot be cancelled the turn was given to us at the same time: pass it on, or nobody gets it again
            if not called.cancel():
                turn.give()
            raise
