"""Listeners: the names of the events, registration, and calling the listeners of an event.

An emit takes the listeners as they are registered at that moment and calls them in the order of their registration;
each is awaited before the next is called. A listener that is removed meanwhile is skipped. One that is added meanwhile
is called by the next emit. A listener that raises stops none of the others: what they raise is collected, and the
caller of `call` decides what it means. What an event is for is not known here.

See also `deadlocks`, for listeners that wait for what waits for them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
from collections.abc import Callable
from types import AsyncGeneratorType, GeneratorType
from typing import Literal, TypeAlias, get_args

from .._core import SessionCore
from ..data import Sanitizer
from ..errors import InvalidListenerError, ListenerError
from ..options import known_event, name_of
from ..user_code import as_exception, current_task, is_for_this_task
from ..wording import quote

__all__ = [
    "MANAGER_EVENTS",
    "SESSION_EVENTS",
    "Listener",
    "Listeners",
    "ManagerEvent",
    "SessionEvent",
    "listener_error",
]

Listener = Callable[..., object]

SessionEvent: TypeAlias = Literal["started", "identified", "before_destroy", "destroy"]
ManagerEvent: TypeAlias = Literal["created", "persist_user_data", "unsavable", "error", SessionEvent]
SESSION_EVENTS: tuple[SessionEvent, ...] = get_args(SessionEvent)
MANAGER_EVENTS: tuple[ManagerEvent, ...] = get_args(ManagerEvent)


class _Registration:
    __slots__ = ("function", "once", "removed")

    def __init__(self, function: Listener, once: bool) -> None:
        self.function = function
        self.once = once
        self.removed = False


class Listeners:
    """The listeners of one manager or one session, by event."""

    __slots__ = ("_by_name", "_known", "_on_heard", "_sanitizer")

    def __init__(
        self,
        known: tuple[str, ...],
        sanitizer: Sanitizer | None = None,
        on_heard: Callable[[str, bool], None] = lambda name, heard: None,
    ) -> None:
        self._known = known
        self._sanitizer = sanitizer
        self._on_heard = on_heard  # called when an event gets its first listener, and when it loses its last one
        self._by_name: dict[str, list[_Registration]] = {}

    @classmethod
    def of_manager(cls, sanitizer: Sanitizer | None, on_heard: Callable[[str, bool], None]) -> Listeners:
        """An empty set of listeners for the events of a manager."""
        return cls(MANAGER_EVENTS, sanitizer, on_heard)

    @classmethod
    def of_session(cls, sanitizer: Sanitizer | None = None) -> Listeners:
        """An empty set of listeners for the events of a session."""
        return cls(SESSION_EVENTS, sanitizer)

    def add(self, name: str, function: Listener, *, once: bool) -> None:
        """Register a listener. Raises `UnknownEventError`, `InvalidListenerError`. O(1)."""
        known_event(name, self._known)
        if not callable(function):
            raise InvalidListenerError(f"a listener is a function or another callable, not {quote(function)}")
        self._by_name.setdefault(name, []).append(_Registration(function, once))
        self._on_heard(name, True)

    def remove(self, name: str, function: Listener) -> None:
        """Remove the oldest registration of a listener; does nothing if there is none. O(listeners)."""
        known_event(name, self._known)
        for registration in self._by_name.get(name, ()):
            if _is_same(registration.function, function):
                self._discard(name, registration)
                return

    def has(self, name: str) -> bool:
        """Whether the event has a listener. O(1)."""
        return name in self._by_name

    def clear(self) -> None:
        """Remove all listeners; emits that are under way skip those that they have not called yet."""
        for registrations in self._by_name.values():
            for registration in registrations:
                registration.removed = True
        for name in self._by_name:
            self._on_heard(name, False)
        self._by_name.clear()

    async def call(
        self, name: str, args: tuple[object, ...], errors: list[Exception], about: SessionCore | None = None
    ) -> int:
        """Call the listeners of an event, and append what they raise to `errors`, with the listener's name as a note.

        If the session that it is `about` ends meanwhile, the remaining listeners are not called. Returns how many
        listeners were passed over.
        """
        passed_over = 0
        task = current_task()
        for registration in tuple(self._by_name.get(name, ())):  # a copy: listeners may add and remove listeners
            if registration.removed or (about is not None and not about.alive):
                passed_over += 1
                continue
            if registration.once:
                # before the call: the listener may emit the same event again
                self._discard(name, registration)
            try:
                if self._sanitizer is None:
                    result = registration.function(*args)
                else:
                    result = self._sanitizer.call(name, registration.function, args)
                if result is not None:
                    await _finish(result)
            except BaseException as error:
                # a cancellation of this very task goes on; whatever else is raised is the fault of this listener alone
                if is_for_this_task(error, task):
                    raise
                errors.append(_with_name(as_exception(error), name, registration))
        return passed_over

    async def emit(self, name: str, session: SessionCore, *args: object, errors: list[Exception]) -> None:
        """Call the listeners of the manager, with the session as first argument, and then those of the session itself.

        `self` has the listeners of the manager. The session's are not called if it has ended meanwhile.
        """
        if self.has(name):
            await self.call(name, (session, *args), errors, session)
        if session._listeners is not None:
            await session._listeners.call(name, args, errors, session)

    def is_heard(self, name: str, session: SessionCore) -> bool:
        """Whether the manager, whose listeners `self` has, or the session has a listener of this event."""
        return self.has(name) or (session._listeners is not None and session._listeners.has(name))

    def _discard(self, name: str, registration: _Registration) -> None:
        registration.removed = True
        registrations = self._by_name.get(name)
        if registrations is not None and registration in registrations:
            registrations.remove(registration)
            if not registrations:
                del self._by_name[name]
                self._on_heard(name, False)


def _is_same(one: object, other: object) -> bool:
    """Whether two listeners are the same: each access to a method makes a new object, which equals the others."""
    try:
        return one is other or bool(one == other)
    except Exception:  # `__eq__` of the program's own class may raise anything
        return False


async def _finish(result: object) -> None:
    """Wait for what a listener has returned, if it is something to wait for."""
    if inspect.isawaitable(result):
        await result
    elif isinstance(result, concurrent.futures.Future):
        await _finish_in_thread(result)
    elif isinstance(result, GeneratorType | AsyncGeneratorType):
        raise InvalidListenerError("a listener with a `yield` in it does nothing when it is called")


async def _finish_in_thread(future: concurrent.futures.Future[object]) -> None:
    """Wait for a future of a thread, and raise the exception in it, if there is one.

    `asyncio.wrap_future` would hang if that is a `StopIteration`, which an asyncio future refuses to hold.
    """
    loop = asyncio.get_running_loop()
    done = loop.create_future()  # only says that the thread is done: it holds no outcome

    def wake(_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish)

    def finish() -> None:
        if not done.done():
            done.set_result(None)

    future.add_done_callback(wake)
    try:
        await done
    except asyncio.CancelledError:
        future.cancel()  # it has an effect if the thread has not begun yet
        raise
    if future.cancelled():
        raise asyncio.CancelledError
    future.result()


RAISED_BY = "raised by listener "
MOST_NAMED = 10


def _with_name(error: Exception, name: str, registration: _Registration) -> Exception:
    note = f"{RAISED_BY}{name_of(registration.function)} of event {name!r}"
    with contextlib.suppress(Exception):  # the exception's class may not allow attributes, or raise from them
        notes: list[str] = vars(error).setdefault("__notes__", [])
        if note in notes:
            notes.remove(note)  # the exception was raised before: the latest listener's note has to come last
        notes.append(note)
    return error


def listener_error(name: str, errors: list[Exception]) -> ListenerError:
    """One `ListenerError` for all that the listeners of an event raised; its message names the listeners."""
    named = list(dict.fromkeys(raiser for error in errors for raiser in _raisers(error, errors)))
    shown = ", ".join(named[:MOST_NAMED]) + (", ..." if len(named) > MOST_NAMED else "")
    if len(errors) == 1:
        return ListenerError(f"listener {shown} raised" if named else f"a listener of event {name!r} raised", errors)
    return ListenerError(f"{len(errors)} listeners raised: {shown or f'of event {name!r}'}", errors)


def _raisers(error: Exception, errors: list[Exception]) -> list[str]:
    """The names of the listeners that raised `error`, one for each time it is among `errors`.

    The notes of an exception object that was raised in earlier emits, too, name earlier listeners first.
    """
    times = sum(other is error for other in errors)
    with contextlib.suppress(Exception):
        notes = [note for note in vars(error)["__notes__"] if note.startswith(RAISED_BY)]
        return [note.removeprefix(RAISED_BY) for note in notes[-times:]]
    return []
