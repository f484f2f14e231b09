"""One human on one server. What lives here: the public manners of a session. What must not: its memory (that is the
core's) and the steps of its life (those are lifecycle's).
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, overload

from .._core import SessionCore, direct
from ..events import Listener, Listeners, SessionEvent
from ..records import EndReason, Receipt
from .ending import Endings
from .loading import NO_DEFAULT
from .server import Server

__all__ = ["Session"]

if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    T = TypeVarWithDefault("T", default=Any)
else:
    T = TypeVar("T")
"""What the user data of a program is; without `decode` a type checker takes it for anything."""
R = TypeVar("R")
# What a decorated listener may be. It keeps its own type, so it is a variable, whose bound cannot hold the variable T.
OfSession = TypeVar("OfSession", bound=Callable[[], object])
OfIdentified = TypeVar("OfIdentified", bound=Callable[[int | str, Any], object])


@direct
class Session(SessionCore, Generic[T]):
    """One user on this server, from `SessionManager.create` to `destroy`.

    `key` is what the session can be found by, or None; `user_id` and `user_data` are set by `login`, or without a store
    by `set_user`. `set` and `get` keep live objects beside them that are never saved. In an ``async with`` it ends with
    the block: ``async with manager.create() as session: ...``.
    """

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def end_reason(self) -> EndReason | None: ...
        @property
        def user_data(self) -> T: ...
        @user_data.setter
        def user_data(self, value: T) -> None: ...
        async def set_user(self, user_id: int | str, user_data: T) -> None: ...

    async def login(
        self,
        user_id: int | str,
        *,
        default: T | Callable[[], T] = NO_DEFAULT,
        when_active: Literal["replace", "refuse"] = "replace",
    ) -> None:
        """Say who this human is, and have the store load their data; from now on it is saved. Emits ``identified``.

        The user is claimed in the store, so that no other server has them; the data is decoded; then `user_id` and
        `user_data` are set in one step. `default` is the data of a user the store does not know: a value, of which each
        user gets a copy, or a plain function that makes one. If the user has a live session on this server it is
        saved and ended first (``when_active="replace"``), or the call raises (``"refuse"``).
        While the store is down the call waits for `save_timeout`. Cancelling it identifies nobody.

        Raises before anything changes: `InvalidUserIdError`, `OptionError`, `AlreadyIdentifiedError`,
        `SessionEndedError`, `ManagerClosedError`, `EncodingError` for a `default` that cannot be saved, and
        `StoreModeError` without a store. Raises and leaves the session anonymous: `UserNotFoundError` without a
        default, `OwnedElsewhereError`, `UserActiveError`, `CorruptRecordError`, `NewerSchemaError`,
        `StoreUnavailableError`, and what the save of the older session raised, which stays live then. Raises
        `ListenerError` with what the listeners raised, and then the user stays set. O(size of the data), and a call of
        the store.
        """
        await self._host._logins.login(self, user_id, default, when_active)

    async def persist_now(self) -> Receipt | None:
        """Save the user's data as it is now, and return when that is done: the store's `Receipt`.

        A call that comes while a save is under way waits for a later one; callers that wait for the same save share
        it, and with a store those of one turn of the loop share a batch. Without a user there is nothing to save, and
        nothing happens. Returns None then, and where a listener saves. Cancelling the call stops the waiting, not the
        save.

        It saves this user alone. ``asyncio.gather(ann.persist_now(), bob.persist_now())`` is two saves: after a crash,
        or where one of them is refused, one may be stored and the other not. The trade of the page on tests survives
        that.

        With a store attempts that fail are repeated meanwhile; raises `StoreUnavailableError` when none has succeeded
        within `save_timeout` (the data stays due), `UnsavableError` for data that cannot be saved as it is,
        `FencedError` and `UserErasedError` when the session has lost its user. Without one raises `ListenerError` with
        what the ``persist_user_data`` listeners raised (the data stays due), and `NothingSavesError` without such a
        listener. Raises `SessionEndedError`, and `WouldDeadlockError` inside a listener that this very save would wait
        for.
        """
        server: Server = self._host._server
        server.enter()
        return await server.requests.save(self)

    async def wait_ended(self) -> EndReason:
        """Wait until the session has ended; returns why. Raises `WouldDeadlockError` inside a listener of its end."""
        endings: Endings = self._host._endings
        return await endings.wait_ended(self)

    async def __aenter__(self) -> Self:
        """The session itself. Raises `SessionEndedError` if its end has begun."""
        server: Server = self._host._server
        server.refuse_if_ending(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Destroy the session, with a save if `persist_on` has ``"disconnect"``, which with a store it has.

        Does nothing if its end has begun already: whoever began it has said what to save. Raises what `destroy` raises.
        """
        server: Server = self._host._server
        if self.alive and not server.table.is_ending(self):
            await self.destroy("disconnect" in server.options.persist_on)

    @overload
    def on(
        self, name: Literal["started", "before_destroy", "destroy"], listener: Callable[[], R]
    ) -> Callable[[], R]: ...
    @overload
    def on(self, name: Literal["identified"], listener: Callable[[int | str, T], R]) -> Callable[[int | str, T], R]: ...
    @overload
    def on(self, name: Literal["started", "before_destroy", "destroy"]) -> Callable[[OfSession], OfSession]: ...
    @overload
    def on(self, name: Literal["identified"]) -> Callable[[OfIdentified], OfIdentified]: ...
    def on(self, name: SessionEvent, listener: Listener | None = None) -> object:
        """Call a listener, sync or async, each time an event is emitted; without one, a decorator.

        The events of a session and what their listeners receive: ``started`` (), ``identified`` (user_id, user_data),
        ``before_destroy`` (), ``destroy`` (). Raises `UnknownEventError`, `InvalidListenerError`, `SessionEndedError`.
        """
        if listener is None:
            return lambda function: self._add(name, function, once=False)
        return self._add(name, listener, once=False)

    @overload
    def once(
        self, name: Literal["started", "before_destroy", "destroy"], listener: Callable[[], R]
    ) -> Callable[[], R]: ...
    @overload
    def once(
        self, name: Literal["identified"], listener: Callable[[int | str, T], R]
    ) -> Callable[[int | str, T], R]: ...
    @overload
    def once(self, name: Literal["started", "before_destroy", "destroy"]) -> Callable[[OfSession], OfSession]: ...
    @overload
    def once(self, name: Literal["identified"]) -> Callable[[OfIdentified], OfIdentified]: ...
    def once(self, name: SessionEvent, listener: Listener | None = None) -> object:
        """Like `on`, for the next time only, also if the listener raises or causes the event again."""
        if listener is None:
            return lambda function: self._add(name, function, once=True)
        return self._add(name, listener, once=True)

    def off(self, name: SessionEvent, listener: Listener) -> None:
        """Take a listener back; nothing happens if it is not registered. Raises `UnknownEventError`."""
        self._host._server.table.require_thread()
        if self._listeners is not None:
            self._listeners.remove(name, listener)
        else:
            Listeners.of_session().remove(name, listener)

    def _add(self, name: SessionEvent, listener: Listener, *, once: bool) -> Listener:
        self._own_listeners().add(name, listener, once=once)
        return listener

    def _own_listeners(self) -> Listeners:
        self._require_alive()
        listeners: Listeners | None = self._listeners
        if listeners is None:
            listeners = self._listeners = Listeners.of_session(self._host._server.sanitizer)
        return listeners
