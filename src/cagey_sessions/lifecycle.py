"""From the first event of a session to its last. What lives here: creating, identifying and ending sessions, the drain
of them all, and where errors go that nobody waits for. What must not: the choice of when to save, or public manners.

Ending a session is one task's work, owned here; callers wait for it through a shield, so cancelling them cancels
nothing. Its steps: hide it from its key, `before_destroy`, wait for what is in flight, the last save, forget it,
`destroy`, the end. If the last save fails the session is parked: hidden, its user's slot still taken, tried again by
the wheel until it is saved, or the manager's deadline passes.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Coroutine, Iterator
from contextvars import copy_context
from itertools import chain
from typing import Any, TypeVar

import orjson

from ._core import OldestFirst, SessionCore, SessionTable, check_user_id
from .autosave import Autosave
from .clock import Clock
from .errors import (
    CageySessionsError,
    DrainDeadlineError,
    DrainError,
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
from .records import DrainReport, EndReason, Statistics, UnsavedUser
from .waits import Wait, inside_save_of_host, listening, waiting_for, within_host, would_deadlock

__all__ = ["Lifecycle"]

T = TypeVar("T")

AFTER_DEADLINE = SECOND
"""How long listeners of ``destroy`` may still run when the deadline of a drain has passed."""
LONGEST_REPORT_QUEUE = 1000
MOST_LAST_SAVES = 20
"""How often the last save is repeated for data that does not stop changing."""


class _Ending:
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
    )

    def __init__(self, persist: bool, reason: EndReason, loop: asyncio.AbstractEventLoop) -> None:
        self.persist = persist
        self.reason = reason
        self.announced = False  # before_destroy has been emitted
        self.decided = False  # whether there is a last save cannot be changed any more
        self.saved = False  # the last save was acknowledged
        self.parked = False  # the last save failed and waits for its retry; no task is at work
        self.last_error: Exception | None = None
        self.errors: list[Exception] = []
        self.attempt: asyncio.Future[ListenerError | None] = loop.create_future()
        self.task: asyncio.Task[None] | None = None


class Lifecycle:
    """All sessions of one manager, and everything that happens to them."""

    def __init__(self, session_type: type[SessionCore], options: Options, clock: Clock) -> None:
        self.options = options
        self.listeners = Listeners(MANAGER_EVENTS)
        self.table = SessionTable(session_type, self, seed=random.getrandbits(64))
        self.autosave = Autosave(self.table, clock, options, self)
        self.closed = False
        self._clock = clock
        self._log = options.log
        self._loop: asyncio.AbstractEventLoop | None = None
        self._endings: dict[SessionCore, _Ending] = {}
        self._ended: dict[SessionCore, asyncio.Future[EndReason]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reports: deque[tuple[Exception, SessionCore | None]] = deque()
        self._reporter: asyncio.Task[None] | None = None
        self._drain: _Drain | None = None

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

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start a task that this manager owns."""
        assert self._loop is not None
        task = self._loop.create_task(work, name=f"cagey-sessions {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Events

    async def emit(self, name: str, session: SessionCore, *args: object, errors: list[Exception]) -> None:
        """Emit on the manager, with the session first, then on the session itself, unless it has ended meanwhile."""
        if self.listeners.has(name):
            await self.listeners.call(name, (session, *args), errors)
        if session._listeners is not None:
            await session._listeners.call(name, args, errors)

    def is_heard(self, name: str, session: SessionCore) -> bool:
        """Whether anybody would hear an event."""
        return self.listeners.has(name) or (session._listeners is not None and session._listeners.has(name))

    def report(self, error: Exception, session: SessionCore | None) -> None:
        """Log an error that no caller waits for and hand it to the listeners of ``error``."""
        if session is None:
            self._log.error("%s", error)
        else:
            self._log.error("user %r: %s", session.user_id, _summary(error))
        if not self.listeners.has("error") or len(self._reports) >= LONGEST_REPORT_QUEUE:
            return
        self._reports.append((error, session))
        if self._reporter is None or self._reporter.done():
            self._reporter = self.spawn(self._report_all(), "error events")

    async def _report_all(self) -> None:
        while self._reports:
            errors: list[Exception] = []
            await self.listeners.call("error", self._reports.popleft(), errors)
            for error in errors:
                self._log.error("a listener of 'error' raised: %s", _summary(error))

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
        await self.listeners.call("persist_user_data", (session,), errors)
        if errors:
            raise listener_error("persist_user_data", errors)

    async def persist(self, session: SessionCore) -> None:
        self.enter()
        if self.table.state(session) == "gone":
            raise SessionEndedError(f"the session has ended, or is past its last save ({session!r})")
        if session.user_id is None:
            return
        self.require_saver()
        target = Wait(session, is_save=True)
        if would_deadlock(target):
            raise WouldDeadlockError("this listener would wait for a save that waits for this listener")
        with waiting_for(target):
            error = await self.autosave.save(session)
        if error is not None:
            raise _again(error)

    async def persist_all(self) -> None:
        self.enter()
        if inside_save_of_host(self):
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
                if self.table.is_ending(session):
                    continue
                total += 1
                error = await self.autosave.save(session)
                if error is not None and session.user_id is not None:
                    failures.append((session.user_id, _again(error)))

        with self.table.oldest_first() as oldest_first:
            others = (session for session in oldest_first if session not in under_way)
            walk = chain(list(under_way), others)
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.options.max_in_flight, self.table.counters.identified)):
                    group.create_task(save_some(walk))
        if failures:
            names = ", ".join(f"{user_id!r:.80}" for user_id, _ in failures[:10]) + (
                ", ..." if len(failures) > 10 else ""
            )
            raise UnsavedError(
                f"{len(failures)} of {total} users could not be saved: {names}",
                [error for _, error in failures],
                user_ids=[user_id for user_id, _ in failures],
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
                await self.listeners.call("created", (session,), errors)
            except BaseException:
                self._abort_creation(session)
                raise
            if errors:
                ending = self._abort_creation(session)
                if ending is not None:
                    await self._join(session, ending)
                raise listener_error("created", errors)
        return session

    def _abort_creation(self, session: SessionCore) -> _Ending | None:
        if session.end_reason is not None or self._end_at_once(session, False, EndReason.CREATE_FAILED):
            return None
        ending = self._endings.get(session)
        return ending or self._begin_end(session, persist=False, reason=EndReason.CREATE_FAILED)

    async def _replace(self, older: SessionCore) -> None:
        """Save a session and end it; if it cannot be saved, raise and leave it live."""
        persist = older.user_id is not None and self.can_save()
        if persist:
            await self.persist(older)
        await self.end(older, persist, EndReason.REPLACED)

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
        if self._drain is not None:
            raise ManagerClosedError("this manager is being destroyed, or has been: it takes nobody new")

    def _refuse_if_ending(self, session: SessionCore) -> None:
        if self.table.is_ending(session):
            raise SessionEndedError(f"the session has ended, or is ending ({session!r})")

    # Ending one

    async def end(self, session: SessionCore, persist: bool, reason: EndReason = EndReason.DESTROYED) -> None:
        """End a session, or join its end. Raises what the listeners and the last save raised."""
        self.enter()
        if session.end_reason is not None:
            return
        ending = self._endings.get(session)
        if persist and session.user_id is not None and (ending is None or ending.parked):
            self.require_saver()
        if ending is None:
            if self._end_at_once(session, persist, reason):
                return
            ending = self._begin_end(session, persist, reason)
        elif ending.parked:
            ending.persist = persist
            self._resume(session, ending)
        elif not ending.decided:
            ending.persist = ending.persist or persist
        error = await self._join(session, ending)
        if error is not None:
            raise _again(error)

    async def _join(self, session: SessionCore, ending: _Ending) -> ListenerError | None:
        """Wait for an attempt to end a session; inside a listener that it waits for itself, do not."""
        target = Wait(session, is_save=False)
        if would_deadlock(target):
            return None
        with waiting_for(target):
            return await asyncio.shield(ending.attempt)

    def _end_at_once(self, session: SessionCore, persist: bool, reason: EndReason) -> bool:
        """End a session right here if there is nothing to wait for: no save, and no listener."""
        if (
            (persist and session.user_id is not None)
            or self.is_heard("before_destroy", session)
            or self.is_heard("destroy", session)
            or self.table.state(session) not in ("none", "idle", "due")
        ):
            return False
        self.table.begin_end(session)
        self.table.forget(session)
        self._let_go(session, reason)
        return True

    def _begin_end(self, session: SessionCore, persist: bool, reason: EndReason, *, spawn: bool = True) -> _Ending:
        assert self._loop is not None
        self.table.begin_end(session)
        ending = self._endings[session] = _Ending(persist, reason, self._loop)
        if spawn:
            ending.task = self.spawn(self._end(session, ending), "end of session")
        return ending

    def _resume(self, session: SessionCore, ending: _Ending, *, spawn: bool = True) -> None:
        assert self._loop is not None
        ending.parked = False
        ending.attempt = self._loop.create_future()
        if spawn:
            ending.task = self.spawn(self._end(session, ending), "end of session")

    def settled(self, session: SessionCore, error: Exception | None) -> None:
        """The wheel has tried the last save of a parked session again."""
        ending = self._endings.get(session)
        if ending is None or not ending.parked:
            return
        if error is None:
            ending.saved = True
            self._resume(session, ending)
        else:
            ending.last_error = error

    async def _end(self, session: SessionCore, ending: _Ending) -> None:
        """The steps of an end, from wherever the last attempt stopped."""
        if not ending.announced:
            ending.announced = True
            with listening(Wait(session, is_save=False), self):
                await self.emit("before_destroy", session, errors=ending.errors)
        error = await self.autosave.settle(session)
        if self._endings.get(session) is not ending:
            return  # ended by force meanwhile
        ending.decided = True
        if ending.persist and session.user_id is not None and not ending.saved:
            if self._gave_up():
                error = ending.last_error or DrainDeadlineError("the deadline passed before this user's turn came")
            else:
                error = await self._save_last(session)
            if error is not None:
                ending.last_error = error
                if not self._gave_up():
                    self._park(ending, error)
                    return
                self._note_unsaved(session, ending)
            else:
                ending.saved = True
        if ending.saved and self._drain is not None:
            self._drain.saved += 1
        self.table.forget(session)
        with listening(Wait(session, is_save=False), self):
            await self.emit("destroy", session, errors=ending.errors)
        if self._endings.get(session) is ending:
            self._finish(session, ending)

    async def _save_last(self, session: SessionCore) -> Exception | None:
        """Save a session that is being ended, again while its data changed meanwhile: what went wrong, if anything."""
        for _ in range(MOST_LAST_SAVES):
            before = _fingerprint(session.user_data)
            error = await self.autosave.settle(session, await self.autosave.save(session))
            if error is not None or _fingerprint(session.user_data) == before:
                return error
        self._log.warning(
            "user %r: the data goes on changing while the session ends; its last save is the %dth",
            session.user_id,
            MOST_LAST_SAVES,
        )
        return None

    def _park(self, ending: _Ending, error: Exception) -> None:
        """Tell whoever waits that the last save failed, and leave the session to the wheel."""
        ending.parked = True
        ending.decided = False
        errors = [*ending.errors, *(error.exceptions if isinstance(error, ListenerError) else [error])]
        ending.errors = []
        failed = listener_error("persist_user_data", errors)
        failed.add_note("the session is hidden and keeps its user; its last save is tried again until it succeeds")
        ending.attempt.set_result(failed)

    def _finish(self, session: SessionCore, ending: _Ending) -> None:
        del self._endings[session]
        self._let_go(session, ending.reason)
        error = listener_error("destroy", ending.errors) if ending.errors else None
        if error is not None and self._drain is not None:
            self._drain.note(error, self._log)
        if not ending.attempt.done():
            ending.attempt.set_result(error)
        if self._drain is not None:
            self._drain.look(not self._endings)

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

    # Ending all

    async def drain(self, persist: bool, deadline: int) -> DrainReport:
        """End all sessions, oldest save first, within `deadline` nanoseconds. Joined by everybody who calls again."""
        loop = self.enter()
        if self._drain is None:
            if persist and self.table.counters.identified:
                self.require_saver()
            self._drain = _Drain(persist, loop)
            self.spawn(self._run_drain(self._drain, deadline), "drain")
        elif persist and not self._drain.outcome.done() and self.can_save():
            self._drain.persist = True
        if within_host(self):
            return self._drain.report(self._clock.now())
        report = await asyncio.shield(self._drain.outcome)
        errors = [*(user.error for user in report.unsaved), *self._drain.errors]
        if errors:
            names = ", ".join(f"{user.user_id!r:.80}" for user in report.unsaved[:10])
            more = ", ..." if len(report.unsaved) > 10 else ""
            raise DrainError(
                f"{len(report.unsaved)} users were not saved: {names}{more}"
                if report.unsaved
                else "everybody who was to be saved is saved, but listeners raised",
                errors,
                user_ids=[user.user_id for user in report.unsaved],
                report=report,
            )
        return report

    async def _run_drain(self, drain: _Drain, deadline: int) -> None:
        drain.started = self._clock.now()
        self.autosave.drain()
        if not await self._sweep(drain, deadline):
            drain.gave_up = True
            self._log.error("%d sessions had not ended when the deadline of the drain passed", len(self._endings))
            self.autosave.give_up(DrainDeadlineError("the save had not come to its end when the deadline passed"))
            if not await self._sweep(drain, AFTER_DEADLINE):
                self._force_end(drain)
        self.autosave.close()
        self.closed = True
        drain.outcome.set_result(drain.report(self._clock.now()))

    async def _sweep(self, drain: _Drain, limit: int) -> bool:
        """Walk over everybody and end them, a bounded number at a time: whether all have ended within the limit."""
        drain.signal = asyncio.get_running_loop().create_future()
        timer = self._clock.call_later(limit, drain.time_is_up, copy_context())
        workers = min(self.options.max_in_flight, len(self.table))
        drain.sweepers += workers  # some of an earlier sweep may still be at work
        with (
            self.table.oldest_first(to_the_end=True) as identified,
            self.table.oldest_first(identified=False, to_the_end=True) as anonymous,
        ):
            drain.tasks += [self.spawn(self._sweep_some(drain, identified, anonymous), "drain") for _ in range(workers)]
            drain.look(not self._endings)
            in_time = await drain.signal
        timer.cancel()
        return in_time

    async def _sweep_some(self, drain: _Drain, *walks: OldestFirst) -> None:
        for walk in walks:
            for session in walk:
                ending = self._endings.get(session)
                if ending is None:
                    ending = self._begin_end(session, drain.persist, EndReason.DRAINED, spawn=False)
                elif ending.parked:
                    self._resume(session, ending, spawn=False)
                else:
                    continue
                await self._end(session, ending)
                await self.autosave.slice()
        drain.sweepers -= 1
        drain.look(not self._endings)

    def _gave_up(self) -> bool:
        return self._drain is not None and self._drain.gave_up

    def _note_unsaved(self, session: SessionCore, ending: _Ending) -> None:
        assert self._drain is not None and session.user_id is not None and ending.last_error is not None
        ending.reason = EndReason.UNSAVED
        age = (self.autosave.now_tick() - self.table.saved_at(session)) * self.autosave.tick / SECOND
        self._drain.unsaved.append(UnsavedUser(session.user_id, age, ending.last_error))

    def _force_end(self, drain: _Drain) -> None:
        """Listeners do not return: end what is left without them."""
        for task in (*drain.tasks, *(ending.task for ending in self._endings.values() if ending.task is not None)):
            task.cancel()
        for session in self.table.sessions_now():
            ending = self._endings.get(session)
            if ending is None:
                ending = self._begin_end(session, drain.persist, EndReason.DRAINED, spawn=False)
            if ending.persist and session.user_id is not None and not ending.saved:
                ending.last_error = ending.last_error or DrainDeadlineError(
                    "its listeners had not returned when the deadline passed"
                )
                self._note_unsaved(session, ending)
            self.table.forget(session)
        for session, ending in list(self._endings.items()):
            self._finish(session, ending)

    def statistics(self) -> Statistics:
        counters = self.table.counters
        oldest = self.table.oldest_save
        return Statistics(
            live=counters.created - counters.ended,
            identified=counters.identified,
            ending=len(self._endings),
            created=counters.created,
            ended=counters.ended,
            pending=counters.due,
            in_flight=counters.in_flight,
            overdue=self.autosave.overdue()[0],
            oldest_unsaved=None
            if oldest is None
            else (self.autosave.now_tick() - oldest) * self.autosave.tick / SECOND,
            saved=counters.saved,
            failed=counters.failed,
            tick_lag=self.autosave.tick_lag / SECOND,
        )


class _Drain:
    """The end of a manager, under way or done."""

    def __init__(self, persist: bool, loop: asyncio.AbstractEventLoop) -> None:
        self.persist = persist
        self.started = 0
        self.gave_up = False
        self.saved = 0
        self.unsaved: list[UnsavedUser] = []
        self.errors: list[Exception] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.sweepers = 0
        self.outcome: asyncio.Future[DrainReport] = loop.create_future()
        self.signal: asyncio.Future[bool] | None = None

    def look(self, nobody_is_ending: bool) -> None:
        """Say so if everybody has ended."""
        if nobody_is_ending and self.sweepers == 0 and self.signal is not None and not self.signal.done():
            self.signal.set_result(True)

    def time_is_up(self) -> None:
        if self.signal is not None and not self.signal.done():
            self.signal.set_result(False)

    def note(self, error: Exception, log: Any) -> None:
        """Keep what listeners raised, up to a bound; the rest goes to the log."""
        if len(self.errors) < LONGEST_REPORT_QUEUE:
            self.errors.append(error)
        else:
            log.error("%s", _summary(error))

    def report(self, now: int) -> DrainReport:
        oldest_first = sorted(self.unsaved, key=lambda user: -user.age)
        return DrainReport(self.saved, tuple(oldest_first), (now - self.started) / SECOND)


def _fingerprint(user_data: object) -> bytes | None:
    """Bytes that change when the data does; None for data that is not JSON, whose changes cannot be seen."""
    try:
        return orjson.dumps(user_data, option=orjson.OPT_NON_STR_KEYS)
    except (TypeError, RecursionError):
        return None


def _again(error: Exception) -> Exception:
    """A fresh copy of a group that several callers may raise, so that their tracebacks do not pile up on one object."""
    if isinstance(error, ListenerError):
        copy = error.derive(error.exceptions)
        for note in getattr(error, "__notes__", ()):
            copy.add_note(note)
        return copy
    return error


def _summary(error: BaseException) -> str:
    """One line for the log: the types and texts of what was raised, without the values they may quote."""
    if isinstance(error, BaseExceptionGroup):
        return f"{error.message} ({', '.join(type(part).__name__ for part in error.exceptions[:10])})"
    return f"{type(error).__name__}: {error}" if isinstance(error, CageySessionsError) else type(error).__name__
