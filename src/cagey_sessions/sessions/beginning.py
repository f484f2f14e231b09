"""The beginning of a session: making it, ``started``, and, where there is no store, giving it its user.

With a store a session gets its user in `login`.
"""

from __future__ import annotations

from .._core import SessionCore, check_user_id
from ..errors import ListenerError, ManagerClosedError, StoreModeError
from ..events import listener_error
from ..options import yes_or_no
from ..records import EndReason
from .ending import Ending, Endings
from .server import Server

__all__ = ["Beginnings"]


class Beginnings:
    """The beginnings of one manager's sessions."""

    def __init__(self, server: Server, endings: Endings) -> None:
        self._server = server
        self._endings = endings

    async def create(self, key: str | None, replace: bool) -> SessionCore:
        """See `SessionManager.create`."""
        server = self._server
        server.enter()
        yes_or_no("replace", replace)
        self.refuse_if_closed()
        if replace and key is not None:
            # again and again: while one session ends another may be made under the same key
            while (older := server.table.find_by_key(key)) is not None:
                await self.replace(older)
                self.refuse_if_closed()
        session = server.table.create(key)  # refuses a key that is taken
        if server.listeners.has("created"):
            errors: list[Exception] = []
            try:
                await server.listeners.call("created", (session,), errors, session)
            except BaseException:
                self._abort(session)
                raise
            if errors:
                ending = self._abort(session)
                if ending is not None:
                    await self._endings.join(session, ending)
                raise listener_error("created", errors)
            server.refuse_if_ending(session)
        return session

    def _abort(self, session: SessionCore) -> Ending | None:
        endings = self._endings
        ending = endings.under_way.get(session)
        if ending is None and session.alive and not endings.end_at_once(session, EndReason.CREATE_FAILED):
            ending = endings.begin_end(session, persist=False, reason=EndReason.CREATE_FAILED)
        return ending

    async def replace(self, older: SessionCore) -> None:
        """Save a session, and then end it. If the save fails the session stays live, and the error is raised."""
        server, endings = self._server, self._endings
        if older.user_id is None or not server.saver.can_save():
            await endings.end(older, False, EndReason.REPLACED)
            return
        await server.requests.save(older)
        try:
            await endings.end(older, True, EndReason.REPLACED)
        except ListenerError as error:
            if not server.saver.is_store or older.alive:
                raise
            # it is saved and has ended: what the listeners of its end raised is no reason to refuse the newer session
            server.reports.error(error, older)

    async def start(self, session: SessionCore) -> None:
        """See `Session.start`."""
        self._server.enter()
        self._server.refuse_if_ending(session)
        errors: list[Exception] = []
        await self._server.listeners.emit("started", session, errors=errors)
        if errors:
            raise listener_error("started", errors)

    async def set_user(self, session: SessionCore, user_id: int | str, user_data: object) -> None:
        """See `Session.set_user`."""
        server = self._server
        server.enter()
        server.refuse_if_ending(session)
        if server.saver.is_store:
            raise StoreModeError(
                "this manager has a store: `await session.login(user_id, default=...)` loads the user's data and "
                "identifies in one step"
            )
        check_user_id(user_id, server.options.user_id)
        self.refuse_if_closed()
        server.autosave.identify(session, user_id, user_data)
        await self.emit_identified(session, user_id, user_data)

    async def emit_identified(self, session: SessionCore, user_id: int | str, user_data: object) -> None:
        """Emit ``identified``. Raises `ListenerError` if listeners raise."""
        errors: list[Exception] = []
        await self._server.listeners.emit("identified", session, user_id, user_data, errors=errors)
        if errors:
            raise listener_error("identified", errors)

    def refuse_if_closed(self) -> None:
        """Raise `ManagerClosedError` if the manager is being destroyed, or has been."""
        if self._endings.drain is not None:
            raise ManagerClosedError("this manager is being destroyed, or has been: it takes nobody new")
