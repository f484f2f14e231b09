"""Users without a session: reading, editing and erasing them, on whichever server they are.

See also `loading`, and the silent sessions in `ending`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from .._core import SessionCore, check_user_id
from ..errors import (
    SessionEndedError,
    StoreModeError,
    UsageError,
    UserErasedError,
    WouldDeadlockError,
)
from ..events.deadlocks import Kind, Wait, would_deadlock
from ..stores.rows import check_record
from ..wording import quote
from .beginning import Beginnings
from .ending import Endings
from .loading import Loading, not_found
from .login import WHEN_ACTIVE
from .server import Server
from .spilling import Spilling

__all__ = ["Users"]


class Users:
    """Reads, edits and erases the users of one manager's store."""

    def __init__(
        self, server: Server, endings: Endings, beginnings: Beginnings, loading: Loading, spilling: Spilling
    ) -> None:
        self._server = server
        self._endings = endings
        self._beginnings = beginnings
        self._loading = loading
        self._spilling = spilling

    async def read(self, user_id: int | str) -> Any:
        """See `SessionManager.read`."""
        server = self._server
        server.enter()
        link = self._loading.require_store()
        check_user_id(user_id, server.options.user_id)
        session = server.table.active_session(user_id)
        if session is not None and not server.table.is_silent(session) and await self._has_the_newest(session):
            return server.encoding.copy(session.user_data)
        record = await link.persistently(lambda until: link.ask(link.store.load, user_id, until=until))
        if record is None:
            raise not_found(user_id)
        return self._loading.decode(check_record(record))

    async def _has_the_newest(self, session: SessionCore) -> bool:
        """Whether this session's data is the newest, because nobody else can have saved the user since.

        An ending session may have released the user already, by a last save whose answer was lost; so the store is
        asked.
        """
        server, link, user_id = self._server, self._loading.require_store(), session.user_id
        if not session.alive or server.table.is_lost(session):
            return False
        if not link.store.shared or not server.table.is_ending(session):
            return True
        ours = (server.owner, server.table.epoch(session))
        assert user_id is not None
        holder = await link.persistently(lambda until: link.ask(link.store.holder, user_id, until=until))
        return holder == ours and session.alive

    @asynccontextmanager
    async def edit(self, user_id: int | str, default: Any) -> AsyncIterator[Any]:
        """See `SessionManager.edit`."""
        server = self._server
        server.enter()
        self._loading.require_store()
        self._loading.check(user_id, default, "join", WHEN_ACTIVE)
        self._beginnings.refuse_if_closed()
        async with self._loading.claims.turns.take(user_id, self._loading.caller_deadline()) as frame:
            live = server.table.find_by_user(user_id)
            if live is not None:
                # tasks that the block starts may want the turn, and wait for it like any other call
                frame.confine()
                async with self._edit_live(live) as data:
                    yield data
                return
            await self._loading.make_room(user_id, "replace")
            loaded = await self._loading.load(user_id, default)
            try:
                session = server.table.hold(user_id, loaded.data)
                self._loading.own(session, loaded)
            except BaseException:
                self._loading.claims.release_later(user_id, loaded.epoch)
                raise
            try:
                frame.confine()
                yield loaded.data
            except BaseException:
                self._endings.drop(session)  # nothing of a block that raises is saved
                raise
            await self._endings.write(session)

    @asynccontextmanager
    async def _edit_live(self, session: SessionCore) -> AsyncIterator[Any]:
        session.mark_changed()
        data = session.user_data
        before = self._server.encoding.try_dump(data)
        try:
            yield data
        finally:
            with suppress(SessionEndedError):
                # the block may have changed a live session before it raised, and the session goes on with that
                session.mark_changed()
        if session.user_data is not data and self._server.encoding.try_dump(data) != before:
            raise UsageError(
                f"user_data was assigned while user {quote(session.user_id)} was being edited: what this edit has "
                "changed is not in it; edit again"
            )
        await self._server.requests.save(session)

    async def erase(self, user_id: int | str) -> bool:
        """See `SessionManager.erase`."""
        server = self._server
        server.enter()
        link = self._loading.require_store()
        check_user_id(user_id, server.options.user_id)
        if not link.store.can_erase:
            raise StoreModeError(
                f"this {link.name} cannot erase users; give it a function: CallbackStore(load, save_many, erase=...)"
            )
        session = server.table.active_session(user_id)
        if session is not None and would_deadlock(Wait(session, Kind.END)):
            raise WouldDeadlockError("this listener would wait for an end that waits for this listener")
        async with self._loading.claims.turns.take(user_id, self._loading.caller_deadline()):
            # Without a fence a write that is under way would bring the user back, so the sessions end first. The load
            # before shows that the store can be reached at all: a session is not ended for an erasure that fails.
            if not link.store.fenced:
                await link.persistently(lambda until: link.ask(link.store.load, user_id, until=until))
                await self._end_erased(user_id)

            erased = await link.persistently(lambda until: link.erase(user_id, server.owner, until))
            await self._end_erased(user_id)
            if server.spill is not None and server.spill.drop(user_id):
                await self._spilling.write_spill()
            return erased

    async def _end_erased(self, user_id: int | str) -> None:
        while (session := self._server.table.active_session(user_id)) is not None:
            self._endings.on_lost(session, UserErasedError(f"user {quote(user_id)} was erased", user_id=user_id))
            # the data is erased; listeners of the end that do not return hold up the end, and not this call
            if not await self._loading.within(self._endings.wait_ended(session), self._server.options.save_timeout):
                return
