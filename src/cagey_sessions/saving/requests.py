"""Saves that the program asks for: of one session (`Session.persist_now`), or of all.

See also `autosave`, which makes them, and `in_flight`, which says how long a caller waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import chain

from .._core import SessionCore, SessionTable
from ..clock import Clock
from ..errors import SessionEndedError, UnsavedError, WouldDeadlockError
from ..events.deadlocks import Kind, Wait, saves_inside, waiting_for, would_deadlock
from ..events.reports import fresh
from ..records import Receipt
from ..wording import name_some
from .autosave import Autosave
from .in_flight import SaveOutcome
from .saver import Saver

__all__ = ["Requests"]

MOST_ASKED = 1000
"""How many saves `save_all` waits for at a time, where a store takes them in batches."""


class Requests:
    """The saves that the program asks of one manager."""

    def __init__(self, table: SessionTable, clock: Clock, autosave: Autosave, saver: Saver, max_in_flight: int) -> None:
        self._table = table
        self._clock = clock
        self._autosave = autosave
        self._saver = saver
        self._most = MOST_ASKED if saver.one_at_a_time else max_in_flight

    async def save(self, session: SessionCore) -> Receipt | None:
        """See `Session.persist_now`."""
        if self._table.state(session) == "gone":
            raise SessionEndedError(f"the session has ended, or is past its last save ({session!r})")
        if session.user_id is None:
            return None
        if (loss := self._autosave.loss_of(session)) is not None:
            raise fresh(loss)
        self._saver.require()
        outcome = await self._wait(session)
        if isinstance(outcome, Exception):
            raise fresh(outcome)  # several callers may share this save, and its error
        return outcome

    async def _wait(self, session: SessionCore) -> SaveOutcome:
        target = Wait(session, Kind.SAVE)
        if would_deadlock(target):
            raise WouldDeadlockError("this listener would wait for a save that waits for this listener")
        with waiting_for(target):
            return await self._autosave.save(session)

    async def save_all(self) -> None:
        """See `SessionManager.persist_all_user_data`."""
        if saves_inside(self._table):
            raise WouldDeadlockError("a listener of 'persist_user_data' cannot wait for a save of everybody")
        if not self._table.counters.identified:
            return
        self._saver.require()
        failures: list[tuple[int | str, Exception]] = []
        total = 0
        until = self._clock.now() + (self._saver.timeout or 0)
        # A save under way may have been encoded before the latest changes. When it is acknowledged its session moves
        # to the end of the walk and may be missed there, so these sessions come first.
        under_way = dict.fromkeys(self._autosave.in_flight())

        async def save_some(walk: Iterator[SessionCore]) -> None:
            nonlocal total
            for session in walk:
                if session.user_id is None or self._table.is_ending(session):
                    continue  # an ending session has a last save of its own
                total += 1
                # after the time of one caller: while the store is down each further session would wait as long again
                if self._clock.now() >= until and (outage := self._saver.outage()) is not None:
                    failures.append((session.user_id, outage))
                    continue
                try:
                    outcome = await self._wait(session)
                except WouldDeadlockError as refused:
                    outcome = refused
                if isinstance(outcome, Exception):
                    failures.append((session.user_id, fresh(outcome)))

        with self._table.oldest_first() as oldest_first:
            others = (session for session in oldest_first if session not in under_way)
            walk = chain(list(under_way), others)
            # all tasks share one walk: the next session is asked for when the save of an earlier one is over
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._most, self._table.counters.identified)):
                    group.create_task(save_some(walk))
        if failures:
            user_ids = [user_id for user_id, _ in failures]
            raise UnsavedError(
                f"{len(failures)} of {total} users could not be saved: {name_some(user_ids)}",
                [error for _, error in failures],
                user_ids=user_ids,
            )
