"""Claims of users in the store. What lives here: whose turn it is with a user in this process, asking the store for
many users in a call, and looking after claims that had no answer. What must not: data, why a user is wanted, or how one
is released.

A claim whose answer never came may have been granted all the same, even later. Then somebody looks after it, for a user
who is kept by nobody is kept from everybody: the other servers wait until this process is dead.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from itertools import islice
from typing import TypeVar

from .._core import SessionCore
from ..clock import Clock
from ..errors import (
    CageySessionsError,
    CorruptRecordError,
    OwnedElsewhereError,
    StoreError,
    StoreUnavailableError,
    WouldDeadlockError,
)
from ..events.deadlocks import Frame, Kind, Wait, listening, waiting_for, would_deadlock
from ..options import SECOND
from ..saving.reclaiming import claims_of
from ..sessions.server import Lifecycle
from ..stores import Claim, Record
from ..stores.contract import Answers
from ..stores.link import StoreGateway
from ..stores.rows import check_claim
from ..wording import quote
from .releases import FIRST_RETRY, LONGEST_RETRY, Releases, leave

__all__ = ["CLAIMS_IN_A_CALL", "CLAIM_CALLS", "Claims"]

T = TypeVar("T")

CLAIMS_IN_A_CALL = 64
CLAIM_CALLS = 4
"""At a time. Where each user is claimed by a call of its own, there are as many calls as one would have users."""
LOOKS_AT_DOUBTFUL = (SECOND, 5 * SECOND, 30 * SECOND)
"""How long after a claim that had no answer somebody looks whether it came to anything."""
ENDED_REMEMBERED = 10_000
"""Of how many sessions that are over it is seen whether an engine that has lost something still has them as ours."""


class _Turn:
    """The turn with one user: one call in this process has it, others wait in the order in which they came."""

    def __init__(self) -> None:
        self.is_taken = False
        self.calls = 0
        """That have the turn or wait for it."""
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self, clock: Clock, until: int | None) -> None:
        """Wait for the turn, no longer than until then. Raises `TimeoutError`."""
        if not self.is_taken:
            self.is_taken = True
            return
        called: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def lose_patience() -> None:
            if not called.done():
                called.set_exception(TimeoutError())

        self._waiting.append(called)
        timer = None if until is None else clock.call_later(max(0, until - clock.now()), lose_patience, Context())
        try:
            await called
        except asyncio.CancelledError:
            if called.done() and not called.cancelled() and called.exception() is None:
                self.give()  # the turn and the cancellation came at the same time
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def give(self) -> None:
        """It is the turn of the next call that still waits."""
        while self._waiting:
            called = self._waiting.popleft()
            if not called.done():
                called.set_result(None)
                return
        self.is_taken = False


class Claims:
    """The claims of one manager."""

    def __init__(self, life: Lifecycle) -> None:
        self._life = life
        self.open_store: Callable[[], Awaitable[None]] = self._open
        """How the store is opened; a spill has to be known before anybody is claimed."""
        self._turns: dict[int | str, _Turn] = {}
        self._wanted: dict[int | str, asyncio.Future[Claim]] = {}
        self._claimers: set[asyncio.Task[None]] = set()
        self.releases: Releases = Releases(life, self._is_wanted)
        self._unsure: set[int | str] = set()
        """Users who may be claimed once more by us than their sessions know."""
        self._doubtful: dict[int | str, list[int]] = {}
        """Users whose claims had no answer, and when to look after them."""
        self._looker: asyncio.Task[None] | None = None
        self._ended: deque[int | str] = deque(maxlen=ENDED_REMEMBERED)
        """Users whose sessions are over; the engine may lose that they were released."""

    @property
    def _gateway(self) -> StoreGateway:
        assert self._life.gateway is not None
        return self._life.gateway

    async def _open(self) -> None:
        await self._gateway.open()

    # Turns

    @asynccontextmanager
    async def turn(self, user_id: int | str, until: int | None = None) -> AsyncIterator[Frame]:
        """Within this block no other call in this process loads, edits or erases the same user.

        Waits until then, in nanoseconds of the clock, or without end. Raises `WouldDeadlockError` where the call that
        has the turn waits for this very code, over however many steps, and `StoreUnavailableError`.
        """
        turn = self._turns.setdefault(user_id, _Turn())
        target = Wait(turn, Kind.TURN)
        if would_deadlock(target):
            raise WouldDeadlockError(
                f"a call that is at work on user {quote(user_id)} waits for this very code, which would wait for that "
                "call; do it outside of that listener or edit block"
            )
        turn.calls += 1
        try:
            await self._take(turn, target, user_id, until)
            try:
                with listening(target, None) as frame:
                    yield frame
            finally:
                turn.give()
        finally:
            turn.calls -= 1
            if not turn.calls:
                del self._turns[user_id]

    async def _take(self, turn: _Turn, target: Wait, user_id: int | str, until: int | None) -> None:
        try:
            with waiting_for(target):
                await turn.take(self._life.clock, until)
        except TimeoutError:
            raise StoreUnavailableError(
                f"another call is at work on user {quote(user_id)} and has not come to its end; try again later"
            ) from None

    def is_at_work(self, user_id: int | str) -> bool:
        """Whether anybody in this process has the turn, or waits for it."""
        return user_id in self._turns

    async def outlast(self, user_id: int | str) -> None:
        """Where nothing fences off a late write, wait for the end of any before the user is read."""
        while (write := self._gateway.writes.get(user_id)) is not None and not write.done():
            await self._gateway.wait_for(write, self._gateway.timeout)
            if not write.done():
                raise StoreUnavailableError(
                    f"an earlier write of user {quote(user_id)} has not returned, and would land on top of what follows"
                )

    async def claim(self, user_id: int | str) -> Claim:
        """Claim one user, in one call of the store with whoever asks at the same time.

        Raises `OwnedElsewhereError` and `CorruptRecordError`, and `StoreUnavailableError` after as long as callers are
        made to wait.
        """
        claim = await self.persistently(lambda until: self._wait_for_claim(user_id, until))
        if not claim.granted:
            raise OwnedElsewhereError(
                f"user {quote(user_id)} is on another server ({claim.owner})", user_id=user_id, owner=claim.owner
            )
        try:
            check_claim(claim)
        except CorruptRecordError:
            self.let_go(user_id, claim.epoch)
            raise
        return claim

    async def _wait_for_claim(self, user_id: int | str, until: int) -> Claim:
        future: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
        self._wanted[user_id] = future
        if len(self._claimers) < (CLAIMS_IN_A_CALL if self._gateway.store.independent else CLAIM_CALLS):
            task = self._life.spawn(self._claim_all(), "claims", Context())
            self._claimers.add(task)
            task.add_done_callback(self._see_claimer_gone)

        def lose_patience() -> None:
            _refuse(future, StoreUnavailableError(f"{self._gateway.name} has not answered to the claim of this user"))

        clock = self._life.clock
        timer = clock.call_later(max(0, until - clock.now()), lose_patience, Context())
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None and future.result().granted:
                self.disown(future.result())  # the answer and the cancellation came in the same turn of the loop
            raise
        finally:
            timer.cancel()
            if self._wanted.get(user_id) is future:
                del self._wanted[user_id]  # nobody waits any more, and nothing has been asked

    def _see_claimer_gone(self, task: asyncio.Task[None]) -> None:
        self._claimers.discard(task)
        if task.cancelled():
            for future in self._wanted.values():
                _refuse(future, _cancelled(self._gateway.name))
            self._wanted.clear()

    async def _claim_all(self) -> None:
        """Claim whoever is wanted, until nobody is."""
        try:
            while self._wanted:
                await self._claim_next()
        finally:
            leave(self._claimers)

    async def _claim_next(self) -> None:
        """Claim those who have waited longest, in one call; each alone if it fails and it may be the fault of one."""
        await self._gateway.admission()
        if not self._gateway.may_call():  # the store is to be closed
            for future in self._wanted.values():
                _refuse(future, StoreUnavailableError(f"{self._gateway.name} is down"))
            self._wanted.clear()
            return
        most = 1 if self._gateway.store.independent else CLAIMS_IN_A_CALL
        wanted = {user_id: self._wanted.pop(user_id) for user_id in list(islice(self._wanted, most))}
        try:
            error = await self._claim_some(wanted) if wanted else None
            if error is None:
                return
            if len(wanted) > 1 and not isinstance(error, StoreUnavailableError):
                for user_id, future in wanted.items():
                    if error := await self._claim_some({user_id: future}):
                        _refuse(future, error)
            else:
                for future in wanted.values():
                    _refuse(future, error)
        except asyncio.CancelledError:
            for future in wanted.values():
                _refuse(future, _cancelled(self._gateway.name))
            raise

    async def _claim_some(self, wanted: dict[int | str, asyncio.Future[Claim]]) -> Exception | None:
        gateway = self._gateway
        if gateway.closed:
            return StoreUnavailableError(f"{gateway.name} is closed: the manager was destroyed")
        user_ids = list(wanted)
        call = gateway.start(user_ids, gateway.store.claim_many, user_ids, self._life.owner)
        try:
            claims = claims_of(gateway.store, await call.answer(), user_ids)
        except asyncio.CancelledError:
            self.doubt(wanted, call.task)
            raise
        except Exception as error:
            self.doubt(wanted, call.task)
            if isinstance(error, StoreError):
                return error
            unavailable = StoreUnavailableError(f"{gateway.name} could not load: {type(error).__name__}")
            unavailable.__cause__ = error
            return error if len(wanted) > 1 else unavailable
        for future, claim in zip(wanted.values(), claims, strict=True):
            if isinstance(claim, StoreError):
                _refuse(future, claim)
            elif not future.done():
                future.set_result(claim)
            elif claim.granted:
                self.disown(claim)  # whoever wanted it has been cancelled
        return None

    def _see_late(self, task: asyncio.Task[Answers]) -> None:
        """A claim was given up on, and has been granted after all."""
        if task.cancelled() or task.exception() is not None or self._gateway.closed:
            return
        for claim in task.result():
            if isinstance(claim, StoreError):
                continue
            self._doubtful.pop(claim.user_id, None)
            if claim.granted:
                self.disown(claim)

    def doubt(self, user_ids: Iterable[int | str], call: asyncio.Task[Answers]) -> None:
        """A claim of these users had no answer, and may be granted all the same: see that nobody is kept by nobody."""
        if not call.done():
            call.add_done_callback(self._see_late)
        if self._gateway.store.shared:
            self._look_after(user_ids)

    def _look_after(self, user_ids: Iterable[int | str]) -> None:
        now = self._life.clock.now()
        for user_id in user_ids:
            self._doubtful[user_id] = [now + delay for delay in LOOKS_AT_DOUBTFUL]
        if self._looker is None or self._looker.done():
            self._looker = self._life.spawn(self._look_at_doubtful(), "doubtful claims", Context())

    async def _look_at_doubtful(self) -> None:
        """Look after users several times, for a request may arrive long after its connection was closed."""
        while self._doubtful and not self._life.closed:
            await self._pause(LOOKS_AT_DOUBTFUL[0])
            for user_id, looks in list(self._doubtful.items()):
                if not self._gateway.may_call() or self._life.drain is not None:
                    break
                if self.is_at_work(user_id):
                    continue  # a load, or the replay, will claim them
                if looks[0] <= self._life.clock.now():
                    with suppress(Exception):
                        await self._look_at(user_id)
                        looks.pop(0)
                if not looks and self._doubtful.get(user_id) is looks:
                    del self._doubtful[user_id]

    async def _look_at(self, user_id: int | str) -> None:
        """Let go of a user who is ours in the store, and whom nobody here has."""
        self._require_chance()
        holder, epoch = await self._gateway.ask(self._gateway.store.holder, user_id)
        if holder == self._life.owner and not self._is_wanted(user_id):
            self.let_go(user_id, epoch)

    def _is_wanted(self, user_id: int | str) -> bool:
        """Whether anybody here has a user or is about to; who has them is looked after again at the end.

        Who is spilled and pending is in a file, and here only when they log in.

        What was read before this was asked may be released without a lock: every claim from now on raises the epoch.
        """
        session = self._life.table.active_session(user_id)
        if session is not None and self._life.loss_of(session) is None:
            self._unsure.add(user_id)
            return True
        return self.is_at_work(user_id)

    def see_end(self, user_id: int | str) -> None:
        """A session of this user is over."""
        self._ended.append(user_id)
        if user_id in self._unsure:
            self._unsure.discard(user_id)
            self._look_after([user_id])

    def see_loss(self) -> None:
        """The engine has lost what it had acknowledged, perhaps releases: then it takes users for ours who are not."""
        if self._gateway.store.shared:
            self._look_after(dict.fromkeys(self._ended))

    def _require_chance(self) -> None:
        if self._gateway.closed or not self._gateway.may_call():
            raise StoreUnavailableError(f"{self._gateway.name} has gone down")

    def disown(self, claim: Claim) -> None:
        """Nobody waits for a claim any more."""
        self._life.spawn(self._settle_stray(claim), "stray claim", Context())

    async def _settle_stray(self, claim: Claim) -> None:
        """Let go of a claim, unless a session has the user by another one meanwhile."""
        table = self._life.table
        async with self.turn(claim.user_id):
            session = table.active_session(claim.user_id)
            if session is None or self._life.loss_of(session) is not None:
                self.let_go(claim.user_id, claim.epoch)
            elif claim.epoch > table.epoch(session) and self._is_known(session, claim.record):
                table.own(session, claim.epoch)  # else the fence finds out that the session is stale

    def _is_known(self, session: SessionCore, stored: Record | None) -> bool:
        if stored is None:
            return self._life.table.versions(session)[1] == 0
        return self._life.table.is_stored(session, stored.version, self._life.identity.digest(stored.body))

    def let_go(self, user_id: int | str, epoch: int) -> None:
        """Release a claim that no session has taken over; nobody waits for that."""
        self.releases.add(user_id, epoch)

    async def release(self, user_id: int | str, epoch: int) -> None:
        """Let go of a user for the session that has them; see `Releases.wait`."""
        await self.releases.wait(user_id, epoch)

    async def settle(self, until: int) -> None:
        """Wait until nobody is at work on a user any more, at most until then; the end."""
        if self._looker is not None:
            self._looker.cancel()
        while (self._turns or not self.releases.is_idle) and self._life.clock.now() < until:
            await self._pause(SECOND // 200)

    def close(self) -> None:
        """The store is closed: nobody is let go of or looked after any more."""
        self.releases.close()
        if self._looker is not None:
            self._looker.cancel()

    async def persistently(self, work: Callable[[int], Awaitable[T]]) -> T:
        """Do something with the store, again while it is unavailable, for as long as callers are made to wait.

        `work` is told until when that is, in nanoseconds of the clock.
        """
        life = self._life
        until = life.clock.now() + life.options.save_timeout
        delay = FIRST_RETRY
        while True:
            while not self._gateway.may_call() and life.clock.now() < until and not life.closed:
                await self._pause(FIRST_RETRY)
            if not self._gateway.may_call():
                raise StoreUnavailableError(f"{self._gateway.name} is down")
            try:
                await self.open_store()
                return await work(until)
            except Exception as error:
                if isinstance(error, CageySessionsError) and not isinstance(error, StoreUnavailableError):
                    raise
                if life.clock.now() + delay >= until or life.closed:
                    if isinstance(error, StoreUnavailableError):
                        raise
                    raise StoreUnavailableError(f"{self._gateway.name} raised {type(error).__name__}") from error
            await self._pause(delay)
            delay = min(2 * delay, LONGEST_RETRY)

    async def _pause(self, delay: int) -> None:
        """Wait for so many nanoseconds of the clock."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not future.done():
                future.set_result(None)

        timer = self._life.clock.call_later(delay, wake, Context())
        try:
            await future
        finally:
            timer.cancel()


def _refuse(future: asyncio.Future[Claim], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _cancelled(name: str) -> StoreUnavailableError:
    """Whoever waits for a claim has not been cancelled, and asks again."""
    return StoreUnavailableError(f"a claim in {name} was cancelled from outside")
