"""Saves that are under way, or that a caller waits for: who waits for which save, and until when.

A caller waits until its own deadline. An attempt that fails before then is followed by the next one, and its callers
wait on; at its deadline a caller is told that the save has not succeeded yet. The session stays due.

See also `autosave`, which begins and settles the saves.
"""

from __future__ import annotations

import asyncio
from contextvars import Context
from functools import partial

from .._core import SessionCore
from ..clock import Clock
from ..errors import SessionEndedError, StoreUnavailableError
from ..options import SECOND
from ..records import Receipt

__all__ = ["Save", "SaveOutcome", "Saves"]

SaveOutcome = Exception | Receipt | None
"""The outcome of a save: the error, or the store's receipt, or None if listeners have saved."""

GRACE = SECOND // 20
"""A caller waits so much longer than one call of the store, so that the store counts as down when it is answered."""


class Save:
    """A save that is asked for or under way, and the callers that wait for it."""

    __slots__ = ("error", "is_resolved", "is_retried", "outcome", "started", "waiters")

    def __init__(self, *, is_retried: bool = False) -> None:
        self.is_retried: bool = is_retried
        """Whether its callers wait for the next attempt when one has failed."""
        self.is_resolved: bool = False
        self.outcome: SaveOutcome = None
        """What callers are told. It may be known before the save is over: a call that hangs is given up for them."""
        self.started: int = 0
        self.waiters: dict[asyncio.Future[SaveOutcome], None] = {}
        """One future for each caller that waits, in the order in which they came."""
        self.error: Exception | None = None
        """The error of the last attempt, which becomes the cause of what a caller gets at its deadline."""

    @property
    def has_waiters(self) -> bool:
        """Whether a caller still waits. One that was cancelled in this turn of the loop does not."""
        return any(not future.done() for future in self.waiters)

    def resolve(self, outcome: SaveOutcome) -> None:
        """Answer all callers. Only the first call has an effect."""
        if not self.is_resolved:
            self.is_resolved, self.outcome = True, outcome
            waiters, self.waiters = self.waiters, {}
            for future in waiters:
                if not future.done():  # a caller may have been cancelled in this turn of the loop
                    future.set_result(outcome)


class Saves:
    """The saves of one manager. A session has at most one that is asked for, and at most one under way.

    A caller waits for `timeout` nanoseconds while attempts fail; None if it gets the first failure.
    """

    def __init__(self, clock: Clock, timeout: int | None) -> None:
        self.asked: dict[SessionCore, Save] = {}
        self.under_way: dict[SessionCore, Save] = {}
        self._clock = clock
        self._timeout = timeout

    def ask(self, session: SessionCore) -> Save:
        """The next save of a session. Callers that come before it starts share it."""
        save = self.asked.get(session)
        if save is None:
            save = self.asked[session] = Save(is_retried=self._timeout is not None)
        return save

    def enter(self, session: SessionCore, started: int) -> Save:
        """Give a save that is under way in a batch a `Save` of its own, so that callers can wait for it."""
        save = self.under_way[session] = Save()
        save.started = started
        return save

    def refuse_asked(self, session: SessionCore) -> None:
        """A session is past its last save: callers that have asked for another one get `SessionEndedError`."""
        save = self.asked.pop(session, None)
        if save is not None:
            save.resolve(SessionEndedError(f"the session has ended, or is past its last save ({session!r})"))

    def resolve_all(self, error: Exception) -> None:
        """Answer all callers with an error."""
        for save in (*self.under_way.values(), *self.asked.values()):
            save.resolve(error)
        self.asked.clear()

    def caller_deadline(self) -> int | None:
        """Until when a caller that comes now waits while attempts fail; None if it gets the first failure."""
        if self._timeout is None:
            return None
        return self._clock.now() + self._timeout + GRACE

    async def join(self, session: SessionCore, save: Save, until: int | None) -> SaveOutcome:
        """Wait for a save: its outcome, or an error at `until`."""
        if save.is_resolved:
            return save.outcome
        future: asyncio.Future[SaveOutcome] = asyncio.get_running_loop().create_future()
        save.waiters[future] = None
        timer = None
        if until is not None:
            time_out = partial(self._time_out, session, future)
            timer = self._clock.call_later(max(0, until - self._clock.now()), time_out, Context())
            # a timer for each caller: with one for a save, a caller that joined late would be given up too early
        try:
            return await future
        finally:
            self._leave(session, future)
            if timer is not None:
                timer.cancel()

    def _leave(self, session: SessionCore, future: asyncio.Future[SaveOutcome]) -> Save | None:
        """A caller waits no longer. Returns the save that it waited for, unless that has been resolved."""
        for saves in (self.asked, self.under_way):
            # looked up anew: since the caller came its save may have been replaced by a later one that it waits for now
            save = saves.get(session)
            if save is not None and future in save.waiters:
                del save.waiters[future]
                return save
        return None

    def _time_out(self, session: SessionCore, future: asyncio.Future[SaveOutcome]) -> None:
        """A caller's deadline has passed. A save without any other caller is resolved; the session stays due."""
        save = self._leave(session, future)
        outcome = _timed_out(self._timeout or 0, None if save is None else save.error)
        if not future.done():
            future.set_result(outcome)
        if save is not None and not save.has_waiters:
            # when the store is back the save is made as an ordinary one, and nothing is kept for it until then
            save.resolve(outcome)
            if self.asked.get(session) is save:
                del self.asked[session]


def _timed_out(timeout: int, last: Exception | None) -> StoreUnavailableError:
    error = StoreUnavailableError(
        f"the store has not acknowledged this save within {timeout / SECOND:g} s; "
        "the session stays due, and is saved when the store is back"
    )
    error.__cause__ = last
    return error
