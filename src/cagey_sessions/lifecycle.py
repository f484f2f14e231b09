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
import os
import random
import time
from collections import deque
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from contextvars import Context
from itertools import chain
from typing import Any, Protocol, TypeVar

import orjson

from ._core import SessionCore, SessionTable, check_user_id, is_plain
from .autosave import Autosave, Flight, ListenerSaver, Outcome, Saver
from .clock import Clock, SystemClock
from .encoding import Encoding
from .errors import (
    CageySessionsError,
    FencedError,
    ListenerCancelledError,
    ListenerError,
    ManagerClosedError,
    NothingSavesError,
    SessionEndedError,
    SnapshotError,
    StoreError,
    StoreModeError,
    StoreUnavailableError,
    UnsavableError,
    UnsavedError,
    UserErasedError,
    WouldDeadlockError,
    WrongLoopError,
)
from .events import MANAGER_EVENTS, Listeners, listener_error
from .gateway import StoreGateway
from .options import SECOND, Options
from .records import EndReason, Health, Receipt, SnapshotEntry, Statistics
from .sanitizer import Sanitizer
from .spill import Spill, SpillEntry
from .stores import Claim, Store
from .waits import Wait, listening, saves_inside, waiting_for, would_deadlock
from .writebehind import MOST_ROWS, StoreSaver

__all__ = ["Drain", "Ending", "Lifecycle", "name_some"]

T = TypeVar("T")

LONGEST_REPORT_QUEUE = 1000
MOST_SAVES_ASKED = 1000
"""How many saves of everybody are asked for at a time, where a store takes them in batches."""
MOST_LAST_SAVES = 20
"""How often the last save is repeated for data that does not stop changing."""
SECONDS_PER_END = 0.0001
"""What the end of one session costs the event loop, about."""
NOT_SAVED, UNSEEN = object(), object()
_LOSSES = (EndReason.UNSAVED, EndReason.FENCED, EndReason.ERASED)


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
        "released",
        "saved",
        "task",
        "waiting",
    )

    def __init__(self, persist: bool, reason: EndReason, loop: asyncio.AbstractEventLoop) -> None:
        self.persist: bool = persist
        self.reason: EndReason = reason
        self.announced: bool = False  # before_destroy has been emitted
        self.decided: bool = False  # whether there is a last save cannot be changed any more
        self.parked: bool = False  # no task is at work; the last save waits for its retry
        self.saved: object = NOT_SAVED  # fingerprint of the data last acknowledged since the end began
        self.released: bool = False  # the store has let go of the user
        self.last_error: Exception | None = None
        self.errors: list[Exception] = []
        self.attempt: asyncio.Future[Exception | None] = loop.create_future()
        self.task: asyncio.Task[None] | None = None
        self.waiting: int = 0  # callers who will hear of the attempt


class Drain(Protocol):
    """The end of everybody, as far as the end of one needs to know."""

    gave_up: bool
    persist: bool

    def note(self, session: SessionCore, ending: Ending, error: ListenerError | None) -> None:
        """A session has ended; the error is what its listeners raised."""
        ...

    def look(self) -> None:
        """A session has ended, or is parked."""
        ...


