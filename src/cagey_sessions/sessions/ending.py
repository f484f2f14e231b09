"""The end of a session. What lives here: its steps, whoever waits for it, and what becomes of a session whose last save
fails. What must not: the end of everybody, or how a save is performed.

Ending a session is one task's work, owned here; callers wait for it through a shield, so cancelling them cancels
nothing. Its steps: hide it from its key, ``before_destroy``, wait for what is in flight, the last save, forget it,
``destroy``, the end. If the last save fails the session is parked: hidden, its user's slot still taken, tried again by
the wheel until it is saved, or the manager's deadline passes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

from .._core import SessionCore, SessionTable
from ..data.sanitizer import Sanitizer
from ..errors import (
    FencedError,
    ListenerCancelledError,
    ListenerError,
    SessionEndedError,
    StoreUnavailableError,
    UnsavableError,
    UserErasedError,
    WouldDeadlockError,
)
from ..events.deadlocks import Kind, Wait, listening, waiting_for, would_deadlock
from ..events.listeners import Listeners, listener_error
from ..events.reports import Reports, drop_tracebacks, fresh
from ..options import yes_or_no
from ..records import EndReason
from ..saving.autosave import Autosave
from ..saving.in_flight import Flight
from ..saving.to_store import StoreSaver
from ..stores.link import StoreGateway
from ..wording import quote

__all__ = ["UNSEEN", "Drain", "EndHost", "Ending", "Endings", "Releases"]

MOST_LAST_SAVES = 20
"""How often the last save is repeated for data that does not stop changing."""
NOT_SAVED, UNSEEN = object(), object()
_LOSSES = (EndReason.UNSAVED, EndReason.FENCED, EndReason.ERASED)


@dataclass(slots=True, eq=False)
class Ending:
    """A session on its way out."""

    persist: bool
    reason: EndReason
    attempt: asyncio.Future[Exception | None]
    announced: bool = False
    """``before_destroy`` has been emitted."""
    decided: bool = False
    """Whether there is a last save cannot be changed any more."""
    parked: bool = False
    """No task is at work; the last save waits for its retry."""
    saved: object = NOT_SAVED
    """Fingerprint of the data last acknowledged since the end began."""
    released: bool = False
    """The store has let go of the user."""
    last_error: Exception | None = None
    errors: list[Exception] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    waiting: int = 0
    """Callers who will hear of the attempt."""


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


class Releases(Protocol):
    """How users are let go of in the store whom no save lets go of."""

    async def release(self, user_id: int | str, epoch: int) -> None:
        """Let go of a user, and go on trying while this process lives. Raises what the first attempt raised."""
        ...

    def see_end(self, user_id: int | str) -> None:
        """A session of this user is over."""
        ...


class EndHost(Protocol):
    """What ends need of whoever they happen for."""

    table: SessionTable
    autosave: Autosave
    listeners: Listeners
    reports: Reports
    sanitizer: Sanitizer | None
    gateway: StoreGateway | None
    store_saver: StoreSaver | None
    loop: asyncio.AbstractEventLoop | None

    @property
    def drain(self) -> Drain | None:
        """The end of everybody, if it has begun."""
        ...

    @property
    def claims(self) -> Releases:
        """What knows of the store's claims."""
        ...

    def enter(self) -> asyncio.AbstractEventLoop:
        """Bind the loop, or refuse another."""
        ...

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start a task."""
        ...

    def require_saver(self) -> None:
        """Raise `NothingSavesError` if nobody would perform a save."""
        ...

    def fingerprint(self, session: SessionCore) -> object:
        """Something that changes when the session's data does, or `UNSEEN`."""
        ...


