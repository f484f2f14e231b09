"""From the first event of a session to its last. What lives here: creating, identifying, saving and ending sessions,
and where errors go that nobody waits for. What must not: the choice of when to save, the end of everybody, or public
manners.

Ending a session is one task's work, owned here; callers wait for it through a shield, so cancelling them cancels
nothing. Its steps: hide it from its key, ``before_destroy``, wait for what is in flight, the last save, forget it,
``destroy``, the end. If the last save fails the session is parked: hidden, its user's slot still taken, tried again by
the wheel until it is saved, or the manager's deadline passes.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from contextvars import Context
from itertools import chain
from typing import Any, Protocol, TypeVar

import orjson

from ._core import SessionCore, SessionTable, check_user_id, is_plain
from .autosave import Autosave
from .clock import Clock
from .errors import (
    CageySessionsError,
    ListenerCancelledError,
    ListenerError,
    ManagerClosedError,
    NothingSavesError,
    SessionEndedError,
    UnsavedError,
    WouldDeadlockError,
    WrongLoopError,
)
from .events import MANAGER_EVENTS, Listeners, listener_error
from .options import SECOND, Options
from .records import EndReason, Statistics
from .waits import Wait, listening, saves_inside, waiting_for, would_deadlock

__all__ = ["Drain", "Ending", "Lifecycle", "name_some"]

T = TypeVar("T")

LONGEST_REPORT_QUEUE = 1000
MOST_LAST_SAVES = 20
"""How often the last save is repeated for data that does not stop changing."""
NOT_SAVED, UNSEEN = object(), object()


class Ending:
    """A session on its way out."""

    __slots__ = (
        "announced",
        "attempt",
        "decided",
        "errors",
        "last_error",
        "parked",
        "persist",
        "reason",
        "saved",
        "task",
        "waiting",
    )

    def __init__(self, persist: bool, reason: EndReason, loop: asyncio.AbstractEventLoop) -> None:
        self.persist = persist
        self.reason = reason
        self.announced = False  # before_destroy has been emitted
        self.decided = False  # whether there is a last save cannot be changed any more
        self.parked = False  # no task is at work; the last save waits for its retry
        self.saved: object = NOT_SAVED  # fingerprint of the data last acknowledged since the end began
        self.last_error: Exception | None = None
        self.errors: list[Exception] = []
        self.attempt: asyncio.Future[ListenerError | None] = loop.create_future()
        self.task: asyncio.Task[None] | None = None
        self.waiting = 0  # callers who will hear of the attempt


class Drain(Protocol):
    """The end of everybody, as far as the end of one needs to know."""

    gave_up: bool

    def note(self, session: SessionCore, ending: Ending, error: ListenerError | None) -> None:
        """A session has ended; the error is what its caller gets to see."""
        ...

    def look(self) -> None:
        """A session has ended, or is parked."""
        ...


class Lifecycle:
    """All sessions of one manager, and everything that happens to them."""

    def __init__(self, session_type: type[SessionCore], options: Options, clock: Clock) -> None:
        self.options = options
        self.clock = clock
        self.listeners = Listeners(MANAGER_EVENTS)
        self.table = SessionTable(session_type, self, seed=random.getrandbits(64))
        self.autosave = Autosave(self.table, clock, options, self)
        self.endings: dict[SessionCore, Ending] = {}
        self.ends_at_work = 0
        self.ends_announcing = 0
        self.drain: Drain | None = None
        self.closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: dict[SessionCore, asyncio.Future[EndReason]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reports: deque[tuple[Exception, SessionCore | None]] = deque()
        self._reporter: asyncio.Task[None] | None = None

    # The loop

    def enter(self) -> asyncio.AbstractEventLoop:
        """Every awaited call passes here: bind the loop at the first, refuse any other later."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            if self._loop is not None:
                raise WrongLoopError("this manager belongs to another event loop; make one manager for each loop")
            self._loop = loop
            self.table.bind_thread()
            self.autosave.bind(loop)
        return loop

    def spawn(self, work: Coroutine[Any, Any, T], name: str, context: Context | None = None) -> asyncio.Task[T]:
        """Start a task that this manager owns; not by the loop's factory, which may run it here and now."""
        task = asyncio.Task(work, loop=self._loop, name=f"cagey-sessions {name}", context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Events

    async def emit(self, name: str, session: SessionCore, *args: object, errors: list[Exception]) -> None:
        """Emit on the manager, with the session first, then on the session itself, unless it has ended meanwhile."""
        if self.listeners.has(name):
            await self.listeners.call(name, (session, *args), errors, session)
        if session._listeners is not None:
            await session._listeners.call(name, args, errors, session)

    def is_heard(self, name: str, session: SessionCore) -> bool:
        """Whether anybody would hear an event."""
        return self.listeners.has(name) or (session._listeners is not None and session._listeners.has(name))

    def say(self, level: str, message: str, *args: object) -> None:
        """Log, and let no logger that fails stop a save."""
        with suppress(Exception):
            getattr(self.options.log, level)(message, *args)

    def report(self, error: Exception, session: SessionCore | None) -> None:
        """Log an error that no caller waits for and hand it to the listeners of ``error``."""
        if session is None:
            self.say("error", "%s", error)
        else:
            self.say("error", "user %r: %s", session.user_id, _summary(error))
        if self.closed or not self.listeners.has("error") or len(self._reports) >= LONGEST_REPORT_QUEUE:
            return
        self._reports.append((error, session))
        if self._reporter is None or self._reporter.done():
            self._reporter = self.spawn(self._report_all(), "error events")

    async def _report_all(self) -> None:
        while self._reports:
            errors: list[Exception] = []
            await self.listeners.call("error", self._reports.popleft(), errors)
            for error in errors:
                self.say("error", "a listener of 'error' raised: %s", _summary(error))

    # Saving

    def can_save(self) -> bool:
        return self.listeners.has("persist_user_data")

    def require_saver(self) -> None:
        if not self.can_save():
            raise NothingSavesError(
                "nobody would perform this save: register a listener with manager.on('persist_user_data', ...) "
                "that writes session.user_data to your database"
            )

    async def perform(self, session: SessionCore) -> None:
        self.require_saver()
        errors: list[Exception] = []
        if await self.listeners.call("persist_user_data", (session,), errors):
            errors.append(ListenerCancelledError("a listener was removed while the save was under way"))
        if errors:
            raise listener_error("persist_user_data", errors)

    def fingerprint(self, session: SessionCore) -> object:
        """Bytes that change when the data does, or `UNSEEN` for data that is not JSON, whose changes cannot be seen."""
        data = session.user_data
        if not is_plain(data):
            return UNSEEN  # a serialiser may call different values equal, or crash on them
        try:
            return orjson.dumps(data)
        except TypeError:  # a lone surrogate, or an int of more than 64 bits
            return UNSEEN

    async def persist(self, session: SessionCore) -> None:
        self.enter()
        if self.table.state(session) == "gone":
            raise SessionEndedError(f"the session has ended, or is past its last save ({session!r})")
        if session.user_id is None:
            return
        self.require_saver()
        error = await self._save_waiting(session)
        if error is not None:
            raise _again(error)

    async def _save_waiting(self, session: SessionCore) -> Exception | None:
        target = Wait(session, is_save=True)
        if would_deadlock(target):
            raise WouldDeadlockError("this listener would wait for a save that waits for this listener")
        with waiting_for(target):
            return await self.autosave.save(session)

    async def persist_all(self) -> None:
        self.enter()
        if saves_inside(self):
            raise WouldDeadlockError("a listener of 'persist_user_data' cannot wait for a save of everybody")
        if not self.table.counters.identified:
            return
        self.require_saver()
        failures: list[tuple[int | str, Exception]] = []
        total = 0
        # a save under way may have missed the latest changes, and its acknowledgement hides its session from the walk
        under_way = dict.fromkeys(self.autosave.in_flight())

        async def save_some(walk: Iterator[SessionCore]) -> None:
            nonlocal total
            for session in walk:
                if session.user_id is None or self.table.is_ending(session):
                    continue
                total += 1
                try:
                    error = await self._save_waiting(session)
                except WouldDeadlockError as refused:
                    error = refused
                if error is not None:
                    failures.append((session.user_id, _again(error)))

        with self.table.oldest_first() as oldest_first:
            others = (session for session in oldest_first if session not in under_way)
            walk = chain(list(under_way), others)
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.options.max_in_flight, self.table.counters.identified)):
                    group.create_task(save_some(walk))
        if failures:
            user_ids = [user_id for user_id, _ in failures]
            raise UnsavedError(
                f"{len(failures)} of {total} users could not be saved: {name_some(user_ids)}",
                [error for _, error in failures],
                user_ids=user_ids,
            )

    # Beginning

    async def create(self, key: str | None, replace: bool) -> SessionCore:
        self.enter()
        self._refuse_if_closed()
        if replace and key is not None:
            while (older := self.table.find_by_key(key)) is not None:
                await self._replace(older)
                self._refuse_if_closed()
        session = self.table.create(key)
        if self.listeners.has("created"):
            errors: list[Exception] = []
            try:
                await self.listeners.call("created", (session,), errors, session)
            except BaseException:
                self._abort_creation(session)
                raise
            if errors:
                ending = self._abort_creation(session)
                if ending is not None:
                    await self._join(session, ending)
                raise listener_error("created", errors)
            self._refuse_if_ending(session)
        return session

    def _abort_creation(self, session: SessionCore) -> Ending | None:
        ending = self.endings.get(session)
        if ending is None and session.end_reason is None and not self.end_at_once(session, EndReason.CREATE_FAILED):
            ending = self.begin_end(session, persist=False, reason=EndReason.CREATE_FAILED)
        return ending

    async def _replace(self, older: SessionCore) -> None:
        """Save a session while it is live, and if that failed raise and leave it so; then end it."""
        if older.user_id is None or not self.can_save():
            await self.end(older, False, EndReason.REPLACED)
            return
        await self.persist(older)
        await self.end(older, True, EndReason.REPLACED)

    async def start(self, session: SessionCore) -> None:
        self.enter()
        self._refuse_if_ending(session)
        errors: list[Exception] = []
        await self.emit("started", session, errors=errors)
        if errors:
            raise listener_error("started", errors)

    async def set_user(self, session: SessionCore, user_id: int | str, user_data: object) -> None:
        self.enter()
        self._refuse_if_ending(session)
        check_user_id(user_id, self.options.user_id)
        self._refuse_if_closed()
        self.autosave.identify(session, user_id, user_data)
        errors: list[Exception] = []
        await self.emit("identified", session, user_id, user_data, errors=errors)
        if errors:
            raise listener_error("identified", errors)

    def _refuse_if_closed(self) -> None:
        if self.drain is not None:
            raise ManagerClosedError("this manager is being destroyed, or has been: it takes nobody new")

    def _refuse_if_ending(self, session: SessionCore) -> None:
        if self.table.is_ending(session):
            raise SessionEndedError(f"the session has ended, or is ending ({session!r})")

    # Ending

    async def end(self, session: SessionCore, persist: bool | None, reason: EndReason = EndReason.DESTROYED) -> None:
        """End a session, or join its end. Raises what the listeners and the last save raised.

        `persist` of None asks for nothing: a new end makes no save, one under way keeps what was asked of it.
        """
        self.enter()
        if session.end_reason is not None:
            return
        ending = self.endings.get(session)
        wants_save = bool(persist) and session.user_id is not None
        if wants_save and (ending is None or not (ending.persist or ending.decided)):
            self.require_saver()
        if ending is None:
            if not wants_save and self.end_at_once(session, reason):
                return
            ending = self.begin_end(session, wants_save, reason)
        elif ending.parked:
            if persist is not None:
                ending.persist = persist
            self.resume(session, ending)
        elif not ending.decided:
            ending.persist = ending.persist or wants_save
        comes_too_late = wants_save and not ending.persist
        error = await self._join(session, ending)
        if error is not None:
            raise _again(error)
        if comes_too_late:
            raise SessionEndedError(f"the session was past its last save, and ended without one ({session!r})")

    async def _join(self, session: SessionCore, ending: Ending) -> ListenerError | None:
        """Wait for an attempt to end a session; inside a listener that it waits for itself, do not."""
        target = Wait(session, is_save=False)
        if would_deadlock(target):
            return None
        ending.waiting += 1
        try:
            with waiting_for(target):
                return await asyncio.shield(ending.attempt)
        finally:
            ending.waiting -= 1

    def end_at_once(self, session: SessionCore, reason: EndReason) -> bool:
        """End a session right here if there is nothing to wait for: no save under way, and no listener."""
        if (
            self.is_heard("before_destroy", session)
            or self.is_heard("destroy", session)
            or self.table.state(session) not in ("none", "idle", "due")
        ):
            return False
        self.table.begin_end(session)
        self.table.forget(session)
        self._let_go(session, reason)
        return True

    def begin_end(self, session: SessionCore, persist: bool, reason: EndReason, *, parked: bool = False) -> Ending:
        """Start to end a live session; a parked one is hidden, and somebody else sees to the rest."""
        assert self._loop is not None
        self.table.begin_end(session)
        ending = self.endings[session] = Ending(persist, reason, self._loop)
        ending.parked = parked
        if not parked:
            self._work_on(session, ending)
        return ending

    def resume(self, session: SessionCore, ending: Ending) -> None:
        """Go on with an end that is parked."""
        assert self._loop is not None
        ending.parked = False
        ending.attempt = self._loop.create_future()
        self._work_on(session, ending)

    def _work_on(self, session: SessionCore, ending: Ending) -> None:
        self.ends_at_work += 1
        task = ending.task = self.spawn(self._end(session, ending), "end of session")
        task.add_done_callback(lambda _: self._see_stopped(session, ending))

    def _see_stopped(self, session: SessionCore, ending: Ending) -> None:
        """If the task was stopped by somebody else, perhaps before its first step, whoever waits hears of it."""
        if self.endings.get(session) is not ending or ending.parked or ending.task is None or not ending.task.done():
            return
        stopped = ListenerCancelledError("the task that was ending this session was stopped")
        if self.table.state(session) != "gone" and ending.persist:
            self._park(session, ending, stopped)
            self.autosave.ask_later(session)
            return
        ending.errors.append(stopped)
        if self.table.state(session) != "gone":
            self._forget(session, ending)
        self.finish(session, ending)

    def settled(self, session: SessionCore, error: Exception | None, fingerprint: object) -> None:
        ending = self.endings.get(session)
        if ending is None:
            return
        if error is None:
            ending.saved = NOT_SAVED if fingerprint is None else fingerprint
            if ending.parked:
                self.resume(session, ending)
        else:
            ending.saved = NOT_SAVED
            ending.last_error = error

    async def _end(self, session: SessionCore, ending: Ending) -> None:
        """The steps of an end, from wherever the last attempt stopped."""
        if not ending.announced:
            ending.announced = True
            if self.is_heard("before_destroy", session):
                self.ends_at_work -= 1
                self.ends_announcing += 1
                try:
                    with listening(Wait(session, is_save=False), self):
                        await self.emit("before_destroy", session, errors=ending.errors)
                finally:
                    self.ends_announcing -= 1
                    self.ends_at_work += 1
                    if self.drain is not None:
                        self.drain.look()
        error = await self.autosave.settle(session)
        if self.endings.get(session) is not ending:
            return  # ended by force meanwhile
        ending.decided = True
        if ending.saved is UNSEEN:
            ending.saved = NOT_SAVED  # it may have changed since
        if ending.persist:
            error = await self._save_last(session, ending)
            if error is not None:
                ending.last_error = error
                if not self._gave_up():
                    self._park(session, ending, error)
                    return
                ending.reason = EndReason.UNSAVED
        elif error is not None:
            self.report(error, session)
        self._forget(session, ending)
        with listening(Wait(session, is_save=False), self):
            await self.emit("destroy", session, errors=ending.errors)
        if self.endings.get(session) is ending:
            self.finish(session, ending)

    async def _save_last(self, session: SessionCore, ending: Ending) -> Exception | None:
        """Save a session that is being ended, again while its data changes meanwhile: what went wrong, if anything."""
        for _ in range(MOST_LAST_SAVES):
            if ending.saved is UNSEEN or (ending.saved is not NOT_SAVED and ending.saved == self.fingerprint(session)):
                return None
            if self._gave_up():
                return ending.last_error or self.autosave.gave_up
            error = await self.autosave.settle(session, await self.autosave.save(session))
            if error is not None:
                return error
        self.say(
            "warning",
            "user %r: the data goes on changing while the session ends; save number %d is the last",
            session.user_id,
            MOST_LAST_SAVES,
        )
        return None

    def _gave_up(self) -> bool:
        return self.drain is not None and self.drain.gave_up

    def _park(self, session: SessionCore, ending: Ending, error: Exception) -> None:
        """Tell whoever waits that the last save failed, and leave the session to the wheel."""
        self.ends_at_work -= 1
        ending.parked = True
        ending.decided = False
        errors = [*ending.errors, *(error.exceptions if isinstance(error, ListenerError) else [error])]
        failed = listener_error("persist_user_data", errors)
        failed.add_note("the session is hidden and keeps its user; its last save is tried again until it succeeds")
        if ending.waiting:
            ending.errors = []
            ending.attempt.set_result(failed)
        else:
            ending.attempt.set_result(None)
            self.report(failed, session)
        if not ending.waiting:
            _drop_tracebacks(error)  # what waits for the store is to be small
        if self.drain is not None:
            self.drain.look()

    def _forget(self, session: SessionCore, ending: Ending) -> None:
        if self.drain is not None:
            self.drain.note(session, ending, None)
        self.table.forget(session)

    def finish(self, session: SessionCore, ending: Ending) -> None:
        """The session has had its last event."""
        del self.endings[session]
        self.ends_at_work -= not ending.parked
        self._let_go(session, ending.reason)
        error = listener_error("destroy", ending.errors) if ending.errors else None
        if ending.reason is EndReason.UNSAVED and ending.last_error is not None:
            error = ListenerError(
                "the last save had not succeeded when the manager's deadline passed",
                [ending.last_error, *ending.errors],
            )
        if not ending.attempt.done():
            ending.attempt.set_result(error)
        if error is not None and not ending.waiting and self.drain is None:
            self.report(error, session)
        if self.drain is not None:
            if ending.errors:
                self.drain.note(session, ending, listener_error("destroy", ending.errors))
            self.drain.look()

    def _let_go(self, session: SessionCore, reason: EndReason) -> None:
        """The very end: the handle is dead from here on."""
        if session._listeners is not None:
            session._listeners.clear()
        session._end(reason)
        waiting = self._ended.pop(session, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(reason)

    async def wait_ended(self, session: SessionCore) -> EndReason:
        loop = self.enter()
        if session.end_reason is not None:
            return EndReason(session.end_reason)
        target = Wait(session, is_save=False)
        if would_deadlock(target):
            raise WouldDeadlockError("this listener would wait for an end that waits for this listener")
        waiting = self._ended.get(session)
        if waiting is None:
            waiting = self._ended[session] = loop.create_future()
        with waiting_for(target):
            return await asyncio.shield(waiting)

    # Looking

    def statistics(self) -> Statistics:
        counters = self.table.counters
        oldest = self.table.oldest_save
        return Statistics(
            live=counters.created - counters.ended,
            identified=counters.identified,
            ending=len(self.endings),
            created=counters.created,
            ended=counters.ended,
            pending=counters.due,
            in_flight=counters.in_flight,
            overdue=self.autosave.overdue()[0],
            oldest_unsaved=None if oldest is None else self.autosave.age(oldest),
            saved=counters.saved,
            failed=counters.failed,
            tick_lag=self.autosave.tick_lag / SECOND,
        )


def name_some(user_ids: list[int | str]) -> str:
    """The first few ids, for a message."""
    return ", ".join(f"{user_id!r:.80}" for user_id in user_ids[:10]) + (", ..." if len(user_ids) > 10 else "")


def _again(error: Exception) -> Exception:
    """A fresh copy of a group that several callers may raise, so that their tracebacks do not pile up on one object."""
    if isinstance(error, ListenerError):
        copy = error.derive(error.exceptions)
        for note in getattr(error, "__notes__", ()):
            copy.add_note(note)
        return copy
    return error.with_traceback(None)


def _drop_tracebacks(error: BaseException) -> None:
    error.__traceback__ = None
    for part in getattr(error, "exceptions", ()):
        _drop_tracebacks(part)


def _summary(error: BaseException) -> str:
    """One line for the log: the types of what was raised, without the texts, which may quote data."""
    if isinstance(error, BaseExceptionGroup):
        return f"{error.message} ({', '.join(type(part).__name__ for part in error.exceptions[:10])})"
    return f"{type(error).__name__}: {error}" if isinstance(error, CageySessionsError) else type(error).__name__
