"""The link to the store: every call of it, their deadlines, and whether the store is up or down.

A call is a task of its own, and never cancelled here. A call that has not returned at its deadline has an *unknown
outcome*: it may still take effect. The store is told to `abort` it, and the task is watched until it returns.

The store goes *down* when a call fails to reach it, and comes back *up* when a call succeeds; the failure of a call
that began before the latest success does not count. While it is down one call at a time is let through, as a *probe*,
to see whether it is back: the half-open state of a circuit breaker (Nygard, "Release It!", 2007). In a store whose
users fail independently, the failure of one user's call is not yet an outage; failures of several users in a row are.

What a call is for is up to the modules above: claims, saves, releases.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextvars import Context
from typing import Any, Generic, TypeVar

from ..clock import Clock, TimerHandle
from ..errors import CageySessionsError, StoreContractError, StoreError, StoreUnavailableError
from ..loop import Loop
from ..options import SECOND
from ..process import Identity
from ..user_code import END_OF_PROCESS, is_for_this_task
from ..wording import quote
from . import Record, Store, Verdict

__all__ = ["FIRST_RETRY", "LONGEST_RETRY", "Call", "CallTimedOutError", "StoreLink"]

T = TypeVar("T")

FIRST_PROBE = SECOND // 10
"""The time from the moment the store goes down to the first probe. It doubles with each probe that fails..."""
LONGEST_PROBE = SECOND
"""... up to this."""
AVERAGE_OVER = 16
"""The latency is a moving average over about so many calls."""
MOST_FAILING = 8
"""In a store whose users fail independently: how many calls, each for different users, may fail in a row. If it is
more, the store counts as down."""
FIRST_RETRY = SECOND // 20
LONGEST_RETRY = SECOND
"""The pause between two attempts of a call that a caller waits for, or of a release; it doubles up to this."""
CLOSING = SECOND
"""How long `close` waits for the calls under way, and then once more for the store itself to close."""


class CallTimedOutError(StoreUnavailableError):
    """A call has not returned at its deadline. It may still take effect."""


class Call(Generic[T]):
    """One call of the store, from its beginning until it returns, however late that is."""

    __slots__ = ("_link", "is_probe", "started", "task", "users")

    def __init__(
        self,
        link: StoreLink,
        task: asyncio.Task[T],
        started: int,
        is_probe: bool,
        users: frozenset[int | str],
    ) -> None:
        self._link = link
        self.users: frozenset[int | str] = users
        self.task: asyncio.Task[T] = task
        self.started: int = started
        self.is_probe: bool = is_probe

    async def answer(self, until: int | None = None) -> T:
        """Wait for the call, and return or raise what it does. At its deadline raises `CallTimedOutError`.

        So it does at `until`, in nanoseconds of the clock, if the caller cannot wait for as long as the call may take.
        """
        left = self._left()
        limit = left if until is None else min(left, until - self._link.now())
        try:
            await self._link.loop.wait(self.task, limit)
        except asyncio.CancelledError:
            # The caller goes away, the call goes on. A timer sees to its deadline in the caller's place.
            self._link.bound(self, self._left())
            raise
        if not self.task.done() and limit < left:
            self._link.bound(self, self._left())
            raise CallTimedOutError(f"{self._link.name} has not answered in the time that this call had left")
        if not self.task.done():
            self._link.give_up_on(self)
            raise CallTimedOutError(f"{self._link.name} did not answer within {self._link.timeout / SECOND:g} s")
        return self.result()

    def _left(self) -> int:
        return self._link.timeout - (self._link.now() - self.started)

    async def end(self) -> None:
        """Wait until the call has returned, without a deadline."""
        await self._link.loop.wait(self.task, None)

    def result(self) -> T:
        """Return or raise what the call did; only once it has returned."""
        if self.task.cancelled():
            raise StoreUnavailableError(f"a call of {self._link.name} was cancelled")
        error = self.task.exception()
        if error is None:
            return self.task.result()
        is_of_users = self._link.store.independent  # the error concerns these users, not what all users depend on
        if isinstance(error, StoreError) or is_of_users or not isinstance(error, (OSError, TimeoutError)):
            raise error
        raise StoreUnavailableError(f"{self._link.name} cannot be reached ({type(error).__name__})") from error


class StoreLink:
    """All calls of one store."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        loop: Loop,
        timeout: int,
        identity: Identity,
        say: Callable[..., None],
        prepare: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self.store = store
        self.name: str = store.name
        self.timeout = timeout
        self.loop = loop
        self.now: Callable[[], int] = clock.now
        self._clock = clock
        self._say = say
        self._identity = identity
        self._prepare = prepare
        self._opening: asyncio.Task[None] | None = None
        self._calls: dict[asyncio.Task[Any], None] = {}  # under way, the oldest first
        self._writes: dict[int | str, asyncio.Task[Any]] = {}
        """In an unfenced store: by user, the last write or erasure that has not returned. See `outlast`."""
        self._last_success = -1
        """When the latest call began that has succeeded; older calls that fail say nothing about the store now."""
        self._failing: list[frozenset[int | str]] = []
        """If users fail independently: the users of each call that failed since one succeeded; no user is in two."""
        self._probe: Call[Any] | None = None
        self._probe_delay = FIRST_PROBE
        self._probe_at = 0
        self._probe_timer: TimerHandle | None = None
        self._on_change: Callable[[], None] = lambda: None
        self._incarnation = ""
        self.losses: int = 0
        """How often the engine may have lost acknowledged saves, because it was restarted or replaced."""
        self.returns: int = 0
        """How often the store has come back up."""
        self._admission: asyncio.Future[None] | None = None
        self.down_since: int | None = None
        self.last_error: Exception | None = None
        self.latency: float = 0.0
        self._closing = False
        self._closer: asyncio.Task[None] | None = None
        self.closed: bool = False

    def watch(self, on_change: Callable[[], None]) -> None:
        """Set the function to call when a call may begin again, and when `losses` or `returns` has grown."""
        self._on_change = on_change

    # Opening and closing

    async def open(self) -> None:
        """Open the store, once: callers that come meanwhile wait for the same attempt. A failed one may be repeated.

        `prepare`, as given to the constructor, is awaited first. Raises what it and the store raise,
        `StoreUnavailableError` if the store does not open within the deadline of a call, and `StoreContractError` while
        another manager has the store open.
        """
        if self._closing:
            raise StoreUnavailableError(f"{self.name} is closed: the manager was destroyed")
        if self._prepare is not None:
            await self._prepare()
        if not self._has_store():
            holder = None if self.store._link is None else self.store._link()
            if holder is not None and holder._has_store():
                raise StoreContractError(f"this {self.name} is open already; make one for each manager")
            self.store._link = weakref.ref(self)
            self._opening = self._spawn(self.store.open)
        assert self._opening is not None
        await self.loop.wait(self._opening, self.timeout)
        if not self._opening.done():
            raise StoreUnavailableError(f"{self.name} could not be opened within {self.timeout / SECOND:g} s")
        if self._opening.cancelled():  # by somebody else: this caller was not cancelled
            raise StoreUnavailableError(f"the task that opened {self.name} was cancelled")
        self._opening.result()

    def _has_store(self) -> bool:
        """Whether this link has opened the store, or is opening it. After a failed attempt any manager may open it."""
        opening = self._opening
        if opening is None or not opening.done():
            return opening is not None
        return not opening.cancelled() and opening.exception() is None

    async def close(self) -> None:
        """Wait up to `CLOSING` for the calls under way, then close the store. Logs errors, and never raises.

        A caller that is cancelled does not stop it, and one that comes later waits for the same.
        """
        if not self._closing:
            self._closing = True
            self._closer = self.loop.spawn(self._close(), "store close", Context())
        if self._closer is not None and not self._closer.done():
            await self.loop.wait(self._closer, None)

    async def _close(self) -> None:
        self._stop_probing()
        self._wake()
        until = self.now() + CLOSING
        while self._calls and self.now() < until:
            await self.loop.wait(next(iter(self._calls)), until - self.now())
            # A task that waited for this call may make another one, such as a release after a save. It needs one turn
            # of the loop to wake up, and one to begin the call.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        self.closed = True
        if not self._has_store():
            return  # never opened here; another manager may have it open
        closing = self._spawn(self.store.close)
        await self.loop.wait(closing, CLOSING)
        self._opening = None  # another manager may open the store now
        if not closing.done():
            self._say("error", "%s did not close within %g s", self.name, CLOSING / SECOND)
        elif closing.cancelled() or closing.exception() is not None:
            error = None if closing.cancelled() else closing.exception()
            self._say("error", "%s could not be closed: %s", self.name, type(error or asyncio.CancelledError).__name__)

    # Calling

    def start(
        self, users: Iterable[int | str], method: Callable[..., Coroutine[Any, Any, T]], *args: object
    ) -> Call[T]:
        """Begin a call of a method of the store for some users, and return it."""
        call = Call(self, self._spawn(method, *args), self.now(), self.down, frozenset(users))
        if call.is_probe:
            self._probe = call
        call.task.add_done_callback(lambda _: self._on_returned(call))
        return call

    async def ask(
        self, method: Callable[..., Coroutine[Any, Any, T]], user_id: int | str, *, until: int | None = None
    ) -> T:
        """Begin a call for one user and wait for its answer; see `Call.answer`."""
        return await self.start((user_id,), method, user_id).answer(until)

    def _spawn(self, method: Callable[..., Coroutine[Any, Any, T]], *args: object) -> asyncio.Task[T]:
        async def run() -> T:
            task = asyncio.current_task()
            try:
                return await method(*args)  # called here, so that an error before its first await is caught, too
            except Exception:
                raise
            except BaseException as error:
                if is_for_this_task(error, task):
                    raise
                # A CancelledError that the store's own code raised, for one. As a task's own cancellation it would look
                # as if the process were ending.
                raised = f"a call of {self.name} raised {type(error).__name__}; what it has done is unknown"
                raise StoreUnavailableError(raised) from error

        # An empty context: the call may outlive its caller, and must not count as part of the listener that made it.
        task = self.loop.spawn(run(), "store call", Context())
        self._calls[task] = None
        task.add_done_callback(self._calls.pop)
        task.add_done_callback(_mark_retrieved)
        return task

    def give_up_on(self, call: Call[Any]) -> None:
        """Count a call as failed, because its deadline has passed, and tell the store to abort it."""
        if self._probe is call:
            self._probe = None  # it may never return, and must not keep the next probe from beginning
        self._failed_call(call, CallTimedOutError(f"{self.name} does not answer"))
        try:
            self.store.abort(call.task)
        except END_OF_PROCESS:
            raise
        except BaseException as error:
            self._say("error", "%s could not abort a call: %s", self.name, type(error).__name__)

    def bound(self, call: Call[Any], left: int) -> None:
        """Enforce the deadline of a call, in `left` nanoseconds, after its caller has gone away."""

        def give_up() -> None:
            if not call.task.done() and not self.closed:
                self.give_up_on(call)

        timer = self._clock.call_later(max(0, left), give_up, Context())
        call.task.add_done_callback(lambda _: timer.cancel())

    def write(self, records: list[Record]) -> Call[list[Verdict]]:
        """Begin a call of `Store.save_many`. In an unfenced store it is remembered until it returns; see `outlast`."""
        user_ids = [record.user_id for record in records]
        call = self.start(user_ids, self.store.save_many, records)
        if not self.store.fenced:
            self._track_write(call.task, user_ids)
        return call

    async def erase(self, user_id: int | str, owner: str, until: int) -> bool:
        """Call `Store.erase`, after any write of the user that `outlast` waits for; it is waited for like one itself.

        Also where the store is fenced: no epoch fences off an erasure of our own, and one that was given up, or whose
        caller was cancelled, would erase what is saved and acknowledged after it.
        """
        await self.outlast(user_id, until)
        call = self.start((user_id,), self.store.erase, user_id, owner)
        self._track_write(call.task, [user_id])
        return await call.answer(until)

    async def outlast(self, user_id: int | str, until: int) -> None:
        """Wait until what no fence stops has returned, before a user is claimed or erased.

        That is an erasure, and in an unfenced store any write: it would land on top of newer data. Raises
        `StoreUnavailableError` if it has not returned within the deadline of a call.
        """
        while (write := self._writes.get(user_id)) is not None and not write.done():
            if not await self.loop.wait(write, until - self.now()):
                raise StoreUnavailableError(
                    f"an earlier write of user {quote(user_id)} has not returned, and would land on top of what follows"
                )

    def _track_write(self, task: asyncio.Task[Any], user_ids: list[int | str]) -> None:
        """Remember a call until it returns; see `outlast`."""
        for user_id in user_ids:
            self._writes[user_id] = task

        def untrack(_: object) -> None:
            for user_id in user_ids:
                if self._writes.get(user_id) is task:
                    del self._writes[user_id]

        task.add_done_callback(untrack)

    def _on_returned(self, call: Call[Any]) -> None:
        """See what the result of a call says about the store: up, down, or nothing."""
        if self._probe is call:
            self._probe = None
        if call.task.cancelled():
            self.failed(call.started, StoreUnavailableError("a call was cancelled"))
            return
        error = call.task.exception()
        if error is None:
            self._succeeded(call)
        elif isinstance(error, StoreUnavailableError):
            self.failed(call.started, error)
        elif isinstance(error, (OSError, TimeoutError)):
            self._failed_call(call, error)
        elif call.is_probe and isinstance(error, Exception):
            self.failed(call.started, error)  # a probe has to succeed: any error shows that the store is not well yet
        elif self.store.independent and isinstance(error, Exception) and not isinstance(error, StoreError):
            self._failed_call(call, error)
        else:
            self._wake()  # the store has answered, with a refusal: it is reached, and the next call may begin

    async def persistently(self, work: Callable[[int], Awaitable[T]]) -> T:
        """Await `work(until)`, and repeat it while the store is unavailable, until the deadline of a call has passed.

        `until` is that moment, in nanoseconds of the clock. The store is opened first. Raises what `work` raises if
        that is not about the store, and `StoreUnavailableError` otherwise.
        """
        until = self.now() + self.timeout
        delay = FIRST_RETRY
        while True:
            while not self.may_call() and self.now() < until and not self.closed:
                await self.loop.sleep(FIRST_RETRY)
            if not self.may_call():
                raise StoreUnavailableError(f"{self.name} is down")
            try:
                await self.open()
                return await work(until)
            except Exception as error:
                if isinstance(error, CageySessionsError) and not isinstance(error, StoreUnavailableError):
                    raise
                if self.now() + delay >= until or self.closed:
                    if isinstance(error, StoreUnavailableError):
                        raise
                    raise StoreUnavailableError(f"{self.name} raised {type(error).__name__}") from error
            await self.loop.sleep(delay)
            delay = min(2 * delay, LONGEST_RETRY)

    # Up and down

    @property
    def fails_for_several(self) -> bool:
        """If users fail independently: whether calls of different users have failed with no success in between."""
        return len(self._failing) > 1

    @property
    def down(self) -> bool:
        """Whether the store counts as unreachable."""
        return self.down_since is not None

    def may_call(self) -> bool:
        """Whether a call may begin now: always while the store is up; as a probe, one at a time, while it is down."""
        return not self.down or (self._probe is None and self.now() >= self._probe_at)

    async def admission(self) -> None:
        """Wait until a call may begin, or the link closes."""
        while not self.may_call() and not self._closing:
            if self._admission is None:
                self._admission = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._admission)

    def _succeeded(self, call: Call[Any]) -> None:
        """A call has reached the store: it is up. Also notices when the engine is not the one of the last call."""
        now = self.now()
        self._last_success = max(self._last_success, call.started)
        self._failing.clear()
        taken = (now - call.started) / SECOND
        if self.store.incarnation != self._incarnation:  # "" at the first call, which loses nothing
            before, self._incarnation = self._incarnation, self.store.incarnation
            if before:
                self._say("warning", "the engine of %s was started anew; everybody is written again", self.name)
                self.losses += 1
                self._on_change()
        self.latency = taken if not self.latency else self.latency + (taken - self.latency) / AVERAGE_OVER
        if self.down_since is not None:
            self._say("warning", "%s is back after %.1f s", self.name, (now - self.down_since) / SECOND)
            self.down_since = None
            self._probe_delay = FIRST_PROBE
            self._stop_probing()
            self.returns += 1
            self._wake()

    def _failed_call(self, call: Call[Any], error: Exception) -> None:
        """A call has failed or hangs. If users fail independently, the store is down only after several of them."""
        if not self.store.independent or self.down:
            self.failed(call.started, error)
            return
        self.last_error = error
        # A second failure of the same users says nothing new: their rows may be the cause.
        if call.started > self._last_success and all(call.users.isdisjoint(others) for others in self._failing):
            self._failing.append(call.users)
        if len(self._failing) > MOST_FAILING:
            self.failed(call.started, error)
        else:
            self._wake()

    def failed(self, started: int, error: Exception) -> None:
        """Count the store as down, because a call that began at `started` did not reach it, or may not have."""
        self.last_error = error
        if self._closing or started <= self._last_success:
            return  # a call that began later has succeeded
        now = self.now()
        if self.down_since is None:
            self.down_since = now
            self._say(
                "error", "%s is down: %s", self.name, error if isinstance(error, StoreError) else type(error).__name__
            )
        elif self._probe_timer is not None and now < self._probe_at:
            return  # several calls fail at once, and the first of them has set the time of the next probe
        # spread, so that many processes do not probe an engine that has just come back all at once
        self._probe_at = now + int(self._probe_delay * self._identity.random.uniform(0.5, 1.0))
        self._probe_delay = min(self._probe_delay * 2, LONGEST_PROBE)
        self._stop_probing()
        self._probe_timer = self._clock.call_later(self._probe_at - now, self._let_probe, Context())

    def _let_probe(self) -> None:
        """The time of the next probe has come: let whoever waits for admission make it."""
        self._probe_timer = None
        if self.now() < self._probe_at:  # an event loop may wake us a fraction of a millisecond early
            self._probe_timer = self._clock.call_later(SECOND // 1000, self._let_probe, Context())
            return
        self._wake()

    def _stop_probing(self) -> None:
        if self._probe_timer is not None:
            self._probe_timer.cancel()
            self._probe_timer = None

    def _wake(self) -> None:
        admission, self._admission = self._admission, None
        if admission is not None and not admission.done():
            admission.set_result(None)
        self._on_change()


def _mark_retrieved(task: asyncio.Task[Any]) -> None:
    """Mark the error as retrieved: if the waiting task is gone, asyncio would print it as never retrieved."""
    if not task.cancelled():
        task.exception()
