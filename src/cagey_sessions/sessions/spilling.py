"""The way back of users who were spilled. What lives here: saving them at the start, and before they are loaded. What
must not: the file, or when an entry of it may be saved (`spill.py`).
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from contextvars import Context

from ..errors import (
    SnapshotError,
    SpillConflictError,
    StoreContractError,
    StoreError,
    StoreUnavailableError,
    UnsavableError,
)
from ..files.spill import Plan
from ..ownership.claims import CLAIM_CALLS, CLAIMS_IN_A_CALL, Claims
from ..saving.to_store import MOST_BYTES, MOST_ROWS
from ..stores import Claim, Outcome, Verdict
from ..stores.contract import verdicts_of
from ..stores.link import StoreGateway
from ..threads import in_thread
from ..wording import quote
from .server import Lifecycle

__all__ = ["Replay"]

REPLAYED_AT_A_TIME = CLAIMS_IN_A_CALL * CLAIM_CALLS


class Replay:
    """The spilled users of one manager, on their way into the store."""

    def __init__(self, life: Lifecycle, claims: Claims) -> None:
        self._life = life
        self._claims = claims
        claims.open_store = self.open_store
        self._spill_turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    @property
    def _gateway(self) -> StoreGateway:
        assert self._life.gateway is not None
        return self._life.gateway

    async def enter(self) -> None:
        """Open the store, and save what an earlier process has spilled."""
        await self.open_store()
        if self._task is not None:
            await asyncio.shield(self._task)

    async def open_store(self) -> None:
        """Open the store; the first time, know what was spilled before anybody is loaded."""
        spill = self._life.spill
        if spill is not None and not spill.is_open:
            async with self._spill_turn:
                if not spill.is_open:
                    spill.open(await in_thread(spill.read))  # only what is still wanted becomes known
        await self._gateway.open()
        if spill is not None and self._task is None:
            self._life.guard_exit()
            self._task = self._life.spawn(self._replay_all(), "replay of the spill", Context())

    async def _replay_all(self) -> None:
        """Save everybody who was spilled, as far as they may be claimed and the store takes them."""
        spill, life = self._life.spill, self._life
        assert spill is not None
        user_ids = list(spill.pending)
        try:
            for start in range(0, len(user_ids), REPLAYED_AT_A_TIME):
                if life.drain is not None or not await self._replay_some(user_ids[start : start + REPLAYED_AT_A_TIME]):
                    break
        except Exception as error:  # what is left is pending, and no reason not to begin
            life.reports.error(error, None)
        await self.write_spill()
        report = spill.report()
        if report.pending or report.conflicts or not report.complete:
            life.reports.say(
                "warning",
                "of the spilled users %d are saved; in %s remain %d pending, %d in conflict, %d damaged%s",
                len(report.replayed),
                spill.path,
                len(report.pending),
                len(report.conflicts),
                len(report.damaged),
                "" if report.complete else ", and the file was not complete",
            )
        elif report.replayed:
            life.reports.say("info", "all spilled users are saved: %d", len(report.replayed))

    async def _replay_some(self, user_ids: list[int | str]) -> bool:
        """Save some users who were spilled: whether it is worth going on."""
        async with AsyncExitStack() as turns:
            tasks = []
            for user_id in user_ids:
                if not self._claims.is_at_work(user_id):  # else somebody loads the user, and sees to the spill then
                    await turns.enter_async_context(self._claims.turn(user_id))
                    tasks.append(self._life.spawn(self._claims.claim(user_id), "claim", Context()))
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            claims = [answer for answer in answers if isinstance(answer, Claim)]
            plans = await self._apply_spill(claims, release=True)
            for plan in plans:
                if plan.write is None or plan.error is not None:  # else the write has let go of them
                    self._claims.let_go(plan.claim.user_id, plan.claim.epoch)
        return not self._gateway.down

    async def _apply_spill(self, claims: list[Claim], *, release: bool) -> list[Plan]:
        """Save what was spilled of users who are claimed, where nobody has written since: what became of it."""
        spill = self._life.spill
        assert spill is not None
        plans = [
            spill.plan(claim, self._life.owner, self._gateway.store, self._life.encoding, release=release)
            for claim in claims
        ]
        for plan in plans:
            spill.set_aside(plan.conflicts)
            if plan.conflicts:
                self._life.reports.error(_conflict(plan.claim, spill.path), None)
            if plan.write is None:
                spill.settle(plan.saved)
        writes = [plan for plan in plans if plan.write is not None]
        while writes:
            part: list[Plan] = []
            size = 0
            while writes and len(part) < MOST_ROWS and size < MOST_BYTES:
                part.append(writes.pop())
                size += len(part[-1].saved[-1].body)
            if not await self._write_spilled(part) and len(part) > 1:
                for plan in part:  # it may be the fault of one of them
                    await self._write_spilled([plan])
        for plan in plans:
            if plan.error is not None:
                spill.postpone(plan)
        return plans

    async def _write_spilled(self, plans: list[Plan]) -> bool:
        """One call of the store: whether it is not worth repeating for each alone."""
        gateway = self._gateway
        try:
            if not gateway.may_call():
                raise StoreUnavailableError(f"{gateway.name} is down")
            answer = await gateway.write([plan.write for plan in plans if plan.write is not None]).answer()
            verdicts = verdicts_of(gateway.store, answer, len(plans))
        except Exception as raised:
            error: Exception = raised
            if not isinstance(error, StoreError):
                error = StoreContractError(f"{gateway.name} raised {type(raised).__name__}")
                error.__cause__ = raised
            for plan in plans:
                plan.error = error
            return isinstance(error, StoreUnavailableError)
        for plan, verdict in zip(plans, verdicts, strict=True):
            self._see_spilled(plan, verdict)
        return True

    def _see_spilled(self, plan: Plan, verdict: Verdict) -> None:
        spill, user_id = self._life.spill, plan.claim.user_id
        assert spill is not None
        plan.error = None
        if verdict.outcome in (Outcome.SAVED, Outcome.ALREADY):
            spill.settle(plan.saved)
        elif verdict.outcome == Outcome.INVALID:
            spill.set_aside(plan.saved)
            plan.write = None
            refusal = f"the store refuses what was spilled of user {quote(user_id)}: {verdict.detail}"
            self._life.reports.error(UnsavableError(f"{refusal}; it stays in {spill.path}", user_id=user_id), None)
        else:
            plan.error = StoreUnavailableError(
                f"what was spilled of user {quote(user_id)} could not be saved: {verdict.detail or verdict.outcome}"
            )

    async def write_spill(self) -> None:
        """Bring the spill file up to date, once for all who wait for it."""
        spill = self._life.spill
        assert spill is not None
        try:
            async with self._spill_turn:
                if spill.is_stale:
                    await in_thread(spill.write)
        except SnapshotError as error:
            self._life.reports.error(error, None)

    async def see(self, claim: Claim) -> Claim:
        """Save what was spilled of a user who logs in, so that they see it. Raises if the store does not take it."""
        spill = self._life.spill
        if spill is None or claim.user_id not in spill.pending:
            return claim
        (plan,) = await self._apply_spill([claim], release=False)
        await self.write_spill()
        if plan.error is not None:
            raise plan.error
        return claim if plan.write is None else claim._replace(record=plan.write)


def _conflict(claim: Claim, path: str) -> SpillConflictError:
    found = "was erased" if claim.record is None else "was saved by somebody else"
    return SpillConflictError(
        f"user {quote(claim.user_id)} {found} after their data was spilled; the store is left as it is, and the "
        f"spilled data in {path}. Look at it with read_snapshot, and erase the user or remove the file when it is "
        "dealt with",
        user_id=claim.user_id,
    )
