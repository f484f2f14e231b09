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
from dataclasses import replace

from .._core import SessionCore
from ..errors import DrainDeadlineError, DrainError, ListenerError, ManagerClosedError, SnapshotError
from ..events.deadlocks import within_host
from ..options import SECOND
from ..records import DrainReport, EndReason, UnsavedUser
from ..threads import in_thread
from ..user_code import current_task, is_for_this_task
from ..wording import quote
from .ending import Ending
from .server import Lifecycle, name_some

__all__ = ["drain"]

AFTER_DEADLINE = SECOND
"""How long listeners of ``destroy`` may still run when the deadline has passed."""
SECONDS_TO_SPILL = 10
MOST_ENDS_AT_WORK = 10_000
MOST_ENDS_ANNOUNCING = 100_000
"""How many listeners of ``before_destroy`` may be waited for at a time."""
MOST_ERRORS = 1000


async def drain(life: Lifecycle, persist: bool, deadline: int) -> DrainReport:
    """End all sessions within `deadline` nanoseconds; whoever calls again joins. Raises `DrainError`."""
    life.enter()
    until = life.clock.now() + deadline
    while True:
        current = life.drain
        if persist and life.table.counters.identified and not (isinstance(current, _Drain) and current.persist):
            life.require_saver()
        if not isinstance(current, _Drain):
            current = life.drain = _Drain(life, persist)
            current.begin(max(0, until - life.clock.now()))
        elif persist and not current.persist:
            current.save_after_all()
        if within_host(life):
            return current.report()
        try:
            report = await asyncio.shield(current.outcome)
            break
        except asyncio.CancelledError as error:
            if not current.outcome.cancelled() or is_for_this_task(error, current_task()):
                raise
            # somebody has cancelled the task of this end, but not this call, which begins the end anew
    errors: list[Exception] = [*(user.error for user in report.unsaved), *current.errors]
    if errors:
        user_ids = [user.user_id for user in report.unsaved]
        spilled = sum(user.spilled for user in report.unsaved)
        raise DrainError(
            f"{len(user_ids)} users were not saved: {name_some(user_ids)}"
            + (f"; {spilled} of them are in the spill file, and are saved at the next start" if spilled else "")
            if user_ids
            else "everybody who was to be saved is saved, but listeners raised",
            errors,
            user_ids=user_ids,
            report=report,
        )
    if persist and current.passed_over:
        raise ManagerClosedError(f"{current.passed_over} users had ended without a save before this call asked for one")
    return report


