"""`ListenerSaver`: the program saves, in listeners of ``persist_user_data``, one session at a time.

The end of a session has to know whether the data has changed since its last save. So for a session that is being ended
the data is encoded when the listeners are called, and the bytes are kept. Of data that is not plain JSON there are no
bytes to compare; such a save counts, unless `forget_unseen` is called.

See also `to_store`.
"""

from __future__ import annotations

import asyncio

from .._core import SessionCore, SessionTable
from ..data import Encoding, Sanitizer
from ..errors import ListenerCancelledError, NothingSavesError
from ..events import Listeners, listener_error
from ..events.deadlocks import Kind, Wait, listening
from .autosave import Autosave
from .saver import Saver
from .workers import Worker

__all__ = ["ListenerSaver"]


class ListenerSaver(Saver):
    """Has listeners save, one session at a time."""

    is_store = False
    one_at_a_time = False
    timeout: int | None = None

    def __init__(
        self, table: SessionTable, listeners: Listeners, encoding: Encoding, sanitizer: Sanitizer | None
    ) -> None:
        self._table = table
        self._listeners = listeners
        self._encoding = encoding
        self._sanitizer = sanitizer
        self._saved: dict[SessionCore, bytes | None] = {}
        """The data of sessions that were saved while being ended; None if changes of it cannot be detected."""
        self._autosave: Autosave

    def bind(self, autosave: Autosave) -> None:
        self._autosave = autosave

    def can_save(self) -> bool:
        return self._listeners.has("persist_user_data")

    def require(self) -> None:
        if not self.can_save():
            raise NothingSavesError(
                "nobody would perform this save: register a listener with manager.on('persist_user_data', ...) "
                "that writes session.user_data to your database"
            )

    def serves_periodic(self) -> bool:
        return self.can_save()

    def is_saved(self, session: SessionCore) -> bool:
        """Whether a session was saved since its end began, and its data has not changed since then."""
        if session not in self._saved:
            return False
        # None for both: its changes cannot be seen. Data that was not JSON and is now has changed.
        return self._saved[session] == self._encoding.try_dump(session.user_data)

    def forget_unseen(self, session: SessionCore) -> None:
        if self._saved.get(session) is None:
            self._saved.pop(session, None)

    def forget(self, session: SessionCore) -> None:
        self._saved.pop(session, None)

    async def serve(self, worker: Worker) -> bool:
        autosave = self._autosave
        taken = autosave.take()
        worker.start()
        if taken is None:
            return False
        session, version, save = taken
        is_ending = self._table.is_ending(session)
        data = self._encoding.try_dump(session.user_data) if is_ending else None
        self._saved.pop(session, None)
        # the error unless the listeners return: the `finally` below runs also when this task is cancelled or closed
        error: Exception | None = ListenerCancelledError("the event loop was shut down during the save")
        try:
            with listening(Wait(session, Kind.SAVE), self._table, autosave.free_slots):
                await self._call_listeners(session)
            error = None
        except asyncio.CancelledError:
            autosave.interrupt()
            raise
        except Exception as raised:
            error = raised
        finally:
            if error is None:
                if is_ending and self._table.state(session) != "gone":  # else nothing would drop it any more
                    self._saved[session] = data
                autosave.note_duration(save)
                autosave.acknowledge(session, version, save, None)
            else:
                autosave.fail(session, version, save, error)
        return True

    async def _call_listeners(self, session: SessionCore) -> None:
        self.require()
        if self._sanitizer is not None:
            self._sanitizer.saving(session)
        errors: list[Exception] = []
        if await self._listeners.call("persist_user_data", (session,), errors):  # some were passed over
            errors.append(ListenerCancelledError("a listener was removed while the save was under way"))
        if errors:
            raise listener_error("persist_user_data", errors)
