"""Loading: brings a user into this process, which takes room, a claim, and the data.

A load has these steps. The caller takes the turn with the user, so that no other call of this process is at work on
them. An older session is saved and ended. The store grants a claim. What was spilled of the user is saved. The body is
decoded, and encoded again, because the digest of those bytes is what later saves are compared with. Until the caller
has given the data to a session there is nothing to save; if anything fails the user is released.

See also `login` and `users`, which load.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from .._core import SessionCore, check_user_id
from ..errors import (
    CorruptRecordError,
    EncodingError,
    OptionError,
    StoreModeError,
    StoreUnavailableError,
    UserActiveError,
    UserNotFoundError,
)
from ..options import SECOND, one_of
from ..ownership import Claims
from ..stores import Claim, Record
from ..stores.link import StoreLink
from ..user_code import END_OF_PROCESS
from ..wording import quote
from .beginning import Beginnings
from .ending import Endings
from .server import Server
from .spilling import Spilling

__all__ = ["NO_DEFAULT", "Loaded", "Loading", "not_found"]


class _NoDefault:
    """Stands for a `default` that was not given, also where a signature is printed."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<no default>"


NO_DEFAULT: Any = _NoDefault()


class Loaded(NamedTuple):
    """A user who is claimed and loaded, but has not been given to a session yet."""

    user_id: int | str
    epoch: int
    version: int  # 0 if the user is new
    digest: int  # of the data as it is encoded now
    stored: int  # of the body as it is in the store; another one if the store or an older version encoded it otherwise
    data: Any
    losses: int  # how many losses the engine had had before the claim


class Loading:
    """Loads users for one manager."""

    def __init__(self, server: Server, endings: Endings, beginnings: Beginnings, spilling: Spilling) -> None:
        self._server = server
        self._endings = endings
        self._beginnings = beginnings
        self._spilling = spilling

    def require_store(self) -> StoreLink:
        """The link to the store; raises `StoreModeError` without one."""
        if self._server.link is None:
            raise StoreModeError(
                "this call needs a store: SessionManager(store=...); without one the program loads the data itself and "
                "hands it over with `await session.set_user(user_id, user_data)`"
            )
        return self._server.link

    @property
    def claims(self) -> Claims:
        assert self._server.claims is not None
        return self._server.claims

    def caller_deadline(self) -> int:
        """Until when a call that begins now waits for its turn with a user."""
        return self._server.clock.now() + self._server.options.save_timeout

    def check(self, user_id: int | str, default: Any, when_active: str, known: tuple[str, ...]) -> None:
        """Check arguments, before anything changes. Raises `UsageError` and its kinds, or `EncodingError`."""
        check_user_id(user_id, self._server.options.user_id)
        one_of("when_active", when_active, known)
        if default is not NO_DEFAULT and not callable(default):  # a function is called only if the user is new
            self._server.encoding.dump(default)

    async def make_room(self, user_id: int | str, when_active: str) -> None:
        """End the sessions of a user in this process. When this returns the last save has been acknowledged."""
        server, endings = self._server, self._endings
        while (older := server.table.active_session(user_id)) is not None:
            if not server.table.is_ending(older):
                if when_active == "refuse":
                    raise UserActiveError(f"user {quote(user_id)} has a live session", session=older)
                # a save and then an end: each may take as long as a caller waits
                replaced = self._beginnings.replace(older)
                if not await self.within(replaced, 2 * server.options.save_timeout + SECOND):
                    raise StoreUnavailableError(
                        f"the earlier session of user {quote(user_id)} has not ended: its last save is not "
                        "acknowledged, or a listener of its end has not returned; try again later"
                    )
                continue
            ending = endings.under_way.get(older)
            if ending is not None and ending.parked:
                endings.resume(older, ending)  # a caller waits now: do not leave it to the retry of the wheel
            if not await self.within(endings.wait_ended(older), server.options.save_timeout):
                raise StoreUnavailableError(
                    f"the last save of the earlier session of user {quote(user_id)} is not acknowledged; "
                    "try again later"
                )

    async def within(self, waiting: Coroutine[Any, Any, object], limit: int) -> bool:
        """Await something for at most `limit` nanoseconds. Returns whether it was done by then."""
        # not `asyncio.timeout`: time is that of the manager's clock
        task = self._server.loop.spawn(waiting, "wait")
        try:
            if not await self._server.loop.wait(task, limit) or task.cancelled():
                return False
            task.result()
            return True
        finally:
            if not task.done():
                task.cancel()

    async def load(self, user_id: int | str, default: Any) -> Loaded:
        """Claim a user, and read their data or make it from `default`. If anything fails the user is released."""
        claims, link = self.claims, self.require_store()
        losses = link.losses
        claim = await claims.claim(user_id)
        try:
            self._spilling.begin()  # the store is open, and the spill file has been read before the first claim
            claim = await self._spilling.replay_one(claim)
            if claim.record is not None:
                data = self.decode(claim.record)
                version = max(claim.record.version, 1)  # a store that keeps no versions says 0, which means a new user
            elif default is NO_DEFAULT:
                raise not_found(user_id)
            else:
                data = _made(default) if callable(default) else self._server.encoding.copy(default)
                version = 0
            digest = self._server.identity.digest
            stored = 0 if claim.record is None else digest(claim.record.body)
            return Loaded(user_id, claim.epoch, version, digest(self._dump(claim, data)), stored, data, losses)
        except BaseException:
            claims.release_later(user_id, claim.epoch)
            raise

    def own(self, session: SessionCore, loaded: Loaded) -> None:
        """Record in the table what the store has of a user who was given to a session just now."""
        table = self._server.table
        if loaded.version and loaded.losses != self.require_store().losses:
            # The engine has lost something since: it may have an older record than the one loaded. A digest that fits
            # nothing makes the session count as changed, so that it is written.
            table.own(session, loaded.epoch, loaded.version, loaded.stored ^ 1, loaded.stored)
            session.mark_changed()
        elif loaded.version:
            table.own(session, loaded.epoch, loaded.version, loaded.digest, loaded.stored)
        else:
            table.own(session, loaded.epoch)

    def _dump(self, claim: Claim, data: Any) -> bytes:
        try:
            return self._server.encoding.dump(data)
        except EncodingError as error:
            if claim.record is None:
                raise  # the default is what cannot be encoded
            raise CorruptRecordError(
                f"the record of user {quote(claim.user_id)} can be read but not be written again, and is left as it "
                f"is: {error}",
                user_id=claim.user_id,
                body=claim.record.body,
                path=error.path,
            ) from error

    def decode(self, record: Record) -> Any:
        """The data of a record, as objects of the program's classes."""
        encoding = self._server.encoding
        if not self.require_store().store.keeps_schema:  # then any record counts as one of the current schema
            record = record._replace(schema=encoding.schema)
        return encoding.load(record)


def _made(default: Callable[[], Any]) -> Any:
    try:
        data = default()
    except (Exception, *END_OF_PROCESS):
        raise
    except BaseException as error:
        raise OptionError(f"default raised {type(error).__name__}; it returns data, or raises an Exception") from error
    if inspect.isawaitable(data):
        if inspect.iscoroutine(data):
            data.close()
        raise OptionError(
            "default is a value, or a plain function that makes one; this one returned something to await"
        )
    return data


def not_found(user_id: int | str) -> UserNotFoundError:
    return UserNotFoundError(
        f"the store has no user {quote(user_id)}; give a default, a value or a function that makes one, to begin anew"
    )
