"""When to save, and how many at a time. What lives here: the one timer of a manager, when another worker is
wanted, what is under way, retries and what is overdue. What must not: how a save is performed, or the end of a session.

A save passes through four hands: the wheel in the core says who is due; `_turn` moves them into the core's lanes, in
slices; up to `max_in_flight` workers have a `Saver` take from the lanes and save, one session at a time where a
listener does it, a batch where a store does; the outcome goes back to the core and to whoever waits. What waits for a
slot is a mark in a row of the core, never a task or a body.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextvars import Context
from typing import Any

from .._core import SaveBatch, SessionCore, SessionTable
from ..clock import Clock, TimerHandle
from ..errors import NothingSavesError, SaveOverdueError, UnsavableError
from ..events.reports import Reports
from ..loop import Loop
from ..options import SECOND, Options
from ..process import Identity
from ..records import Receipt
from .in_flight import Save, SaveOutcome, Saves
from .saver import Saver
from .workers import Worker, WorkerPool

__all__ = ["Autosave", "Settled"]

AVERAGE_OVER = 16
"""The duration of a save is averaged over about so many saves."""
LONGEST_TICK = SECOND // 100
SHORTEST_TICK = SECOND // 1000
ROWS_PER_STEP = 256

PAUSE = SECOND
"""How long no task is begun after somebody has cancelled one of ours."""

FIRST_RETRY = 16
"""The first retry comes after this part of the interval, each later one after twice as long, at most half of it."""
INTERVAL_FOR_RETRIES = 16 * SECOND
"""What retries are measured by where there is no interval."""
LONGEST_RETRY_OF_A_STORE = 15 * SECOND
LONGEST_RETRY_IN_DRAIN = SECOND
LONGEST_RETRY_FOR_CALLER = SECOND
"""While somebody waits for a save that the store did not take."""


Settled = Callable[[SessionCore, Exception | None], None]
"""Is told that a save of a session that is being ended has come to its end."""


class Autosave:
    """The saves of one manager."""

    def __init__(
        self,
        table: SessionTable,
        loop: Loop,
        clock: Clock,
        options: Options,
        reports: Reports,
        saver: Saver,
        identity: Identity,
        on_settled: Settled,
    ) -> None:
        self._table = table
        self._loop = loop
        self._clock = clock
        self._reports = reports
        self._saver = saver
        self._on_settled = on_settled
        self._stopped: dict[SessionCore, Exception] = {}
        """Sessions that are not saved any more, and why."""
        saver.bind(self)
        self._interval = options.interval
        self.tick: int = (
            min(LONGEST_TICK, max(SHORTEST_TICK, options.interval // 100)) if options.interval else LONGEST_TICK
        )
        self._interval_ticks = options.interval // self.tick if options.interval else 0
        # with `debug` nobody is passed over, for how else would a forgotten mark be seen
        self._skip = self._interval_ticks if options.tracking == "marked" and not options.debug else 0
        self._overdue_after = options.interval or 30 * SECOND
        self._identity = identity
        self._context = Context()  # not that of whoever happens to call first
        self._timer: TimerHandle | None = None
        self._timer_tick = 0
        self._timer_due = 0
        self._watch_timer: TimerHandle | None = None
        self._turn_is_queued = False
        self._saves = Saves(clock, saver.timeout)
        self._batches: dict[SaveBatch, int] = {}
        """Batches under way, and when each was begun; their sessions have a save only if somebody asks for it."""
        self._carried: dict[SessionCore, None] = {}
        """Sessions of which somebody waits for the next attempt."""
        self._workers = WorkerPool(options.max_in_flight, self._work)
        self._draining = False
        self._pause: TimerHandle | None = None
        self.gave_up: Exception | None = None
        self._closed = False
        self.seconds_per_save: float = 0.0
        """Of listeners, as a moving average."""
        self.tick_lag: int = 0

    def now_tick(self) -> int:
        return self._clock.now() // self.tick

    def identify(self, session: SessionCore, user_id: int | str, user_data: object) -> None:
        """Give a session its user and its first deadline."""
        self._table.identify(session, user_id, user_data, self.now_tick(), self._interval_ticks)
        if self._interval:
            self.arm()

    async def save(self, session: SessionCore, until: int | None = None) -> SaveOutcome:
        """Have a session saved as it is now, or later: the outcome, or at the end of the caller's patience its lack.

        Callers that come before the next save starts share it. Cancelling one of them stops the waiting, not the save.
        """
        if self.gave_up is not None:
            return self.gave_up
        self._table.ask(session)
        saves = self._saves
        save = saves.ask(session)
        self.employ()
        return await saves.join(session, save, until or saves.caller_deadline())

    async def wait_settled(self, session: SessionCore, until: int | None, outcome: SaveOutcome = None) -> SaveOutcome:
        """Wait until no save of a session is under way or asked for, or patience ends.

        Returns the outcome of the last one waited for, or the one given if there was none.
        """
        while save := self._under_way(session) or self._saves.asked.get(session):
            if self.gave_up is not None:
                return self.gave_up  # the save may be under way for ever
            if save.is_resolved:
                return save.outcome  # it is known as far as it will be: it is not waited for any longer
            outcome = await self._saves.join(session, save, until)
            if until is not None and self._clock.now() >= until:
                break
        return outcome

    def _under_way(self, session: SessionCore) -> Save | None:
        save = self._saves.under_way.get(session)
        if save is None and self._batches and "saving" in self._table.state(session):
            for batch, started in self._batches.items():
                if session in batch.under_way():
                    return self._saves.enter(session, started)
        return save

    def caller_deadline(self) -> int | None:
        """See `Saves.caller_deadline`."""
        return self._saves.caller_deadline()

    def refuse_asked(self, session: SessionCore) -> None:
        """A session is past its last save; see `Saves.refuse_asked`."""
        self._saves.refuse_asked(session)

    def stop(self, session: SessionCore, error: Exception) -> None:
        """Begin no save of a session any more: it has lost its user. The error is kept for whoever asks for one."""
        if self._table.state(session) != "gone":
            self._table.lose(session)
            self._stopped[session] = error

    def loss_of(self, session: SessionCore) -> Exception | None:
        """Why no save of a session begins any more, if so."""
        return self._stopped.get(session)

    def forget(self, session: SessionCore) -> None:
        """The handle of a session is dead: nothing is kept of it."""
        self._stopped.pop(session, None)

    def ask_later(self, session: SessionCore) -> None:
        """Have a session saved after a pause; nobody waits for it."""
        self._table.ask(session)
        self.interrupt()

    def hasten(self, session: SessionCore) -> None:
        """Do not leave whoever waits for the next attempt to the timer: the session is to end."""
        if session in self._saves.asked:
            self._table.ask(session)

    def kick(self) -> None:
        """Look again at what is due: there may be somebody now who saves it."""
        if self._loop.is_usable and not self._closed:
            self._loop.call_soon(self._employ_unless_paused, context=self._context)

    def _employ_unless_paused(self) -> None:
        if self._pause is None:
            self.employ()

    def free_slots(self, slots: int) -> None:
        """A listener waits for another save, or does no longer: meanwhile its slot may be used for that one."""
        self._workers.free += slots
        if slots > 0:
            self.employ()

    def drain(self, draining: bool = True) -> None:
        """From now on serve only what is asked for; or again what is due by the timer, too."""
        self._draining = draining
        if not draining:
            self.gave_up = None
            self._watch()

    def give_up(self, error: Exception) -> None:
        """From now on let nobody wait; what is under way goes on, and no more of it is started."""
        self.gave_up = error
        self._saves.resolve_all(error)

    def close(self) -> None:
        """Stop all timers."""
        self._closed = True
        for timer in (self._timer, self._watch_timer, self._pause):
            if timer is not None:
                timer.cancel()
        self._timer = self._watch_timer = self._pause = None

    def in_flight(self) -> list[SessionCore]:
        """The sessions whose saves are under way."""
        return [*self._saves.under_way, *(session for batch in self._batches for session in batch.under_way())]

    def age(self, tick: int) -> float:
        """How many seconds ago a tick was."""
        return (self.now_tick() - tick) * self.tick / SECOND

    def overdue(self) -> tuple[int, int]:
        """How many saves are under way for longer than the interval, and for how long the oldest, in nanoseconds."""
        now = self._clock.now()
        late = now - self._overdue_after
        saves = {session: save.started for session, save in self._saves.under_way.items() if save.started <= late}
        for batch, started in self._batches.items():
            if started <= late:
                saves |= dict.fromkeys(batch.under_way(), started)
        return len(saves), max((now - started for started in saves.values()), default=0)

    # Time

    def arm(self, *, extra: int = 0) -> None:
        """Have the timer wake us at the next deadline, or `extra` nanoseconds after it."""
        if self._closed or self._turn_is_queued or not self._loop.is_usable:
            return
        tick = self._table.next_deadline()
        if tick is None or (self._timer is not None and self._timer_tick <= tick):
            return
        if self._timer is not None:
            self._timer.cancel()
        now = self._clock.now()
        self._timer_tick = tick
        self._timer_due = max(tick * self.tick, now)
        delay = max(0, tick * self.tick - now + extra)
        self._timer = self._clock.call_later(delay, self._wake, self._context)

    def _wake(self) -> None:
        self._timer = None
        lag = self._clock.now() - self._timer_due
        if lag < 0:
            # loops may wake us a fraction of a millisecond early; asking for that fraction would spin
            self.arm(extra=SHORTEST_TICK)
            return
        self.tick_lag = lag
        self._turn()

    def _turn(self) -> None:
        """Move what is due into the lanes, for at most one slice; the rest in the next turn of the loop."""
        self._turn_is_queued = False
        if self._closed:
            return
        while self._table.advance(self.now_tick(), ROWS_PER_STEP, self._skip) == ROWS_PER_STEP:
            if self._loop.is_turn_over():
                self._turn_is_queued = True
                self._loop.call_soon(self._turn, context=self._context)
                break
        for session in list(self._carried):
            if session not in self._saves.asked:
                self._carried.pop(session, None)
            elif self._table.state(session) == "due":
                self._table.ask(session)  # somebody waits for it: not behind those whose time has come
        self._employ_unless_paused()
        self.arm()

    def interrupt(self) -> None:
        """Somebody has cancelled a task of ours, most likely to shut down the loop: begin no other for a while.

        A task begun then would be thrown away in the middle of its save.
        """
        if self._pause is None and not self._closed and self._loop.is_usable:
            self._pause = self._clock.call_later(PAUSE, self._go_on, self._context)

    def _go_on(self) -> None:
        self._pause = None
        self.employ()

    # Work

    def serves_periodic(self) -> bool:
        """Whether those may be taken now whose time has come."""
        return not self._draining and self._saver.serves_periodic()

    def employ(self) -> None:
        """Start workers for what is in the lanes, as far as there are free slots."""
        if self.gave_up is not None or not self._table.has_due():
            return
        if self._saver.may_start() and self._table.has_due(self.serves_periodic()):
            workers = self._workers
            wanted = self._table.counters.due - workers.starting
            if self._saver.one_at_a_time:
                wanted = min(wanted, 1 - workers.starting)
            for _ in range(min(workers.free, wanted)):
                workers.hire(self._loop, self._context)
        self._watch()

    def _watch(self) -> None:
        """Look once an interval, while there is anything to do, whether it gets done."""
        if self._watch_timer is None and not self._closed and self._loop.is_usable:
            self._watch_timer = self._clock.call_later(self._overdue_after, self._check_progress, self._context)

    def _check_progress(self) -> None:
        self._watch_timer = None
        count, oldest = self.overdue()
        if count:
            self._reports.error(SaveOverdueError(count, oldest / SECOND), None)
        waiting = self._table.has_due()
        if waiting and not self._draining and not self._saver.can_save():
            self._reports.error(
                NothingSavesError("sessions are due to be saved, and nobody listens to 'persist_user_data'"), None
            )
        self.employ()  # somebody else may have cancelled a worker
        if waiting or self._saves.under_way or self._batches:
            self._watch()

    async def _work(self, worker: Worker) -> None:
        """Save until the lanes are empty."""
        while True:
            await self._loop.take_turn()
            if self.gave_up is not None or self._workers.free < 0 or not self._saver.may_start():
                break
            if not await self._saver.serve(worker):
                break
        # here, and not when the task is seen to be done: whoever asks in between must find the slot free
        self._workers.finish(worker)

    # For savers

    def take_into(self, batch: SaveBatch, rows: int, size: int) -> int:
        """Fill a batch with sessions whose time has come; see `SaveBatch.fill`. Their saves are under way."""
        now = self._clock.now()
        self._batches.setdefault(batch, now)
        taken = batch.fill(rows, size, now // self.tick, self._interval_ticks, time.time())
        self.arm()  # who has not changed is due again
        return taken

    def settle_batch(self, batch: SaveBatch, verdicts: list[Any]) -> bool:
        """Settle the saves of a batch, if every verdict says that they are stored; see `SaveBatch.settle`."""
        left = batch.settle(verdicts, self._interval_ticks, self._saves.under_way)
        if left is None:
            return False
        self.arm()
        return True

    def take_left_out(self, batch: SaveBatch) -> Iterator[tuple[SessionCore, int, Save]]:
        """Take those out of a batch whose bytes are not fixed; they are like what `take` returns."""
        for session, version in batch.left_out():
            yield session, version, self._saves.enter(session, self._batches[batch])

    def end_batch(self, batch: SaveBatch) -> Iterator[tuple[SessionCore, int, Save, int, int]]:
        """What is left of a batch, to be settled: session, version, save, digest, and place in `records`."""
        started = self._batches.pop(batch, 0)
        for session, version, digest, place in batch.hand_over():
            save = self._saves.under_way.get(session) or self._saves.enter(session, started)
            yield session, version, save, digest, place

    def take(self, *, periodic: bool = True) -> tuple[SessionCore, int, Save] | None:
        """The next session to save, with its version; from here on its save is under way. None if there is nobody.

        Without `periodic`, those only who are asked for.
        """
        taken = self._table.take(periodic and self.serves_periodic())
        if taken is None:
            return None
        session, version = taken
        save = self._saves.asked.pop(session, None) or Save()
        save.started = self._clock.now()
        self._saves.under_way[session] = save
        return session, version, save

    def acknowledge(self, session: SessionCore, version: int, save: Save, receipt: Receipt | None) -> None:
        """A save has succeeded."""
        del self._saves.under_way[session]
        taken_at = save.started // self.tick
        deadline = self._table.due_after(session, taken_at, self._interval_ticks) if self._interval else None
        owned = self._table.acknowledge(session, version, taken_at, deadline)
        save.resolve(receipt)
        self._after_settled(session, owned, None)

    def note_duration(self, save: Save) -> None:
        """A listener has taken until now."""
        taken, average = (self._clock.now() - save.started) / SECOND, self.seconds_per_save
        self.seconds_per_save = average + (taken - average) / AVERAGE_OVER if average else taken

    def fail(self, session: SessionCore, version: int, save: Save, error: Exception, *, report: bool = True) -> None:
        """A save has failed. Whoever waits hears of it, unless there is patience left; then the next attempt counts."""
        del self._saves.under_way[session]
        heard = save.has_waiters
        is_retried = heard and save.is_retried and not isinstance(error, UnsavableError) and self.gave_up is None
        owned = self._table.fail(session, version, self._retry_tick(session, is_retried, error))
        if is_retried and owned and self._table.state(session) != "gone":
            self._wait_on(session, save, error)
            if self._table.is_ending(session):
                self._on_settled(session, error)
            return
        save.resolve(error)
        self._after_settled(session, owned, error)
        if report and not heard:
            self._reports.error(error, session)

    def drop(self, session: SessionCore, version: int, save: Save, error: Exception) -> None:
        """A save has failed, and no other is to be tried: the store will take nothing more of this session."""
        del self._saves.under_way[session]
        self._table.fail(session, version, None)
        save.resolve(error)
        later = self._saves.asked.pop(session, None)
        if later is not None:
            later.resolve(error)

    def _wait_on(self, session: SessionCore, save: Save, error: Exception) -> None:
        """Leave the callers of a failed attempt to the next one."""
        save.error = error
        self._carried[session] = None
        later = self._saves.asked.setdefault(session, save)
        if later is not save:  # somebody has asked meanwhile; all of them wait for the same save from now on
            later.error = error
            later.waiters |= save.waiters
        if not self._saver.may_start() and self._table.state(session) in ("idle", "ending"):
            self._table.ask(session)  # nothing is tried by the clock now: be among the first when it is
        self.arm()

    def _after_settled(self, session: SessionCore, owned: bool, error: Exception | None) -> None:
        if owned and self._table.is_ending(session):
            self._on_settled(session, error)
        self.arm()

    def _retry_tick(self, session: SessionCore, is_retried: bool, error: Exception) -> int | None:
        """When a failed save is tried again; None if only on request."""
        if not session.alive or self._table.state(session) == "gone":
            return None
        if self._interval is None and not is_retried and not self._table.is_ending(session):
            return None
        interval = self._interval or INTERVAL_FOR_RETRIES
        delay = min(interval // FIRST_RETRY << self._table.failures(session), interval // 2)
        if self._saver.timeout is not None:
            delay = min(delay, LONGEST_RETRY_OF_A_STORE)
        if isinstance(error, UnsavableError):
            delay = interval  # not before the data has had time to change
        if self._draining:
            delay = min(delay, LONGEST_RETRY_IN_DRAIN)
        if is_retried:
            delay = min(delay, LONGEST_RETRY_FOR_CALLER)
        return (self._clock.now() + int(delay * self._identity.random.uniform(0.5, 1.0))) // self.tick
