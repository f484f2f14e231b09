"""`Session.login` and `SessionManager.open`: a session gets its user from the store.

Both take the turn with the user, load them (`loading`), and give user and data to the session in one synchronous step.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from contextvars import Context
from typing import Any

from .._core import SessionCore
from ..errors import AlreadyIdentifiedError
from ..records import EndReason
from .beginning import Beginnings
from .ending import Endings
from .loading import Loaded, Loading
from .server import Server

__all__ = ["WHEN_ACTIVE", "Logins"]

WHEN_ACTIVE = ("replace", "refuse", "join")


class Logins:
    """The logins of one manager."""

    def __init__(self, server: Server, endings: Endings, beginnings: Beginnings, loading: Loading) -> None:
        self._server = server
        self._endings = endings
        self._beginnings = beginnings
        self._loading = loading
        self._identifying: set[SessionCore] = set()
        self._untaken: set[SessionCore] = set()
        """Sessions made by an `open` that has not returned yet, and that no other call has been given."""

    async def login(self, session: SessionCore, user_id: int | str, default: Any, when_active: str) -> None:
        """See `Session.login`."""
        server, loading = self._server, self._loading
        server.enter()
        loading.require_store()
        server.refuse_if_ending(session)
        loading.check(user_id, default, when_active, ("replace", "refuse"))
        if session.user_id is not None or session in self._identifying:
            raise AlreadyIdentifiedError(f"this session has a user already, or is getting one ({session!r})")
        self._beginnings.refuse_if_closed()
        self._identifying.add(session)
        try:
            async with loading.claims.turns.take(user_id, loading.caller_deadline()):
                await loading.make_room(user_id, when_active)
                loaded = await loading.load(user_id, default)
                try:
                    self._identify(session, loaded)  # refuses if the session has begun to end meanwhile
                except BaseException:
                    loading.claims.release_later(loaded.user_id, loaded.epoch)
                    raise
        finally:
            self._identifying.discard(session)
        await self._beginnings.emit_identified(session, user_id, session.user_data)

    async def open(self, user_id: int | str, default: Any, when_active: str) -> SessionCore:
        """See `SessionManager.open`."""
        loading = self._loading
        self._server.enter()
        loading.require_store()
        loading.check(user_id, default, when_active, WHEN_ACTIVE)
        self._beginnings.refuse_if_closed()
        joins = when_active == "join"
        if joins and (live := self._join(user_id)) is not None:
            return live
        async with loading.claims.turns.take(user_id, loading.caller_deadline()):
            if joins and (live := self._join(user_id)) is not None:
                return live  # made by the call that had the turn before
            await loading.make_room(user_id, when_active)
            loaded = await loading.load(user_id, default)
            try:
                session = await self._beginnings.create(None, False)
                try:
                    self._identify(session, loaded)
                except BaseException:
                    with suppress(Exception):  # it is reported where it is raised; the first error is the one to raise
                        await self._endings.end(session, False)
                    raise
            except BaseException:
                loading.claims.release_later(loaded.user_id, loaded.epoch)
                raise
        self._untaken.add(session)
        try:
            await self._beginnings.emit_identified(session, user_id, session.user_data)
        except asyncio.CancelledError:  # the caller never gets the session, so it could never end it
            self._abandon(session, user_id)
            raise
        except BaseException:  # the session lives, and listeners, or `find_by_user`, give it to the program
            self._untaken.discard(session)
            raise
        self._untaken.discard(session)
        return session

    def _join(self, user_id: int | str) -> SessionCore | None:
        """The live session of a user, for a caller that is given it; it is not abandoned from here on."""
        live = self._server.table.find_by_user(user_id)
        if live is not None:
            self._untaken.discard(live)
        return live

    def _abandon(self, session: SessionCore, user_id: int | str) -> None:
        """End a session whose `open` was cancelled, unless another caller has been given it meanwhile.

        That happens at once, so that no other call finds the session. But if a call, such as an edit of this session,
        has the turn with the user, it is done first.
        """
        if self._loading.claims.turns.is_taken(user_id):
            self._server.loop.spawn(self._abandon_later(session, user_id), "abandoned session", Context())
        else:
            self._end_untaken(session)

    async def _abandon_later(self, session: SessionCore, user_id: int | str) -> None:
        try:
            async with self._loading.claims.turns.take(user_id):
                pass
        finally:
            self._end_untaken(session)

    def _end_untaken(self, session: SessionCore) -> None:
        if session not in self._untaken:
            return
        self._untaken.discard(session)
        if not self._server.table.is_ending(session) and not self._endings.end_at_once(session, EndReason.DESTROYED):
            self._endings.begin_end(session, False, EndReason.DESTROYED)

    def _identify(self, session: SessionCore, loaded: Loaded) -> None:
        """Give a session its user and its data, in one synchronous step."""
        server = self._server
        server.refuse_if_ending(session)
        self._beginnings.refuse_if_closed()
        server.autosave.identify(session, loaded.user_id, loaded.data)
        self._loading.own(session, loaded)
