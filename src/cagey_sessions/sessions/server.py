"""The life of sessions. What lives here: creating, identifying and saving them, and what all sessions of a manager
share. What must not: the choice of when to save, the steps of an end, or public manners.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context
from itertools import chain
from typing import Any, Protocol, TypeVar

import orjson

from .._core import Counters, SessionCore, SessionTable, check_user_id, is_plain
from ..clock import Clock, SystemClock
from ..data.encoding import Encoding
from ..data.sanitizer import Sanitizer
from ..errors import (
    FencedError,
    ListenerCancelledError,
    ListenerError,
    ManagerClosedError,
    NothingSavesError,
    SessionEndedError,
    SnapshotError,
    StoreModeError,
    StoreUnavailableError,
    UnsavableError,
    UnsavedError,
    UserErasedError,
    WouldDeadlockError,
    WrongLoopError,
)
from ..events.deadlocks import Kind, Wait, saves_inside, waiting_for, would_deadlock
from ..events.listeners import MANAGER_EVENTS, Listeners, listener_error
from ..events.reports import Reports, fresh, say
from ..files.spill import Spill, SpillEntry
from ..options import Options, yes_or_no
from ..process import Identity, at_exit, is_forked_worker
from ..records import EndReason, Receipt, SnapshotEntry
from ..saving.autosave import Autosave, Saver
from ..saving.in_flight import Flight, SaveOutcome
from ..saving.to_listeners import ListenerSaver
from ..saving.to_store import StoreSaver
from ..stores import Claim, Store
from ..stores.contract import Answers
from ..stores.link import StoreGateway
from ..wording import quote
from .ending import UNSEEN, Drain, Ending, Endings, Releases

__all__ = ["MOST_NAMED", "Claimed", "Lifecycle", "name_some"]

T = TypeVar("T")

MOST_NAMED = 10
"""How many users a message names."""
MOST_SAVES_ASKED = 1000
"""How many saves of everybody are asked for at a time, where a store takes them in batches."""


class Claimed(Releases, Protocol):
    """What becomes of users whom this process has claimed in the store."""

    def disown(self, claim: Claim) -> None:
        """Let go of a claim that turned out not to be wanted."""
        ...

    def doubt(self, user_ids: list[int | str], call: asyncio.Task[Answers]) -> None:
        """A claim of these users had no answer, and may be granted all the same."""
        ...

    def see_loss(self) -> None:
        """The store may have lost what it had acknowledged."""
        ...

    async def settle(self, until: int) -> None:
        """Wait, until then at the latest, for what is under way."""
        ...

    def close(self) -> None:
        """Stop."""
        ...


class SaveIntent:
    """Whether a manager is meant to save at all; nobody wants a warning from one that is not."""

    def __init__(self, is_there: bool) -> None:
        self.is_there: bool = is_there


class Lifecycle:
    """All sessions of one manager, and everything that happens to them.

    Saves go to `store`, if there is one, as `encoding` writes them; to listeners otherwise.
    """

    def __init__(
        self,
        session_type: type[SessionCore],
        options: Options,
        clock: Clock,
        store: Store | None = None,
        encoding: Encoding | None = None,
        spill: Spill | None = None,
    ) -> None:
        self.options = options
        self.clock = clock
        self.identity: Identity = Identity()
        self.encoding: Encoding = encoding or Encoding()
        self.spill = spill
        self.loop: asyncio.AbstractEventLoop | None = None
        self.claims: Claimed
        self.ownership: Any
        """What is done with users of the store; both stand above this room."""
        self.table: SessionTable = SessionTable(session_type, self, stored=store is not None)
        self.sanitizer: Sanitizer | None = (
            Sanitizer(self.table, self.encoding, self.fingerprint_of, self.report) if options.debug else None
        )
        self.listeners: Listeners = Listeners(MANAGER_EVENTS, self.sanitizer, self.table.hear)
        self.reports: Reports = Reports(options.log, self.listeners, self.spawn)
        self.gateway: StoreGateway | None = None
        self.store_saver: StoreSaver | None = None
        saver: Saver
        if store is None:
            saver = ListenerSaver(self.table, self)
        else:
            self.gateway = StoreGateway(store, clock, options.save_timeout, self.identity, self.reports.say)
            saver = self.store_saver = StoreSaver(
                self.table, self.gateway, self.encoding, clock, options, self, self.identity, self.sanitizer
            )
        self.autosave: Autosave = Autosave(self.table, clock, options, self, saver, self.identity)
        self.intent: SaveIntent = SaveIntent(
            store is not None or options.interval is not None or bool(options.persist_on)
        )
        self.warning: weakref.finalize[Any, Any] = weakref.finalize(
            self, _warn_of_unsaved, self.table.counters, self.intent, options.log, self.identity
        )
        """Called when a manager vanishes, or the process exits, without `SessionManager.destroy`."""
        self._drain: Drain | None = None
        self.end_wanted: asyncio.Event = asyncio.Event()
        """Set once the end of everybody has begun, or is about to."""
        self.closed: bool = False
        self._unguard_exit: Callable[[], object] = lambda: None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.endings: Endings = Endings(self)
        self.table.attend(
            now=time.monotonic_ns if type(clock) is SystemClock else clock.now,
            tick=self.autosave.tick,
            interval=options.interval // self.autosave.tick if options.interval else 0,
            arm=self.autosave.arm,
            ending=self.endings.under_way,
            waited_for=self.endings.waited_for,
            destroyed=EndReason.DESTROYED,
            user_id_type=options.user_id,
            stored=store is not None,
            watched=options.debug,
        )

    # The loop

    def enter(self) -> asyncio.AbstractEventLoop:
        """Every awaited call passes here: bind the loop at the first, refuse any other later."""
        loop = asyncio.get_running_loop()
        if loop is not self.loop:
            if self.loop is not None:
                raise WrongLoopError("this manager belongs to another event loop; make one manager for each loop")
            self._begin(loop)
        else:
            self.table.require_thread()  # a forked child has the same loop
        return loop

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Belong to this loop and this process; until here a fork may have made several of us."""
        self.loop = loop
        self.identity.begin()
        self.table.reseed(self.identity.random.getrandbits(64))
        self.table.bind_thread()
        self.table.bind_loop(loop)
        self.autosave.bind(loop)
        if self.gateway is not None and self.store_saver is not None:
            self.gateway.bind(loop)
            self.store_saver.begin()
        if is_forked_worker():
            at_exit(self.warning)

    def spawn(self, work: Coroutine[Any, Any, T], name: str, context: Context | None = None) -> asyncio.Task[T]:
        """Start a task that this manager owns; not by the loop's factory, which may run it here and now."""
        task = asyncio.Task(work, loop=self.loop, name=f"cagey-sessions {name}", context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @property
    def owner(self) -> str:
        """The name under which users are claimed; empty until the first awaited call."""
        return self.identity.owner

    @property
    def drain(self) -> Drain | None:
        """The end of everybody, if it has begun."""
        return self._drain

    @drain.setter
    def drain(self, drain: Drain | None) -> None:
        self._drain = drain
        self.table.admit(drain is None)

    def close(self) -> None:
        """All have ended: nobody hears of anything any more."""
        self.listeners.clear()
        self.reports.close()
        self.closed = True

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
        if (loss := self.endings.loss_of(session)) is not None:
            raise loss
        self.require_saver()
        outcome = await self._save_waiting(session)
        if isinstance(outcome, Exception):
            raise fresh(outcome)
        return outcome

    async def _save_waiting(self, session: SessionCore) -> SaveOutcome:
        target = Wait(session, Kind.SAVE)
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
                    failures.append((session.user_id, fresh(outcome)))

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
        yes_or_no("replace", replace)
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
                    await self.endings.join(session, ending)
                raise listener_error("created", errors)
            self.refuse_if_ending(session)
        return session

    def _abort_creation(self, session: SessionCore) -> Ending | None:
        ends = self.endings
        ending = ends.under_way.get(session)
        if ending is None and session.alive and not ends.end_at_once(session, EndReason.CREATE_FAILED):
            ending = ends.begin_end(session, persist=False, reason=EndReason.CREATE_FAILED)
        return ending

    async def replace(self, older: SessionCore) -> None:
        """Save a session while it is live, and if that failed raise and leave it so; then end it."""
        if older.user_id is None or not self.can_save():
            await self.endings.end(older, False, EndReason.REPLACED)
            return
        await self.persist(older)
        try:
            await self.endings.end(older, True, EndReason.REPLACED)
        except ListenerError as error:
            if self.gateway is None or older.alive:
                raise
            self.reports.error(
                error, older
            )  # it is saved and has ended, and its listeners are no concern of the newer one

    async def start(self, session: SessionCore) -> None:
        self.enter()
        self.refuse_if_ending(session)
        errors: list[Exception] = []
        await self.listeners.emit("started", session, errors=errors)
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
        await self.listeners.emit("identified", session, user_id, user_data, errors=errors)
        if errors:
            raise listener_error("identified", errors)

    def refuse_if_closed(self) -> None:
        if self.drain is not None:
            raise ManagerClosedError("this manager is being destroyed, or has been: it takes nobody new")

    def refuse_if_ending(self, session: SessionCore) -> None:
        if self.table.is_ending(session):
            raise SessionEndedError(f"the session has ended, or is ending ({session!r})")

    # What the core has done here, and what autosave and the store have to say

    def end(self, session: SessionCore, persist: bool | None) -> Coroutine[Any, Any, None]:
        return self.endings.end(session, persist)

    def report(self, error: Exception, session: SessionCore | None) -> None:
        self.reports.error(error, session)

    def unsavable(self, session: SessionCore, error: UnsavableError) -> None:
        self.reports.unsavable(error, session)

    def settled(self, session: SessionCore, error: Exception | None, flight: Flight) -> None:
        self.endings.settled(session, error, flight)

    def is_last_save(self, session: SessionCore) -> bool:
        return self.endings.is_last_save(session)

    def loss_of(self, session: SessionCore) -> Exception | None:
        return self.endings.loss_of(session)

    def lost(self, session: SessionCore, error: FencedError | UserErasedError) -> None:
        self.reports.error(error, session)
        self.endings.end_unsaved(session, error)

    def disown(self, claim: Claim) -> None:
        self.claims.disown(claim)

    def doubt(self, user_ids: list[int | str], call: asyncio.Task[Answers]) -> None:
        self.claims.doubt(user_ids, call)

    def see_loss(self) -> None:
        self.claims.see_loss()

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
        return SnapshotEntry(
            session.user_id, session.key, epoch, self.identity.owner, acknowledged, self.encoding.schema, body
        )

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
            self.identity.digest_key,
            self.store_saver.known_stored(session),
        )

    def guard_exit(self) -> None:
        """Spill whatever is unsaved when the process exits. Keeps this object alive until `unguard_exit`."""
        self._unguard_exit = at_exit(self._spill_at_exit)

    def unguard_exit(self) -> None:
        """Everything that was unsaved is in the spill file."""
        self._unguard_exit()

    def _spill_at_exit(self) -> None:
        """The interpreter exits, and nobody has ended this manager: keep what is unsaved."""
        if self.spill is None or self.store_saver is None or not self.identity.is_this_process():
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
                if not self.table.is_current(session, self.identity.digest(entry.body)):
                    self.spill.collect(entry)
        try:
            kept = self.spill.write()
        except SnapshotError as error:
            self.reports.say("error", "what was unsaved at exit could not be spilled: %s", error)
            return
        if kept or lost:
            self.reports.say("warning", "unsaved at exit: %d users are in %s, %d are lost", kept, self.spill.path, lost)

    def _is_to_be_saved(self, session: SessionCore) -> bool:
        """Whether a session has a user, and nobody has said that it is not to be saved."""
        if session.user_id is None or self.table.state(session) == "gone" or self.endings.loss_of(session) is not None:
            return False
        asker = self.endings.under_way.get(session) or self.drain
        return asker is None or asker.persist


def _warn_of_unsaved(counters: Counters, intent: SaveIntent, log: Any, identity: Identity) -> None:
    if intent.is_there and counters.identified and identity.is_this_process():
        say(
            log,
            "warning",
            "unsaved users: %d; `await manager.destroy(persist=True)` was not called, or did not finish",
            counters.identified,
        )


def name_some(user_ids: list[int | str]) -> str:
    """The first few ids, for a message."""
    return ", ".join(map(quote, user_ids[:MOST_NAMED])) + (", ..." if len(user_ids) > MOST_NAMED else "")
