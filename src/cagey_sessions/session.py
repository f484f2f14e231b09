"""One human on one server. What lives here: the public manners of a session. What must not: its memory (that is the
core's) and the steps of its life (those are lifecycle's).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, overload

from ._core import SessionCore
from .events import SESSION_EVENTS, Listener, Listeners
from .lifecycle import Lifecycle
from .records import EndReason

__all__ = ["Session"]

AnyListener = TypeVar("AnyListener", bound=Listener)


class Session(SessionCore):
    """One human on this server, from `SessionManager.create` to `destroy`.

    `key` is what the session can be found by, or None; `user_id` and `user_data` are set by `set_user`. `set` and `get`
    keep live objects beside them that are never saved.
    """

    __slots__ = ()

    async def start(self) -> None:
        """Emit ``started``, on the manager and on the session: the program may begin to talk to this human.

        Raises `ListenerError` with what the listeners raised, `SessionEndedError`.
        """
        host: Lifecycle = self._host
        await host.start(self)

    async def set_user(self, user_id: int | str, user_data: object) -> None:
        """Say who this human is and hand over their data; from now on it is saved. Emits ``identified``.

        `user_data` is kept as it is: change it in place. Call this with data loaded *after* the user's last session
        has ended, else its last save would be overwritten by something older; that is why a user with a session,
        live or ending, is refused.

        Raises before anything changes: `InvalidUserIdError`, `InvalidUserDataError`, `AlreadyIdentifiedError`,
        `UserActiveError` (wait for the end of its ``session``), `SessionEndedError`, `ManagerClosedError`. Raises
        `ListenerError` with what the listeners raised, and then the user stays set. O(1).
        """
        host: Lifecycle = self._host
        await host.set_user(self, user_id, user_data)

    async def persist_now(self) -> None:
        """Save the user's data as it is now, and return when that is done.

        A call that comes while a save is under way waits for a later one; callers that wait for the same save share
        it. Without a user there is nothing to save, and nothing happens. Cancelling the call stops the waiting, not
        the save.

        Raises `ListenerError` with what the ``persist_user_data`` listeners raised (the data stays due),
        `NothingSavesError` without such a listener, `SessionEndedError`, and `WouldDeadlockError` inside a listener
        that this very save would wait for.
        """
        host: Lifecycle = self._host
        await host.persist(self)

    async def destroy(self, persist: bool | None = None) -> None:
        """End the session: ``before_destroy``, the last save if `persist`, ``destroy``.

        The session is hidden from its key at once; its user stays taken until the last save is acknowledged, and that
        save is repeated if the data changed meanwhile (data that is not JSON: its changes cannot be seen). Calls that
        come later join the first, and one that asks for a save still gets it as long as the last save has not been
        passed over. Without `persist` nothing is saved, unless an earlier call has asked for it. After the end the call
        does nothing. Inside a listener that this end waits for, or in a task that such a listener has started, it
        cannot wait itself, and returns at once. Cancelling the call stops the waiting, not the end.

        Raises `ListenerError`: with what the listeners of the two events raised, and then the session has ended all the
        same; or with what the last save raised, and then it stays hidden, keeps its user, and is tried again until it
        is saved: call once more to try at once, or with ``persist=False`` to let the data go. Raises
        `NothingSavesError` before anything changes if nobody would perform the save, and `SessionEndedError` if it is
        asked for too late.
        """
        host: Lifecycle = self._host
        await host.end(self, persist)

    async def wait_ended(self) -> EndReason:
        """Wait until the session has ended; returns why. Raises `WouldDeadlockError` inside a listener of its end."""
        host: Lifecycle = self._host
        return await host.wait_ended(self)

    @overload
    def on(self, name: str, listener: AnyListener) -> AnyListener: ...
    @overload
    def on(self, name: str) -> Callable[[AnyListener], AnyListener]: ...
    def on(self, name: str, listener: AnyListener | None = None) -> object:
        """Call a listener, sync or async, each time an event is emitted; without one, a decorator.

        The events of a session and what their listeners receive: ``started`` (), ``identified`` (user_id, user_data),
        ``before_destroy`` (), ``destroy`` (). Raises `UnknownEventError`, `InvalidListenerError`, `SessionEndedError`.
        """
        if listener is None:
            return lambda function: self.on(name, function)
        self._own_listeners().add(name, listener, once=False)
        return listener

    @overload
    def once(self, name: str, listener: AnyListener) -> AnyListener: ...
    @overload
    def once(self, name: str) -> Callable[[AnyListener], AnyListener]: ...
    def once(self, name: str, listener: AnyListener | None = None) -> object:
        """Like `on`, for the next time only, also if the listener raises or causes the event again."""
        if listener is None:
            return lambda function: self.once(name, function)
        self._own_listeners().add(name, listener, once=True)
        return listener

    def off(self, name: str, listener: Listener) -> None:
        """Take a listener back; nothing happens if it is not registered. Raises `UnknownEventError`."""
        if self._listeners is not None:
            self._listeners.remove(name, listener)
        else:
            Listeners(SESSION_EVENTS).remove(name, listener)

    def _own_listeners(self) -> Listeners:
        self._require_alive()
        listeners: Listeners | None = self._listeners
        if listeners is None:
            listeners = self._listeners = Listeners(SESSION_EVENTS)
        return listeners
