"""Saving to a store. What lives here: batches, the bytes in them, what each verdict means, and how fast to go on after
an outage. What must not: when a session is due, or what a store is made of.

The bytes of a session are fixed in one synchronous step: `before_save`, the encoder, the digest, the version. If the
digest is that of the version last acknowledged there is nothing to write. From there on only bytes, user id and version
are in flight, in batches of at most `MOST_ROWS` rows and about `MOST_BYTES`.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import time
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import Protocol

from ._core import Digest, SaveBatch, SaveBatches, SessionCore, SessionTable
from .autosave import Autosave, Flight, SaveHost, Worker
from .clock import Clock, TimerHandle
from .encoding import Encoding
from .errors import (
    CageySessionsError,
    EncodingError,
    FencedError,
    ListenerCancelledError,
    LostRecordError,
    StoreContractError,
    StoreUnavailableError,
    UnsavableError,
    UserErasedError,
)
from .gateway import Call, CallTimedOutError, StoreGateway
from .options import SECOND, Options
from .records import Receipt
from .sanitizer import Sanitizer
from .stores import MAX_NUMBER, Claim, Outcome, Record, Verdict

__all__ = ["MOST_BYTES", "MOST_ROWS", "StoreHost", "StoreSaver"]

_OUTCOMES = frozenset(Outcome)

MOST_ROWS = 200
MOST_BYTES = 1024 * 1024
ROWS_AT_ONCE = 64
BYTES_AT_ONCE = 64 * 1024
"""After about so much of a batch it is seen whether the loop is to have its turn."""
MOST_ALONE = 8
"""After how many rows of a batch that fail alone, and none that does not, it is the store and not the rows."""
ROWS_DOUBTED_AT_ONCE = 4096
MOST_REFUSALS = 8
"""How many saves in a row may fail because an engine has lost our claim, and so the release before it."""
MOST_CLAIMS = 2
"""How often a user is claimed again for one save."""
RECOVERY_RATE = 1.25
"""After an outage periodic saves come at this multiple of users / interval: above 1 the backlog melts, and what is
saved together in this interval comes together in the next, where it must not be more than the store is made for."""
RECOVERY_STEP = SECOND // 100


class StoreHost(SaveHost, Protocol):
    """What a saver to a store needs of whoever it works for."""

    def is_last_save(self, session: SessionCore) -> bool:
        """Whether this save is to release the user."""
        ...

    def unsavable(self, session: SessionCore, error: UnsavableError) -> None:
        """The data of a session cannot be saved as it is; told once for the same fault."""
        ...

    def lost(self, session: SessionCore, error: FencedError | UserErasedError) -> None:
        """The store takes nothing more of a session."""
        ...

    def loss_of(self, session: SessionCore) -> Exception | None:
        """Why nothing more of a session is to be written, if so."""
        ...

    def disown(self, claim: Claim) -> None:
        """Let go of a claim that turned out not to be wanted."""
        ...

    def doubt(self, user_ids: list[int | str], call: asyncio.Task[list[Claim]]) -> None:
        """A claim of these users had no answer, and may be granted all the same."""
        ...

    def see_loss(self) -> None:
        """What the store had acknowledged may be gone."""
        ...


class _Row:
    """One save of a batch."""

    __slots__ = ("changed", "claims", "flight", "record", "session", "settled", "unowned", "version", "was_fenced")

    def __init__(self, session: SessionCore, version: int, flight: Flight) -> None:
        self.session = session
        self.version = version
        self.flight = flight
        self.record: Record | None = None
        self.changed = True
        self.settled = False
        self.unowned = False  # the store says that it has to be claimed before it is written
        self.was_fenced = False
        self.claims = 0

    @property
    def user_id(self) -> int | str:
        assert self.record is not None
        return self.record.user_id


_Hanging = tuple[Call[list[Verdict]], list[_Row]]
"""A call that has not returned at its deadline, and the rows that wait for it nevertheless."""


class StoreSaver:
    """Saves to one store."""

    one_at_a_time = True

    def __init__(
        self,
        table: SessionTable,
        gateway: StoreGateway,
        encoding: Encoding,
        clock: Clock,
        options: Options,
        host: StoreHost,
        owner: str,
        sanitizer: Sanitizer | None = None,
    ) -> None:
        self.patience: int | None = options.save_timeout
        self.encoding = encoding
        self.owner = owner
        self.unchanged: int = 0
        self.fenced: int = 0
        self.unsavable: dict[SessionCore, str] = {}
        """Sessions whose data cannot be saved as it is, with the fault that was last told."""
        self._refused: dict[SessionCore, tuple[int, UnsavableError]] = {}  # by the store: the digest, and why
        self._unknown: dict[SessionCore, set[tuple[int, int]]] = {}
        """Writes that may be stored, or be about to, by version and digest, since the last one acknowledged."""
        self._table = table
        self._gateway = gateway
        self._clock = clock
        self._interval = options.interval
        self._before_save: Callable[[SessionCore], object] | None = options.before_save
        self._sanitizer = sanitizer
        if sanitizer is not None and options.before_save is not None:
            self._before_save = sanitizer.before_save(options.before_save)
        self._is_marked_only = options.tracking == "marked"
        self._host = host
        self.digest_key: bytes = os.urandom(16)
        self.digest: Digest = Digest(self.digest_key)
        self._batches = self._plan_batches()
        self._batch_is_next = False  # else whoever is asked for
        self._order = random.Random(random.getrandbits(64))
        self._kick: Callable[[], None] = lambda: None
        self._recovering = False
        self._allowance = 0.0
        self._allowed_at = 0
        self._step_timer: TimerHandle | None = None
        self._doubt_timer: TimerHandle | None = None
        gateway.watch(self._see_chance, self._see_return, self._see_loss)

    def _plan_batches(self) -> SaveBatches | None:
        """How most saves are made; None where there is more to each of them than its bytes."""
        if self._interval is None or self._before_save is not None or self._sanitizer is not None:
            return None
        return SaveBatches(
            self._table,
            self.digest,
            record=Record,
            verdict=Verdict,
            saved=(Outcome.SAVED, Outcome.ALREADY),
            owner=self.owner,
            schema=self.encoding.schema,
            dump=self.encoding.dump if self.encoding.converts else None,
            max_bytes=self.encoding.max_bytes,
        )

    def bind(self, kick: Callable[[], None]) -> None:
        """`kick` is called when there may be more to do."""
        self._kick = kick

    def known_stored(self, session: SessionCore) -> frozenset[tuple[int, int]]:
        """All that the store may have of a user by the work of this session: versions, with digests of the bodies."""
        known = set(self._unknown.get(session, ()))
        version, digest = self._table.stored(session)
        if version:
            known.add((version, digest))
        if self._batches is not None:
            fixed = self._batches.fixed(session)  # it may be under way in a batch
            if fixed[0] != version:
                known.add(fixed)
        return frozenset(known)

    def close(self) -> None:
        for timer in (self._step_timer, self._doubt_timer):
            if timer is not None:
                timer.cancel()
        self._step_timer = self._doubt_timer = None

    # What may be done now

    def can_save(self) -> bool:
        return True

    def may_start(self) -> bool:
        return self._gateway.may_call()

    def _see_chance(self) -> None:
        self._kick()

    def _see_return(self) -> None:
        self._recovering = self._interval is not None
        self._allowance = 1.0
        self._allowed_at = self._clock.now()

    def _see_loss(self, place: int = 0) -> None:
        """What was acknowledged may be gone: within one interval everybody is written again."""
        if not place:
            self._host.see_loss()
        following = self._table.doubt(place, ROWS_DOUBTED_AT_ONCE)
        if self._doubt_timer is not None:
            self._doubt_timer.cancel()  # of an earlier loss: this walk passes there, too
        self._doubt_timer = None
        if following:
            self._doubt_timer = self._clock.call_later(0, partial(self._see_loss, following), Context())

    def serves_periodic(self) -> bool:
        """After an outage everybody is due at once; they are let through at a steady rate, oldest first."""
        if not self._recovering:
            return True
        self._grow_allowance()
        if self._allowance >= 1:
            return True
        if self._step_timer is None:
            self._step_timer = self._clock.call_later(RECOVERY_STEP, self._step, Context())
        return False

    def _grow_allowance(self) -> None:
        assert self._interval is not None
        now = self._clock.now()
        rate = self._table.counters.identified * RECOVERY_RATE / self._interval
        self._allowance = min(self._allowance + (now - self._allowed_at) * rate, max(1.0, 2 * RECOVERY_STEP * rate))
        self._allowed_at = now

    def _step(self) -> None:
        self._step_timer = None
        self._kick()

    # Batches

    async def serve(self, autosave: Autosave, worker: Worker) -> bool:
        batches = self._batches
        if batches is None or self._recovering or self._gateway.down or not autosave.serves_periodic():
            return await self._serve_each(autosave, worker)
        # the two kinds take turns, so that neither starves
        takes_batch = batches.has_due() and (self._batch_is_next or not self._table.has_due(False))
        self._batch_is_next = not takes_batch
        if takes_batch:
            return await self._serve_batch(batches.batch(), autosave, worker)
        return await self._serve_each(autosave, worker, periodic=not batches.has_due())

    async def _serve_batch(self, batch: SaveBatch, autosave: Autosave, worker: Worker) -> bool:
        """Save those whose time has come and who are nothing special, in a batch; the others as `_serve_each` does."""
        rows: list[_Row] = []
        hanging: list[_Hanging] = []
        taken = 0

        def rest() -> list[_Row]:
            handed = [self._handed_over(batch, *each) for each in autosave.end_batch(batch)]
            rows.extend(handed)
            return handed

        try:
            while taken < MOST_ROWS and batch.size < MOST_BYTES:
                if taken and autosave.slice_is_spent():
                    await autosave.slice()
                number = autosave.take_into(
                    batch, min(ROWS_AT_ONCE, MOST_ROWS - taken), min(BYTES_AT_ONCE, MOST_BYTES - batch.size)
                )
                for odd in autosave.take_odd(batch):
                    row = _Row(*odd)
                    rows.append(row)
                    self._fix(row, autosave)
                if not number:
                    break
                taken += number
            worker.start()
            if not taken:
                return False
            autosave.employ()
            others = [row for row in rows if not row.settled]
            if len(batch) and not self._trouble(hanging):
                error = await self._call(batch.records, rest, autosave, hanging, batch)
                if error is not None:
                    await self._write(rest(), autosave, hanging, tried=error)
            await self._write([*rest(), *others], autosave, hanging)
            await self._finish(rows, autosave, hanging)
        except asyncio.CancelledError:
            autosave.interrupt()
            raise
        finally:
            self.unchanged += batch.unchanged
            rows += (_Row(*odd) for odd in autosave.take_odd(batch))
            rest()
            self._fail_unsettled(rows, autosave)
        return True

    def _handed_over(
        self, batch: SaveBatch, session: SessionCore, version: int, flight: Flight, digest: int, place: int
    ) -> _Row:
        row = _Row(session, version, flight)
        row.record = batch.records[place]
        if self._table.state(session) != "gone":
            self._unknown.setdefault(session, set()).add((version, digest))
        return row

    async def _serve_each(self, autosave: Autosave, worker: Worker, *, periodic: bool = True) -> bool:
        """Save whoever is due, each looked at alone; without `periodic`, those who are asked for."""
        rows: list[_Row] = []
        try:
            await self._fill(rows, autosave, periodic=periodic)
            worker.start()
            if not rows:
                return False
            autosave.employ()
            open_rows = [row for row in rows if not row.settled]
            # what failed before never shares a batch with what did not
            suspects = [row for row in open_rows if self._failures(row)]
            clean = [row for row in open_rows if row not in suspects] if suspects else open_rows
            hanging: list[_Hanging] = []
            await self._write(clean, autosave, hanging)
            await self._write_suspects(suspects, autosave, hanging)
            await self._finish(rows, autosave, hanging)
        except asyncio.CancelledError:
            autosave.interrupt()
            raise
        finally:
            self._fail_unsettled(rows, autosave)
        return True

    async def _finish(self, rows: list[_Row], autosave: Autosave, hanging: list[_Hanging]) -> None:
        while unowned := [row for row in rows if row.unowned and not row.settled]:
            await self._write_reclaimed(unowned, autosave, hanging)
        for call, late in hanging:
            await self._outlive(call, late, autosave)

    def _fail_unsettled(self, rows: list[_Row], autosave: Autosave) -> None:
        for row in rows:
            if not row.settled:
                self._fail(row, autosave, ListenerCancelledError("the event loop was shut down during the save"))

    async def _fill(self, rows: list[_Row], autosave: Autosave, *, periodic: bool) -> None:
        """Take sessions and fix their bytes, until the batch is full or nobody is left."""
        size = 0
        most = 1 if self._gateway.down else MOST_ROWS
        while len(rows) < most and size < MOST_BYTES:
            if rows and autosave.slice_is_spent():
                await autosave.slice()
            taken = autosave.take(periodic=periodic)
            if taken is None:
                if self._recovering and not self._table.has_due():
                    self._recovering = False  # nobody is left of those who had to wait
                break
            row = _Row(*taken)
            rows.append(row)
            if self._recovering and not row.flight.has_waiters and not self._table.is_ending(row.session):
                self._allowance -= 1
            size += self._fix(row, autosave)

    def _failures(self, row: _Row) -> int:
        if self._table.state(row.session) == "gone":
            return 0
        return self._table.failures(row.session)

    def _fix(self, row: _Row, autosave: Autosave) -> int:
        """Fix the bytes of a session; settle it here if there is nothing to send. Returns the size of what is."""
        session = row.session
        user_id = session.user_id
        assert user_id is not None
        if (loss := self._host.loss_of(session)) is not None:
            row.settled = True
            autosave.drop(session, row.version, row.flight, loss)
            return 0
        try:
            body = self.body(session)
        except UnsavableError as error:
            self._refuse(row, autosave, error.with_traceback(None))
            return 0
        fingerprint = self.digest(body)
        refused = self._refused.get(session)
        if refused is not None and refused[0] == fingerprint:
            self._refuse(row, autosave, refused[1])
            return 0
        is_ending = self._table.is_ending(session)
        if is_ending:
            row.flight.fingerprint = fingerprint
        release = is_ending and self._host.is_last_save(session)
        version = self._table.fix(session, fingerprint)
        row.changed = version > 0
        if self._sanitizer is not None:
            by_timer = self._is_marked_only and not row.flight.is_patient and not is_ending
            self._sanitizer.saving(session, found_changed=by_timer and row.changed)
        if version:
            row.version = version
        elif not release:
            self.unchanged += 1
            self._acknowledge(row, autosave, time.time())
            return 0
        if release:
            row.flight.releases = True
        row.record = Record(
            user_id,
            self._table.epoch(session),
            self.owner,
            row.version,
            self.encoding.schema,
            body,
            time.time(),
            release,
        )
        self._unknown.setdefault(session, set()).add((row.version, fingerprint))
        return len(body)

    def body(self, session: SessionCore) -> bytes:
        """The data of a session as it is to be stored now. Raises `UnsavableError`."""
        assert session.user_id is not None
        try:
            if self._before_save is not None:
                self._copy_live_state(self._before_save, session)
            return self.encoding.dump(session.user_data)
        except Exception as error:
            raise _unsavable(session.user_id, error) from error

    def _copy_live_state(self, before_save: Callable[[SessionCore], object], session: SessionCore) -> None:
        result = before_save(session)
        if inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                result.close()
            raise EncodingError("before_save returned something to await; it has to be done when it returns")

    def fingerprint(self, data: object) -> int | None:
        """The digest of what would be saved; None if it cannot be."""
        try:
            return self.digest(self.encoding.dump(data))
        except Exception:
            return None

    def refusal(self, session: SessionCore) -> UnsavableError | None:
        """Why the data of a session cannot be saved as it is, as far as can be told without the store."""
        try:
            body = self.body(session)
        except UnsavableError as error:
            return error.with_traceback(None)
        refused = self._refused.get(session)
        if refused is not None and refused[0] == self.digest(body):
            return refused[1]
        return None

    # Calls

    async def _write_suspects(self, rows: list[_Row], autosave: Autosave, hanging: list[_Hanging]) -> None:
        self._order.shuffle(rows)
        while rows:
            most = max(1, MOST_ROWS >> max(self._failures(row) for row in rows))
            part, rows = rows[:most], rows[most:]
            await self._write(part, autosave, hanging, suspects=True)

    async def _write(
        self,
        rows: list[_Row],
        autosave: Autosave,
        hanging: list[_Hanging],
        *,
        suspects: bool = False,
        tried: Exception | None = None,
    ) -> None:
        """Write rows; where a call fails as a whole, in halves, until the row it fails for is alone.

        `tried` is what a call for all of them has raised already.
        """
        pending = [rows] if rows else []
        alone, any_success = 0, False
        was_down = self._gateway.down  # and that has been said
        while pending:
            part = pending.pop()
            if tried is None and (trouble := self._trouble(hanging)):
                unavailable = StoreUnavailableError(f"{self._gateway.name} {trouble}")
                self._fail_all(part, autosave, unavailable, report=False)
                continue
            if tried is None:
                error = await self._call(_records(part), partial(list, part), autosave, hanging)
            else:
                error, tried = tried, None
            if error is None:
                any_success = True
            elif len(part) > 1 and not isinstance(error, StoreUnavailableError):
                half = len(part) // 2
                pending += [part[half:], part[:half]]
            else:
                self._fail_all(part, autosave, error, report=not was_down)
                alone += 1
                is_hopeless = not any_success and alone > MOST_ALONE
                if isinstance(error, StoreUnavailableError) or is_hopeless:
                    # not the fault of a row
                    if not isinstance(error, StoreUnavailableError) and not suspects:
                        self._gateway.failed(self._clock.now(), error)
                    for others in pending:
                        self._fail_all(others, autosave, error, report=not was_down)
                    return

    def _trouble(self, hanging: list[_Hanging]) -> str:
        """Why nothing more is sent now, if so."""
        if hanging:
            return "hangs"  # not behind a call that may never return: another worker takes them
        return "" if self._gateway.may_call() else "is down"  # it has gone down since these rows were taken

    async def _call(
        self,
        records: list[Record],
        rows_of: Callable[[], list[_Row]],
        autosave: Autosave,
        hanging: list[_Hanging],
        batch: SaveBatch | None = None,
    ) -> Exception | None:
        """One call of the store; None once it has been answered and each row settled, or if it hangs.

        `rows_of` gives the rows of the records; of those of a `batch` only if they are needed.
        """
        call = self._gateway.write(records)
        try:
            verdicts = await call.answer()
        except CallTimedOutError as error:
            rows = rows_of()
            if self._gateway.store.fenced:
                self._fail_all(rows, autosave, error)
                hanging.append((call, []))
            else:
                for row in rows:
                    row.flight.resolve(error)
                self._report_batch(rows, error)
                hanging.append((call, rows))
            return None
        except asyncio.CancelledError:
            # this worker is thrown away, the call is not: its users are not free before it has returned
            rows = rows_of()
            for row in rows:
                row.settled = True
            call.task.add_done_callback(lambda _: self._settle_late(call, rows, autosave))
            raise
        except Exception as error:
            return error
        if batch is not None and isinstance(verdicts, list) and autosave.settle_batch(batch, verdicts):
            for row in rows_of():
                assert row.record is not None
                self._acknowledge(row, autosave, row.record.saved_at)
            return None
        return self._settle(rows_of(), verdicts, autosave)

    async def _outlive(self, call: Call[list[Verdict]], rows: list[_Row], autosave: Autosave) -> None:
        """A call hangs. It keeps its slot until it returns, and its users too where nothing fences off a late write."""
        try:
            await call.end()
        except asyncio.CancelledError:
            for row in rows:
                row.settled = True
            call.task.add_done_callback(lambda _: self._settle_late(call, rows, autosave))
            raise
        self._settle_late(call, rows, autosave)

    def _settle_late(self, call: Call[list[Verdict]], rows: list[_Row], autosave: Autosave) -> None:
        """A call has returned that its worker no longer waits for."""
        error: Exception | None
        for row in rows:
            row.settled = False
        try:
            error = self._settle(rows, call.result(), autosave)
        except Exception as raised:
            error = raised
        unsettled = [row for row in rows if not row.settled]
        self._fail_all(unsettled, autosave, error or StoreUnavailableError("it has to be claimed again"), report=False)
        self._kick()

    def _settle(self, rows: list[_Row], verdicts: object, autosave: Autosave) -> Exception | None:
        if (
            not isinstance(verdicts, list)
            or len(verdicts) != len(rows)
            or not all(
                isinstance(verdict, Verdict) and isinstance(verdict.outcome, str) and verdict.outcome in _OUTCOMES
                for verdict in verdicts
            )
        ):
            return StoreContractError(f"{self._gateway.name} did not answer with one verdict for each record")
        for row, verdict in zip(rows, verdicts, strict=True):
            self._settle_one(row, Outcome(verdict.outcome), verdict.detail, autosave)
        return None

    def _settle_one(self, row: _Row, outcome: Outcome, detail: str, autosave: Autosave) -> None:
        session, record = row.session, row.record
        assert record is not None
        user_id = record.user_id
        if outcome is Outcome.SAVED or outcome is Outcome.ALREADY:
            self._acknowledge(row, autosave, record.saved_at)
        elif outcome is Outcome.INVALID:
            reason = detail or "it does not say why"
            invalid = UnsavableError(f"the store refuses the data of user {user_id!r:.80}: {reason}", user_id=user_id)
            if session.end_reason is None:
                self._refused[session] = (self.digest(record.body), invalid)
            self._refuse(row, autosave, invalid)
        elif outcome is Outcome.FAILED or row.claims >= MOST_CLAIMS:
            failed = StoreUnavailableError(
                f"{self._gateway.name} could not save user {user_id!r:.80}: {detail or outcome}"
            )
            self._fail(row, autosave, failed)
        elif outcome is Outcome.MISSING:
            row.unowned = True
            if not self._failures(row) and not row.claims:
                lost = f"the store no longer has the record of user {user_id!r:.80}; it is claimed and saved again"
                self._host.report(LostRecordError(lost, user_id=user_id), session)
        elif outcome is Outcome.FENCED and not self._gateway.store.fenced:
            self._drop(row, autosave, _fenced(user_id))  # it can only know from somewhere else
        elif outcome is Outcome.FENCED:
            # perhaps by ourselves: a claim whose reply came too late, or a last save after which the data has changed
            row.unowned = True
            row.was_fenced = True
        else:
            erased = UserErasedError(f"user {user_id!r:.80} was erased while the session lived", user_id=user_id)
            self._drop(row, autosave, erased)

    async def _write_reclaimed(self, rows: list[_Row], autosave: Autosave, hanging: list[_Hanging]) -> None:
        """Claim users again whose rows are gone, or fenced off, and write what was to be written."""
        for row in list(rows):
            row.unowned = False
            row.claims += 1
            if self._is_lost(row):
                # by the same owner the claim would be granted, at the expense of a session that has the user by now
                self._drop(row, autosave, _fenced(row.user_id))
                rows.remove(row)
        if not rows:
            return
        if not self._gateway.may_call():
            self._fail_all(rows, autosave, StoreUnavailableError(f"{self._gateway.name} is down"), report=False)
            return
        call = self._gateway.start(self._gateway.store.claim_many, [row.user_id for row in rows], self.owner)
        try:
            answers = {claim.user_id: claim for claim in await call.answer() if is_sound(claim)}
        except BaseException as error:
            self._host.doubt([row.user_id for row in rows], call.task)
            if not isinstance(error, Exception):
                raise
            self._fail_all(rows, autosave, error)
            return
        owned = []
        for row in rows:
            assert row.record is not None
            claim = answers.get(row.user_id)
            if claim is None:
                self._fail(row, autosave, StoreContractError("a claim was not answered"))
            elif not claim.granted and self._has_lost_ours(row, claim):
                self._fail(row, autosave, StoreUnavailableError(f"{claim.owner} has not let go of this user again"))
            elif not claim.granted:
                self._drop(row, autosave, _fenced(row.user_id))
            elif self._is_lost(row) or not self._is_ours(row, claim):
                self._drop(row, autosave, _fenced(row.user_id))
                self._host.disown(claim)
            else:
                self._table.own(row.session, claim.epoch)
                row.record = row.record._replace(epoch=claim.epoch)
                owned.append(row)
        await self._write(owned, autosave, hanging)

    def _has_lost_ours(self, row: _Row, claim: Claim) -> bool:
        """Whether who has a user had them before us, in an engine that has lost our claim: they let go of them soon."""
        return 0 < claim.epoch < self._table.epoch(row.session) and self._failures(row) < MOST_REFUSALS

    def _is_lost(self, row: _Row) -> bool:
        """Whether a session is over, or has no user any more, while its save is under way."""
        return self._table.state(row.session) == "gone" or self._host.loss_of(row.session) is not None

    def _is_ours(self, row: _Row, claim: Claim) -> bool:
        """Whether what is stored is what this session has saved, or may have, so that it may go on from there."""
        assert row.record is not None
        stored = claim.record
        _, acknowledged = self._table.versions(row.session)
        if row.was_fenced and claim.epoch <= self._table.epoch(row.session):
            # epochs never fall, but in an engine that has lost what came after: what it has now is older than ours
            return stored is None or stored.version <= acknowledged
        if stored is None:
            return not (row.was_fenced and acknowledged)  # else it was erased, and is new
        found = stored.version, self.digest(stored.body)
        return (
            found == (row.version, self.digest(row.record.body))
            or self._table.is_stored(row.session, *found)
            or found in self._unknown.get(row.session, ())
        )

    # Settling

    def _acknowledge(self, row: _Row, autosave: Autosave, saved_at: float) -> None:
        row.settled = True
        self.forget(row.session)
        autosave.acknowledge(
            row.session, row.version, row.flight, Receipt(row.version, saved_at, row.changed, self._gateway.name)
        )

    def _fail(self, row: _Row, autosave: Autosave, error: Exception) -> None:
        row.settled = True
        autosave.fail(row.session, row.version, row.flight, error)

    def _fail_all(self, rows: list[_Row], autosave: Autosave, error: Exception, *, report: bool = True) -> None:
        if not isinstance(error, CageySessionsError):
            raised, error = error, StoreUnavailableError(f"{self._gateway.name} raised {type(error).__name__}")
            error.__cause__ = raised
        if report:
            self._report_batch(rows, error)
        for row in rows:
            row.settled = True
            autosave.fail(row.session, row.version, row.flight, error, report=False)

    def _report_batch(self, rows: list[_Row], error: Exception) -> None:
        if len(rows) == 1:
            self._host.report(error, rows[0].session)
            return
        failed = StoreUnavailableError(f"{len(rows)} users were not saved; they are tried again")
        failed.__cause__ = error
        self._host.report(failed, None)

    def _refuse(self, row: _Row, autosave: Autosave, error: UnsavableError) -> None:
        row.settled = True
        if self.unsavable.get(row.session) != str(error) and row.session.end_reason is None:
            self.unsavable[row.session] = str(error)
            self._host.unsavable(row.session, error)
        autosave.fail(row.session, row.version, row.flight, error, report=False)

    def _drop(self, row: _Row, autosave: Autosave, error: FencedError | UserErasedError) -> None:
        row.settled = True
        self.fenced += isinstance(error, FencedError)
        self.forget(row.session)
        autosave.drop(row.session, row.version, row.flight, error)
        self._host.lost(row.session, error)

    def forget(self, session: SessionCore) -> None:
        """Nothing is wrong with the data of a session any more, or the session is gone."""
        if self.unsavable:
            self.unsavable.pop(session, None)
        if self._refused:
            self._refused.pop(session, None)
        if self._unknown:
            self._unknown.pop(session, None)


def _records(rows: list[_Row]) -> list[Record]:
    return [row.record for row in rows if row.record is not None]


def is_sound(claim: Claim) -> bool:
    """Whether an answer to a claim can be used."""
    epoch = claim.epoch
    return type(epoch) is int and (0 < epoch < MAX_NUMBER or not claim.granted)


def _unsavable(user_id: int | str, error: Exception) -> UnsavableError:
    path = error.path if isinstance(error, EncodingError) else None
    reason = str(error) if isinstance(error, EncodingError) else f"before_save raised {type(error).__name__}"
    message = f"the data of user {user_id!r:.80} cannot be saved: {reason}"
    return UnsavableError(message, user_id=user_id, path=path)


def _fenced(user_id: int | str) -> FencedError:
    return FencedError(
        f"somebody else has taken over user {user_id!r:.80}: what this session had not saved by then is not saved",
        user_id=user_id,
    )
