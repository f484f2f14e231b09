"""Saves that somebody waits for, or that are under way. What lives here: who waits for which, and until when. What must
not: when a save begins, or what becomes of its session.
"""

from __future__ import annotations

import asyncio
from contextvars import Context

from .._core import SessionCore
from ..clock import Clock, TimerHandle
from ..errors import SessionEndedError, StoreUnavailableError
from ..options import SECOND
from ..records import Receipt

__all__ = ["Flight", "Flights", "SaveOutcome"]

SaveOutcome = Exception | Receipt | None
"""Of a save: what went wrong, or the receipt of the store, or None where a listener has saved."""

PATIENCE_GRID = SECOND // 20
"""Callers whose patience ends within the same fraction of a second are told together."""
SHORTEST_DELAY = SECOND // 1000


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
        self.waiters: list[tuple[int | None, asyncio.Future[SaveOutcome]]] = []
        """Each with the end of their patience."""
        self.error: Exception | None = None
        """Of the last attempt."""

    @property
    def has_waiters(self) -> bool:
        return bool(self.waiters) and any(not future.done() for _, future in self.waiters)

    def resolve(self, outcome: SaveOutcome) -> None:
        if not self.is_resolved:
            self.is_resolved, self.outcome = True, outcome
            if self.waiters:
                self._tell(self.waiters, outcome)
                self.waiters = []

    def lose_patience(self, now: int, patience: int) -> None:
        """Tell those who have waited long enough; if nobody is left it is not waited for any longer."""
        late = [waiter for waiter in self.waiters if waiter[0] is not None and waiter[0] <= now]
        if late:
            outcome = _out_of_patience(patience, self.error)
            self._tell(late, outcome)
            self.waiters = [waiter for waiter in self.waiters if waiter[0] is None or waiter[0] > now]
            if not self.waiters:
                self.resolve(outcome)

    @staticmethod
    def _tell(waiters: list[tuple[int | None, asyncio.Future[SaveOutcome]]], outcome: SaveOutcome) -> None:
        for _, future in waiters:
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
        self._context = Context()
        self._timer: TimerHandle | None = None
        self._timer_time = 0
        self._closed = False

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
        return -(-(self._clock.now() + self._patience) // PATIENCE_GRID) * PATIENCE_GRID

    def join(self, flight: Flight, until: int | None) -> asyncio.Future[SaveOutcome]:
        """Another caller waits: for the outcome, or at the end of their patience its lack."""
        future: asyncio.Future[SaveOutcome] = asyncio.get_running_loop().create_future()
        flight.waiters.append((until, future))
        if until is not None:
            self._set_timer(until)
        return future

    def _set_timer(self, when: int) -> None:
        if self._closed or (self._timer is not None and self._timer_time <= when):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_time = when
        delay = max(when - self._clock.now(), SHORTEST_DELAY)
        self._timer = self._clock.call_later(delay, self._lose_patience, self._context)

    def _lose_patience(self) -> None:
        """Tell callers who have waited long enough; their sessions stay due."""
        self._timer = None
        now = self._clock.now()
        for flight in (*self.asked.values(), *self.under_way.values()):
            flight.lose_patience(now, self._patience or 0)
        for session in [session for session, flight in self.asked.items() if flight.is_resolved]:
            del self.asked[session]
        flights = (*self.asked.values(), *self.under_way.values())
        next_time = min((until for flight in flights for until, _ in flight.waiters if until), default=None)
        if next_time is not None:
            self._set_timer(next_time)

    def close(self) -> None:
        """Stop the timer."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _out_of_patience(patience: int, last: Exception | None) -> StoreUnavailableError:
    error = StoreUnavailableError(
        f"the store has not acknowledged this save within {patience / SECOND:g} s; "
        "the session stays due, and is saved when the store is back"
    )
    error.__cause__ = last
    return error
