"""When to save, and how many at a time. What lives here: the one timer of a manager, the workers that perform saves,
who waits for which, retries and what is overdue. What must not: how a save is performed, or the end of a session.

A save passes through four hands: the wheel in the core says who is due; `_turn` moves them into the core's lanes, in
slices; up to `max_in_flight` workers have a `Saver` take from the lanes and save, one session at a time where a
listener does it, a batch where a store does; the outcome goes back to the core and to whoever waits. What waits for a
slot is a mark in a row of the core, never a task or a body.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from contextvars import Context
from typing import Any, Protocol

from ._core import SaveBatch, SessionCore, SessionTable
from .clock import Clock, TimerHandle
from .errors import (
    ListenerCancelledError,
    NothingSavesError,
    SaveOverdueError,
    SessionEndedError,
    StoreUnavailableError,
    UnsavableError,
)
from .options import SECOND, Options
from .records import Receipt
from .waits import Wait, listening

__all__ = ["Autosave", "Flight", "ListenerSaver", "SaveHost", "Saver"]

Outcome = Exception | Receipt | None
"""Of a save: what went wrong, or the receipt of the store, or None where a listener has saved."""

AVERAGE_OVER = 16
"""The duration of a save is averaged over about so many saves."""
LONGEST_TICK = SECOND // 100
SHORTEST_TICK = SECOND // 1000
ROWS_PER_STEP = 256
SLICE = SECOND // 2000
"""How long autosave works on the loop before others get a turn."""

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
PATIENCE_GRID = SECOND // 20
"""Callers whose patience ends within the same fraction of a second are told together."""


class SaveHost(Protocol):
    """What autosave needs of whoever it works for."""

    def report(self, error: Exception, session: SessionCore | None) -> None:
        """Take note of an error that no caller waits for."""
        ...

    def settled(self, session: SessionCore, error: Exception | None, flight: Flight) -> None:
        """A save of a session that is being ended has come to its end."""
        ...


class ListenerHost(SaveHost, Protocol):
    """What a saver by listeners needs besides."""

    def can_save(self) -> bool:
        """Whether there is such a listener."""
        ...

    async def perform(self, session: SessionCore) -> None:
        """Have the listeners save one session; raises if that failed."""
        ...

    def fingerprint(self, session: SessionCore) -> object:
        """Something that changes when the session's data does, and is not None."""
        ...


class Saver(Protocol):
    """How saves are performed."""

    one_at_a_time: bool
    """Whether a worker takes all there is before another is needed."""
    patience: int | None
    """For how many nanoseconds a caller waits while attempts fail; None if the first failure is the answer."""

    def can_save(self) -> bool:
        """Whether anybody would perform a save."""
        ...

    def may_start(self) -> bool:
        """Whether a worker may begin now; if not, `Autosave.employ` is called when it may."""
        ...

    def serves_periodic(self) -> bool:
        """Whether those may be taken now whose time has come."""
        ...

    async def serve(self, autosave: Autosave, worker: Worker) -> bool:
        """Take a load of work and save it: False if there was none.

        Between `Worker.start`, called as soon as all is taken, and the end every session taken is settled.
        """
        ...


class Flight:
    """A save that is asked for or under way, and who waits for it."""

    __slots__ = ("error", "fingerprint", "is_patient", "is_resolved", "outcome", "releases", "started", "waiters")

    def __init__(self, *, is_patient: bool = False) -> None:
        self.is_patient: bool = is_patient  # a failed attempt is not its end yet
        self.is_resolved: bool = False
        self.outcome: Outcome = None  # as far as whoever waits will hear of it, even if the save is still under way
        self.started: int = 0
        self.waiters: list[tuple[int | None, asyncio.Future[Outcome]]] = []  # each with the end of their patience
        self.error: Exception | None = None  # of the last attempt
        self.fingerprint: object = None  # of what is being saved, if the session was ending when it was fixed
        self.releases: bool = False  # the store lets go of the user with this save

    @property
    def has_waiters(self) -> bool:
        return bool(self.waiters) and any(not future.done() for _, future in self.waiters)

    def resolve(self, outcome: Outcome) -> None:
        if not self.is_resolved:
            self.is_resolved, self.outcome = True, outcome
            if self.waiters:
                self._tell(self.waiters, outcome)
                self.waiters = []

    def lose_patience(self, now: int, patience: int) -> None:
        """Tell those who have waited long enough; if nobody is left it is not waited for any longer."""
        late = [waiter for waiter in self.waiters if waiter[0] is not None and waiter[0] <= now]
        if late:
            outcome = _out_of_patience(patience, self.error)
            self._tell(late, outcome)
            self.waiters = [waiter for waiter in self.waiters if waiter[0] is None or waiter[0] > now]
            if not self.waiters:
                self.resolve(outcome)

    @staticmethod
    def _tell(waiters: list[tuple[int | None, asyncio.Future[Outcome]]], outcome: Outcome) -> None:
        for _, future in waiters:
            if not future.done():
                future.set_result(outcome)


