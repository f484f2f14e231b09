"""Releases of users that no save has released: a queue, calls for many users at once, and retries.

A release that is added while calls are under way is sent with the next call, with all others that were added by then. A
user is in the queue once, under the newest epoch that is known of their claims, because the store ignores a release
under an older one. Releases come after saves: while the store is down, and saves are due, they are put off.

The last save of a session usually releases the user in the same write, and does not come here.

See also `claims`.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from contextvars import Context
from itertools import islice

from .._core import SessionTable
from ..clock import Clock, TimerHandle
from ..errors import StoreContractError, StoreUnavailableError
from ..loop import Loop, leave
from ..process import Identity
from ..stores.link import FIRST_RETRY, LONGEST_RETRY, StoreLink
from ..wording import quote

__all__ = ["MOST_ATTEMPTS", "RELEASES_IN_A_CALL", "RELEASE_CALLS", "Releases"]

RELEASES_IN_A_CALL = 200
RELEASE_CALLS = 4
"""How many calls run at a time."""
MOST_ATTEMPTS = 8
"""How often a release may fail, for another reason than an outage, until it is given up and reported."""


class _Release:
    """A user who is to be released."""

    __slots__ = ("attempts", "epoch", "rounds", "waiting")

    def __init__(self, epoch: int) -> None:
        self.epoch: int = epoch
        self.attempts: int = 0
        """How often it has failed for another reason than an outage."""
        self.rounds: int = 0
        """How often it was put off; the delay doubles each time."""
        self.waiting: list[asyncio.Future[None]] = []
        """The callers that wait for the first answer."""

    def resolve(self, error: Exception | None = None) -> None:
        """Answer the callers; a retry later has none."""
        waiting, self.waiting = self.waiting, []
        for future in waiting:
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)


class Releases:
    """The releases of one manager. `is_wanted` says whether a session here has a user or is about to get them."""

    def __init__(
        self,
        link: StoreLink,
        loop: Loop,
        clock: Clock,
        table: SessionTable,
        identity: Identity,
        tell: Callable[[str, Exception], None],
        is_wanted: Callable[[int | str], bool],
    ) -> None:
        self._link = link
        self._loop = loop
        self._clock = clock
        self._table = table
        self._identity = identity
        self._tell = tell
        self._is_wanted = is_wanted
        self._queue: OrderedDict[int | str, _Release] = OrderedDict()
        self._workers: set[asyncio.Task[None]] = set()
        self._under_way = 0
        self._timers: set[TimerHandle] = set()
        """Of releases that were put off."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to release."""
        return not (self._queue or self._under_way or self._timers)

    def add(self, user_id: int | str, epoch: int) -> None:
        """Release a user, and repeat that until it is done or this process ends."""
        if not self._link.closed:
            self._put(user_id, _Release(epoch))
            self._hire()

    async def wait(self, user_id: int | str, epoch: int) -> None:
        """As `add`, and wait for the first answer. Returns without one if the store is down. Raises what failed.

        If the row has another epoch by now, a claim of ours that was given up may have been granted late. Nobody waits
        until that is found out.
        """
        if not self._link.closed:
            release = _Release(epoch)
            release.waiting.append(asyncio.get_running_loop().create_future())
            (answer,) = release.waiting
            self._put(user_id, release)
            self._hire()
            await answer

    def close(self) -> None:
        """The store is closed: release nobody any more."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        for task in self._workers:
            task.cancel()
        for release in self._queue.values():
            release.resolve()
        self._queue.clear()

    def _put(self, user_id: int | str, release: _Release) -> None:
        other = self._queue.setdefault(user_id, release)
        if other is not release:
            # both callers get the answer of the newer one: what the store says of the older epoch means nothing
            older, newer = sorted((other, release), key=lambda each: each.epoch)
            newer.waiting += older.waiting
            self._queue[user_id] = newer

    def _put_off(self, some: dict[int | str, _Release], delay: int) -> None:
        """Put releases into the queue again after `delay` nanoseconds."""
        if self._link.closed:
            for release in some.values():
                release.resolve()
            return

        def again() -> None:
            self._timers.discard(timer)
            for user_id, release in some.items():
                self._put(user_id, release)
            self._hire()

        timer = self._clock.call_later(delay, again, Context())
        self._timers.add(timer)

    def _hire(self) -> None:
        if self._queue and len(self._workers) < RELEASE_CALLS and not self._link.closed:
            task = self._loop.spawn(self._work(), "release", Context())
            self._workers.add(task)
            task.add_done_callback(self._on_worker_done)

    def _on_worker_done(self, task: asyncio.Task[None]) -> None:
        self._workers.discard(task)
        # somebody else did that, perhaps before its first step, or the loop is about to be shut down: a task begun
        # now would be cancelled, too
        if task.cancelled():
            self._put_off({}, LONGEST_RETRY)

    async def _work(self) -> None:
        """Release everybody in the queue, until it is empty."""
        link = self._link
        try:
            while self._queue and not link.closed:
                if link.down and (not link.may_call() or self._table.has_due()):  # saves go first
                    waiting, self._queue = dict(self._queue), OrderedDict()
                    for release in waiting.values():
                        release.resolve()
                    self._put_off(waiting, LONGEST_RETRY)
                    return
                some = dict(islice(self._queue.items(), RELEASES_IN_A_CALL))
                for user_id in some:
                    del self._queue[user_id]
                self._under_way += 1
                try:
                    await self._release(some)
                finally:
                    self._under_way -= 1
        finally:
            leave(self._workers)

    async def _release(self, left: dict[int | str, _Release]) -> None:
        """Release users in one call, and in halves if it fails and the cause may be one of them.

        Those that are not done stay in `left`, and are put off.
        """
        delay = LONGEST_RETRY  # unless all have got an answer
        parts = [list(left)]
        try:
            while parts:
                part = [user_id for user_id in parts.pop() if not self._is_kept(user_id, left)]
                try:
                    answers = await self._call_store(part, left)
                except Exception as error:
                    if len(part) > 1 and not isinstance(error, StoreUnavailableError):
                        parts += [part[len(part) // 2 :], part[: len(part) // 2]]
                        continue
                    for user_id in part:
                        self._on_failure(user_id, left, error)
                    continue
                for user_id, is_released in zip(part, answers, strict=True):
                    left[user_id].resolve()
                    # a store of one process has no holder to check: false means that nothing was left to release
                    if is_released or not self._link.store.shared:
                        del left[user_id]
                for user_id in part:
                    if user_id in left:
                        await self._check_holder(user_id, left)
            delay = min(FIRST_RETRY << min((each.rounds for each in left.values()), default=0), LONGEST_RETRY)
        finally:
            if left:
                for release in left.values():
                    release.rounds = min(release.rounds + 1, MOST_ATTEMPTS)
                self._put_off(left, delay)

    def _is_kept(self, user_id: int | str, left: dict[int | str, _Release]) -> bool:
        """Whether a live session has the user, by this claim or a later one; then there is nothing to release."""
        table = self._table
        session = table.active_session(user_id)
        if session is None or table.is_ending(session) or table.epoch(session) < left[user_id].epoch:
            return False
        left.pop(user_id).resolve()
        return True

    async def _call_store(self, part: list[int | str], left: dict[int | str, _Release]) -> list[bool]:
        if not part:
            return []
        link = self._link
        self._require_up()
        pairs = [(user_id, left[user_id].epoch) for user_id in part]
        answers = await link.start(part, link.store.release_many, pairs, self._identity.owner).answer()
        if not isinstance(answers, list) or len(answers) != len(pairs):
            raise StoreContractError(f"{link.name} did not answer for each user whether they were released")
        return answers

    def _on_failure(self, user_id: int | str, left: dict[int | str, _Release], error: Exception) -> None:
        release = left[user_id]
        release.resolve(error)
        release.attempts += not isinstance(error, StoreUnavailableError)
        if release.attempts == MOST_ATTEMPTS:
            del left[user_id]
            self._tell(f"user {quote(user_id)} stays with this process until it ends", error)

    async def _check_holder(self, user_id: int | str, left: dict[int | str, _Release]) -> None:
        """The store has not released a user: if a later claim of ours holds them, release that unless it is wanted."""
        release, table = left[user_id], self._table
        try:
            self._require_up()
            holder, epoch = await self._link.ask(self._link.store.holder, user_id)
        except Exception as error:
            self._on_failure(user_id, left, error)
            return
        session = table.active_session(user_id)
        if holder == self._identity.owner:
            if session is not None and table.is_ending(session) and table.epoch(session) == release.epoch:
                return  # the session has yet to end: try again later
            if not self._is_wanted(user_id):
                release.epoch = epoch  # the next attempt releases the later claim
                return
        del left[user_id]

    def _require_up(self) -> None:
        if self._link.closed or not self._link.may_call():
            raise StoreUnavailableError(f"{self._link.name} has gone down")