class _Drain:
    """The end of a manager, under way or done."""

    def __init__(self, life: Lifecycle, persist: bool) -> None:
        self.persist = persist
        self.gave_up = False
        self.passed_over = 0
        """Users who have ended without a save, as was asked at first."""
        self.errors: list[Exception] = []
        self.outcome: asyncio.Future[DrainReport] = asyncio.get_running_loop().create_future()
        self._life = life
        self._started = life.clock.now()
        self._saved = 0
        self._unsaved: list[UnsavedUser] = []
        self._spill_is_written = False
        self._task: asyncio.Task[None] | None = None
        self._sweep: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        self._quiet: asyncio.Future[bool] | None = None

    def begin(self, deadline: int) -> None:
        self._life.end_wanted.set()
        if self._life.sanitizer is not None:
            self._life.sanitizer.look_at_all_ended()
        # in a context of its own: a listener that calls for the end of everybody is not waited for by it
        self._life.autosave.drain()
        self._task = self._life.spawn(self._run(deadline), "drain", Context())
        self._task.add_done_callback(self._see_stopped)

    def save_after_all(self) -> None:
        """Somebody has asked for the saves that the first caller did not want: all that are still possible."""
        self.persist = True
        for session, ending in self._life.endings.under_way.items():
            self._upgrade(session, ending)

    def _upgrade(self, session: SessionCore, ending: Ending) -> None:
        if self.persist and not ending.decided and session.user_id is not None:
            ending.persist = ending.persist or ending.reason is EndReason.DRAINED

    def note(self, session: SessionCore, ending: Ending, error: ListenerError | None) -> None:
        if error is not None:
            if len(self.errors) < MOST_ERRORS:
                self.errors.append(error)
            else:
                self._life.reports.tell(f"user {quote(session.user_id)}", error)
        elif ending.reason in (EndReason.UNSAVED, EndReason.FENCED) and session.user_id is not None:
            age = self._life.autosave.age(self._life.table.saved_at(session))
            assert ending.last_error is not None
            spilled = ending.reason is EndReason.UNSAVED and self._life.collect_unsaved(session)
            self._unsaved.append(UnsavedUser(session.user_id, age, ending.last_error, spilled))
        elif ending.persist:
            self._saved += 1
        elif session.user_id is not None and ending.reason is EndReason.DRAINED:
            self.passed_over += 1

    def look(self) -> None:
        self._room.set()
        if self._quiet is not None and not self._quiet.done():
            swept = self._sweep is not None and self._sweep.done()
            if swept and not self._life.endings.under_way:
                self._quiet.set_result(True)

    def report(self) -> DrainReport:
        """How it has gone so far."""
        unsaved = self._unsaved
        if not self._spill_is_written:
            unsaved = [replace(user, spilled=False) for user in unsaved]
        oldest_first = sorted(unsaved, key=lambda user: -user.age)
        return DrainReport(self._saved, tuple(oldest_first), (self._life.clock.now() - self._started) / SECOND)

    async def _run(self, deadline: int) -> None:
        life = self._life
        self._start_sweep()
        if not await self._wait_quiet(deadline):
            self.gave_up = True
            life.reports.say(
                "error", "%d sessions had not ended when the deadline of the drain passed", len(life.table)
            )
            life.autosave.give_up(DrainDeadlineError("the save had not come to its end when the deadline passed"))
            self._start_sweep()
            await self._wait_quiet(AFTER_DEADLINE)
        await self._end_the_rest_by_force()
        await self._write_spill()
        life.autosave.close()
        if life.sanitizer is not None:
            life.sanitizer.look_at_all_ended()
        if life.store_saver is not None:
            life.store_saver.close()
        if life.gateway is not None:
            await life.claims.settle(life.clock.now() + AFTER_DEADLINE)
            await life.gateway.close()
            life.claims.close()
        if life.spill is not None and not life.spill.is_stale:  # else the exit tries once more
            life.unguard_exit()
        life.close()
        self.outcome.set_result(self.report())

    def _see_stopped(self, _: object) -> None:
        """If we were stopped by somebody else, perhaps before our first step, another call may begin anew."""
        if self.outcome.done():
            return
        if self._sweep is not None:
            self._sweep.cancel()
        self._life.drain = None
        self._life.autosave.drain(False)
        self.outcome.cancel()

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

    def _start_sweep(self) -> None:
        earlier, self._sweep = self._sweep, self._life.spawn(self._end_everybody(), "drain", Context())
        if earlier is not None:
            earlier.cancel()
        self._sweep.add_done_callback(self._see_swept)

    def _see_swept(self, sweep: asyncio.Task[None]) -> None:
        if sweep is not self._sweep:
            return
        if sweep.cancelled() or sweep.exception() is not None:
            if self._task is not None:
                self._task.cancel()  # without a sweep nobody is met any more
        else:
            self.look()

    async def _end_everybody(self) -> None:
        """Start the end of each session, oldest save first, as there is room, and go on with those that are parked."""
        life = self._life
        with (
            life.table.oldest_first(to_the_end=True) as identified,
            life.table.oldest_first(identified=False, to_the_end=True) as anonymous,
        ):
            for walk in (identified, anonymous):
                for session in walk:
                    self._end_one(session)
                    while life.endings.at_work >= MOST_ENDS_AT_WORK or life.endings.announcing >= MOST_ENDS_ANNOUNCING:
                        self._room.clear()
                        await self._room.wait()
                    await life.autosave.slice.wait()

    def _end_one(self, session: SessionCore) -> None:
        life = self._life
        ending = life.endings.under_way.get(session)
        if ending is not None:
            self._upgrade(session, ending)
            if ending.parked:
                life.endings.resume(session, ending)
            return
        persist = self.persist and session.user_id is not None
        if not persist and life.endings.end_at_once(session, EndReason.DRAINED):
            self.passed_over += session.user_id is not None
        else:
            life.endings.begin_end(session, persist, EndReason.DRAINED)

    async def _end_the_rest_by_force(self) -> None:
        """Listeners do not return: end what is left without them."""
        life = self._life
        for session in life.table.sessions_now():
            if life.table.state(session) == "gone":
                continue
            ending = life.endings.under_way.get(session)
            if ending is None:
                ending = life.endings.begin_end(session, self.persist, EndReason.DRAINED, parked=True)
            if ending.persist and session.user_id is not None:
                ending.reason = EndReason.UNSAVED
                ending.last_error = ending.last_error or DrainDeadlineError(
                    "its listeners had not returned when the deadline passed"
                )
            self.note(session, ending, None)
            life.table.forget(session)
            self._finish_by_force(session, ending)
            await life.autosave.slice.wait()
        for session, ending in list(life.endings.under_way.items()):
            self._finish_by_force(session, ending)

    async def _write_spill(self) -> None:
        """Keep in a file whom the store did not take."""
        spill = self._life.spill
        try:
            if spill is not None and spill.is_stale:
                try:
                    await in_thread(spill.write, limit=SECONDS_TO_SPILL)
                except TimeoutError as error:
                    raise SnapshotError(
                        f"{spill.path} was not written within {SECONDS_TO_SPILL} s: the disk hangs"
                    ) from error
                self._spill_is_written = True
        except Exception as error:  # whatever it is, everybody is to hear how it went
            self._life.reports.say("error", "what was not saved could not be spilled: %s", error)
            self.errors.append(error)

    def _finish_by_force(self, session: SessionCore, ending: Ending) -> None:
        self._life.endings.finish(session, ending)
        if ending.task is not None:
            ending.task.cancel()