class Worker:
    """A task that saves, and what is still to be accounted for when it ends."""

    __slots__ = ("_autosave", "released", "started", "task")

    def __init__(self, autosave: Autosave) -> None:
        self._autosave = autosave
        self.started: bool = False
        self.released: bool = False
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """It has taken what it could; what is left is for another."""
        if not self.started:
            self.started = True
            self._autosave._starting -= 1


class Autosave:
    """The saves of one manager."""

    def __init__(self, table: SessionTable, clock: Clock, options: Options, host: SaveHost, saver: Saver) -> None:
        self._table = table
        self._clock = clock
        self._host = host
        self._saver = saver
        self._max_in_flight = options.max_in_flight
        self._interval = options.interval
        self.tick: int = (
            min(LONGEST_TICK, max(SHORTEST_TICK, options.interval // 100)) if options.interval else LONGEST_TICK
        )
        self._interval_ticks = options.interval // self.tick if options.interval else 0
        # with `debug` nobody is passed over, for how else would a forgotten mark be seen
        self._skip = self._interval_ticks if options.tracking == "marked" and not options.debug else 0
        self._overdue_after = options.interval or 30 * SECOND
        self._jitter = random.Random(random.getrandbits(64))
        self._context: Context | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: TimerHandle | None = None
        self._wake_at = 0  # the tick the timer is set for
        self._wake_due = 0  # when it may be expected to fire
        self._watch_timer: TimerHandle | None = None
        self._slice_ends = 0
        self._turn_is_queued = False
        self._asked: dict[SessionCore, Flight] = {}
        self._in_flight: dict[SessionCore, Flight] = {}
        self._batches: dict[SaveBatch, int] = {}
        """Batches under way, and when each was begun; their sessions have a flight only if somebody asks for it."""
        self._carried: dict[SessionCore, None] = {}
        """Sessions of which somebody waits for the next attempt."""
        self._patience_timer: TimerHandle | None = None
        self._patience_at = 0  # what the timer is set for
        self._workers: set[asyncio.Task[None]] = set()
        self._employed = 0
        self._starting = 0  # of those employed, who have not looked for work yet
        self._lent = 0
        self._draining = False
        self._pause: TimerHandle | None = None
        self.gave_up: Exception | None = None
        self._closed = False
        self.seconds_per_save: float = 0.0  # of listeners, as a moving average
        self.tick_lag: int = 0
        self.slice_overruns: int = 0
        self._slice_is_overrun = False

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Work on this loop from now on."""
        self._loop = loop
        self._context = Context()  # not that of whoever happens to call first

    def now_tick(self) -> int:
        return self._clock.now() // self.tick

    def identify(self, session: SessionCore, user_id: int | str, user_data: object) -> None:
        """Give a session its user and its first deadline."""
        self._table.identify(session, user_id, user_data, self.now_tick(), self._interval_ticks)
        if self._interval:
            self._arm()

    async def save(self, session: SessionCore, until: int | None = None) -> Outcome:
        """Have a session saved as it is now, or later: the outcome, or at the end of the caller's patience its lack.

        Callers that come before the next save starts share it. Cancelling one of them stops the waiting, not the save.
        """
        if self.gave_up is not None:
            return self.gave_up
        self._table.ask(session)
        flight = self._asked.get(session)
        if flight is None:
            flight = self._asked[session] = Flight(is_patient=self._saver.patience is not None)
        outcome = self._outcome(flight, until or self.patience_ends())
        self.employ()
        return await outcome

    async def settle(self, session: SessionCore, until: int | None, outcome: Outcome = None) -> Outcome:
        """Wait until no save of a session is under way or asked for, or patience ends.

        Returns the outcome of the last one waited for, or the one given if there was none.
        """
        while flight := self._under_way(session) or self._asked.get(session):
            if self.gave_up is not None:
                return self.gave_up  # the save may be under way for ever
            if flight.is_resolved:
                return flight.outcome  # it is known as far as it will be: it is not waited for any longer
            outcome = await self._outcome(flight, until)
            if until is not None and self._clock.now() >= until:
                break
        return outcome

    def _under_way(self, session: SessionCore) -> Flight | None:
        flight = self._in_flight.get(session)
        if flight is None and self._batches and "saving" in self._table.state(session):
            for batch, started in self._batches.items():
                if session in batch.under_way():
                    return self._enter(session, started)
        return flight

    def _enter(self, session: SessionCore, started: int) -> Flight:
        flight = self._in_flight[session] = Flight()
        flight.started = started
        return flight

    def forget(self, session: SessionCore) -> None:
        """A session is past its last save: whoever has asked for another hears of it."""
        flight = self._asked.pop(session, None)
        if flight is not None:
            flight.resolve(SessionEndedError(f"the session has ended, or is past its last save ({session!r})"))

    # Patience

    def patience_ends(self) -> int | None:
        """Until when a caller who comes now waits while attempts fail; None if the first failure is the answer."""
        if self._saver.patience is None:
            return None
        return -(-(self._clock.now() + self._saver.patience) // PATIENCE_GRID) * PATIENCE_GRID

    def _outcome(self, flight: Flight, until: int | None) -> asyncio.Future[Outcome]:
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        flight.waiters.append((until, future))
        if until is not None:
            self._set_patience_timer(until)
        return future

    def _set_patience_timer(self, when: int) -> None:
        if self._closed or (self._patience_timer is not None and self._patience_at <= when):
            return
        if self._patience_timer is not None:
            self._patience_timer.cancel()
        self._patience_at = when
        delay = max(when - self._clock.now(), SHORTEST_TICK)
        assert self._context is not None
        self._patience_timer = self._clock.call_later(delay, self._lose_patience, self._context)

    def _lose_patience(self) -> None:
        """Tell callers who have waited long enough; their sessions stay due."""
        self._patience_timer = None
        now = self._clock.now()
        for flight in (*self._asked.values(), *self._in_flight.values()):
            flight.lose_patience(now, self._saver.patience or 0)
        self._asked = {session: flight for session, flight in self._asked.items() if not flight.is_resolved}
        flights = (*self._asked.values(), *self._in_flight.values())
        next_time = min((until for flight in flights for until, _ in flight.waiters if until), default=None)
        if next_time is not None:
            self._set_patience_timer(next_time)

    def ask_later(self, session: SessionCore) -> None:
        """Have a session saved after a pause; nobody waits for it."""
        self._table.ask(session)
        self.interrupt()

    def hasten(self, session: SessionCore) -> None:
        """Do not leave whoever waits for the next attempt to the timer: the session is to end."""
        if session in self._asked:
            self._table.ask(session)

    def kick(self) -> None:
        """Look again at what is due: a listener that saves has been registered."""
        if self._loop is not None and not self._loop.is_closed() and not self._closed:
            self._loop.call_soon(self._employ_unless_paused, context=self._context)

    def _employ_unless_paused(self) -> None:
        if self._pause is None:
            self.employ()

    def lend(self, slots: int) -> None:
        """A listener waits for another save, or does no longer: meanwhile its slot may be used for that one."""
        self._lent += slots
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
        for flight in (*self._in_flight.values(), *self._asked.values()):
            flight.resolve(error)
        self._asked.clear()

    def close(self) -> None:
        """Stop all timers."""
        self._closed = True
        for timer in (self._timer, self._watch_timer, self._pause, self._patience_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._watch_timer = self._pause = self._patience_timer = None

    def in_flight(self) -> list[SessionCore]:
        """The sessions whose saves are under way."""
        return [*self._in_flight, *(session for batch in self._batches for session in batch.under_way())]

    def age(self, tick: int) -> float:
        """How many seconds ago a tick was."""
        return (self.now_tick() - tick) * self.tick / SECOND

    def overdue(self) -> tuple[int, int]:
        """How many saves are under way for longer than the interval, and for how long the oldest, in nanoseconds."""
        now = self._clock.now()
        late = now - self._overdue_after
        saves = {session: flight.started for session, flight in self._in_flight.items() if flight.started <= late}
        for batch, started in self._batches.items():
            if started <= late:
                saves |= dict.fromkeys(batch.under_way(), started)
        return len(saves), max((now - started for started in saves.values()), default=0)

    async def slice(self) -> None:
        """Return in a turn of the loop that has time left for our work."""
        while self.slice_is_spent():  # noqa: ASYNC110 - there is no event: other callbacks are to have their turn
            await asyncio.sleep(0)

    def slice_is_spent(self) -> bool:
        """Whether this turn of the loop has had its share of our work. The first question of a turn is answered no."""
        now = self._clock.now()
        if self._slice_ends == 0:
            self._slice_ends = now + SLICE
            assert self._loop is not None
            self._loop.call_soon(self._open_slice)
            return False
        if now > self._slice_ends + SLICE and not self._slice_is_overrun:
            self._slice_is_overrun = True
            self.slice_overruns += 1
        return now > self._slice_ends

    def _open_slice(self) -> None:
        self._slice_ends = 0
        self._slice_is_overrun = False

    # Time

    def _arm(self, *, extra: int = 0) -> None:
        """Have the timer wake us at the next deadline, or `extra` nanoseconds after it."""
        if self._closed or self._turn_is_queued or self._loop is None or self._loop.is_closed():
            return
        tick = self._table.next_deadline()
        if tick is None or (self._timer is not None and self._wake_at <= tick):
            return
        if self._timer is not None:
            self._timer.cancel()
        now = self._clock.now()
        self._wake_at = tick
        self._wake_due = max(tick * self.tick, now)
        delay = max(0, tick * self.tick - now + extra)
        assert self._context is not None
        self._timer = self._clock.call_later(delay, self._wake, self._context)

    def _wake(self) -> None:
        self._timer = None
        lag = self._clock.now() - self._wake_due
        if lag < 0:
            # loops may wake us a fraction of a millisecond early; asking for that fraction would spin
            self._arm(extra=SHORTEST_TICK)
            return
        self.tick_lag = lag
        self._turn()

    def _turn(self) -> None:
        """Move what is due into the lanes, for at most one slice; the rest in the next turn of the loop."""
        self._turn_is_queued = False
        if self._closed:
            return
        while self._table.advance(self.now_tick(), ROWS_PER_STEP, self._skip) == ROWS_PER_STEP:
            if self.slice_is_spent():
                self._turn_is_queued = True
                assert self._loop is not None
                self._loop.call_soon(self._turn, context=self._context)
                break
        for session in list(self._carried):
            if session not in self._asked:
                self._carried.pop(session, None)
            elif self._table.state(session) == "due":
                self._table.ask(session)  # somebody waits for it: not behind those whose time has come
        self._employ_unless_paused()
        self._arm()

    def interrupt(self) -> None:
        """Somebody has cancelled a task of ours, most likely to shut down the loop: begin no other for a while.

        A task begun then would be thrown away in the middle of its save.
        """
        if self._pause is None and not self._closed and self._loop is not None and not self._loop.is_closed():
            assert self._context is not None
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
            free = self._max_in_flight + self._lent - self._employed
            wanted = self._table.counters.due - self._starting
            if self._saver.one_at_a_time:
                wanted = min(wanted, 1 - self._starting)
            for _ in range(min(free, wanted)):
                self._hire()
        self._watch()

    def _watch(self) -> None:
        """Look once an interval, while there is anything to do, whether it gets done."""
        if self._watch_timer is None and not self._closed and self._loop is not None and not self._loop.is_closed():
            assert self._context is not None
            self._watch_timer = self._clock.call_later(self._overdue_after, self._look, self._context)

    def _look(self) -> None:
        self._watch_timer = None
        count, oldest = self.overdue()
        if count:
            self._host.report(SaveOverdueError(count, oldest / SECOND), None)
        waiting = self._table.has_due()
        if waiting and not self._draining and not self._saver.can_save():
            self._host.report(
                NothingSavesError("sessions are due to be saved, and nobody listens to 'persist_user_data'"), None
            )
        self.employ()  # somebody else may have cancelled a worker
        if waiting or self._in_flight or self._batches:
            self._watch()

    def _hire(self) -> None:
        assert self._loop is not None and self._context is not None
        self._employed += 1
        self._starting += 1
        worker = Worker(self)
        worker.task = asyncio.Task(  # not by the loop's factory, which may run it here and now
            self._work(worker), loop=self._loop, name="cagey-sessions autosave", context=self._context.copy()
        )
        self._workers.add(worker.task)
        worker.task.add_done_callback(lambda task: self._dismiss(worker, task))

    async def _work(self, worker: Worker) -> None:
        """Save until the lanes are empty."""
        while True:
            await self.slice()
            is_wanted = self._employed <= self._max_in_flight + self._lent
            if self.gave_up is not None or not is_wanted or not self._saver.may_start():
                break
            if not await self._saver.serve(self, worker):
                break
        # here, and not when the task is seen to be done: whoever asks in between must find the slot free
        self._release(worker)

    def _release(self, worker: Worker) -> None:
        worker.start()
        self._employed -= not worker.released
        worker.released = True

    def _dismiss(self, worker: Worker, task: asyncio.Task[None]) -> None:
        """The task is done, perhaps because somebody cancelled it, perhaps before its first step."""
        self._workers.discard(task)
        self._release(worker)

    # For savers

    def take_into(self, batch: SaveBatch, rows: int, size: int) -> int:
        """Fill a batch with sessions whose time has come; see `SaveBatch.fill`. Their saves are under way."""
        now = self._clock.now()
        self._batches.setdefault(batch, now)
        taken = batch.fill(rows, size, now // self.tick, self._interval_ticks, time.time())
        self._arm()  # who has not changed is due again
        return taken

    def settle_batch(self, batch: SaveBatch, verdicts: list[Any]) -> bool:
        """Settle the saves of a batch, if every verdict says that they are stored; see `SaveBatch.settle`."""
        left = batch.settle(verdicts, self._interval_ticks, self._in_flight)
        if left is None:
            return False
        self._arm()
        return True

    def take_odd(self, batch: SaveBatch) -> Iterator[tuple[SessionCore, int, Flight]]:
        """Take those out of a batch whose bytes are not fixed; they are like what `take` returns."""
        for session, version in batch.odd():
            yield session, version, self._enter(session, self._batches[batch])

    def end_batch(self, batch: SaveBatch) -> Iterator[tuple[SessionCore, int, Flight, int, int]]:
        """What is left of a batch, to be settled: session, version, flight, digest, and place in `records`."""
        started = self._batches.pop(batch, 0)
        for session, version, digest, place in batch.hand_over():
            yield session, version, self._in_flight.get(session) or self._enter(session, started), digest, place

    def take(self, *, periodic: bool = True) -> tuple[SessionCore, int, Flight] | None:
        """The next session to save, with its version; from here on its save is under way. None if there is nobody.

        Without `periodic`, those only who are asked for.
        """
        taken = self._table.take(periodic and self.serves_periodic())
        if taken is None:
            return None
        session, version = taken
        flight = self._asked.pop(session, None) or Flight()
        flight.started = self._clock.now()
        self._in_flight[session] = flight
        return session, version, flight

    def acknowledge(self, session: SessionCore, version: int, flight: Flight, receipt: Receipt | None) -> None:
        """A save has succeeded."""
        del self._in_flight[session]
        taken_at = flight.started // self.tick
        deadline = taken_at + self._interval_ticks if self._interval else None
        owned = self._table.acknowledge(session, version, taken_at, deadline)
        flight.resolve(receipt)
        self._tell_host(session, owned, None, flight)

    def note_duration(self, flight: Flight) -> None:
        """A listener has taken until now."""
        taken, average = (self._clock.now() - flight.started) / SECOND, self.seconds_per_save
        self.seconds_per_save = average + (taken - average) / AVERAGE_OVER if average else taken

    def fail(
        self, session: SessionCore, version: int, flight: Flight, error: Exception, *, report: bool = True
    ) -> None:
        """A save has failed. Whoever waits hears of it, unless there is patience left; then the next attempt counts."""
        del self._in_flight[session]
        heard = flight.has_waiters
        is_patient = heard and flight.is_patient and not isinstance(error, UnsavableError) and self.gave_up is None
        owned = self._table.fail(session, version, self._retry_tick(session, is_patient, error))
        if is_patient and owned and self._table.state(session) != "gone":
            self._wait_on(session, flight, error)
            if self._table.is_ending(session):
                self._host.settled(session, error, flight)
            return
        flight.resolve(error)
        self._tell_host(session, owned, error, flight)
        if report and not heard:
            self._host.report(error, session)

    def drop(self, session: SessionCore, version: int, flight: Flight, error: Exception) -> None:
        """A save has failed, and no other is to be tried: the store will take nothing more of this session."""
        del self._in_flight[session]
        self._table.fail(session, version, None)
        flight.resolve(error)
        later = self._asked.pop(session, None)
        if later is not None:
            later.resolve(error)

    def _wait_on(self, session: SessionCore, flight: Flight, error: Exception) -> None:
        """Leave the callers of a failed attempt to the next one."""
        flight.error = error
        self._carried[session] = None
        later = self._asked.setdefault(session, flight)
        if later is not flight:  # somebody has asked meanwhile; all of them wait for the same save from now on
            later.error = error
            later.waiters += flight.waiters
        if not self._saver.may_start() and self._table.state(session) in ("idle", "ending"):
            self._table.ask(session)  # nothing is tried by the clock now: be among the first when it is
        self._arm()

    def _tell_host(self, session: SessionCore, owned: bool, error: Exception | None, flight: Flight) -> None:
        if owned and self._table.is_ending(session):
            self._host.settled(session, error, flight)
        self._arm()

    def _retry_tick(self, session: SessionCore, is_patient: bool, error: Exception) -> int | None:
        """When a failed save is tried again; None if only on request."""
        if session.end_reason is not None or self._table.state(session) == "gone":
            return None
        if self._interval is None and not is_patient and not self._table.is_ending(session):
            return None
        interval = self._interval or INTERVAL_FOR_RETRIES
        delay = min(interval // FIRST_RETRY << self._table.failures(session), interval // 2)
        if self._saver.patience is not None:
            delay = min(delay, LONGEST_RETRY_OF_A_STORE)
        if isinstance(error, UnsavableError):
            delay = interval  # not before the data has had time to change
        if self._draining:
            delay = min(delay, LONGEST_RETRY_IN_DRAIN)
        if is_patient:
            delay = min(delay, LONGEST_RETRY_FOR_CALLER)
        return (self._clock.now() + int(delay * self._jitter.uniform(0.5, 1.0))) // self.tick


class ListenerSaver:
    """Has the program save, one session at a time, in its listeners of ``persist_user_data``."""

    one_at_a_time = False
    patience: int | None = None

    def __init__(self, table: SessionTable, host: ListenerHost) -> None:
        self._table = table
        self._host = host

    def can_save(self) -> bool:
        return self._host.can_save()

    def may_start(self) -> bool:
        return True

    def serves_periodic(self) -> bool:
        return self._host.can_save()

    async def serve(self, autosave: Autosave, worker: Worker) -> bool:
        taken = autosave.take()
        worker.start()
        if taken is None:
            return False
        session, version, flight = taken
        error: Exception | None = ListenerCancelledError("the event loop was shut down during the save")
        try:
            if self._table.is_ending(session):
                flight.fingerprint = self._host.fingerprint(session)
            with listening(Wait(session, is_save=True), self._host, autosave.lend):
                await self._host.perform(session)
            error = None
        except asyncio.CancelledError:
            autosave.interrupt()
            raise
        except Exception as raised:
            error = raised
        finally:
            if error is None:
                autosave.note_duration(flight)
                autosave.acknowledge(session, version, flight, None)
            else:
                autosave.fail(session, version, flight, error)
        return True


def _out_of_patience(patience: int, last: Exception | None) -> StoreUnavailableError:
    error = StoreUnavailableError(
        f"the store has not acknowledged this save within {patience / SECOND:g} s; "
        "the session stays due, and is saved when the store is back"
    )
    error.__cause__ = last
    return error