class Lifecycle:
    """All sessions of one manager, and everything that happens to them.

    Saves go to `store`, if there is one, as `encoding` writes them and in the name of `owner`; to listeners otherwise.
    """

    def __init__(
        self,
        session_type: type[SessionCore],
        options: Options,
        clock: Clock,
        store: Store | None = None,
        encoding: Encoding | None = None,
        owner: str = "",
        spill: Spill | None = None,
    ) -> None:
        self.options = options
        self.clock = clock
        self.owner = owner
        self.encoding: Encoding = encoding or Encoding()
        self.spill = spill
        self.claims: Any = None
        self.ownership: Any = None
        """What is done with users of the store; it stands above this room."""
        self.table: SessionTable = SessionTable(
            session_type, self, seed=random.getrandbits(64), stored=store is not None
        )
        encoding = encoding or Encoding()
        self.sanitizer: Sanitizer | None = (
            Sanitizer(self.table, encoding, self.fingerprint_of, self.report) if options.debug else None
        )
        self.listeners: Listeners = Listeners(MANAGER_EVENTS, self.sanitizer, self.table.hear)
        self.gateway: StoreGateway | None = None
        self.store_saver: StoreSaver | None = None
        saver: Saver
        if store is None:
            saver = ListenerSaver(self.table, self)
        else:
            self.gateway = StoreGateway(store, clock, options.save_timeout, self.say)
            saver = self.store_saver = StoreSaver(
                self.table, self.gateway, self.encoding, clock, options, self, owner, self.sanitizer
            )
        self.autosave: Autosave = Autosave(self.table, clock, options, self, saver)
        if self.store_saver is not None:
            self.store_saver.bind(self.autosave.kick)
        self.endings: dict[SessionCore, Ending] = {}
        self.ends_at_work: int = 0
        self.ends_announcing: int = 0
        self._drain: Drain | None = None
        self.end_wanted: asyncio.Event = asyncio.Event()
        """Set once the end of everybody has begun, or is about to."""
        self.closed = False
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: dict[SessionCore, asyncio.Future[EndReason]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reports: deque[tuple[str, tuple[object, ...]]] = deque()
        self._reporter: asyncio.Task[None] | None = None
        self.table.attend(
            now=time.monotonic_ns if type(clock) is SystemClock else clock.now,
            tick=self.autosave.tick,
            interval=options.interval // self.autosave.tick if options.interval else 0,
            arm=self.autosave._arm,
            waited_for=self._ended,
            destroyed=EndReason.DESTROYED,
            user_id_type=options.user_id,
            stored=store is not None,
            watched=options.debug,
        )

    # The loop

    def enter(self) -> asyncio.AbstractEventLoop:
        """Every awaited call passes here: bind the loop at the first, refuse any other later."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            if self._loop is not None:
                raise WrongLoopError("this manager belongs to another event loop; make one manager for each loop")
            self._loop = loop
            self.table.bind_thread()
            self.table.bind_loop(loop)
            self.autosave.bind(loop)
            if self.gateway is not None:
                self.gateway.bind(loop)
        return loop

    def spawn(self, work: Coroutine[Any, Any, T], name: str, context: Context | None = None) -> asyncio.Task[T]:
        """Start a task that this manager owns; not by the loop's factory, which may run it here and now."""
        task = asyncio.Task(work, loop=self._loop, name=f"cagey-sessions {name}", context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @property
    def drain(self) -> Drain | None:
        """The end of everybody, if it has begun."""
        return self._drain

    @drain.setter
    def drain(self, drain: Drain | None) -> None:
        self._drain = drain
        self.table.admit(drain is None)

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
        self._announce("error", error, session)

    def _announce(self, name: str, *args: object) -> None:
        """Have a task emit an event that nobody waits for."""
        if self.closed or not self.listeners.has(name) or len(self._reports) >= LONGEST_REPORT_QUEUE:
            return
        self._reports.append((name, args))
        if self._reporter is None or self._reporter.done():
            self._reporter = self.spawn(self._report_all(), "error events")

    async def _report_all(self) -> None:
        while self._reports:
            errors: list[Exception] = []
            name, args = self._reports.popleft()
            await self.listeners.call(name, args, errors)
            for error in errors:
                self.say("error", "a listener of %r raised: %s", name, _summary(error))

    # Saving

    def can_save(self) -> bool:
        return self.gateway is not None or self.listeners.has("persist_user_data")

    def require_saver(self) -> None:
        if not self.can_save():
            raise NothingSavesError(
                "nobody would perform this save: register a listener with manager.on('persist_user_data', ...) "
                "that writes session.user_data to your database"
            )

    async def perform(self, session: SessionCore) -> None:
        self.require_saver()
        if self.sanitizer is not None:
            self.sanitizer.saving(session)
        errors: list[Exception] = []
        if await self.listeners.call("persist_user_data", (session,), errors):
            errors.append(ListenerCancelledError("a listener was removed while the save was under way"))
        if errors:
            raise listener_error("persist_user_data", errors)

    def fingerprint(self, session: SessionCore) -> object:
        """See `fingerprint_of`."""
        return self.fingerprint_of(session.user_data)

    def fingerprint_of(self, data: object) -> object:
        """Bytes that change when the data does, or `UNSEEN` for data that is not JSON, whose changes cannot be seen."""
        if self.store_saver is not None:
            return self.store_saver.fingerprint(data)
        if not is_plain(data):
            return UNSEEN  # a serialiser may call different values equal, or crash on them
        try:
            return orjson.dumps(data)
        except TypeError:  # a lone surrogate, or an int of more than 64 bits
            return UNSEEN

    async def persist(self, session: SessionCore) -> Receipt | None:
        self.enter()
        if self.table.state(session) == "gone":
            raise SessionEndedError(f"the session has ended, or is past its last save ({session!r})")
        if session.user_id is None:
            return None
        if (loss := self.loss_of(session)) is not None:
            raise loss
        self.require_saver()
        outcome = await self._save_waiting(session)
        if isinstance(outcome, Exception):
            raise _again(outcome)
        return outcome

    async def _save_waiting(self, session: SessionCore) -> Outcome:
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
        until = self.clock.now() + self.options.save_timeout
        # a save under way may have missed the latest changes, and its acknowledgement hides its session from the walk
        under_way = dict.fromkeys(self.autosave.in_flight())

        async def save_some(walk: Iterator[SessionCore]) -> None:
            nonlocal total
            for session in walk:
                if session.user_id is None or self.table.is_ending(session):
                    continue
                total += 1
                if self.gateway is not None and self.gateway.down and self.clock.now() >= until:
                    failures.append((session.user_id, StoreUnavailableError(f"{self.gateway.name} is down")))
                    continue
                try:
                    outcome = await self._save_waiting(session)
                except WouldDeadlockError as refused:
                    outcome = refused
                if isinstance(outcome, Exception):
                    failures.append((session.user_id, _again(outcome)))

        with self.table.oldest_first() as oldest_first:
            others = (session for session in oldest_first if session not in under_way)
            walk = chain(list(under_way), others)
            async with asyncio.TaskGroup() as group:
                most = self.options.max_in_flight if self.gateway is None else MOST_SAVES_ASKED
                for _ in range(min(most, self.table.counters.identified)):
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
        self.refuse_if_closed()
        if replace and key is not None:
            while (older := self.table.find_by_key(key)) is not None:
                await self.replace(older)
                self.refuse_if_closed()
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
            self.refuse_if_ending(session)
        return session

    def _abort_creation(self, session: SessionCore) -> Ending | None:
        ending = self.endings.get(session)
        if ending is None and session.end_reason is None and not self.end_at_once(session, EndReason.CREATE_FAILED):
            ending = self.begin_end(session, persist=False, reason=EndReason.CREATE_FAILED)
        return ending

    async def replace(self, older: SessionCore) -> None:
        """Save a session while it is live, and if that failed raise and leave it so; then end it."""
        if older.user_id is None or not self.can_save():
            await self.end(older, False, EndReason.REPLACED)
            return
        await self.persist(older)
        try:
            await self.end(older, True, EndReason.REPLACED)
        except ListenerError as error:
            if self.gateway is None or older.end_reason is None:
                raise
            self.report(error, older)  # it is saved and has ended, and its listeners are no concern of the newer one

    async def start(self, session: SessionCore) -> None:
        self.enter()
        self.refuse_if_ending(session)
        errors: list[Exception] = []
        await self.emit("started", session, errors=errors)
        if errors:
            raise listener_error("started", errors)

    async def set_user(self, session: SessionCore, user_id: int | str, user_data: object) -> None:
        self.enter()
        self.refuse_if_ending(session)
        if self.gateway is not None:
            raise StoreModeError(
                "this manager has a store: `await session.login(user_id, default=...)` loads the user's data and "
                "identifies in one step"
            )
        check_user_id(user_id, self.options.user_id)
        self.refuse_if_closed()
        self.autosave.identify(session, user_id, user_data)
        await self.emit_identified(session, user_id, user_data)

    async def emit_identified(self, session: SessionCore, user_id: int | str, user_data: object) -> None:
        errors: list[Exception] = []
        await self.emit("identified", session, user_id, user_data, errors=errors)
        if errors:
            raise listener_error("identified", errors)

    def refuse_if_closed(self) -> None:
        if self.drain is not None:
            raise ManagerClosedError("this manager is being destroyed, or has been: it takes nobody new")

    def refuse_if_ending(self, session: SessionCore) -> None:
        if self.table.is_ending(session):
            raise SessionEndedError(f"the session has ended, or is ending ({session!r})")

    # Ending

    async def end(self, session: SessionCore, persist: bool | None, reason: EndReason = EndReason.DESTROYED) -> None:
        """End a session, or join its end. Raises what the listeners and the last save raised.

        `persist` of None asks for a save where there is a store, and for nothing where there is not: a new end makes no
        save then, one under way keeps what was asked of it.
        """
        self.enter()
        if persist is None and self.gateway is not None:
            persist = True
        if session.end_reason is not None:
            return
        ending = self.endings.get(session)
        wants_save = bool(persist) and session.user_id is not None
        if wants_save and (ending is None or not (ending.persist or ending.decided)):
            self.require_saver()
        if ending is None:
            if not wants_save and self.end_at_once(session, reason):
                return
            if wants_save:
                self._refuse_if_unsavable(session)
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

    def _refuse_if_unsavable(self, session: SessionCore) -> None:
        """Better to leave a session live than to hide it with data that cannot be saved."""
        if self.store_saver is not None and (refusal := self.store_saver.refusal(session)) is not None:
            refusal.add_note("the session is live as before; mend its user_data, or destroy it with persist=False")
            raise refusal

    async def _join(self, session: SessionCore, ending: Ending) -> Exception | None:
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
            or self._is_to_be_released(session)
        ):
            return False
        self.table.begin_end(session)
        self.table.forget(session)
        self.autosave.forget(session)
        self._let_go(session, reason)
        return True

    def begin_end(self, session: SessionCore, persist: bool, reason: EndReason, *, parked: bool = False) -> Ending:
        """Start to end a live session; a parked one is hidden, and somebody else sees to the rest."""
        assert self._loop is not None
        self.table.begin_end(session)
        self.autosave.hasten(session)
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

    def settled(self, session: SessionCore, error: Exception | None, flight: Flight) -> None:
        ending = self.endings.get(session)
        if ending is None:
            return
        if error is None:
            ending.saved = NOT_SAVED if flight.fingerprint is None else flight.fingerprint
            ending.released = flight.releases
            if ending.parked:
                self.resume(session, ending)
        else:
            ending.saved = NOT_SAVED  # the store may have other bytes now, or be about to
            if ending.reason in _LOSSES:
                return
            ending.released = False
            ending.last_error = error
            if ending.parked and self.drain is not None and isinstance(error, UnsavableError):
                self.resume(session, ending)  # waiting would not help

    # What the store has to say about a session

    def is_last_save(self, session: SessionCore) -> bool:
        ending = self.endings.get(session)
        return ending is not None and (ending.decided or ending.parked) and self._is_to_be_released(session)

    def _is_to_be_released(self, session: SessionCore) -> bool:
        """Whether other processes wait for this one to let go of the user."""
        return self.gateway is not None and self.gateway.store.shared and session.user_id is not None

    def loss_of(self, session: SessionCore) -> Exception | None:
        """Why nothing more of a session is to be written, if so."""
        ending = self.endings.get(session)
        if ending is not None and ending.reason in (EndReason.FENCED, EndReason.ERASED):
            return ending.last_error
        return None

    def disown(self, claim: Claim) -> None:
        self.claims.disown(claim)

    def doubt(self, user_ids: list[int | str], call: asyncio.Task[list[Claim]]) -> None:
        self.claims.doubt(user_ids, call)

    def see_loss(self) -> None:
        self.claims.see_loss()

    def unsavable(self, session: SessionCore, error: UnsavableError) -> None:
        self.say("error", "%s", error)
        self._announce("unsavable", session, error)

    def lost(self, session: SessionCore, error: FencedError | UserErasedError) -> None:
        """The store takes nothing more of a session: it ends unsaved."""
        self.report(error, session)
        self.end_unsaved(session, error)

    def end_unsaved(self, session: SessionCore, error: FencedError | UserErasedError) -> None:
        """End a session in whose name nothing is to be written any more."""
        reason = EndReason.FENCED if isinstance(error, FencedError) else EndReason.ERASED
        if self.table.state(session) == "gone":
            return
        ending = self.endings.get(session)
        if ending is None:
            ending = self.begin_end(session, persist=False, reason=reason, parked=True)
        ending.persist = False
        ending.reason = reason
        ending.last_error = error
        ending.released = True  # there is nothing left to let go of
        if ending.parked:
            self.resume(session, ending)

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
        until = self.autosave.patience_ends()
        outcome = await self.autosave.settle(session, until)
        if self.endings.get(session) is not ending:
            return  # ended by force meanwhile
        ending.decided = True
        if ending.saved is UNSEEN:
            ending.saved = NOT_SAVED  # it may have changed since
        if ending.persist:
            error = await self._save_last(session, ending, until)
            if error is not None and ending.persist:
                ending.last_error = error
                if not self._is_hopeless(error):
                    self._park(session, ending, error)
                    return
                ending.reason = EndReason.UNSAVED
        elif isinstance(outcome, Exception) and ending.reason not in _LOSSES:
            self.report(outcome, session)
        if self._is_to_be_released(session) and not ending.released:
            await self._release(session)
        if self.endings.get(session) is not ending:
            return
        self._forget(session, ending)
        with listening(Wait(session, is_save=False), self):
            await self.emit("destroy", session, errors=ending.errors)
        if self.endings.get(session) is ending:
            self.finish(session, ending)

    def _is_hopeless(self, error: Exception) -> bool:
        """Whether a last save that has failed is not worth another attempt."""
        return self._gave_up() or (self.drain is not None and isinstance(error, UnsavableError))

    async def _release(self, session: SessionCore) -> None:
        """Let go of a user that no save lets go of."""
        assert self.gateway is not None and session.user_id is not None
        epoch = self.table.epoch(session)
        if self._gave_up():
            return  # other nodes wait until this one is dead
        if not self.gateway.may_call():
            self.claims.release_later(session.user_id, epoch)
            return
        try:
            await self.claims.release(session.user_id, epoch)
        except Exception as error:
            self.report(error, session)
            self.claims.release_later(session.user_id, epoch)

    async def _save_last(self, session: SessionCore, ending: Ending, until: int | None) -> Exception | None:
        """Save a session that is being ended, again while its data changes meanwhile: what went wrong, if anything."""
        for _ in range(MOST_LAST_SAVES):
            if self._is_saved(session, ending):
                return None
            if self._gave_up():
                return ending.last_error or self.autosave.gave_up
            outcome = await self.autosave.settle(session, until, await self.autosave.save(session, until))
            if isinstance(outcome, Exception):
                return outcome
        self.say(
            "warning",
            "user %r: the data goes on changing while the session ends; save number %d is the last",
            session.user_id,
            MOST_LAST_SAVES,
        )
        return None

    def _is_saved(self, session: SessionCore, ending: Ending) -> bool:
        """Whether the last save is acknowledged, the release included where there is one, and nothing has changed."""
        if self._is_to_be_released(session) and not ending.released:
            return False
        return ending.saved is UNSEEN or (ending.saved is not NOT_SAVED and ending.saved == self.fingerprint(session))

    def _gave_up(self) -> bool:
        return self.drain is not None and self.drain.gave_up

    def _park(self, session: SessionCore, ending: Ending, error: Exception) -> None:
        """Tell whoever waits that the last save failed, and leave the session to the wheel."""
        self.ends_at_work -= 1
        ending.parked = True
        ending.decided = False
        ending.saved = NOT_SAVED
        failed = self._tell_of_parking(session, ending, error)
        if ending.waiting:
            ending.errors = []
            ending.attempt.set_result(failed)
        else:
            ending.attempt.set_result(None)
            if self.drain is None:  # it reports in the end who was not saved, all at once
                self.report(failed, session)
        if not ending.waiting:
            _drop_tracebacks(error)  # what waits for the store is to be small
        if self.drain is not None:
            self.drain.look()

    def _tell_of_parking(self, session: SessionCore, ending: Ending, error: Exception) -> Exception:
        """What a caller hears of a last save that failed."""
        note = "the session is hidden and keeps its user; its last save is tried again until it succeeds"
        if self.gateway is None:
            parts = error.exceptions if isinstance(error, ListenerError) else [error]
            failed = listener_error("persist_user_data", [*ending.errors, *parts])
            failed.add_note(note)
            return failed
        if ending.errors:
            self.report(listener_error("before_destroy", ending.errors), session)
            ending.errors = []
        if isinstance(error, UnsavableError):
            return UnsavableError(f"{error}; {note}", user_id=error.user_id, path=error.path)
        unavailable = StoreUnavailableError(
            f"the last save of user {session.user_id!r:.80} was not acknowledged; {note}"
        )
        unavailable.__cause__ = error
        return unavailable

    def _forget(self, session: SessionCore, ending: Ending) -> None:
        if self.drain is not None:
            self.drain.note(session, ending, None)
        self.table.forget(session)
        self.autosave.forget(session)

    def finish(self, session: SessionCore, ending: Ending) -> None:
        """The session has had its last event."""
        del self.endings[session]
        self.ends_at_work -= not ending.parked
        self._let_go(session, ending.reason)
        error: Exception | None = listener_error("destroy", ending.errors) if ending.errors else None
        if ending.reason is EndReason.UNSAVED and ending.last_error is not None and self.gateway is None:
            error = ListenerError(
                "the last save had not succeeded when the manager's deadline passed",
                [ending.last_error, *ending.errors],
            )
        elif ending.last_error is not None and ending.reason in _LOSSES:
            if error is not None:
                self.report(error, session)
            error = ending.last_error
        if not ending.attempt.done():
            ending.attempt.set_result(error)
        if error is not None and error is not ending.last_error and not ending.waiting and self.drain is None:
            self.report(error, session)  # what the store had to say has been reported when it said it
        if self.drain is not None:
            if ending.errors:
                self.drain.note(session, ending, listener_error("destroy", ending.errors))
            self.drain.look()

    def _let_go(self, session: SessionCore, reason: EndReason) -> None:
        """The very end: the handle is dead from here on."""
        if session.user_id is not None and self.gateway is not None:
            self.claims.see_end(session.user_id)
        if session._listeners is not None:
            session._listeners.clear()
        if self.sanitizer is not None:
            self.sanitizer.ended(session)
        if self.store_saver is not None:
            self.store_saver.forget(session)
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

    def entry_of(self, session: SessionCore) -> SnapshotEntry:
        """A user as they are at this moment. Raises `UnsavableError`, or `EncodingError` without a store."""
        assert session.user_id is not None
        if self.store_saver is None:
            body = self.encoding.dump(session.user_data)
            return SnapshotEntry(session.user_id, session.key, 0, "", 0, self.encoding.schema, body)
        body = self.store_saver.body(session)
        _, acknowledged = self.table.versions(session)
        epoch = self.table.epoch(session)
        return SnapshotEntry(session.user_id, session.key, epoch, self.owner, acknowledged, self.encoding.schema, body)

    # Who is not saved in the end

    def collect_unsaved(self, session: SessionCore) -> bool:
        """Have a user in the spill file when it is written next: False without one, and if that cannot be encoded."""
        if self.spill is None:
            return False
        try:
            self.spill.collect(self._spill_entry_of(session))
        except UnsavableError:
            return False
        return True

    def _spill_entry_of(self, session: SessionCore) -> SpillEntry:
        assert self.store_saver is not None
        entry = self.entry_of(session)
        return SpillEntry(
            entry.user_id,
            None,  # of no use to another process, and perhaps a secret
            entry.epoch,
            entry.owner,
            entry.version,
            entry.schema,
            entry.body,
            time.time(),
            self.store_saver.digest_key,
            self.store_saver.known_stored(session),
        )

    def spill_at_exit(self) -> None:
        """The interpreter exits, and nobody has ended this manager: keep what is unsaved."""
        if self.spill is None or self.store_saver is None or os.getpid() != self._pid:
            return
        if self.closed and not self.spill.is_stale:
            return
        self.table.bind_thread()  # the loop may have run in another one, which is over
        lost = 0
        for session in self.table.sessions_now():
            if self._is_to_be_saved(session):
                try:
                    entry = self._spill_entry_of(session)
                except UnsavableError:
                    lost += 1
                    continue
                if not self.table.is_current(session, self.store_saver.digest(entry.body)):
                    self.spill.collect(entry)
        try:
            kept = self.spill.write()
        except SnapshotError as error:
            self.say("error", "what was unsaved at exit could not be spilled: %s", error)
            return
        if kept or lost:
            self.say("warning", "unsaved at exit: %d users are in %s, %d are lost", kept, self.spill.path, lost)

    def _is_to_be_saved(self, session: SessionCore) -> bool:
        """Whether a session has a user, and nobody has said that it is not to be saved."""
        if session.user_id is None or self.table.state(session) == "gone" or self.loss_of(session) is not None:
            return False
        asker = self.endings.get(session) or self.drain
        return asker is None or asker.persist

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
            unchanged=0 if self.store_saver is None else self.store_saver.unchanged + counters.skipped,
            failed=counters.failed,
            fenced=0 if self.store_saver is None else self.store_saver.fenced,
            unsavable=0 if self.store_saver is None else len(self.store_saver.unsavable),
            store=None if self.gateway is None else self.gateway.name,
            store_up=self.gateway is None or not self.gateway.down,
            store_latency=0.0 if self.gateway is None else self.gateway.latency,
            tick_lag=self.autosave.tick_lag / SECOND,
            slice_overruns=self.autosave.slice_overruns,
        )

    def drain_seconds(self) -> float:
        """See `SessionManager.estimate_drain_seconds`."""
        users = self.table.counters.identified
        if self.gateway is None:
            saves, seconds = users, self.autosave.seconds_per_save
        else:
            saves, seconds = -(-users // MOST_ROWS), self.gateway.latency
        return -(-saves // self.options.max_in_flight) * seconds + users * SECONDS_PER_END

    def health(self) -> Health:
        """See `SessionManager.health`."""
        if self.closed:
            return Health("down", "the manager has been destroyed")
        if self.gateway is not None and self.gateway.down_since is not None:
            seconds = (self.clock.now() - self.gateway.down_since) / SECOND
            last = self.gateway.last_error
            why = last if isinstance(last, StoreError) else type(last).__name__  # a driver may name addresses
            return Health("down", f"{self.gateway.name} has been down for {seconds:.1f} s: {why}")
        if self.options.interval is not None and self.table.counters.identified and not self.can_save():
            return Health("down", "nobody listens to 'persist_user_data', and there is no store")
        found = self.statistics()
        limit = 2 * (self.options.interval or 0) / SECOND
        if limit and found.oldest_unsaved is not None and found.oldest_unsaved > limit:
            return Health("degraded", f"the oldest unsaved state is {found.oldest_unsaved:.1f} s old")
        if found.overdue:
            return Health("degraded", f"saves that take longer than the interval: {found.overdue}")
        if found.unsavable:
            return Health("degraded", f"users whose data cannot be saved as it is: {found.unsavable}")
        if self.drain is not None:
            return Health("degraded", "the manager is being destroyed")
        return Health("ok", "")


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
