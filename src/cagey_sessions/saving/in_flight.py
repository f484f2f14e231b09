"""Saves that are under way, or that a caller waits for: who waits for which, and until when.

A caller waits until its own deadline. If attempts fail meanwhile the next one counts, so at the deadline the caller is
told that the save has not succeeded yet; the session stays due.
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
"""Of a save: what went wrong, or the receipt of the store, or None where a listener has saved."""

GRACE = SECOND // 20
"""A caller hears so much later than a call of the store that began with it: by then the store counts as down."""


class Save:
    """A save that is asked for or under way, and who waits for it."""

    __slots__ = ("error", "is_resolved", "is_retried", "outcome", "started", "waiters")

    def __init__(self, *, is_retried: bool = False) -> None:
        self.is_retried: bool = is_retried
        """A failed attempt is not its end yet."""
        self.is_resolved: bool = False
        self.outcome: SaveOutcome = None
        """As far as whoever waits will hear of it, even if the save is still under way."""
        self.started: int = 0
        self.waiters: dict[asyncio.Future[SaveOutcome], None] = {}
        """A future for each caller that waits."""
        self.error: Exception | None = None
        """Of the last attempt."""

    @property
    def has_waiters(self) -> bool:
        """Whether any caller still waits; one that was cancelled just now does not."""
        return any(not future.done() for future in self.waiters)

    def resolve(self, outcome: SaveOutcome) -> None:
        if not self.is_resolved:
            self.is_resolved, self.outcome = True, outcome
            waiters, self.waiters = self.waiters, {}
            for future in waiters:
                if not future.done():
                    future.set_result(outcome)


class Saves:
    """The saves of one manager. Of a session there is at most one asked for, and at most one under way.

    A caller waits for `timeout` nanoseconds while attempts fail; None if the first failure is the answer.
    """

    def __init__(self, clock: Clock, timeout: int | None) -> None:
        self.asked: dict[SessionCore, Save] = {}
        self.under_way: dict[SessionCore, Save] = {}
        self._clock = clock
        self._timeout = timeout

    def ask(self, session: SessionCore) -> Save:
        """The next save of a session; callers that come before it starts share it."""
        save = self.asked.get(session)
        if save is None:
            save = self.asked[session] = Save(is_retried=self._timeout is not None)
        return save

    def enter(self, session: SessionCore, started: int) -> Save:
        """A save that is under way already is looked at alone from now on."""
        save = self.under_way[session] = Save()
        save.started = started
        return save

    def refuse_asked(self, session: SessionCore) -> None:
        """A session is past its last save: whoever has asked for another hears of it."""
        save = self.asked.pop(session, None)
        if save is not None:
            save.resolve(SessionEndedError(f"the session has ended, or is past its last save ({session!r})"))

    def resolve_all(self, error: Exception) -> None:
        """Let nobody wait any longer."""
        for save in (*self.under_way.values(), *self.asked.values()):
            save.resolve(error)
        self.asked.clear()

    def caller_deadline(self) -> int | None:
        """Until when a caller who comes now waits while attempts fail; None if the first failure is the answer."""
        if self._timeout is None:
            return None
        return self._clock.now() + self._timeout + GRACE

    async def join(self, session: SessionCore, save: Save, until: int | None) -> SaveOutcome:
        """Another caller waits for a save: its outcome, or at its deadline the lack of one."""
        if save.is_resolved:
            return save.outcome
        future: asyncio.Future[SaveOutcome] = asyncio.get_running_loop().create_future()
        save.waiters[future] = None
        timer = None
        if until is not None:
            time_out = partial(self._time_out, session, future)
            timer = self._clock.call_later(max(0, until - self._clock.now()), time_out, Context())
        try:
            return await future
        finally:
            self._leave(session, future)
            if timer is not None:
                timer.cancel()

    def _leave(self, session: SessionCore, future: asyncio.Future[SaveOutcome]) -> Save | None:
        """A caller waits no longer: the save that it waited for, if that is still to come to its end."""
        for saves in (self.asked, self.under_way):
            save = saves.get(session)
            if save is not None and future in save.waiters:
                del save.waiters[future]
                return save
        return None

    def _time_out(self, session: SessionCore, future: asyncio.Future[SaveOutcome]) -> None:
        """A caller has waited long enough. A save that nobody is left to wait for is resolved; the session stays
        due."""
        save = self._leave(session, future)
        outcome = _timed_out(self._timeout or 0, None if save is None else save.error)
        if not future.done():
            future.set_result(outcome)
        if save is not None and not save.has_waiters:
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
