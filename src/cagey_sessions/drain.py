"""The end of everybody. What lives here: ending all sessions of a manager within a deadline, and the report of it. What
must not: the steps of a single end.

Sessions are ended oldest save first, each by a task of its own, up to `MOST_ENDS_AT_WORK` at a time; how many of their
saves are under way is autosave's affair, so listeners that dawdle hold up nobody's save but their own session's. When
the deadline passes autosave gives up, and whoever is not saved is ended unsaved; listeners that do not return even then
are cancelled.
"""

from __future__ import annotations

import asyncio
from contextvars import Context

from ._core import SessionCore
from .errors import DrainDeadlineError, DrainError, ListenerError
from .lifecycle import Ending, Lifecycle, name_some
from .options import SECOND
from .records import DrainReport, EndReason, UnsavedUser
from .waits import within_host

__all__ = ["drain"]

AFTER_DEADLINE = SECOND
"""How long listeners of ``destroy`` may still run when the deadline has passed."""
MOST_ENDS_AT_WORK = 10_000
MOST_ERRORS = 1000


async def drain(life: Lifecycle, persist: bool, deadline: int) -> DrainReport:
    """End all sessions within `deadline` nanoseconds; whoever calls again joins. Raises `DrainError`."""
    life.enter()
    current = life.drain
    if not isinstance(current, _Drain):
        if persist and life.table.counters.identified:
            life.require_saver()
        current = life.drain = _Drain(life, persist)
        current.begin(deadline)
    elif persist and not current.persist and life.can_save():
        current.save_after_all()
    if within_host(life):
        return current.report()
    report = await asyncio.shield(current.outcome)
    errors: list[Exception] = [*(user.error for user in report.unsaved), *current.errors]
    if errors:
        user_ids = [user.user_id for user in report.unsaved]
        raise DrainError(
            f"{len(user_ids)} users were not saved: {name_some(user_ids)}"
            if user_ids
            else "everybody who was to be saved is saved, but listeners raised",
            errors,
            user_ids=user_ids,
            report=report,
        )
    return report


class _Drain:
    """The end of a manager, under way or done."""

    def __init__(self, life: Lifecycle, persist: bool) -> None:
        self.persist = persist
        self.gave_up = False
        self.errors: list[Exception] = []
        self.outcome: asyncio.Future[DrainReport] = asyncio.get_running_loop().create_future()
        self._life = life
        self._started = life.clock.now()
        self._saved = 0
        self._unsaved: list[UnsavedUser] = []
        self._sweep: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        self._quiet: asyncio.Future[bool] | None = None

    def begin(self, deadline: int) -> None:
        self._life.autosave.drain()
        self._life.spawn(self._run(deadline), "drain")

    def save_after_all(self) -> None:
        """Somebody has asked for the saves that the first caller did not want: all that are still possible."""
        self.persist = True
        for session, ending in self._life.endings.items():
            if ending.reason is EndReason.DRAINED and not ending.decided and session.user_id is not None:
                ending.persist = True

    def note(self, session: SessionCore, ending: Ending, error: ListenerError | None) -> None:
        if error is not None:
            if len(self.errors) < MOST_ERRORS:
                self.errors.append(error)
            else:
                self._life.say("error", "user %r: %s", session.user_id, error.message)
        elif ending.reason is EndReason.UNSAVED and session.user_id is not None:
            age = self._life.autosave.age(self._life.table.saved_at(session))
            assert ending.last_error is not None
            self._unsaved.append(UnsavedUser(session.user_id, age, ending.last_error))
        elif ending.persist:
            self._saved += 1

    def look(self) -> None:
        self._room.set()
        if self._quiet is not None and not self._quiet.done():
            swept = self._sweep is not None and self._sweep.done()
            if swept and not self._life.endings:
                self._quiet.set_result(True)

    def report(self) -> DrainReport:
        """How it has gone so far."""
        oldest_first = sorted(self._unsaved, key=lambda user: -user.age)
        return DrainReport(self._saved, tuple(oldest_first), (self._life.clock.now() - self._started) / SECOND)

    async def _run(self, deadline: int) -> None:
        life = self._life
        try:
            self._sweep = life.spawn(self._end_everybody(), "drain")
            self._sweep.add_done_callback(lambda _: self.look())
            if not await self._wait_quiet(deadline):
                self._give_up()
                await self._wait_quiet(AFTER_DEADLINE)
            self._end_the_rest_by_force()
        except BaseException:
            # stopped from outside: nobody else has been ended, and another call may begin anew
            life.drain = None
            life.autosave.drain(False)
            self.outcome.cancel()
            raise
        life.autosave.close()
        life.listeners.clear()
        life.closed = True
        self.outcome.set_result(self.report())

    def _give_up(self) -> None:
        life = self._life
        self.gave_up = True
        life.say("error", "%d sessions had not ended when the deadline of the drain passed", len(life.table))
        life.autosave.give_up(DrainDeadlineError("the save had not come to its end when the deadline passed"))
        for session, ending in list(life.endings.items()):
            if ending.parked:
                life.resume(session, ending)

    async def _wait_quiet(self, limit: int) -> bool:
        """Wait until everybody has ended, but no longer than `limit`: whether they have."""
        quiet: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._quiet = quiet

        def time_is_up() -> None:
            if not quiet.done():
                quiet.set_result(False)

        timer = self._life.clock.call_later(limit, time_is_up, Context())
        self.look()
        try:
            return await quiet
        finally:
            timer.cancel()

    async def _end_everybody(self) -> None:
        """Start the end of each session, oldest save first, as there is room."""
        life = self._life
        with (
            life.table.oldest_first(to_the_end=True) as identified,
            life.table.oldest_first(identified=False, to_the_end=True) as anonymous,
        ):
            for walk in (identified, anonymous):
                for session in walk:
                    self._end_one(session)
                    while life.ends_at_work >= MOST_ENDS_AT_WORK:
                        self._room.clear()
                        await self._room.wait()
                    await life.autosave.slice()

    def _end_one(self, session: SessionCore) -> None:
        life = self._life
        ending = life.endings.get(session)
        if ending is not None:
            if ending.parked:
                life.resume(session, ending)
            return
        persist = self.persist and session.user_id is not None
        if persist or not life.end_at_once(session, EndReason.DRAINED):
            life.begin_end(session, persist, EndReason.DRAINED)

    def _end_the_rest_by_force(self) -> None:
        """Listeners do not return: end what is left without them."""
        life = self._life
        if self._sweep is not None:
            self._sweep.cancel()
        for session in life.table.sessions_now():
            ending = life.endings.get(session)
            if ending is None:
                ending = life.begin_end(session, self.persist, EndReason.DRAINED, parked=True)
            if ending.persist and session.user_id is not None:
                ending.reason = EndReason.UNSAVED
                ending.last_error = ending.last_error or DrainDeadlineError(
                    "its listeners had not returned when the deadline passed"
                )
            self.note(session, ending, None)
            life.table.forget(session)
        for session, ending in list(life.endings.items()):
            if ending.task is not None:
                ending.task.cancel()
            life.finish(session, ending)
