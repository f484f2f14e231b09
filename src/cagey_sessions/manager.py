"""All sessions of one server. What lives here: `SessionManager`, the front door, and the warning about one that was
forgotten. What must not: anything a session does by itself.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar, cast, overload

from ._core import Counters
from .clock import Clock, SystemClock
from .drain import drain
from .errors import OptionError
from .events import Listener
from .lifecycle import Lifecycle
from .options import PERSIST_EVENTS, Duration, known_event, parse_duration, read_options, suggest
from .records import DrainReport, Statistics
from .session import Session

__all__ = ["SessionManager", "create"]

AnyListener = TypeVar("AnyListener", bound=Listener)


class SessionManager:
    """Every human on this server.

    Parameters
    ----------
    options
        The settings of the Node package in snake case, as one mapping:
        ``{"user_data": {"persistence": {"interval": "30s", "events": ["disconnect", "shutdown"]}}}``.
        They mean the same as `interval` and `persist_on`.
    interval
        How old an unsaved change may become: each user is saved at least this often, at times spread evenly.
        Seconds, a `timedelta`, or text (``"30s"``, ``"1h30m"``, ``"500ms"``); from 10 ms to 100 years.
        Without it nothing is saved by itself.
    persist_on
        At which moments the program wants to save besides: any of ``"disconnect"`` and ``"shutdown"``. The program asks
        with `will_persist_user_data_on`; leaving ``async with`` asks for ``"shutdown"``.
    max_in_flight
        How many saves may be under way at a time. A listener that never returns holds one of them; one that waits for
        the save of another session lends its own meanwhile.
    user_id
        ``int`` or ``str`` to accept user ids of that type only.
    log
        A logger; ``logging.getLogger("cagey_sessions")`` by default. It is given ids and counts, never data or keys.
    clock
        Where time comes from; for tests.

    The manager belongs to the event loop of its first awaited call, or of ``async with``. From another loop or thread,
    or after a fork, every call raises `WrongLoopError`. Wrong settings raise `OptionError`.
    """

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        /,
        *,
        interval: Duration | None = None,
        persist_on: Iterable[str] | None = None,
        max_in_flight: int | None = None,
        user_id: type[int] | type[str] | None = None,
        log: Any = None,
        clock: Clock | None = None,
    ) -> None:
        checked = read_options(
            options, interval=interval, persist_on=persist_on, max_in_flight=max_in_flight, user_id=user_id, log=log
        )
        self._life = Lifecycle(Session, checked, clock or SystemClock())
        self._saves = _Saves()
        self._warning = weakref.finalize(
            self._life, _warn_of_unsaved, self._life.table.counters, self._saves, checked.log, os.getpid()
        )
        self._saves.configured = checked.interval is not None or bool(checked.persist_on)

    async def create(self, key: str | None = None, *, replace: bool = False) -> Session:
        """Make a session, emit ``created`` and return it.

        With `key`, a non-empty `str`, `find_by_key` finds it. A key that a live session has raises `KeyTakenError`;
        `replace` saves and ends that session first; if it cannot be saved it stays live, and the call raises.

        If a ``created`` listener raises, the session is ended and a `ListenerError` raised. Raises `InvalidKeyError`,
        `ManagerClosedError`. O(1) amortised.
        """
        return cast(Session, await self._life.create(key, replace))

    def find_by_key(self, key: str) -> Session | None:
        """The live session with that key, or None. Raises `InvalidKeyError` for what is not a `str`. O(1)."""
        return cast("Session | None", self._life.table.find_by_key(key))

    def find_by_user(self, user_id: int | str) -> Session | None:
        """The live session of that user, or None. Raises `InvalidUserIdError`. O(1)."""
        return cast("Session | None", self._life.table.find_by_user(user_id))

    def sessions(self) -> list[Session]:
        """All sessions, those that are ending included, in no order. O(n): not for every message."""
        return cast("list[Session]", self._life.table.sessions_now())

    def __len__(self) -> int:
        """How many sessions there are, those that are ending included. O(1)."""
        return len(self._life.table)

    def __bool__(self) -> bool:
        """A manager is true, also while it has no session."""
        return True

    def will_persist_user_data_on(self, name: str) -> bool:
        """Whether the settings say to save at that moment: ``"disconnect"`` or ``"shutdown"``.

        The program asks before it ends a session or the manager:
        ``await session.destroy(manager.will_persist_user_data_on("disconnect"))``. Raises `UnknownEventError`.
        """
        return known_event(name, PERSIST_EVENTS) in self._life.options.persist_on

    async def persist_all_user_data(self) -> None:
        """Save every user who is there now, each once, oldest save first, `max_in_flight` at a time.

        Who joins meanwhile is not waited for; who is leaving is saved by their own `destroy`. Raises `UnsavedError`
        with the `user_ids` that could not be saved when all others are, and `NothingSavesError` without a listener.
        O(users), in slices.
        """
        await self._life.persist_all()

    def statistics(self) -> Statistics:
        """What the manager is doing at this instant. O(1), plus one step for each save under way."""
        return self._life.statistics()

    async def destroy(self, persist: bool | None = None, *, deadline: Duration = "25s") -> DrainReport:
        """End all sessions and the manager itself, and return how it went.

        Nobody new is admitted from now on; what is under way is awaited; with `persist` (False unless given) every
        user's last save is made, oldest first, `max_in_flight` at a time, and tried again when it fails. Whoever is not
        saved when `deadline` has passed is ended unsaved and named in the `DrainError` that is raised then: its
        ``report`` is the `DrainReport`. Listeners of ``destroy`` may run for one second more. A save that is
        under way by then is left to itself.

        Calls that come later join the first. Inside a listener that this end waits for, or in a task that such a
        listener has started, the call returns at once.
        Cancelling the call stops the waiting, not the end. Raises `NothingSavesError`, `DurationError` before anything
        changes.
        """
        longest = parse_duration(deadline, "deadline", shortest=0)
        report = await drain(self._life, bool(persist), longest)
        if self._life.closed:
            self._warning.detach()
        return report

    async def __aenter__(self) -> Self:
        self._life.enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Destroy the manager; users are saved if `persist_on` has ``"shutdown"``."""
        await self.destroy(self.will_persist_user_data_on("shutdown"))

    @overload
    def on(self, name: str, listener: AnyListener) -> AnyListener: ...
    @overload
    def on(self, name: str) -> Callable[[AnyListener], AnyListener]: ...
    def on(self, name: str, listener: AnyListener | None = None) -> object:
        """Call a listener, sync or async, each time an event is emitted; without one, a decorator.

        The events and what their listeners receive: ``created`` (session), ``started`` (session), ``identified``
        (session, user_id, user_data), ``persist_user_data`` (session), ``before_destroy`` (session), ``destroy``
        (session), ``error`` (error, session or None). Listeners run one at a time in the order of registration, each
        awaited before the next; one that raises stops no other.

        A ``persist_user_data`` listener turns `session.user_data` into bytes first, before its first await, and then
        writes them: the data goes on changing while the write is under way.

        Raises `UnknownEventError`, `InvalidListenerError`.
        """
        if listener is None:
            return lambda function: self.on(name, function)
        self._add(name, listener, once=False)
        return listener

    @overload
    def once(self, name: str, listener: AnyListener) -> AnyListener: ...
    @overload
    def once(self, name: str) -> Callable[[AnyListener], AnyListener]: ...
    def once(self, name: str, listener: AnyListener | None = None) -> object:
        """Like `on`, for the next time only, also if the listener raises or causes the event again."""
        if listener is None:
            return lambda function: self.once(name, function)
        self._add(name, listener, once=True)
        return listener

    def off(self, name: str, listener: Listener) -> None:
        """Take a listener back; nothing happens if it is not registered. Raises `UnknownEventError`."""
        self._life.table.require_thread()
        self._life.listeners.remove(name, listener)

    def _add(self, name: str, listener: Listener, *, once: bool) -> None:
        self._life.table.require_thread()
        self._life.listeners.add(name, listener, once=once)
        if name == "persist_user_data":
            self._saves.configured = True
            self._life.autosave.kick()


def create(apis: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None) -> SessionManager:
    """Make a `SessionManager` the way the Node package does.

    `apis` may hold ``"log"``, a logger; `options` is the nested mapping of `SessionManager`. Raises `OptionError`.
    """
    if apis is not None and not isinstance(apis, Mapping):
        raise OptionError(f"apis is a mapping like {{'log': logger}}, not {apis!r:.80}")
    for name in apis or ():
        if name != "log":
            raise OptionError(f"there is no api {name!r:.80}{suggest(str(name), ('log',))}")
    return SessionManager(options, log=(apis or {}).get("log"))


class _Saves:
    """Whether a manager was meant to save at all."""

    configured = False


def _warn_of_unsaved(counters: Counters, saves: _Saves, log: Any, pid: int) -> None:
    """Called when a manager vanishes, or the process ends, without `SessionManager.destroy`."""
    if saves.configured and counters.identified and os.getpid() == pid:
        log.warning(
            "unsaved users: %d; `await manager.destroy(persist=True)` was not called, or did not finish",
            counters.identified,
        )
