"""The public `Session` class: the docstrings and the types of its calls, and its listeners.

Its fields, and its calls that need not wait, are in the compiled `SessionCore`; the steps of its life are in
`login.py`, `beginning.py` and `ending.py`, its saves in the package `saving`.
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
    """One connected user on this server, from `SessionManager.create` to `destroy`.

    `key` is the text by which the program finds the session, or None. `user_id` and `user_data` are set by `login`, or
    without a store by `set_user`. `set` and `get` keep other objects, such as a socket, which are never saved. In an
    ``async with`` the session ends with the block: ``async with manager.create() as session: ...``.
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
        """Give the session its user, and load the user's data from the store; from now on it is saved.

        The user is claimed in the store, so that no other server has them, and the data is decoded. Then `user_id` and
        `user_data` are set in one step, and ``identified`` is emitted. `default` is the data of a user whom the store
        does not know: a value, of which each user gets a copy, or a plain function that makes one. `when_active` says
        what to do if the user has a live session on this server: ``"replace"`` saves and ends it first, ``"refuse"``
        raises `UserActiveError`. While the store is down the call waits up to `save_timeout`. If it is cancelled, the
        session stays without a user.

        Raises `InvalidUserIdError`, `OptionError`, `AlreadyIdentifiedError`, `SessionEndedError`, `ManagerClosedError`,
        `EncodingError` for a `default` that cannot be saved, or `StoreModeError` without a store before anything
        changes. Leaves the session without a user, and raises `UserNotFoundError` without a default,
        `OwnedElsewhereError`, `UserActiveError`, `CorruptRecordError`, `NewerSchemaError`, `StoreUnavailableError`, or
        what the save of the older session raised, which then stays live. Raises `ListenerError` with what the listeners
        raised; the user stays set then. O(size of the data), and a call of the store.
        """
        await self._host._logins.login(self, user_id, default, when_active)

    async def persist_now(self) -> Receipt | None:
        """Save the user's data as it is now; returns the store's `Receipt` when that is done.

        A call that comes while a save is under way waits for a later one. Calls that wait for the same save share it,
        and with a store the calls of one turn of the event loop share a batch. Returns None without a user, as there is
        nothing to save, and if a listener saves. Cancelling the call stops the waiting, not the save.

        It saves this user alone. ``asyncio.gather(ann.persist_now(), bob.persist_now())`` is two saves: after a crash,
        or if one of them is refused, one may be stored and the other not. The page on tests has a trade between two
        users that survives that.

        With a store, attempts that fail are repeated. Raises `StoreUnavailableError` if none has succeeded within
        `save_timeout` (the data is saved later), `UnsavableError` for data that cannot be saved as it is, and
        `FencedError` or `UserErasedError` if the session has lost its user. Without a store, raises `ListenerError`
        with what the ``persist_user_data`` listeners raised (the data is saved later), and `NothingSavesError` without
        such a listener. Raises `SessionEndedError`, and `WouldDeadlockError` inside a listener that this save would
        wait for.
        """
        server: Server = self._host._server
        server.enter()
        return await server.requests.save(self)

    async def wait_ended(self) -> EndReason:
        """Wait until the session has ended; returns why. Raises `WouldDeadlockError` inside a listener of its end."""
        endings: Endings = self._host._endings
        return await endings.wait_ended(self)

    async def __aenter__(self) -> Self:
        """Return the session itself. Raises `SessionEndedError` if its end has begun."""
        server: Server = self._host._server
        server.refuse_if_ending(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Destroy the session, with a save if `persist_on` has ``"disconnect"``, as it has by default with a store.

        Does nothing if its end has begun already: that call has said whether to save. Raises what `destroy` raises.
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
        """Call a listener, sync or async, each time an event is emitted. Without a listener, return a decorator.

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
        """As `on`, for the next event only, even if the listener raises or causes the event again."""
        if listener is None:
            return lambda function: self._add(name, function, once=True)
        return self._add(name, listener, once=True)

    def off(self, name: SessionEvent, listener: Listener) -> None:
        """Remove a listener; does nothing if it is not registered. Raises `UnknownEventError`."""
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
