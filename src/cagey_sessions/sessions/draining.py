"""The drain: ends all sessions of a manager by a deadline, and makes the report.

A *sweep* starts the ends, oldest save first: each is a task, at most `MOST_ENDS_AT_WORK` at a time. How many of their
saves are under way at a time is decided in `saving`, so a slow listener delays only the save of its own session. When
the deadline passes no more saves begin, and a second sweep ends the remaining sessions unsaved. If listeners do not
return even then, they are cancelled, and their sessions ended by force.

See also `ending`, for the steps of one end.
"""

from __future__ import annotations

import asyncio
from contextvars import Context
from dataclasses import replace

from .._core import SessionCore
from ..errors import DrainDeadlineError, DrainError, ManagerClosedError, SnapshotError
from ..events.deadlocks import within_host
from ..options import SECOND
from ..records import DrainReport, EndReason
from ..threads import in_thread
from ..user_code import current_task, is_for_this_task
from ..wording import name_some
from .ending import Drain, Endings
from .server import Server
from .spilling import Spilling

__all__ = ["Draining"]

AFTER_DEADLINE = SECOND
"""How long listeners of ``destroy`` may still run after the deadline."""
SECONDS_TO_SPILL = 10
"""How long writing the spill file may take."""
MOST_ENDS_AT_WORK = 10_000
"""How many ends have a task at a time."""
MOST_ENDS_ANNOUNCING = 100_000
"""How many more may wait for their listeners of ``before_destroy``, which may take long."""


class Draining:
    """The drains of one manager: one, unless it is called off because its tasks were cancelled."""

    def __init__(self, server: Server, endings: Endings, spilling: Spilling) -> None:
        self._server = server
        self._endings = endings
        self._spilling = spilling
        self._attempt: _Attempt | None = None

    async def drain(self, persist: bool, deadline: int) -> DrainReport:
        """End all sessions within `deadline` nanoseconds; a later call joins. Raises `DrainError`."""
        server = self._server
        server.enter()
        until = server.clock.now() + deadline
        while True:
            current, drain = self._attempt, self._endings.drain
            # refuse before anything has begun: afterwards there would be no way back
            if persist and server.table.counters.identified and not (drain is not None and drain.persist):
                server.saver.require()
            if current is None or drain is None:
                current = self._attempt = _Attempt(server, self._endings, self._spilling, persist)
                current.begin(max(0, until - server.clock.now()))
            elif persist and not drain.persist:
                drain.persist = True  # an earlier call wanted no saves: make those that are still possible
                self._endings.want_saves()
            # a listener that an end waits for cannot wait for all ends: it gets what is known so far
            if within_host(server.table):
                return current.report()
            try:
                report = await asyncio.shield(current.outcome)
                break
            except asyncio.CancelledError as error:
                if not current.outcome.cancelled() or is_for_this_task(error, current_task()):
                    raise
                # the drain's task was cancelled from outside, but this call was not: it begins another drain
        self._raise_unsaved(current.drain, report)
        if persist and current.drain.passed_over:
            raise ManagerClosedError(
                f"{current.drain.passed_over} users had ended without a save before this call asked for one"
            )
        return report

    @staticmethod
    def _raise_unsaved(drain: Drain, report: DrainReport) -> None:
        errors: list[Exception] = [*(user.error for user in report.unsaved), *drain.errors]
        if not errors:
            return
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


