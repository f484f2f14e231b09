"""`Autosave`, the front of saving: when to save, how many workers there are, retries, and what is overdue.

A save goes through four steps. The wheel in the core says which sessions are due. `_turn` moves them into the core's
lanes, in slices. Up to `max_in_flight` workers have a `Saver` take sessions from the lanes and save them: one at a time
where listeners save, a batch at a time where a store does. The outcome goes back to the core and to the callers that
wait. A session that waits for a slot is a mark in its row of the core; no task and no bytes are kept for it.

Neither how a save is performed nor how a session ends is known here.

See also `in_flight` (callers), `workers` (slots), `saver` (what a saver is), `requests` (what programs ask for).
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
"""The wheel counts in ticks of a hundredth of the interval, between these bounds."""
SHORTEST_TICK = SECOND // 1000
ROWS_PER_STEP = 256
"""How many rows of the wheel are moved until it is seen whether this turn of the loop is over."""

PAUSE = SECOND
"""How long no task is begun after one of ours was cancelled from outside."""

FIRST_RETRY = 16
"""The first retry comes after this part of the interval; the delay doubles each time, up to half of the interval."""
INTERVAL_FOR_RETRIES = 16 * SECOND
"""The interval that retries are derived from if saves have none."""
LONGEST_RETRY_OF_A_STORE = 15 * SECOND
LONGEST_RETRY_IN_DRAIN = SECOND
LONGEST_RETRY_FOR_CALLER = SECOND
"""While a caller waits for a save that has failed."""


Settled = Callable[[SessionCore, Exception | None], None]
"""Called when a save of a session that is being ended has an outcome: None, or the error."""


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
        """Sessions of which no save begins any more, and why."""
        saver.bind(self)
        self._interval = options.interval
        self.tick: int = (
            min(LONGEST_TICK, max(SHORTEST_TICK, options.interval // 100)) if options.interval else LONGEST_TICK
        )
        self._interval_ticks = options.interval // self.tick if options.interval else 0
        # with `debug` every session is encoded when it is due: that is how a forgotten mark is found
        self._skip = self._interval_ticks if options.tracking == "marked" and not options.debug else 0
        self._overdue_after = options.interval or 30 * SECOND
        self._identity = identity
        self._context = Context()  # timers and tasks must not see the context variables of the first caller
        self._timer: TimerHandle | None = None
        self._timer_tick = 0
        self._timer_due = 0
        self._watch_timer: TimerHandle | None = None
        self._turn_is_queued = False
        self._saves = Saves(clock, saver.timeout)
        self._batches: dict[SaveBatch, int] = {}
        """Batches under way, and when each was begun. Their sessions have a `Save` only if a caller waits for it."""
        self._carried: dict[SessionCore, None] = {}
        """Sessions whose last attempt failed while a caller waits: the callers wait for the next attempt."""
        self._workers = WorkerPool(options.max_in_flight, self._work)
        self._draining = False
        self._pause: TimerHandle | None = None
        self.gave_up: Exception | None = None
        self._closed = False
        self.seconds_per_save: float = 0.0
        """Of listeners, as a moving average: what the estimate of a drain is made from."""
        self.tick_lag: int = 0

    def now_tick(self) -> int:
        return self._clock.now() // self.tick

    def identify(self, session: SessionCore, user_id: int | str, user_data: object) -> None:
        """Give a session its user and its first deadline."""
        self._table.identify(session, user_id, user_data, self.now_tick(), self._interval_ticks)
        if self._interval:
            self.arm()

    async def save(self, session: SessionCore, until: int | None = None) -> SaveOutcome:
        """Have a session saved as it is now or later, and return the outcome, or an error at `until`.

        Callers that come before the next save starts share it. Cancelling a caller does not cancel the save.
        """
        if self.gave_up is not None:
            return self.gave_up
        self._table.ask(session)
        saves = self._saves
        save = saves.ask(session)
        self.employ()
        return await saves.join(session, save, until or saves.caller_deadline())

    async def wait_settled(self, session: SessionCore, until: int | None, outcome: SaveOutcome = None) -> SaveOutcome:
        """Wait until no save of a session is under way or asked for, at most until `until`.

        Returns the outcome of the last save that was waited for, or `outcome` if there was none.
        """
        while save := self._under_way(session) or self._saves.asked.get(session):
            if self.gave_up is not None:
                return self.gave_up  # the save may be under way for ever
            if save.is_resolved:
                return save.outcome  # a call hangs: the save stays under way, but its callers have been answered
            outcome = await self._saves.join(session, save, until)
            if until is not None and self._clock.now() >= until:
                break
        return outcome

    def _under_way(self, session: SessionCore) -> Save | None:
        save = self._saves.under_way.get(session)
        if save is None and self._batches and "saving" in self._table.state(session):
            # a batch keeps no `Save` for its sessions; from now on this one has its own, so that it can be waited for
            for batch, started in self._batches.items():
                if session in batch.under_way():
                    return self._saves.enter(session, started)
        return save

    def caller_deadline(self) -> int | None:
        """See `Saves.caller_deadline`."""
        return self._saves.caller_deadline()

    def refuse_asked(self, session: SessionCore) -> None:
        """A session is past its last save: answer the callers that have asked for another one."""
        self._saves.refuse_asked(session)

    def stop(self, session: SessionCore, error: Exception) -> None:
        """Begin no save of a session any more, because it has lost its user. Later callers get `error`."""
        if self._table.state(session) != "gone":
            self._table.lose(session)
            self._stopped[session] = error

    def loss_of(self, session: SessionCore) -> Exception | None:
        """Why no save of a session begins any more; None if saves do."""
        return self._stopped.get(session)

    def forget(self, session: SessionCore) -> None:
        """The session has ended: drop what is kept of it."""
        self._stopped.pop(session, None)

    def ask_later(self, session: SessionCore) -> None:
        """Have a session saved after the pause that follows a cancellation; no caller waits for it."""
        self._table.ask(session)
        self.interrupt()

    def hasten(self, session: SessionCore) -> None:
        """Try again at once if a caller waits for the next attempt: the session is about to end."""
        if session in self._saves.asked:
            self._table.ask(session)

    def kick(self) -> None:
        """In the next turn of the loop, start workers for what is due. For savers, when they may save again."""
        if self._loop.is_usable and not self._closed:
            self._loop.call_soon(self._employ_unless_paused, context=self._context)

    def _employ_unless_paused(self) -> None:
        if self._pause is None:
            self.employ()

    def free_slots(self, slots: int) -> None:
        """A listener begins (1) or stops (-1) to wait for another save. While it waits its slot is free for that one.

        Otherwise listeners that wait for saves could take all slots, and none of those saves would ever begin.
        """
        self._workers.free += slots
        if slots > 0:
            self.employ()

    def drain(self, draining: bool = True) -> None:
        """From now on save only what is asked for, not what is due by the timer; with False, both again."""
        self._draining = draining
        if not draining:
            self.gave_up = None
            self._watch()

    def give_up(self, error: Exception) -> None:
        """From now on let no caller wait and begin no save; those that are under way go on."""
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
        """How many seconds ago a tick of the wheel was."""
        return (self.now_tick() - tick) * self.tick / SECOND

    def overdue(self) -> tuple[int, int]:
        """How many saves have been under way for longer than the interval, and the longest time, in nanoseconds."""
        now = self._clock.now()
        late = now - self._overdue_after
        saves = {session: save.started for session, save in self._saves.under_way.items() if save.started <= late}
        for batch, started in self._batches.items():
            if started <= late:
                saves |= dict.fromkeys(batch.under_way(), started)
        return len(saves), max((now - started for started in saves.values()), default=0)

    # Time

    def arm(self, *, extra: int = 0) -> None:
        """Set the timer to the next deadline of the wheel, or `extra` nanoseconds after it."""
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
            # event loops may wake us a fraction of a millisecond early; a timer for that fraction would spin
            self.arm(extra=SHORTEST_TICK)
            return
        self.tick_lag = lag
        self._turn()

    def _turn(self) -> None:
        """Move due sessions into the lanes, for one slice of time; the rest follows in the next turn of the loop."""
        self._turn_is_queued = False
        if self._closed:
            return
        while self._table.advance(self.now_tick(), ROWS_PER_STEP, self._skip) == ROWS_PER_STEP:
            if self._loop.is_turn_over():
                self._turn_is_queued = True
                self._loop.call_soon(self._turn, context=self._context)
                break
        # callers of a failed attempt wait for these: when the wheel makes them due again they go into the urgent lane
        for session in list(self._carried):
            if session not in self._saves.asked:
                self._carried.pop(session, None)
            elif self._table.state(session) == "due":
                self._table.ask(session)
        self._employ_unless_paused()
        self.arm()

    def interrupt(self) -> None:
        """One of our tasks was cancelled from outside, probably by the shutdown of the loop: pause before the next.

        `asyncio.run` cancels all tasks when it shuts down. A task begun then would be cancelled in the middle of its
        save, and a third one begun for it, and so on.
        """
        if self._pause is None and not self._closed and self._loop.is_usable:
            self._pause = self._clock.call_later(PAUSE, self._go_on, self._context)

    def _go_on(self) -> None:
        self._pause = None
        self.employ()

    # Work

    def serves_periodic(self) -> bool:
        """Whether sessions may be taken now that only the timer wants saved."""
        return not self._draining and self._saver.serves_periodic()

    def employ(self) -> None:
        """Start workers for what is in the lanes, as far as slots are free."""
        if self.gave_up is not None or not self._table.has_due():
            return
        if self._saver.may_start() and self._table.has_due(self.serves_periodic()):
            workers = self._workers
            # a worker that was started and has not looked into the lanes yet will take something of what is due
            wanted = self._table.counters.due - workers.starting
            if self._saver.one_at_a_time:
                wanted = min(wanted, 1 - workers.starting)
            for _ in range(min(workers.free, wanted)):
                workers.hire(self._loop, self._context)
        self._watch()

    def _watch(self) -> None:
        """Check once an interval, while there is work, that it gets done."""
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
        self.employ()  # a worker may have been cancelled from outside, and nothing else would start the next one
        if waiting or self._saves.under_way or self._batches:
            self._watch()

    async def _work(self, worker: Worker) -> None:
        """Save until the lanes are empty."""
        while True:
            await self._loop.take_turn()
            # `free` is below zero when a slot that a waiting listener had lent is needed again
            if self.gave_up is not None or self._workers.free < 0 or not self._saver.may_start():
                break
            if not await self._saver.serve(worker):
                break
        # not in a callback of the task: a caller that asks for a save in between would find no free slot
        self._workers.finish(worker)

    # For savers

    def take_into(self, batch: SaveBatch, rows: int, size: int) -> int:
        """Fill a batch with due sessions; see `SaveBatch.fill`. Their saves are under way from here on."""
        now = self._clock.now()
        self._batches.setdefault(batch, now)
        taken = batch.fill(rows, size, now // self.tick, self._interval_ticks, time.time())
        self.arm()  # sessions that have not changed are not in the batch, and have a new deadline
        return taken

    def settle_batch(self, batch: SaveBatch, verdicts: list[Any]) -> bool:
        """Settle all saves of a batch if every verdict says that they are stored; otherwise do nothing.

        Returns whether they were settled. See `SaveBatch.settle`.
        """
        left = batch.settle(verdicts, self._interval_ticks, self._saves.under_way)
        if left is None:
            return False
        self.arm()
        return True

    def take_left_out(self, batch: SaveBatch) -> Iterator[tuple[SessionCore, int, Save]]:
        """Take those sessions out of a batch whose bytes could not be fixed in the core; as from `take`."""
        for session, version in batch.left_out():
            yield session, version, self._saves.enter(session, self._batches[batch])

    def end_batch(self, batch: SaveBatch) -> Iterator[tuple[SessionCore, int, Save, int, int]]:
        """What is left of a batch and has yet to be settled: session, version, save, digest, place in `records`."""
        started = self._batches.pop(batch, 0)
        for session, version, digest, place in batch.hand_over():
            save = self._saves.under_way.get(session) or self._saves.enter(session, started)
            yield session, version, save, digest, place

    def take(self, *, periodic: bool = True) -> tuple[SessionCore, int, Save] | None:
        """Take the next session to save, with its version and its save, which is under way from here on; or None.

        Without `periodic`, only a session for which a save was asked.
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
        """A save has succeeded: tell the core, the callers, and the end of the session if it is being ended."""
        del self._saves.under_way[session]
        taken_at = save.started // self.tick
        # the next deadline counts from when the save began, so that a slow store does not make saves rarer
        deadline = self._table.due_after(session, taken_at, self._interval_ticks) if self._interval else None
        owned = self._table.acknowledge(session, version, taken_at, deadline)
        save.resolve(receipt)
        self._after_settled(session, owned, None)

    def note_duration(self, save: Save) -> None:
        """Count the time of a save that a listener has just finished."""
        taken, average = (self._clock.now() - save.started) / SECOND, self.seconds_per_save
        self.seconds_per_save = average + (taken - average) / AVERAGE_OVER if average else taken

    def fail(self, session: SessionCore, version: int, save: Save, error: Exception, *, report: bool = True) -> None:
        """A save has failed. Callers that still have time wait for the next attempt; the others get the error.

        If no caller hears of the error it is reported, unless `report` is false.
        """
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
        """A save has failed for good: the session has lost its user, and the store takes nothing more of it."""
        del self._saves.under_way[session]
        self._table.fail(session, version, None)
        save.resolve(error)
        later = self._saves.asked.pop(session, None)
        if later is not None:
            later.resolve(error)

    def _wait_on(self, session: SessionCore, save: Save, error: Exception) -> None:
        """Have the callers of a failed attempt wait for the next one."""
        save.error = error
        self._carried[session] = None
        later = self._saves.asked.setdefault(session, save)
        if later is not save:  # another caller has asked meanwhile: all of them wait for the same save from now on
            later.error = error
            later.waiters |= save.waiters
        if not self._saver.may_start() and self._table.state(session) in ("idle", "ending"):
            # the store is down, and time alone starts no attempt: be in the lanes when it is back
            self._table.ask(session)
        self.arm()

    def _after_settled(self, session: SessionCore, owned: bool, error: Exception | None) -> None:
        if owned and self._table.is_ending(session):
            self._on_settled(session, error)
        self.arm()

    def _retry_tick(self, session: SessionCore, is_retried: bool, error: Exception) -> int | None:
        """The tick at which a failed save is tried again; None if only when a caller asks."""
        if not session.alive or self._table.state(session) == "gone":
            return None
        if self._interval is None and not is_retried and not self._table.is_ending(session):
            return None
        interval = self._interval or INTERVAL_FOR_RETRIES
        # the random part below spreads the retries of many sessions that have failed together
        delay = min(interval // FIRST_RETRY << self._table.failures(session), interval // 2)
        if self._saver.timeout is not None:
            delay = min(delay, LONGEST_RETRY_OF_A_STORE)
        if isinstance(error, UnsavableError):
            delay = interval  # the same data would fail again: give it time to change
        if self._draining:
            delay = min(delay, LONGEST_RETRY_IN_DRAIN)
        if is_retried:
            delay = min(delay, LONGEST_RETRY_FOR_CALLER)
        return (self._clock.now() + int(delay * self._identity.random.uniform(0.5, 1.0))) // self.tick
