"""`port`: this library as it would be in pure Python, written as well as we can: the base of the benchmarks.

What lives here: a manager and a session with the rules of ours - a taken key and an active user are refused, keys and
user ids are checked, every event is looked up where it would be emitted, handles are dead after the end, one save of a
session at a time, a failed last save keeps the session - and one `loop.call_later` for each identified session, armed
again after each save. What must not: our compiled core, or anything that makes it slower than it could be. For that
reason it leaves out what costs time and is not a rule of a session's life: guards against other loops, threads and
forks, waiting for oneself, deadlines, statistics and a bound on saves in flight.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import copy_context
from typing import Any, TypeAlias

from cagey_sessions.errors import (
    AlreadyIdentifiedError,
    InvalidKeyError,
    InvalidListenerError,
    InvalidUserDataError,
    InvalidUserIdError,
    KeyTakenError,
    ListenerError,
    ManagerClosedError,
    NothingSavesError,
    NotIdentifiedError,
    SessionEndedError,
    UnknownEventError,
    UnsavedError,
    UserActiveError,
)
from cagey_sessions.options import SECOND, parse_duration

__all__ = ["Session", "SessionManager"]

UserId: TypeAlias = int | str
Listener: TypeAlias = Callable[..., object]

SESSION_EVENTS = frozenset(("started", "identified", "before_destroy", "destroy"))
MANAGER_EVENTS = SESSION_EVENTS | {"created", "persist_user_data", "error"}


def check_key(key: object) -> None:
    if type(key) is not str or not key:
        raise InvalidKeyError("a key is a non-empty str")


def check_user_id(user_id: object) -> None:
    if type(user_id) is int:
        if not -0x8000000000000000 <= user_id <= 0x7FFFFFFFFFFFFFFF:
            raise InvalidUserIdError("a user id that is an int has to fit into 64 signed bits")
    elif type(user_id) is not str:
        raise InvalidUserIdError("a user id is an int or a str")
    elif not user_id or "\0" in user_id or len(user_id) > 1024:
        raise InvalidUserIdError("a user id that is a str takes 1 to 1,024 bytes, and no NUL")
    elif not user_id.isascii():
        try:
            size = len(user_id.encode())
        except UnicodeEncodeError:
            raise InvalidUserIdError("a user id must be valid text") from None
        if size > 1024:
            raise InvalidUserIdError("a user id that is a str takes at most 1,024 bytes")


Listeners: TypeAlias = dict[str, list[Listener]]
"""By event; one that nobody listens to has no entry, so `name in listeners` is the whole check."""


def add(listeners: Listeners, known: frozenset[str], name: str, function: Listener) -> None:
    if name not in known:
        raise UnknownEventError(f"there is no event {name!r:.80}")
    if not callable(function):
        raise InvalidListenerError("a listener is a callable")
    listeners.setdefault(name, []).append(function)


async def call(listeners: Listeners, name: str, args: tuple[object, ...], errors: list[Exception]) -> None:
    for function in tuple(listeners.get(name, ())):
        try:
            result = function(*args)
            if result is not None and isinstance(result, Awaitable):
                await result
        except Exception as error:
            errors.append(error)


class _Ending:
    """A session on its way out, where that takes more than one step."""

    __slots__ = ("announced", "errors", "persist", "task")

    def __init__(self, persist: bool) -> None:
        self.persist = persist
        self.announced = False
        self.errors: list[Exception] = []
        self.task: asyncio.Task[ListenerError | None] | None = None


class Session:
    """One human on this server."""

    __slots__ = (
        "_asked",
        "_bag",
        "_data",
        "_ending",
        "_listeners",
        "_manager",
        "_saving",
        "_timer",
        "end_reason",
        "key",
        "user_id",
    )

    def __init__(self, manager: SessionManager, key: str | None) -> None:
        self._manager = manager
        self.key = key
        self.user_id: UserId | None = None
        self.end_reason: str | None = None
        self._data: Any = None
        self._bag: dict[str, Any] | None = None
        self._listeners: Listeners | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._asked: asyncio.Task[ListenerError | None] | None = None
        self._saving: asyncio.Task[ListenerError | None] | None = None
        self._ending: _Ending | None = None

    @property
    def alive(self) -> bool:
        return self.end_reason is None

    @property
    def user_data(self) -> Any:
        if self.end_reason is not None:
            raise SessionEndedError("the session has ended")
        if self.user_id is None:
            raise NotIdentifiedError("this session has no user yet")
        return self._data

    @user_data.setter
    def user_data(self, value: Any) -> None:
        if self.end_reason is not None:
            raise SessionEndedError("the session has ended")
        if self.user_id is None:
            raise NotIdentifiedError("this session has no user yet")
        if value is None:
            raise InvalidUserDataError("user_data must not be None")
        self._data = value

    def set(self, key: str, value: Any) -> None:
        if self.end_reason is not None:
            raise SessionEndedError("the session has ended")
        if type(key) is not str:
            raise InvalidKeyError("a name in the bag is a str")
        if self._bag is None:
            self._bag = {}
        self._bag[key] = value

    def get(self, key: str, default: Any = None) -> Any:
        return default if self._bag is None else self._bag.get(key, default)

    async def start(self) -> None:
        if self.end_reason is not None or self._ending is not None:
            raise SessionEndedError("the session has ended, or is ending")
        if "started" in self._manager._listeners or self._listeners is not None:
            await self._emit("started")

    async def set_user(self, user_id: UserId, user_data: Any) -> None:
        if self.end_reason is not None or self._ending is not None:
            raise SessionEndedError("the session has ended, or is ending")
        check_user_id(user_id)
        manager = self._manager
        if manager._closed:
            raise ManagerClosedError("this manager is being destroyed")
        if self.user_id is not None:
            raise AlreadyIdentifiedError("this session has a user already")
        if user_data is None:
            raise InvalidUserDataError("user_data must not be None")
        if user_id in manager._by_user:
            raise UserActiveError("another session has this user", session=manager._by_user[user_id])
        manager._by_user[user_id] = self
        self.user_id = user_id
        self._data = user_data
        if manager._interval is not None:
            delay = manager._random() * manager._interval
            self._timer = manager._loop.call_later(delay, manager._wake, self, context=manager._context)
        if "identified" in manager._listeners or self._listeners is not None:
            await self._emit("identified", user_id, user_data)

    async def persist_now(self) -> None:
        if self.end_reason is not None:
            raise SessionEndedError("the session has ended")
        if self.user_id is None:
            return
        self._manager._require_saver()
        error = await asyncio.shield(self._manager._ask(self))
        if error is not None:
            raise error

    async def destroy(self, persist: bool = False) -> None:
        if self.end_reason is not None:
            return
        manager = self._manager
        persist = persist and self.user_id is not None
        ending = self._ending
        if persist and (ending is None or ending.task is None):
            manager._require_saver()
        if ending is None:
            if self.key is not None:
                del manager._by_key[self.key]
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if not (
                persist
                or self._asked is not None
                or self._saving is not None
                or self._listeners is not None
                or "before_destroy" in manager._listeners
                or "destroy" in manager._listeners
            ):
                manager._forget(self)
                self._close()
                return
            ending = self._ending = _Ending(persist)
        elif ending.task is None:
            ending.persist = persist
        elif persist:
            ending.persist = True
        if ending.task is None:
            manager._resume(self, ending)
        assert ending.task is not None
        error = await asyncio.shield(ending.task)
        if error is not None:
            raise error

    def on(self, name: str, listener: Listener) -> None:
        if self.end_reason is not None:
            raise SessionEndedError("the session has ended")
        if self._listeners is None:
            self._listeners = {}
        add(self._listeners, SESSION_EVENTS, name, listener)

    async def _emit(self, name: str, *args: object) -> None:
        errors: list[Exception] = []
        await self._call(name, args, errors)
        if errors:
            raise ListenerError(f"a listener of {name!r} raised", errors)

    async def _call(self, name: str, args: tuple[object, ...], errors: list[Exception]) -> None:
        if name in self._manager._listeners:
            await call(self._manager._listeners, name, (self, *args), errors)
        if self._listeners is not None:
            await call(self._listeners, name, args, errors)

    def _close(self) -> None:
        self.end_reason = "destroyed"
        self._data = self._listeners = self._ending = None


class SessionManager:
    """Every human on this server."""

    def __init__(self, *, interval: str | float | None = None, log: Any = None) -> None:
        self._interval = None if interval is None else parse_duration(interval, "interval") / SECOND
        self._log = log or logging.getLogger("benchmarks.port")
        self._listeners: Listeners = {}
        self._sessions: set[Session] = set()
        self._by_key: dict[str, Session] = {}
        self._by_user: dict[UserId, Session] = {}
        self._closed = False
        self._random = random.Random().random
        self._loop = asyncio.get_running_loop()
        self._context = copy_context()  # one for all timers, as in ours: copying it for each costs time and memory
        self._wake = self._due  # one bound method for all timers
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._sessions)

    def on(self, name: str, listener: Listener) -> None:
        add(self._listeners, MANAGER_EVENTS, name, listener)

    async def create(self, key: str | None = None) -> Session:
        if self._closed:
            raise ManagerClosedError("this manager is being destroyed")
        session = Session(self, key)
        if key is not None:
            check_key(key)
            if key in self._by_key:
                raise KeyTakenError("another live session has this key")
            self._by_key[key] = session
        self._sessions.add(session)
        if "created" in self._listeners:
            errors: list[Exception] = []
            await call(self._listeners, "created", (session,), errors)
            if errors:
                await session.destroy()
                raise ListenerError("a listener of 'created' raised", errors)
        return session

    def find_by_key(self, key: str) -> Session | None:
        if type(key) is not str:
            check_key(key)
        return self._by_key.get(key)

    def find_by_user(self, user_id: UserId) -> Session | None:
        check_user_id(user_id)
        session = self._by_user.get(user_id)
        return session if session is not None and session._ending is None else None

    async def destroy(self, persist: bool = False) -> None:
        self._closed = True
        errors: list[Exception] = []
        user_ids: list[UserId] = []
        for session in list(self._sessions):
            try:
                await session.destroy(persist)
            except ListenerError as error:
                errors.append(error)
                if session.user_id is not None and session.alive:
                    user_ids.append(session.user_id)
                    self._forget(session)
                    session._close()
        if errors:
            raise UnsavedError("not everybody was saved", errors, user_ids=user_ids)

    # Saving

    def _require_saver(self) -> None:
        if "persist_user_data" not in self._listeners:
            raise NothingSavesError("nobody would perform this save")

    def _arm(self, session: Session, delay: float) -> None:
        session._timer = self._loop.call_later(delay, self._wake, session, context=self._context)

    def _due(self, session: Session) -> None:
        """The timer of a session: save it, or try once more to end it."""
        session._timer = None
        ending = session._ending
        if ending is not None:
            if ending.task is None:
                self._resume(session, ending)
        elif "persist_user_data" in self._listeners:
            self._ask(session)
        elif self._interval is not None:
            self._arm(session, self._interval)

    def _ask(self, session: Session) -> asyncio.Task[ListenerError | None]:
        """A save that starts from now on; whoever asks before it has started shares it."""
        if session._asked is None:
            session._asked = self._spawn(self._save(session))
        return session._asked

    async def _save(self, session: Session) -> ListenerError | None:
        if session._saving is not None:
            await asyncio.wait((session._saving,))
        session._saving, session._asked = session._asked, None
        errors: list[Exception] = []
        try:
            await call(self._listeners, "persist_user_data", (session,), errors)
        finally:
            session._saving = None
        if self._interval is not None and session._ending is None and not self._closed:
            if session._timer is not None:
                session._timer.cancel()
            self._arm(session, self._interval)
        if not errors:
            return None
        failed = ListenerError("a listener of 'persist_user_data' raised", errors)
        self._report(failed, session)
        return failed

    def _report(self, error: Exception, session: Session) -> None:
        self._log.error("user %r: %s", session.user_id, type(error).__name__)
        if "error" in self._listeners:
            self._spawn(call(self._listeners, "error", (error, session), []))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=self._loop)  # not by the loop's factory, which may run it here and now
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Ending

    def _resume(self, session: Session, ending: _Ending) -> None:
        ending.task = self._spawn(self._end(session, ending))

    async def _end(self, session: Session, ending: _Ending) -> ListenerError | None:
        if not ending.announced:
            ending.announced = True
            await session._call("before_destroy", (), ending.errors)
        while (task := session._asked or session._saving) is not None:
            await asyncio.wait((task,))
        if ending.persist:
            error = await self._ask(session)
            if error is not None:
                ending.task = None
                if self._interval is not None and not self._closed:
                    self._arm(session, self._interval / 16)
                return error
        self._forget(session)
        await session._call("destroy", (), ending.errors)
        session._close()
        return ListenerError("a listener of 'destroy' raised", ending.errors) if ending.errors else None

    def _forget(self, session: Session) -> None:
        self._sessions.discard(session)
        if session.user_id is not None:
            del self._by_user[session.user_id]
        if session._timer is not None:
            session._timer.cancel()
            session._timer = None
