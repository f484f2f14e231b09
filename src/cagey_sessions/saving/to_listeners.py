"""Saving by the program itself. What lives here: one save by the listeners of ``persist_user_data``. What must not:
when a session is due, or how listeners are called.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from .._core import SessionCore, SessionTable
from ..errors import ListenerCancelledError
from ..events.deadlocks import Kind, Wait, listening
from .autosave import Autosave, SaveHost
from .workers import Worker

__all__ = ["ListenerHost", "ListenerSaver"]


class ListenerHost(SaveHost, Protocol):
    """What a saver by listeners needs of whoever it works for."""

    def can_save(self) -> bool:
        """Whether there is such a listener."""
        ...

    async def perform(self, session: SessionCore) -> None:
        """Have the listeners save one session; raises if that failed."""
        ...

    def fingerprint(self, session: SessionCore) -> object:
        """Something that changes when the session's data does, and is not None."""
        ...


class ListenerSaver:
    """Has the program save, one session at a time."""

    one_at_a_time = False
    patience: int | None = None

    def __init__(self, table: SessionTable, host: ListenerHost) -> None:
        self._table = table
        self._host = host
        self._autosave: Autosave

    def bind(self, autosave: Autosave) -> None:
        self._autosave = autosave

    def can_save(self) -> bool:
        return self._host.can_save()

    def may_start(self) -> bool:
        return True

    def serves_periodic(self) -> bool:
        return self._host.can_save()

    async def serve(self, worker: Worker) -> bool:
        autosave = self._autosave
        taken = autosave.take()
        worker.start()
        if taken is None:
            return False
        session, version, flight = taken
        error: Exception | None = ListenerCancelledError("the event loop was shut down during the save")
        try:
            if self._table.is_ending(session):
                flight.fingerprint = self._host.fingerprint(session)
            with listening(Wait(session, Kind.SAVE), self._host, autosave.lend):
                await self._host.perform(session)
            error = None
        except asyncio.CancelledError:
            autosave.interrupt()
            raise
        except Exception as raised:
            error = raised
        finally:
            if error is None:
                autosave.note_duration(flight)
                autosave.acknowledge(session, version, flight, None)
            else:
                autosave.fail(session, version, flight, error)
        return True
