"""Claims of users in the store. What lives here: whose turn it is with a user in this process, asking the store for
many users in a call, and looking after claims that had no answer. What must not: data, why a user is wanted, or how one
is released.

A claim whose answer never came may have been granted all the same, even later. Then somebody looks after it, for a user
who is kept by nobody is kept from everybody: the other servers wait until this process is dead.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import Context
from itertools import islice
from typing import TypeVar

from .._core import SessionCore, SessionTable
from ..clock import Clock
from ..errors import (
    CorruptRecordError,
    OwnedElsewhereError,
    StoreError,
    StoreUnavailableError,
)
from ..loop import Loop, leave
from ..options import SECOND
from ..process import Identity
from ..stores import Claim, Record
from ..stores.contract import Answers, claims_of
from ..stores.link import StoreLink
from ..stores.rows import check_claim
from ..wording import quote
from .releases import Releases
from .turns import Turns

__all__ = ["CLAIMED_AT_A_TIME", "CLAIMS_IN_A_CALL", "CLAIM_CALLS", "Claims"]

T = TypeVar("T")

CLAIMS_IN_A_CALL = 64
CLAIM_CALLS = 4
"""At a time. Where each user is claimed by a call of its own, there are as many calls as one would have users."""
CLAIMED_AT_A_TIME = CLAIMS_IN_A_CALL * CLAIM_CALLS
CHECKS_OF_DOUBTFUL = (SECOND, 5 * SECOND, 30 * SECOND)
"""How long after a claim that had no answer somebody checks whether it came to anything."""
ENDED_REMEMBERED = 10_000
"""Of how many sessions that are over it is seen whether an engine that has lost something still has them as ours."""


class Claims:
    """The claims of one manager, and the turns and releases that go with them."""

    def __init__(
        self,
        link: StoreLink,
        loop: Loop,
        clock: Clock,
        table: SessionTable,
        identity: Identity,
        tell: Callable[[str, Exception], None],
    ) -> None:
        self._link = link
        self._loop = loop
        self._clock = clock
        self._table = table
        self._identity = identity
        self.turns: Turns = Turns(loop, clock)
        self.releases: Releases = Releases(link, loop, clock, table, identity, tell, self._is_wanted)
        self._wanted: dict[int | str, asyncio.Future[Claim]] = {}
        self._claimers: set[asyncio.Task[None]] = set()
        self._unsure: set[int | str] = set()
        """Users who may be claimed once more by us than their sessions know."""
        self._doubtful: dict[int | str, list[int]] = {}
        """Users whose claims had no answer, and when to look after them."""
        self._checker: asyncio.Task[None] | None = None
        self._ended: deque[int | str] = deque(maxlen=ENDED_REMEMBERED)
        """Users whose sessions are over; the engine may lose that they were released."""
        self._draining = False

    async def claim(self, user_id: int | str) -> Claim:
        """Claim one user, in one call of the store with whoever asks at the same time.

        Raises `OwnedElsewhereError` and `CorruptRecordError`, and `StoreUnavailableError` after as long as callers are
        made to wait.
        """
        await self._link.outlast(user_id)
        claim = await self._link.persistently(lambda until: self._wait_for_claim(user_id, until))
        if not claim.granted:
            raise OwnedElsewhereError(
                f"user {quote(user_id)} is on another server ({claim.owner})", user_id=user_id, owner=claim.owner
            )
        try:
            check_claim(claim)
        except CorruptRecordError:
            self.release_later(user_id, claim.epoch)
            raise
        return claim

    async def _wait_for_claim(self, user_id: int | str, until: int) -> Claim:
        future: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
        self._wanted[user_id] = future
        if len(self._claimers) < (CLAIMS_IN_A_CALL if self._link.store.independent else CLAIM_CALLS):
            task = self._loop.spawn(self._claim_all(), "claims", Context())
            self._claimers.add(task)
            task.add_done_callback(self._on_claimer_done)

        try:
            if not await self._loop.wait(future, until - self._clock.now()):
                raise StoreUnavailableError(f"{self._link.name} has not answered to the claim of this user")
            return future.result()
        except asyncio.CancelledError:
            if not future.cancel() and future.exception() is None and future.result().granted:
                self.disown(future.result())  # the answer and the cancellation came in the same turn of the loop
            raise
        finally:
            future.cancel()
            if self._wanted.get(user_id) is future:
                del self._wanted[user_id]  # nobody waits any more, and nothing has been asked

    def _on_claimer_done(self, task: asyncio.Task[None]) -> None:
        self._claimers.discard(task)
        if task.cancelled():
            for future in self._wanted.values():
                _refuse(future, _cancelled(self._link.name))
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
        await self._link.admission()
        if not self._link.may_call():  # the store is to be closed
            for future in self._wanted.values():
                _refuse(future, StoreUnavailableError(f"{self._link.name} is down"))
            self._wanted.clear()
            return
        most = 1 if self._link.store.independent else CLAIMS_IN_A_CALL
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
                _refuse(future, _cancelled(self._link.name))
            raise

    async def _claim_some(self, wanted: dict[int | str, asyncio.Future[Claim]]) -> Exception | None:
        link = self._link
        if link.closed:
            return StoreUnavailableError(f"{link.name} is closed: the manager was destroyed")
        user_ids = list(wanted)
        call = link.start(user_ids, link.store.claim_many, user_ids, self._identity.owner)
        try:
            claims = claims_of(link.store, await call.answer(), user_ids)
        except asyncio.CancelledError:
            self.doubt(wanted, call.task)
            raise
        except Exception as error:
            self.doubt(wanted, call.task)
            if isinstance(error, StoreError):
                return error
            unavailable = StoreUnavailableError(f"{link.name} could not load: {type(error).__name__}")
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

    def _on_late_answer(self, task: asyncio.Task[Answers]) -> None:
        """A claim was given up on, and has been granted after all."""
        if task.cancelled() or task.exception() is not None or self._link.closed:
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
            call.add_done_callback(self._on_late_answer)
        if self._link.store.shared:
            self._check_later(user_ids)

    def _check_later(self, user_ids: Iterable[int | str]) -> None:
        now = self._clock.now()
        for user_id in user_ids:
            self._doubtful[user_id] = [now + delay for delay in CHECKS_OF_DOUBTFUL]
        if self._checker is None or self._checker.done():
            self._checker = self._loop.spawn(self._check_doubtful(), "doubtful claims", Context())

    async def _check_doubtful(self) -> None:
        """Look after users several times, for a request may arrive long after its connection was closed."""
        while self._doubtful and not self._link.closed:
            await self._loop.sleep(CHECKS_OF_DOUBTFUL[0])
            for user_id, checks in list(self._doubtful.items()):
                if not self._link.may_call() or self._draining:
                    break
                if self.turns.is_taken(user_id):
                    continue  # a load, or the replay, will claim them
                if checks[0] <= self._clock.now():
                    with suppress(Exception):
                        await self._release_if_unwanted(user_id)
                        checks.pop(0)
                if not checks and self._doubtful.get(user_id) is checks:
                    del self._doubtful[user_id]

    async def _release_if_unwanted(self, user_id: int | str) -> None:
        """Let go of a user who is ours in the store, and whom nobody here has."""
        self._require_up()
        holder, epoch = await self._link.ask(self._link.store.holder, user_id)
        if holder == self._identity.owner and not self._is_wanted(user_id):
            self.release_later(user_id, epoch)

    def _is_wanted(self, user_id: int | str) -> bool:
        """Whether anybody here has a user or is about to; who has them is looked after again at the end.

        Who is spilled and pending is in a file, and here only when they log in.

        What was read before this was asked may be released without a lock: every claim from now on raises the epoch.
        """
        session = self._table.active_session(user_id)
        if session is not None and not self._table.is_lost(session):
            self._unsure.add(user_id)
            return True
        return self.turns.is_taken(user_id)

    def drain(self, draining: bool) -> None:
        """The manager is being destroyed, or is not after all: meanwhile no claim without an answer is looked after."""
        self._draining = draining

    def on_session_ended(self, user_id: int | str) -> None:
        """A session of this user is over."""
        self._ended.append(user_id)
        if user_id in self._unsure:
            self._unsure.discard(user_id)
            self._check_later([user_id])

    def on_loss(self) -> None:
        """The engine has lost what it had acknowledged, perhaps releases: then it takes users for ours who are not."""
        if self._link.store.shared:
            self._check_later(dict.fromkeys(self._ended))

    def _require_up(self) -> None:
        if self._link.closed or not self._link.may_call():
            raise StoreUnavailableError(f"{self._link.name} has gone down")

    def disown(self, claim: Claim) -> None:
        """Nobody waits for a claim any more."""
        self._loop.spawn(self._release_stray(claim), "stray claim", Context())

    async def _release_stray(self, claim: Claim) -> None:
        """Let go of a claim, unless a session has the user by another one meanwhile."""
        table = self._table
        async with self.turns.take(claim.user_id):
            session = table.active_session(claim.user_id)
            if session is None or table.is_lost(session):
                self.release_later(claim.user_id, claim.epoch)
            elif claim.epoch > table.epoch(session) and self._is_known(session, claim.record):
                table.own(session, claim.epoch)  # else the fence finds out that the session is stale

    def _is_known(self, session: SessionCore, stored: Record | None) -> bool:
        if stored is None:
            return self._table.versions(session)[1] == 0
        return self._table.is_stored(session, stored.version, self._identity.digest(stored.body))

    def release_later(self, user_id: int | str, epoch: int) -> None:
        """Release a claim that no session has taken over; nobody waits for that."""
        self.releases.add(user_id, epoch)

    async def release(self, user_id: int | str, epoch: int) -> None:
        """Let go of a user for the session that has them; see `Releases.wait`."""
        await self.releases.wait(user_id, epoch)

    async def wait_until_idle(self, until: int) -> None:
        """Wait until nobody is at work on a user any more, at most until then; the end."""
        if self._checker is not None:
            self._checker.cancel()
        while (self.turns or not self.releases.is_idle) and self._clock.now() < until:
            await self._loop.sleep(SECOND // 200)

    def close(self) -> None:
        """The store is closed: nobody is let go of or looked after any more."""
        self.releases.close()
        if self._checker is not None:
            self._checker.cancel()


def _refuse(future: asyncio.Future[Claim], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _cancelled(name: str) -> StoreUnavailableError:
    """Whoever waits for a claim has not been cancelled, and asks again."""
    return StoreUnavailableError(f"a claim in {name} was cancelled from outside")
