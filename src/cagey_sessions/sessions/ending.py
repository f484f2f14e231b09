"""The end of a session: its steps, the callers that wait for it, and what becomes of it when its last save fails.

Theory of operation
===================

The end of one session is an `Ending`, which exists from the moment the session is hidden until its handle is dead. One
task works on it. Callers wait for the task's outcome through a shield, so cancelling a caller cancels nothing.

The stages (`TRANSITIONS` says which may follow which)::

    PARKED --> ANNOUNCING --> SETTLING --> SAVING --> GONE --> ENDED
      ^            |              |           |
      +------------+--------------+-----------+   the last save failed: no task, the wheel tries again

- **ANNOUNCING**: the session can no longer be found by its key. The listeners of ``before_destroy`` run, and may
  change the data, save, or wait for anything that does not wait for this end (`events.deadlocks` refuses the rest).
- **SETTLING**: a save that was under way comes to its end. Until now a caller can still ask for a last save.
- **SAVING**: the last save, repeated while the data goes on changing, at most `MOST_LAST_SAVES` times. The row is
  flagged *final*, so that the save releases the user in the same write. A user whom no save has released is released
  here.
- **GONE**: the row is forgotten, and the user may log in again, here or elsewhere. The listeners of ``destroy`` run.
- **PARKED**: the last save failed. The session stays hidden and keeps its user. There is no task and no timer of its
  own: the wheel makes the save due again, and when it succeeds the end goes on. A million parked ends are a million
  rows.

Who moves what:

- a caller (`end`) begins an end, joins it, or wakes a parked one;
- saving (`on_settled`) reports that a save of a session that is being ended is over: after a success a parked end
  goes on;
- saving (`on_lost`) reports that the user was lost: the end goes on without a save, whatever stage it is in;
- the drain (`Drain`) ends everybody. After its deadline no failure parks any more, and whoever is left is ended by
  force (`end_by_force`), which is why GONE and ENDED may follow every stage;
- a `cancel()` from outside ends the task (`_on_task_done`): the end is parked if it was to save, and finished
  otherwise.

Three promises rest on this order:

- *Nothing acknowledged is lost*: a session is forgotten only when its data is known to be saved (`Saver.is_saved`),
  or when it was said that it need not be, or in the report of a drain that names it.
- *A user is in one session*: the user's slot is taken until GONE, so a login on this server waits for the last save;
  and the store has released the user by then, so a login on another server finds the newest data.
- *An end ends*: every wait in it has a deadline, or is for the program's own listeners, and a drain cuts those off.

A *silent* session (`Endings.write`, `Endings.drop`) holds a user for a call that has no session, such as an edit. No
listener hears of it, and a failed last save ends it unsaved, because its caller is told that it failed.

What was tried and dropped: an object and a task for each end that waits for a store that is down (two kilobytes each;
it is one object now, and no task), and a fingerprint of the data in the ending (the row has the digest already).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from .._core import SessionCore
from ..errors import (
    DrainDeadlineError,
    FencedError,
    ListenerCancelledError,
    ListenerError,
    SessionEndedError,
    StoreUnavailableError,
    UnsavableError,
    UserErasedError,
    WouldDeadlockError,
)
from ..events import listener_error
from ..events.deadlocks import Kind, Wait, listening, waiting_for, would_deadlock
from ..events.reports import drop_tracebacks, fresh
from ..options import yes_or_no
from ..records import EndReason, UnsavedUser
from ..wording import quote
from .entries import collect_unsaved
from .server import Server

__all__ = ["TRANSITIONS", "Drain", "Ending", "Endings", "Stage"]

MOST_LAST_SAVES = 20
"""How often the last save is made again because the data has changed meanwhile."""
MOST_ERRORS = 1000
"""How many errors of listeners the report of a drain holds."""
_LOSSES = (EndReason.UNSAVED, EndReason.FENCED, EndReason.ERASED)
"""Ends by which data is lost or the user was: `Ending.last_error` says why, and is not replaced by later errors."""


class Stage(Enum):
    """How far the end of a session has come."""

    PARKED = "parked"
    """No task is at work: the last save waits for its retry, or the end has not begun yet."""
    ANNOUNCING = "announcing"
    """The listeners of ``before_destroy`` run."""
    SETTLING = "settling"
    """Waits for a save that is under way. Until here it can still be changed whether there is a last save."""
    SAVING = "saving"
    """The last save, if there is one, and the release."""
    GONE = "gone"
    """The session has been forgotten. The listeners of ``destroy`` run."""
    ENDED = "ended"


TRANSITIONS: dict[Stage, tuple[Stage, ...]] = {
    Stage.PARKED: (Stage.ANNOUNCING, Stage.SETTLING, Stage.GONE, Stage.ENDED),
    Stage.ANNOUNCING: (Stage.SETTLING, Stage.PARKED, Stage.GONE, Stage.ENDED),
    Stage.SETTLING: (Stage.SAVING, Stage.PARKED, Stage.GONE, Stage.ENDED),
    Stage.SAVING: (Stage.PARKED, Stage.GONE, Stage.ENDED),
    Stage.GONE: (Stage.ENDED,),
    Stage.ENDED: (),
}
"""The stages that may follow each. A drain past its deadline moves an end from any stage to GONE and ENDED."""


@dataclass(slots=True, eq=False)
class Ending:
    """The end of one session."""

    persist: bool
    """Whether there is a last save."""
    reason: EndReason
    attempt: asyncio.Future[Exception | None]
    """What callers wait for: done when the session has ended, or the end is parked."""
    stage: Stage = Stage.PARKED
    announced: bool = False
    """``before_destroy`` has been emitted."""
    last_error: Exception | None = None
    """The error of the last save, or the reason why the user was lost."""
    errors: list[Exception] = field(default_factory=list)
    """Raised by listeners."""
    task: asyncio.Task[None] | None = None
    waiting: int = 0
    """How many callers wait for the attempt."""

    @property
    def parked(self) -> bool:
        return self.stage is Stage.PARKED

    @property
    def decided(self) -> bool:
        """Whether it is too late to decide whether there is a last save."""
        return self.stage in (Stage.SAVING, Stage.GONE, Stage.ENDED)

    def move(self, stage: Stage) -> None:
        """Go on to another stage."""
        assert stage in TRANSITIONS[self.stage], f"an end that is {self.stage.value} cannot become {stage.value}"
        self.stage = stage


@dataclass(slots=True, eq=False)
class Drain:
    """The end of all sessions: what was asked for, and what has become of each session so far."""

    persist: bool
    started: int
    gave_up: bool = False
    """The deadline has passed: no more saves are begun."""
    saved: int = 0
    unsaved: list[UnsavedUser] = field(default_factory=list)
    passed_over: int = 0
    """Users whose sessions ended without a save, because the drain was at first asked for without saves."""
    errors: list[Exception] = field(default_factory=list)
    """Raised by listeners of ends."""
    on_change: Callable[[], None] = lambda: None
    """Called when a session has ended or was parked."""


class Endings:
    """The ends of one manager's sessions."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._table = server.table
        self._autosave = server.autosave
        self._saver = server.saver
        self._listeners = server.listeners
        self._reports = server.reports
        self.under_way: dict[SessionCore, Ending] = {}
        self.at_work: int = 0
        """How many have a task that does not wait for a listener of ``before_destroy``."""
        self.announcing: int = 0
        """How many have a task that does, perhaps for long."""
        self.waited_for: dict[SessionCore, asyncio.Future[EndReason]] = {}
        """Futures of callers of `wait_ended`, by session."""
        self._drain: Drain | None = None
        self.end_wanted: asyncio.Event = asyncio.Event()
        """Set when a drain has begun, or a signal asks for one."""
        self._table.attend_ends(ending=self.under_way, waited_for=self.waited_for, destroyed=EndReason.DESTROYED)

    @property
    def drain(self) -> Drain | None:
        """The drain, if one has begun; while there is one no new session is admitted."""
        return self._drain

    @drain.setter
    def drain(self, drain: Drain | None) -> None:
        self._drain = drain
        self._table.admit(drain is None)

    # Ends

    async def end(self, session: SessionCore, persist: bool | None, reason: EndReason = EndReason.DESTROYED) -> None:
        """End a session, or join its end. Raises what the listeners and the last save have raised.

        A `persist` of None means a last save if there is a store. Without a store it means none for a new end, and does
        not change what was asked of an end under way.
        """
        self._server.enter()
        if persist is None and self._saver.is_store:
            persist = True
        elif persist is not None:
            yes_or_no("persist", persist)
        if not session.alive:
            return
        ending = self.under_way.get(session)
        wants_save = bool(persist) and session.user_id is not None
        if wants_save and (ending is None or not (ending.persist or ending.decided)):
            self._saver.require()
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
        # asked before the wait: if the user is lost meanwhile, that sets `persist` to false, too
        comes_too_late = wants_save and not ending.persist
        error = await self.join(session, ending)
        if error is not None:
            raise fresh(error)
        if comes_too_late:
            raise SessionEndedError(f"the session was past its last save, and ended without one ({session!r})")

    def _refuse_if_unsavable(self, session: SessionCore) -> None:
        """Refuse to end a session whose data cannot be saved: live, its data can still be mended by the program."""
        if (refusal := self._saver.refusal(session)) is not None:
            refusal.add_note("the session is live as before; mend its user_data, or destroy it with persist=False")
            raise refusal

    async def join(self, session: SessionCore, ending: Ending) -> Exception | None:
        """Wait for an attempt to end a session. Does not wait in a listener that the end itself waits for."""
        target = Wait(session, Kind.END)
        if would_deadlock(target):
            return None  # the end goes on when the listener has returned
        ending.waiting += 1
        try:
            with waiting_for(target):
                return await asyncio.shield(ending.attempt)
        finally:
            ending.waiting -= 1

    def end_at_once(self, session: SessionCore, reason: EndReason) -> bool:
        """End a session in this call if nothing has to be waited for: no listener, no save, no release.

        Returns whether it has ended.
        """
        if (
            self._listeners.is_heard("before_destroy", session)
            or self._listeners.is_heard("destroy", session)
            or self._table.state(session) not in ("none", "idle", "due")
            or self._saver.has_to_release(session)
        ):
            return False
        self._table.begin_end(session)
        self._table.forget(session)
        self._autosave.refuse_asked(session)
        self._close_handle(session, reason)
        return True

    def begin_end(self, session: SessionCore, persist: bool, reason: EndReason, *, parked: bool = False) -> Ending:
        """Hide a live session and start its end. With `parked` no task is started, and the caller goes on with it."""
        self._table.begin_end(session)
        self._autosave.hasten(session)
        ending = self.under_way[session] = Ending(persist, reason, self._new_attempt())
        if not parked:
            self._work_on(session, ending)
        return ending

    def _new_attempt(self) -> asyncio.Future[Exception | None]:
        assert self._server.loop.running is not None
        return self._server.loop.running.create_future()

    def resume(self, session: SessionCore, ending: Ending) -> None:
        """Start a new attempt of a parked end."""
        ending.attempt = self._new_attempt()
        self._work_on(session, ending)

    def _work_on(self, session: SessionCore, ending: Ending) -> None:
        ending.move(Stage.SETTLING if ending.announced else Stage.ANNOUNCING)
        self._table.set_final(session, False)  # a save that begins now may be followed by another: do not release
        self.at_work += 1
        task = ending.task = self._server.loop.spawn(self._end(session, ending), "end of session")
        task.add_done_callback(lambda _: self._on_task_done(session, ending))

    def _on_task_done(self, session: SessionCore, ending: Ending) -> None:
        """The task of an end is done. If it was cancelled from outside, perhaps before its first step, go on."""
        if self.under_way.get(session) is not ending or ending.parked or ending.task is None or not ending.task.done():
            return
        stopped = ListenerCancelledError("the task that was ending this session was stopped")
        if ending.stage is not Stage.GONE and ending.persist:
            # the data is not saved yet: the wheel goes on, after a pause, as the loop may be about to be shut down
            self._park(session, ending, stopped)
            self._autosave.ask_later(session)
            return
        ending.errors.append(stopped)
        if ending.stage is not Stage.GONE:
            if self._saver.has_to_release(session) and not self._gave_up():
                self._saver.release_later(session)
            self._forget(session, ending)
        self.finish(session, ending)

    # Silent sessions, each of which a call holds

    def drop(self, session: SessionCore) -> None:
        """End a silent session unsaved, and release its user in a task; the caller does not wait for that."""
        self.begin_end(session, persist=False, reason=EndReason.DESTROYED)

    async def write(self, session: SessionCore) -> None:
        """Save a silent session once and end it. If that fails within the time of a caller, end it unsaved.

        Raises `UnsavableError`, `FencedError` or `UserErasedError`; or `StoreUnavailableError`, after which it is
        unknown whether the data is stored.
        """
        refusal: Exception | None = self._saver.refusal(session)
        if self._server.closed:
            refusal = StoreUnavailableError("the store is closed: the manager was destroyed")
        if refusal is not None:
            self.drop(session)
            raise refusal
        ending = self.begin_end(session, persist=not self._saver.is_saved(session), reason=EndReason.DESTROYED)
        error = await self.join(session, ending)
        while error is not None and not ending.parked and ending.stage is not Stage.ENDED:
            # the end was parked and resumed before this task ran: the retry of the save may have succeeded
            error = await self.join(session, ending)
        if error is None:
            return
        if ending.parked:
            # a parked end would be saved by the wheel later, although the caller is told that it has failed
            error = ending.last_error
            ending.persist = False
            self.resume(session, ending)
        if isinstance(error, UnsavableError | FencedError | UserErasedError):
            raise fresh(error)
        raise StoreUnavailableError(
            f"the data of user {quote(session.user_id)} was not acknowledged; whether it is stored is not known"
        ) from error

    # What saving reports

    def on_settled(self, session: SessionCore, error: Exception | None) -> None:
        """Saving reports that a save of a session that is being ended has an outcome."""
        ending = self.under_way.get(session)
        if ending is None:
            return
        if error is None:
            if ending.parked:
                self.resume(session, ending)  # saved by the wheel: what is left is to end
        elif ending.reason not in _LOSSES:
            ending.last_error = error
            if ending.parked and self.drain is not None and isinstance(error, UnsavableError):
                self.resume(session, ending)  # it would fail until the deadline of the drain: end it unsaved now

    def on_lost(self, session: SessionCore, error: FencedError | UserErasedError) -> None:
        """Saving reports that a session has lost its user: end it without another save."""
        if self._table.state(session) == "gone":
            return
        reason = EndReason.FENCED if isinstance(error, FencedError) else EndReason.ERASED
        ending = self.under_way.get(session)
        if ending is None:
            # parked, because the reason and the error have to be set before its task runs
            ending = self.begin_end(session, persist=False, reason=reason, parked=True)
        ending.persist = False
        ending.reason = reason
        ending.last_error = error
        self._autosave.stop(session, error)
        if ending.parked:
            self.resume(session, ending)

    # The steps of an end

    async def _end(self, session: SessionCore, ending: Ending) -> None:
        """The steps of an end, from its stage on. After each wait it may have been ended by force meanwhile."""
        if ending.stage is Stage.ANNOUNCING:
            ending.announced = True
            if self._is_heard("before_destroy", session):
                await self._announce(session, ending)
            if self.under_way.get(session) is not ending:
                return  # ended by force meanwhile
            ending.move(Stage.SETTLING)
        # one deadline for both waits below: together they may take no longer than a caller waits
        until = self._autosave.caller_deadline()
        outcome = await self._autosave.wait_settled(session, until)
        if self.under_way.get(session) is not ending:
            return
        ending.move(Stage.SAVING)
        self._table.set_final(session, True)
        self._saver.forget_unseen(session)  # listeners may have changed data since a save of which that cannot be seen
        if ending.persist:
            error = await self._save_last(session, ending, until)
            if error is not None and ending.persist:  # the user may have been lost meanwhile: then nothing is parked
                ending.last_error = error
                if not self._is_hopeless(error):
                    self._park(session, ending, error)
                    return
                ending.reason = EndReason.UNSAVED
        elif isinstance(outcome, Exception) and ending.reason not in _LOSSES:
            self._reports.error(outcome, session)
        if self._saver.has_to_release(session):
            await self._release(session)
        if self.under_way.get(session) is not ending:
            return
        # asked before `_forget`, because the row knows whether the session is silent
        is_heard = self._is_heard("destroy", session)
        self._forget(session, ending)
        if is_heard:
            with listening(Wait(session, Kind.END), self._table):
                await self._listeners.emit("destroy", session, errors=ending.errors)
        if self.under_way.get(session) is ending:
            self.finish(session, ending)

    def _is_heard(self, event: str, session: SessionCore) -> bool:
        return self._listeners.is_heard(event, session) and not self._table.is_silent(session)

    async def _announce(self, session: SessionCore, ending: Ending) -> None:
        # listeners may take long: meanwhile a drain has room for other ends
        self.at_work -= 1
        self.announcing += 1
        try:
            with listening(Wait(session, Kind.END), self._table):
                await self._listeners.emit("before_destroy", session, errors=ending.errors)
        finally:
            self.announcing -= 1
            self.at_work += 1
            self._on_change()

    async def _release(self, session: SessionCore) -> None:
        """Release a user whom no save has released."""
        if self._gave_up():
            return  # the deadline has passed: other servers get the user when this process has ended
        try:
            await self._saver.release(session)
        except Exception as error:
            self._reports.error(error, session)

    def _is_hopeless(self, error: Exception) -> bool:
        """Whether a last save that has failed is not tried again: past the deadline, or refused during a drain."""
        return self._gave_up() or (self.drain is not None and isinstance(error, UnsavableError))

    async def _save_last(self, session: SessionCore, ending: Ending, until: int | None) -> Exception | None:
        """Make the last save, again if the data changes meanwhile. Returns what went wrong, or None."""
        for _ in range(MOST_LAST_SAVES):
            # a save with `final` releases the user: only when both are done is nothing left to write
            if not self._saver.has_to_release(session) and self._saver.is_saved(session):
                return None
            if self._gave_up():
                return ending.last_error or self._autosave.gave_up
            outcome = await self._autosave.wait_settled(session, until, await self._autosave.save(session, until))
            if isinstance(outcome, Exception):
                return outcome
        self._reports.say(
            "warning",
            "user %s: the data goes on changing while the session ends; save number %d is the last",
            quote(session.user_id),
            MOST_LAST_SAVES,
        )
        return None

    def _gave_up(self) -> bool:
        return self.drain is not None and self.drain.gave_up

    def _park(self, session: SessionCore, ending: Ending, error: Exception) -> None:
        """Tell the callers that the last save has failed, and leave its retry to the wheel."""
        self.at_work -= 1
        ending.move(Stage.PARKED)
        # if a retry succeeds the user is released by it; not before the listeners of `before_destroy`, who may save
        self._table.set_final(session, ending.announced)
        failed = self._parking_error(session, ending, error)
        if ending.waiting:
            ending.errors = []  # they are in what the callers get
            ending.attempt.set_result(failed)
        else:
            ending.attempt.set_result(None)
            if self.drain is None:  # the report of a drain names all unsaved users at its end
                self._reports.error(failed, session)
            drop_tracebacks(error)  # their frames would keep much alive for as long as the store is down
        self._on_change()

    def _parking_error(self, session: SessionCore, ending: Ending, error: Exception) -> Exception:
        """What callers of an end get when its last save has failed."""
        note = "the session is hidden and keeps its user; its last save is tried again until it succeeds"
        if not self._saver.is_store:
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
        self._note(session, ending)
        if not ending.parked:
            ending.move(Stage.GONE)
        self._table.forget(session)
        self._autosave.refuse_asked(session)

    def finish(self, session: SessionCore, ending: Ending) -> None:
        """The session has had its last event: its handle dies, and the callers are answered."""
        del self.under_way[session]
        self.at_work -= not ending.parked
        ending.move(Stage.ENDED)
        self._close_handle(session, ending.reason)
        error: Exception | None = listener_error("destroy", ending.errors) if ending.errors else None
        if ending.reason is EndReason.UNSAVED and ending.last_error is not None and not self._saver.is_store:
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
        if error is not None and error is not ending.last_error and not ending.waiting and self.drain is None:
            # an error of the store was reported when it occurred; callers, or the drain's report, tell the others
            self._reports.error(error, session)
        if ending.errors and self.drain is not None:
            self._note_errors(session, self.drain, listener_error("destroy", ending.errors))
        self._on_change()

    def _close_handle(self, session: SessionCore, reason: EndReason) -> None:
        """The last step of every end: from here on the handle is dead."""
        if session._listeners is not None:
            session._listeners.clear()
        if self._server.sanitizer is not None:
            self._server.sanitizer.ended(session)
        self._saver.forget(session)
        self._autosave.forget(session)
        session._end(reason)
        waiting = self.waited_for.pop(session, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(reason)

    def end_by_force(self, session: SessionCore) -> None:
        """End a session without its listeners, which have not returned by the deadline of the drain."""
        ending = self.under_way.get(session)
        if ending is None:
            assert self.drain is not None
            ending = self.begin_end(session, self.drain.persist, EndReason.DRAINED, parked=True)
        if ending.stage is not Stage.GONE:
            if ending.persist and session.user_id is not None:
                ending.reason = EndReason.UNSAVED
                ending.last_error = ending.last_error or DrainDeadlineError(
                    "its listeners had not returned when the deadline passed"
                )
            self._forget(session, ending)
        self.finish(session, ending)
        if ending.task is not None:
            ending.task.cancel()  # after `finish`, so that its callback finds nothing to do

    async def wait_ended(self, session: SessionCore) -> EndReason:
        """See `Session.wait_ended`."""
        loop = self._server.enter()
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

    # The drain

    def _on_change(self) -> None:
        if self.drain is not None:
            self.drain.on_change()

    def _note(self, session: SessionCore, ending: Ending) -> None:
        """Count a session that is ending in the report of the drain."""
        drain = self.drain
        if drain is None or self._table.is_silent(session):
            return
        if ending.reason in (EndReason.UNSAVED, EndReason.FENCED) and session.user_id is not None:
            age = self._autosave.age(self._table.saved_at(session))
            assert ending.last_error is not None
            is_spilled = ending.reason is EndReason.UNSAVED and collect_unsaved(self._server, session)
            drain.unsaved.append(UnsavedUser(session.user_id, age, ending.last_error, is_spilled))
        elif ending.persist:
            drain.saved += 1
        elif session.user_id is not None and ending.reason is EndReason.DRAINED:
            drain.passed_over += 1

    def _note_errors(self, session: SessionCore, drain: Drain, error: ListenerError) -> None:
        if len(drain.errors) < MOST_ERRORS:
            drain.errors.append(error)
        else:
            self._reports.tell(f"user {quote(session.user_id)}", error)

    def want_saves(self) -> None:
        """The drain is to save after all: add a last save to every end that can still make one."""
        for session, ending in self.under_way.items():
            self.upgrade(session, ending)

    def upgrade(self, session: SessionCore, ending: Ending) -> None:
        """Add a last save to an end, if the drain wants saves and it is not too late."""
        if self.drain is not None and self.drain.persist and not ending.decided and session.user_id is not None:
            # one that the program has ended without a save stays so
            ending.persist = ending.persist or ending.reason is EndReason.DRAINED