class _Attempt:
    """One drain, under way or done. If its tasks are cancelled from outside, the next call makes another."""

    def __init__(self, server: Server, endings: Endings, spilling: Spilling, persist: bool) -> None:
        self._server = server
        self._endings = endings
        self._spilling = spilling
        self.drain: Drain = Drain(persist, server.clock.now(), on_change=self._on_change)
        self.outcome: asyncio.Future[DrainReport] = asyncio.get_running_loop().create_future()
        self._spill_is_written = False
        self._task: asyncio.Task[None] | None = None
        self._sweep: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        self._quiet: asyncio.Future[None] | None = None

    def begin(self, deadline: int) -> None:
        server, endings = self._server, self._endings
        endings.drain = self.drain
        endings.end_wanted.set()
        if server.sanitizer is not None:
            server.sanitizer.look_at_all_ended()
        server.autosave.drain()
        server.saver.drain(True)
        # In a context of its own: a listener may call this, and the drain must not count as code inside of that
        # listener, or its waits for ends would be taken for deadlocks.
        self._task = server.loop.spawn(self._run(deadline), "drain", Context())
        self._task.add_done_callback(self._on_stopped)

    def _on_change(self) -> None:
        """A session has ended or was parked: there may be room for another end, or all may be over."""
        self._room.set()
        if self._quiet is not None and not self._quiet.done():
            swept = self._sweep is not None and self._sweep.done()
            if swept and not self._endings.under_way:
                self._quiet.set_result(None)

    def report(self) -> DrainReport:
        """The report as far as it is known."""
        drain = self.drain
        unsaved = drain.unsaved
        if not self._spill_is_written:
            # a user is `spilled` only when the file is written, and not when they have been collected for it
            unsaved = [replace(user, spilled=False) for user in unsaved]
        oldest_first = sorted(unsaved, key=lambda user: -user.age)
        return DrainReport(drain.saved, tuple(oldest_first), (self._server.clock.now() - drain.started) / SECOND)

    async def _run(self, deadline: int) -> None:
        server = self._server
        until = server.clock.now() + deadline
        self._start_sweep()
        if not await self._wait_quiet(deadline):
            self.drain.gave_up = True
            server.reports.say(
                "error", "%d sessions had not ended when the deadline of the drain passed", len(server.table)
            )
            server.autosave.give_up(DrainDeadlineError("the save had not come to its end when the deadline passed"))
            self._start_sweep()  # parked ends begin another attempt, find that the drain gave up, and end unsaved
            await self._wait_quiet(AFTER_DEADLINE)
        await self._end_the_rest_by_force()
        await self._write_spill()  # all ends are over, so the file has everybody who is unsaved
        if server.sanitizer is not None:
            server.sanitizer.look_at_all_ended()
        # calls that are at work on a user, such as an edit, have the rest of the deadline
        await server.saver.close(until)
        server.autosave.close()
        self._spilling.close()
        server.close()
        self.outcome.set_result(self.report())

    def _on_stopped(self, _: object) -> None:
        """If the task was cancelled from outside, perhaps before its first step, call the drain off."""
        if self.outcome.done():
            return
        if self._sweep is not None:
            self._sweep.cancel()
        self._endings.drain = None
        self._server.autosave.drain(False)
        self._server.saver.drain(False)
        self.outcome.cancel()

    async def _wait_quiet(self, limit: int) -> bool:
        """Wait until all sessions have ended, for at most `limit` nanoseconds. Returns whether they have."""
        self._quiet = asyncio.get_running_loop().create_future()
        self._on_change()
        return await self._server.loop.wait(self._quiet, limit)

    def _start_sweep(self) -> None:
        earlier, self._sweep = self._sweep, self._server.loop.spawn(self._end_everybody(), "drain", Context())
        if earlier is not None:
            earlier.cancel()  # the new one starts over, with those that the earlier one has not reached
        self._sweep.add_done_callback(self._on_swept)

    def _on_swept(self, sweep: asyncio.Task[None]) -> None:
        if sweep is not self._sweep:
            return
        if sweep.cancelled() or sweep.exception() is not None:
            if self._task is not None:
                self._task.cancel()  # the sessions that it has not reached would never end
        else:
            self._on_change()

    async def _end_everybody(self) -> None:
        """Start the end of each session, oldest save first, as there is room, and resume parked ends."""
        table, endings = self._server.table, self._endings
        with (
            table.oldest_first(to_the_end=True) as identified,
            table.oldest_first(identified=False, to_the_end=True) as anonymous,
        ):
            for walk in (identified, anonymous):
                for session in walk:
                    self._end_one(session)
                    while endings.at_work >= MOST_ENDS_AT_WORK or endings.announcing >= MOST_ENDS_ANNOUNCING:
                        self._room.clear()
                        await self._room.wait()
                    await self._server.loop.take_turn()

    def _end_one(self, session: SessionCore) -> None:
        endings = self._endings
        ending = endings.under_way.get(session)
        if ending is not None:
            endings.upgrade(session, ending)
            if ending.parked:
                endings.resume(session, ending)  # now, and not when its retry is due
            return
        persist = self.drain.persist and session.user_id is not None
        if not persist and endings.end_at_once(session, EndReason.DRAINED):
            self.drain.passed_over += session.user_id is not None
        else:
            endings.begin_end(session, persist, EndReason.DRAINED)

    async def _end_the_rest_by_force(self) -> None:
        """End what is left without waiting for its listeners."""
        for session in self._server.table.sessions_now():
            if self._server.table.state(session) != "gone":
                self._endings.end_by_force(session)
                await self._server.loop.take_turn()
        # what is left now has no row any more: listeners of ``destroy`` have not returned
        for session, ending in list(self._endings.under_way.items()):
            # a silent session whose call waits for its end is waited for by `saver.close`
            if not (self._server.table.is_silent(session) and ending.waiting):
                self._endings.end_by_force(session)

    async def _write_spill(self) -> None:
        """Write the users that the store did not take to the spill file."""
        spill = self._server.spill
        try:
            if spill is not None and spill.is_stale:
                try:
                    await in_thread(spill.write, limit=SECONDS_TO_SPILL)
                except TimeoutError as error:
                    raise SnapshotError(
                        f"{spill.path} was not written within {SECONDS_TO_SPILL} s: the disk hangs"
                    ) from error
                self._spill_is_written = True
        except Exception as error:  # whatever it is, the callers of the drain have to get a report
            self._server.reports.say("error", "what was not saved could not be spilled: %s", error)
            self.drain.errors.append(error)
