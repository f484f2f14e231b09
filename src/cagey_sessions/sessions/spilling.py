"""Spilling: saves users to the spill file when the process exits without them saved, and from there to the store later.

The next process saves all of them at its start (the *replay*), and a user who logs in before that when they do.

See also `files.spill`, which decides when an entry may be saved, and `draining`, which writes the file at its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from contextvars import Context

from .._core import SessionCore
from ..errors import (
    SnapshotError,
    SpillConflictError,
    StoreContractError,
    StoreError,
    StoreUnavailableError,
    UnsavableError,
)
from ..files import Plan
from ..ownership import CLAIMED_AT_A_TIME, Claims
from ..process import at_exit
from ..saving import MOST_BYTES, MOST_ROWS
from ..stores import Claim, Outcome, Verdict
from ..stores.contract import verdicts_of
from ..stores.link import StoreLink
from ..threads import in_thread
from ..wording import quote
from .ending import Endings
from .entries import spill_entry_of
from .server import Server

__all__ = ["Spilling"]

REPLAYED_AT_A_TIME = CLAIMED_AT_A_TIME


class Spilling:
    """The spilled users of one manager."""

    def __init__(self, server: Server, endings: Endings) -> None:
        self._server = server
        self._endings = endings
        self._write_turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._unguard_exit: Callable[[], object] = lambda: None

    @property
    def _link(self) -> StoreLink:
        assert self._server.link is not None
        return self._server.link

    @property
    def _claims(self) -> Claims:
        assert self._server.claims is not None
        return self._server.claims

    # The exit

    def guard_exit(self) -> None:
        """Write unsaved users to the spill file when the process exits. Keeps this object alive until `close`."""
        self._unguard_exit = at_exit(self._spill_at_exit)

    def close(self) -> None:
        """The manager has ended: nothing is left for the exit, unless the file could not be written."""
        if self._server.spill is not None and not self._server.spill.is_stale:
            self._unguard_exit()

    def _spill_at_exit(self) -> None:
        """The interpreter exits, and the manager has not been destroyed: write unsaved users to the spill file."""
        server = self._server
        spill, table = server.spill, server.table
        if spill is None or not server.identity.is_this_process():
            return
        if server.closed and not spill.is_stale:
            return
        table.bind_thread()  # the loop may have run in another thread, which has ended
        lost = 0
        for session in table.sessions_now():
            if self._is_to_be_saved(session):
                try:
                    entry = spill_entry_of(server, session)
                except UnsavableError:
                    lost += 1
                    continue
                # what the store has is not spilled: the next start would only find that out again
                if not table.is_current(session, server.identity.digest(entry.body)):
                    spill.collect(entry)
        try:
            kept = spill.write()
        except SnapshotError as error:
            server.reports.say("error", "what was unsaved at exit could not be spilled: %s", error)
            return
        if kept or lost:
            server.reports.say("warning", "unsaved at exit: %d users are in %s, %d are lost", kept, spill.path, lost)

    def _is_to_be_saved(self, session: SessionCore) -> bool:
        """Whether a session has a user, and no caller has asked for its end without a save."""
        if session.user_id is None or self._server.table.is_lost(session):
            return False
        asker = self._endings.under_way.get(session) or self._endings.drain
        return asker is None or asker.persist

    # The way back

    def begin(self) -> None:
        """The store is open: begin the replay, in a task, and guard the exit of this process."""
        if self._server.spill is not None and self._task is None:
            self.guard_exit()
            self._task = self._server.loop.spawn(self._replay_all(), "replay of the spill", Context())

    async def wait(self) -> None:
        """Wait until the replay has tried every spilled user."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def _replay_all(self) -> None:
        """Save all spilled users who can be claimed."""
        server = self._server
        spill = server.spill
        assert spill is not None
        user_ids = list(spill.pending)
        try:
            for start in range(0, len(user_ids), REPLAYED_AT_A_TIME):
                if self._endings.drain is not None or not await self._replay_some(
                    user_ids[start : start + REPLAYED_AT_A_TIME]
                ):
                    break
        except Exception as error:  # what is left stays in the file, and the manager can begin all the same
            server.reports.error(error, None)
        await self.write_spill()
        report = spill.report()
        if report.pending or report.conflicts or not report.complete:
            server.reports.say(
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
            server.reports.say("info", "all spilled users are saved: %d", len(report.replayed))

    async def _replay_some(self, user_ids: list[int | str]) -> bool:
        """Save some spilled users. Returns whether it is worth going on."""
        async with AsyncExitStack() as turns:
            tasks = []
            for user_id in user_ids:
                # a user whose turn is taken is being loaded, and that call sees to the spill itself
                if not self._claims.turns.is_taken(user_id):
                    await turns.enter_async_context(self._claims.turns.take(user_id))
                    tasks.append(self._server.loop.spawn(self._claims.claim(user_id), "claim", Context()))
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            claims = [answer for answer in answers if isinstance(answer, Claim)]
            plans = await self._apply_spill(claims, release=True)
            for plan in plans:
                if plan.write is None or plan.error is not None:  # otherwise the write has released them
                    self._claims.release_later(plan.claim.user_id, plan.claim.epoch)
        return not self._link.down

    async def _apply_spill(self, claims: list[Claim], *, release: bool) -> list[Plan]:
        """Save what was spilled of claimed users, unless somebody else has saved them since. Returns what was done."""
        spill = self._server.spill
        assert spill is not None
        plans = [
            spill.plan(claim, self._server.owner, self._link.store, self._server.encoding, release=release)
            for claim in claims
        ]
        for plan in plans:
            # a conflict stays in the file, for an operator to look at: it is neither written nor dropped
            spill.set_aside(plan.conflicts)
            if plan.conflicts:
                self._server.reports.error(_conflict(plan.claim, spill.path), None)
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
                for plan in part:  # one of them may be the reason
                    await self._write_spilled([plan])
        for plan in plans:
            if plan.error is not None:
                spill.postpone(plan)
        return plans

    async def _write_spilled(self, plans: list[Plan]) -> bool:
        """Write spilled users in one call. False if the call should be repeated for each of them alone."""
        link = self._link
        try:
            if not link.may_call():
                raise StoreUnavailableError(f"{link.name} is down")
            answer = await link.write([plan.write for plan in plans if plan.write is not None]).answer()
            verdicts = verdicts_of(link.store, answer, len(plans))
        except Exception as raised:
            error: Exception = raised
            if not isinstance(error, StoreError):
                error = StoreContractError(f"{link.name} raised {type(raised).__name__}")
                error.__cause__ = raised
            for plan in plans:
                plan.error = error
            return isinstance(error, StoreUnavailableError)
        for plan, verdict in zip(plans, verdicts, strict=True):
            self._on_verdict(plan, verdict)
        return True

    def _on_verdict(self, plan: Plan, verdict: Verdict) -> None:
        spill, user_id = self._server.spill, plan.claim.user_id
        assert spill is not None
        plan.error = None
        if verdict.outcome in (Outcome.SAVED, Outcome.ALREADY):
            spill.settle(plan.saved)
        elif verdict.outcome == Outcome.INVALID:
            spill.set_aside(plan.saved)
            plan.write = None
            refusal = f"the store refuses what was spilled of user {quote(user_id)}: {verdict.detail}"
            self._server.reports.error(UnsavableError(f"{refusal}; it stays in {spill.path}", user_id=user_id), None)
        else:
            plan.error = StoreUnavailableError(
                f"what was spilled of user {quote(user_id)} could not be saved: {verdict.detail or verdict.outcome}"
            )

    async def write_spill(self) -> None:
        """Bring the spill file up to date; callers that come while it is being written share one more write."""
        spill = self._server.spill
        assert spill is not None
        try:
            async with self._write_turn:
                if spill.is_stale:  # else the call that had the turn before has written this change, too
                    await in_thread(spill.write)
        except SnapshotError as error:
            self._server.reports.error(error, None)

    async def replay_one(self, claim: Claim) -> Claim:
        """Save what was spilled of a claimed user who logs in. Raises if the store does not take it.

        Returns the claim with the record as it is now.
        """
        spill = self._server.spill
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
