"""Claims of users in the store: many users in one call, and a later check of claims that had no answer.

Callers that want a user put a future into `_wanted`. Up to `CLAIM_CALLS` tasks take what is wanted by then and claim it
in one call of the store; if that fails and may be the fault of one user, each user is claimed alone.

If a claim has no answer by its deadline but is granted all the same, the store believes that we own the user although
no session here has them, and no other server can claim them until this process ends. So such users are *doubtful*: they
are checked a few times, and released if they are ours in the store and no session here wants them.

See also `turns`, for calls of this process that want the same user, and `releases`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import Context
from functools import partial
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
from ..loop import Kept, Loop, leave
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
"""How many claim calls run at a time; where each user takes a call of its own, `CLAIMS_IN_A_CALL` of them."""
CLAIMED_AT_A_TIME = CLAIMS_IN_A_CALL * CLAIM_CALLS
CHECKS_OF_DOUBTFUL = (SECOND, 5 * SECOND, 30 * SECOND, 120 * SECOND, 600 * SECOND)
"""How long after a claim that had no answer the user is checked."""
FOR_RELEASES = SECOND
"""How long the end of a manager waits for releases that are under way."""
ENDED_REMEMBERED = 10_000
"""How many users of ended sessions are checked when an engine has lost acknowledged data, perhaps a release."""


class Claims:
    """The claims of one manager, with its turns and its releases. `tell` logs an error that no caller waits for."""

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
        """Users that a caller waits for, as long as no call has asked for them. A user is here once, by their turn."""
        self._claimers: set[asyncio.Task[None]] = set()
        self._unsure: set[int | str] = set()
        """Users whose newest epoch in the store may be higher than their sessions know."""
        self._doubtful: dict[int | str, list[int]] = {}
        """Users whose claims had no answer, and the times at which they are still to be checked."""
        self._checker: Kept | None = None
        self._ended: deque[int | str] = deque(maxlen=ENDED_REMEMBERED)
        """Users whose sessions have ended; the engine may lose their releases."""
        self._draining = False

    async def claim(self, user_id: int | str) -> Claim:
        """Claim one user; claims that are made at the same time share a call of the store.

        Raises `OwnedElsewhereError`, `CorruptRecordError`, and `StoreUnavailableError` after `save_timeout`.
        """
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
        await self._link.outlast(user_id, until)
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
            # if the future cannot be cancelled it has got its answer, and nobody but us knows of the claim
            if not future.cancel() and future.exception() is None and future.result().granted:
                self.disown(future.result())  # the answer and the cancellation came in the same turn of the loop
            raise
        finally:
            future.cancel()
            if self._wanted.get(user_id) is future:
                del self._wanted[user_id]  # no call has asked for the user yet, so there is nothing to undo

    def _on_claimer_done(self, task: asyncio.Task[None]) -> None:
        self._claimers.discard(task)
        if task.cancelled():  # perhaps before its first step, so that it could not refuse them itself
            for future in self._wanted.values():
                _refuse(future, _cancelled(self._link.name))
            self._wanted.clear()

    async def _claim_all(self) -> None:
        """Claim users until none is wanted any more."""
        try:
            while self._wanted:
                await self._claim_next()
        finally:
            leave(self._claimers)

    async def _claim_next(self) -> None:
        """Claim those who have waited longest in one call; each alone if the call fails and may fail because of one."""
        await self._link.admission()
        if not self._link.may_call():  # `admission` returns without it only when the store is about to be closed
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
                self.disown(claim)  # its caller has been cancelled, or has timed out
        return None

    def _on_late_answer(self, task: asyncio.Task[Answers]) -> None:
        """A claim call that had been given up has an answer after all."""
        if task.cancelled() or task.exception() is not None or self._link.closed:
            return
        for claim in task.result():
            if isinstance(claim, StoreError):
                continue
            self._doubtful.pop(claim.user_id, None)
            if claim.granted:
                self.disown(claim)

    def doubt(self, user_ids: Iterable[int | str], call: asyncio.Task[Answers]) -> None:
        """The claim of these users had no answer. It may still be granted; then it is released unless it is wanted.

        Where the store is shared they are checked as well, because the call may be carried out and never be answered.
        """
        if not call.done():
            call.add_done_callback(self._on_late_answer)
        if self._link.store.shared:
            self._check_later(user_ids)

    def _check_later(self, user_ids: Iterable[int | str]) -> None:
        now = self._clock.now()
        for user_id in user_ids:
            self._doubtful[user_id] = [now + delay for delay in CHECKS_OF_DOUBTFUL]
        if self._checker is None or self._checker.is_done:
            self._checker = self._loop.keep(self._check_doubtful, "doubtful claims")

    async def _check_doubtful(self) -> None:
        """Check doubtful users several times: a store may carry out a call long after its connection was closed."""
        while self._doubtful and not self._link.closed:
            await self._loop.sleep(CHECKS_OF_DOUBTFUL[0])
            for user_id, checks in list(self._doubtful.items()):
                if not self._link.may_call() or self._draining:
                    break
                if self.turns.is_taken(user_id):
                    continue  # that call claims the user itself, and so learns the newest epoch
                if checks[0] <= self._clock.now():
                    with suppress(Exception):
                        try:
                            await self._release_if_unwanted(user_id)
                        except StoreUnavailableError:
                            continue  # the check stays in the list, and is repeated
                    del checks[:1]  # also if the store refuses to answer about this user: it would refuse for ever
                # compared by identity: while the store was asked the user may have become doubtful anew
                if not checks and self._doubtful.get(user_id) is checks:
                    del self._doubtful[user_id]

    async def _release_if_unwanted(self, user_id: int | str) -> None:
        """Release a user who is ours in the store although no session here has or wants them."""
        self._require_up()
        holder, epoch = await self._link.ask(self._link.store.holder, user_id)
        if holder == self._identity.owner and not self._is_wanted(user_id):
            self.release_later(user_id, epoch)

    def _is_wanted(self, user_id: int | str) -> bool:
        """Whether a session here has a user, or a call is about to give them to one.

        If a session has them, the user is checked once more when it ends, because the store may have granted us a later
        epoch than the session's. A user whose data waits in the spill file is not wanted until they log in.

        No lock is needed between this answer and the release: each claim from now on raises the epoch, and a release
        under the older one does nothing.
        """
        session = self._table.active_session(user_id)
        if session is not None and not self._table.is_lost(session):
            self._unsure.add(user_id)
            return True
        return self.turns.is_taken(user_id)

    def drain(self, draining: bool) -> None:
        """Check no doubtful claims while the manager is being destroyed; check them again if that was called off."""
        self._draining = draining

    def on_session_ended(self, user_id: int | str) -> None:
        """The session of this user has ended."""
        self._ended.append(user_id)
        if user_id in self._unsure:
            self._unsure.discard(user_id)
            self._check_later([user_id])

    def on_loss(self) -> None:
        """The engine has lost acknowledged data. If that was a release, the store believes that we own that user."""
        if self._link.store.shared:
            self._check_later(dict.fromkeys(self._ended))

    def _require_up(self) -> None:
        if self._link.closed or not self._link.may_call():
            raise StoreUnavailableError(f"{self._link.name} has gone down")

    def disown(self, claim: Claim) -> None:
        """Release a granted claim that no caller waits for any more."""
        self._loop.keep(partial(self._release_stray, claim), "stray claim")

    async def _release_stray(self, claim: Claim) -> None:
        """Release a claim, unless a session has the user by now; then the session goes on under the claim's epoch."""
        table = self._table
        async with self.turns.take(claim.user_id):
            session = table.active_session(claim.user_id)
            if session is None or table.is_lost(session):
                self.release_later(claim.user_id, claim.epoch)
            elif claim.epoch > table.epoch(session) and self._is_known(session, claim.record):
                # otherwise somebody else has written since, and the fence stops the session's next save
                table.own(session, claim.epoch)

    def _is_known(self, session: SessionCore, stored: Record | None) -> bool:
        # only if what the store has is what this session last saved may its epoch be raised
        if stored is None:
            return self._table.versions(session)[1] == 0
        return self._table.is_stored(session, stored.version, self._identity.digest(stored.body))

    def release_later(self, user_id: int | str, epoch: int) -> None:
        """Release a user whom no session has; the caller does not wait for the store."""
        self.releases.add(user_id, epoch)

    async def release(self, user_id: int | str, epoch: int) -> None:
        """Release the user of an ending session, and wait for the first answer; see `Releases.wait`."""
        await self.releases.wait(user_id, epoch)

    async def wait_until_idle(self, until: int) -> None:
        """End all checks, wait until no call has a turn, at most until `until`, and then a second for releases."""
        if self._checker is not None:
            self._checker.stop()
        # polled: this runs once, at the end of a manager
        while self.turns and self._clock.now() < until:
            await self._loop.sleep(SECOND // 200)
        until = self._clock.now() + FOR_RELEASES
        while (self.turns or not self.releases.is_idle) and self._clock.now() < until:
            await self._loop.sleep(SECOND // 200)

    def close(self) -> None:
        """The store is closed: release and check no user any more."""
        self.releases.close()
        if self._checker is not None:
            self._checker.stop()


def _refuse(future: asyncio.Future[Claim], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _cancelled(name: str) -> StoreUnavailableError:
    """What a caller of a claim gets if the task that claims was cancelled: the caller itself was not, and retries."""
    return StoreUnavailableError(f"a claim in {name} was cancelled from outside")
