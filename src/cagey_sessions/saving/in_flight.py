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

__all__ = ["Flight", "Flights", "SaveOutcome"]

SaveOutcome = Exception | Receipt | None
"""Of a save: what went wrong, or the receipt of the store, or None where a listener has saved."""

GRACE = SECOND // 20
"""A caller hears so much later than a call of the store that began with it: by then the store counts as down."""


class Flight:
    """A save that is asked for or under way, and who waits for it."""

    __slots__ = ("error", "is_patient", "is_resolved", "outcome", "started", "waiters")

    def __init__(self, *, is_patient: bool = False) -> None:
        self.is_patient: bool = is_patient
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


class Flights:
    """The flights of one manager. Of a session there is at most one asked for, and at most one under way.

    A caller waits for `patience` nanoseconds while attempts fail; None if the first failure is the answer.
    """

    def __init__(self, clock: Clock, patience: int | None) -> None:
        self.asked: dict[SessionCore, Flight] = {}
        self.under_way: dict[SessionCore, Flight] = {}
        self._clock = clock
        self._patience = patience

    def ask(self, session: SessionCore) -> Flight:
        """The next save of a session; callers that come before it starts share it."""
        flight = self.asked.get(session)
        if flight is None:
            flight = self.asked[session] = Flight(is_patient=self._patience is not None)
        return flight

    def enter(self, session: SessionCore, started: int) -> Flight:
        """A save that is under way already is looked at alone from now on."""
        flight = self.under_way[session] = Flight()
        flight.started = started
        return flight

    def forget(self, session: SessionCore) -> None:
        """A session is past its last save: whoever has asked for another hears of it."""
        flight = self.asked.pop(session, None)
        if flight is not None:
            flight.resolve(SessionEndedError(f"the session has ended, or is past its last save ({session!r})"))

    def resolve_all(self, error: Exception) -> None:
        """Let nobody wait any longer."""
        for flight in (*self.under_way.values(), *self.asked.values()):
            flight.resolve(error)
        self.asked.clear()

    def patience_ends(self) -> int | None:
        """Until when a caller who comes now waits while attempts fail; None if the first failure is the answer."""
        if self._patience is None:
            return None
        return self._clock.now() + self._patience + GRACE

    async def join(self, session: SessionCore, flight: Flight, until: int | None) -> SaveOutcome:
        """Another caller waits for a save: its outcome, or when the caller's patience ends the lack of one."""
        if flight.is_resolved:
            return flight.outcome
        future: asyncio.Future[SaveOutcome] = asyncio.get_running_loop().create_future()
        flight.waiters[future] = None
        timer = None
        if until is not None:
            lose_patience = partial(self._lose_patience, session, future)
            timer = self._clock.call_later(max(0, until - self._clock.now()), lose_patience, Context())
        try:
            return await future
        finally:
            self._leave(session, future)
            if timer is not None:
                timer.cancel()

    def _leave(self, session: SessionCore, future: asyncio.Future[SaveOutcome]) -> Flight | None:
        """A caller waits no longer: the save that it waited for, if that is still to come to its end."""
        for flights in (self.asked, self.under_way):
            flight = flights.get(session)
            if flight is not None and future in flight.waiters:
                del flight.waiters[future]
                return flight
        return None

    def _lose_patience(self, session: SessionCore, future: asyncio.Future[SaveOutcome]) -> None:
        """A caller has waited long enough. A save that nobody is left to wait for is resolved; the session stays
        due."""
        flight = self._leave(session, future)
        outcome = _out_of_patience(self._patience or 0, None if flight is None else flight.error)
        if not future.done():
            future.set_result(outcome)
        if flight is not None and not flight.has_waiters:
            flight.resolve(outcome)
            if self.asked.get(session) is flight:
                del self.asked[session]


def _out_of_patience(patience: int, last: Exception | None) -> StoreUnavailableError:
    error = StoreUnavailableError(
        f"the store has not acknowledged this save within {patience / SECOND:g} s; "
        "the session stays due, and is saved when the store is back"
    )
    error.__cause__ = last
    return error