class Endings:
    """The ends of one manager's sessions."""

    def __init__(self, host: EndHost) -> None:
        self._host = host
        self._table = host.table
        self._autosave = host.autosave
        self._listeners = host.listeners
        self._reports = host.reports
        self._gateway = host.gateway
        self._store_saver = host.store_saver
        self.under_way: dict[SessionCore, Ending] = {}
        self.at_work: int = 0
        """Of those under way, how many have a task that is not held up by a listener of ``before_destroy``."""
        self.announcing: int = 0
        """How many are, and may be for long."""
        self.waited_for: dict[SessionCore, asyncio.Future[EndReason]] = {}
        """Sessions whose end somebody waits for."""

    async def end(self, session: SessionCore, persist: bool | None, reason: EndReason = EndReason.DESTROYED) -> None:
        """End a session, or join its end. Raises what the listeners and the last save raised.

        `persist` of None asks for a save where there is a store, and for nothing where there is not: a new end makes no
        save then, one under way keeps what was asked of it.
        """
        self._host.enter()
        if persist is None and self._gateway is not None:
            persist = True
        elif persist is not None:
            yes_or_no("persist", persist)
        if not session.alive:
            return
        ending = self.under_way.get(session)
        wants_save = bool(persist) and session.user_id is not None
        if wants_save and (ending is None or not (ending.persist or ending.decided)):
            self._host.require_saver()
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
        error = await self.join(session, ending)
        if error is not None:
            raise fresh(error)
        if comes_too_late:
            raise SessionEndedError(f"the session was past its last save, and ended without one ({session!r})")

    def _refuse_if_unsavable(self, session: SessionCore) -> None:
        """Better to leave a session live than to hide it with data that cannot be saved."""
        if self._store_saver is not None and (refusal := self._store_saver.refusal(session)) is not None:
            refusal.add_note("the session is live as before; mend its user_data, or destroy it with persist=False")
            raise refusal

    async def join(self, session: SessionCore, ending: Ending) -> Exception | None:
        """Wait for an attempt to end a session; inside a listener that it waits for itself, do not."""
        target = Wait(session, Kind.END)
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
            self._listeners.is_heard("before_destroy", session)
            or self._listeners.is_heard("destroy", session)
            or self._table.state(session) not in ("none", "idle", "due")
            or self._is_to_be_released(session)
        ):
            return False
        self._table.begin_end(session)
        self._table.forget(session)
        self._autosave.forget(session)
        self._let_go(session, reason)
        return True

    def begin_end(self, session: SessionCore, persist: bool, reason: EndReason, *, parked: bool = False) -> Ending:
        """Start to end a live session; a parked one is hidden, and somebody else sees to the rest."""
        self._table.begin_end(session)
        self._autosave.hasten(session)
        ending = self.under_way[session] = Ending(persist, reason, self._new_attempt())
        ending.parked = parked
        if not parked:
            self._work_on(session, ending)
        return ending

    def _new_attempt(self) -> asyncio.Future[Exception | None]:
        assert self._host.loop is not None
        return self._host.loop.create_future()

    def resume(self, session: SessionCore, ending: Ending) -> None:
        """Go on with an end that is parked."""
        ending.parked = False
        ending.attempt = self._new_attempt()
        self._work_on(session, ending)

    def _work_on(self, session: SessionCore, ending: Ending) -> None:
        self.at_work += 1
        task = ending.task = self._host.spawn(self._end(session, ending), "end of session")
        task.add_done_callback(lambda _: self._see_stopped(session, ending))

    def _see_stopped(self, session: SessionCore, ending: Ending) -> None:
        """If the task was stopped by somebody else, perhaps before its first step, whoever waits hears of it."""
        if self.under_way.get(session) is not ending or ending.parked or ending.task is None or not ending.task.done():
            return
        stopped = ListenerCancelledError("the task that was ending this session was stopped")
        if self._table.state(session) != "gone" and ending.persist:
            self._park(session, ending, stopped)
            self._autosave.ask_later(session)
            return
        ending.errors.append(stopped)
        if self._table.state(session) != "gone":
            self._forget(session, ending)
        self.finish(session, ending)

    def settled(self, session: SessionCore, error: Exception | None, flight: Flight) -> None:
        ending = self.under_way.get(session)
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
            if ending.parked and self._host.drain is not None and isinstance(error, UnsavableError):
                self.resume(session, ending)  # waiting would not help

    def is_last_save(self, session: SessionCore) -> bool:
        ending = self.under_way.get(session)
        return ending is not None and (ending.decided or ending.parked) and self._is_to_be_released(session)

    def _is_to_be_released(self, session: SessionCore) -> bool:
        """Whether other processes wait for this one to let go of the user."""
        return self._gateway is not None and self._gateway.store.shared and session.user_id is not None

    def loss_of(self, session: SessionCore) -> Exception | None:
        """Why nothing more of a session is to be written, if so."""
        ending = self.under_way.get(session)
        if ending is not None and ending.reason in (EndReason.FENCED, EndReason.ERASED):
            return ending.last_error
        return None

    def end_unsaved(self, session: SessionCore, error: FencedError | UserErasedError) -> None:
        """End a session in whose name nothing is to be written any more."""
        reason = EndReason.FENCED if isinstance(error, FencedError) else EndReason.ERASED
        if self._table.state(session) == "gone":
            return
        ending = self.under_way.get(session)
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
            if self._listeners.is_heard("before_destroy", session):
                self.at_work -= 1
                self.announcing += 1
                try:
                    with listening(Wait(session, Kind.END), self._host):
                        await self._listeners.emit("before_destroy", session, errors=ending.errors)
                finally:
                    self.announcing -= 1
                    self.at_work += 1
                    if self._host.drain is not None:
                        self._host.drain.look()
        until = self._autosave.patience_ends()
        outcome = await self._autosave.settle(session, until)
        if self.under_way.get(session) is not ending:
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
            self._reports.error(outcome, session)
        if self._is_to_be_released(session) and not ending.released:
            await self._release(session)
        if self.under_way.get(session) is not ending:
            return
        self._forget(session, ending)
        with listening(Wait(session, Kind.END), self._host):
            await self._listeners.emit("destroy", session, errors=ending.errors)
        if self.under_way.get(session) is ending:
            self.finish(session, ending)

    def _is_hopeless(self, error: Exception) -> bool:
        """Whether a last save that has failed is not worth another attempt."""
        return self._gave_up() or (self._host.drain is not None and isinstance(error, UnsavableError))

    async def _release(self, session: SessionCore) -> None:
        """Let go of a user that no save lets go of."""
        assert session.user_id is not None
        if self._gave_up():
            return  # other nodes wait until this one is dead
        try:
            await self._host.claims.release(session.user_id, self._table.epoch(session))
        except Exception as error:
            self._reports.error(error, session)

    async def _save_last(self, session: SessionCore, ending: Ending, until: int | None) -> Exception | None:
        """Save a session that is being ended, again while its data changes meanwhile: what went wrong, if anything."""
        for _ in range(MOST_LAST_SAVES):
            if self._is_saved(session, ending):
                return None
            if self._gave_up():
                return ending.last_error or self._autosave.gave_up
            outcome = await self._autosave.settle(session, until, await self._autosave.save(session, until))
            if isinstance(outcome, Exception):
                return outcome
        self._reports.say(
            "warning",
            "user %s: the data goes on changing while the session ends; save number %d is the last",
            quote(session.user_id),
            MOST_LAST_SAVES,
        )
        return None

    def _is_saved(self, session: SessionCore, ending: Ending) -> bool:
        """Whether the last save is acknowledged, the release included where there is one, and nothing has changed."""
        if self._is_to_be_released(session) and not ending.released:
            return False
        if ending.saved is UNSEEN:
            return True
        return ending.saved is not NOT_SAVED and ending.saved == self._host.fingerprint(session)

    def _gave_up(self) -> bool:
        return self._host.drain is not None and self._host.drain.gave_up

    def _park(self, session: SessionCore, ending: Ending, error: Exception) -> None:
        """Tell whoever waits that the last save failed, and leave the session to the wheel."""
        self.at_work -= 1
        ending.parked = True
        ending.decided = False
        ending.saved = NOT_SAVED
        failed = self._tell_of_parking(session, ending, error)
        if ending.waiting:
            ending.errors = []
            ending.attempt.set_result(failed)
        else:
            ending.attempt.set_result(None)
            if self._host.drain is None:  # it reports in the end who was not saved, all at once
                self._reports.error(failed, session)
        if not ending.waiting:
            drop_tracebacks(error)  # what waits for the store is to be small
        if self._host.drain is not None:
            self._host.drain.look()

    def _tell_of_parking(self, session: SessionCore, ending: Ending, error: Exception) -> Exception:
        """What a caller hears of a last save that failed."""
        note = "the session is hidden and keeps its user; its last save is tried again until it succeeds"
        if self._gateway is None:
            parts = error.exceptions if isinstance(error, ListenerError) else [error]
            failed = listener_error("persist_user_data", [*ending.errors, *parts])
            failed.add_note(note)
            return failed
        if ending.errors:
            self._reports.error(listener_error("before_destroy", ending.errors), session)
            ending.errors = []
        if isinstance(error, UnsavableError):
            return UnsavableError(f"{error}; {note}", user_id=error.user_id, path=error.path)
        unavailable = StoreUnavailableError(
            f"the last save of user {quote(session.user_id)} was not acknowledged; {note}"
        )
        unavailable.__cause__ = error
        return unavailable

    def _forget(self, session: SessionCore, ending: Ending) -> None:
        if self._host.drain is not None:
            self._host.drain.note(session, ending, None)
        self._table.forget(session)
        self._autosave.forget(session)

    def finish(self, session: SessionCore, ending: Ending) -> None:
        """The session has had its last event."""
        del self.under_way[session]
        self.at_work -= not ending.parked
        self._let_go(session, ending.reason)
        error: Exception | None = listener_error("destroy", ending.errors) if ending.errors else None
        if ending.reason is EndReason.UNSAVED and ending.last_error is not None and self._gateway is None:
            error = ListenerError(
                "the last save had not succeeded when the manager's deadline passed",
                [ending.last_error, *ending.errors],
            )
        elif ending.last_error is not None and ending.reason in _LOSSES:
            if error is not None:
                self._reports.error(error, session)
            error = ending.last_error
        if not ending.attempt.done():
            ending.attempt.set_result(error)
        if error is not None and error is not ending.last_error and not ending.waiting and self._host.drain is None:
            self._reports.error(error, session)  # what the store had to say has been reported when it said it
        if self._host.drain is not None:
            if ending.errors:
                self._host.drain.note(session, ending, listener_error("destroy", ending.errors))
            self._host.drain.look()

    def _let_go(self, session: SessionCore, reason: EndReason) -> None:
        """The very end: the handle is dead from here on."""
        if session.user_id is not None and self._gateway is not None:
            self._host.claims.see_end(session.user_id)
        if session._listeners is not None:
            session._listeners.clear()
        if self._host.sanitizer is not None:
            self._host.sanitizer.ended(session)
        if self._store_saver is not None:
            self._store_saver.forget(session)
        session._end(reason)
        waiting = self.waited_for.pop(session, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(reason)

    async def wait_ended(self, session: SessionCore) -> EndReason:
        loop = self._host.enter()
        if not session.alive and session.end_reason is not None:
            return EndReason(session.end_reason)
        target = Wait(session, Kind.END)
        if would_deadlock(target):
            raise WouldDeadlockError("this listener would wait for an end that waits for this listener")
        waiting = self.waited_for.get(session)
        if waiting is None:
            waiting = self.waited_for[session] = loop.create_future()
        with waiting_for(target):
            return await asyncio.shield(waiting)
