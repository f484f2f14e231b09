"""`StoreSaver`: which sessions are saved together in one call of a store, and the bytes of each.

The bytes of a session are fixed in one synchronous step: `before_save`, the encoder, the digest, the version. If the
digest is that of the version last acknowledged there is nothing to write. From then on only bytes, user id and version
are under way, in calls of at most `MOST_ROWS` rows and about `MOST_BYTES`.

Most sessions are saved through the core, in batches (`_serve_batch`). A session goes alone (`_serve_each`) if a caller
has asked for its save, if it is being ended, or if its last save failed; all do after an outage, and where
`before_save` or `debug` has something to do for each.

See also `autosave`, for when a session is due; `writing`, for the calls; `verdicts`, for the answers.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Collection
from contextvars import Context
from functools import partial

from .._core import SaveBatch, SaveBatches, SessionCore, SessionTable
from ..clock import Clock, TimerHandle
from ..data import Encoding, Sanitizer
from ..errors import EncodingError, ListenerCancelledError, StoreUnavailableError, UnsavableError
from ..events.reports import Reports
from ..loop import Loop
from ..options import Options
from ..ownership import Claims
from ..process import Identity
from ..stores import Outcome, Record, Verdict
from ..stores.link import StoreLink
from ..user_code import END_OF_PROCESS
from ..wording import quote
from .autosave import Autosave
from .in_flight import Save
from .pacing import Pacing
from .reclaiming import Reclaiming
from .row import Row, Stage
from .saver import Saver
from .verdicts import Lost, Results
from .workers import Worker
from .writing import MOST_ROWS, Hanging, Writer

__all__ = ["MOST_BYTES", "MOST_ROWS", "StoreSaver"]

MOST_BYTES = 1024 * 1024
"""About how much is sent in one call; the last session may exceed it."""
ROWS_AT_ONCE = 64
BYTES_AT_ONCE = 64 * 1024
"""After so many sessions or bytes of a batch it is seen whether this turn of the loop is over."""
ROWS_DOUBTED_AT_ONCE = 4096
"""How many rows of the table are walked in one step after an engine has lost something."""


class StoreSaver(Saver):
    """Saves to one store."""

    is_store = True
    one_at_a_time = True

    def __init__(
        self,
        table: SessionTable,
        loop: Loop,
        link: StoreLink,
        claims: Claims,
        encoding: Encoding,
        clock: Clock,
        options: Options,
        reports: Reports,
        identity: Identity,
        on_lost: Lost,
        sanitizer: Sanitizer | None = None,
    ) -> None:
        self.timeout: int | None = options.save_timeout
        self.encoding = encoding
        self._identity = identity
        self.unchanged: int = 0
        self._table = table
        self._link = link
        self._clock = clock
        self._interval = options.interval
        self._before_save: Callable[[SessionCore], object] | None = options.before_save
        self._sanitizer = sanitizer
        if sanitizer is not None and options.before_save is not None:
            self._before_save = sanitizer.before_save(options.before_save)
        self._is_marked_only = options.tracking == "marked"
        self._loop = loop
        self._claims = claims
        self._reports = reports
        self._on_lost = on_lost
        self._losses = self._returns = 0
        """How many losses and returns of the link have been dealt with."""
        self._batches: SaveBatches | None = None
        self._batch_is_next = False
        """Whether the next load of work is a batch, and not sessions that are saved alone."""
        self._doubt_timer: TimerHandle | None = None
        self._autosave: Autosave
        self._pacing: Pacing
        self._results: Results
        self._writer: Writer

    def bind(self, autosave: Autosave) -> None:
        table, link, identity = self._table, self._link, self._identity
        self._autosave = autosave
        self._pacing = Pacing(self._clock, table, self._interval, autosave.kick)
        results = self._results = Results(autosave, table, link, identity, self._reports, self._on_lost)
        reclaiming = Reclaiming(table, link, identity, self._claims, results)
        self._writer = Writer(autosave, link, self._clock, results, reclaiming, identity)
        link.watch(self._on_link_change)

    def begin(self) -> None:
        """The process, and with it the owner and the key of the digests, is known: plan the batches."""
        self._batches = self._plan_batches()

    def _plan_batches(self) -> SaveBatches | None:
        """The batches of the core; None if something has to be called for each save, or no save is periodic."""
        if self._interval is None or self._before_save is not None or self._sanitizer is not None:
            return None
        return SaveBatches(
            self._table,
            self._identity.digest,
            record=Record,
            verdict=Verdict,
            saved=(Outcome.SAVED, Outcome.ALREADY),
            owner=self._identity.owner,
            schema=self.encoding.schema,
            dump=self.encoding.dump if self.encoding.converts else None,
            max_bytes=self.encoding.max_bytes,
        )

    def known_stored(self, session: SessionCore) -> frozenset[tuple[int, int]]:
        """All that the store may have of a user from this session's saves: versions, with the digests of the bodies."""
        known = set(self._results.unknown.get(session, ()))
        version, digest = self._table.stored(session)
        if version:
            known.add((version, digest))
        if self._batches is not None:
            fixed = self._batches.fixed(session)  # it is under way in a batch if its version is not the stored one
            if fixed[0] != version:
                known.add(fixed)
        return frozenset(known)

    def has_to_release(self, session: SessionCore) -> bool:
        return (
            self._link.store.shared
            and session.user_id is not None
            and not self._table.is_released(session)
            and not self._table.is_lost(session)
        )

    async def release(self, session: SessionCore) -> None:
        assert session.user_id is not None
        await self._claims.release(session.user_id, self._table.epoch(session))

    def release_later(self, session: SessionCore) -> None:
        assert session.user_id is not None
        self._claims.release_later(session.user_id, self._table.epoch(session))

    def forget(self, session: SessionCore) -> None:
        self._results.forget(session)
        if session.user_id is not None:
            self._claims.on_session_ended(session.user_id)

    @property
    def fenced(self) -> int:
        return self._results.fenced

    @property
    def unsavable(self) -> Collection[SessionCore]:
        return self._results.unsavable

    def drain(self, draining: bool) -> None:
        self._claims.drain(draining)

    async def close(self, until: int) -> None:
        self._pacing.close()
        if self._doubt_timer is not None:
            self._doubt_timer.cancel()
            self._doubt_timer = None
        await self._claims.wait_until_idle(until)
        await self._link.close()
        # before this the last saves and the releases have to be over; after it nothing may be called
        self._claims.close()

    # What may be done now

    def can_save(self) -> bool:
        return True

    def outage(self) -> StoreUnavailableError | None:
        return StoreUnavailableError(f"{self._link.name} is down") if self._link.down else None

    def may_start(self) -> bool:
        return self._link.may_call()

    def _on_link_change(self) -> None:
        """Called by the link when a call may begin again: the store may have been down, or have lost something."""
        if self._losses != self._link.losses:
            self._losses = self._link.losses
            self._claims.on_loss()
            self._doubt_all()
        if self._returns != self._link.returns:
            self._returns = self._link.returns
            self._pacing.begin()
        self._autosave.kick()

    def _doubt_all(self, place: int = 0) -> None:
        """Acknowledged data may be lost: count all sessions as changed, so that all are written within an interval.

        Walks the table from `place` on, in steps.
        """
        following = self._table.doubt(place, ROWS_DOUBTED_AT_ONCE)
        if self._doubt_timer is not None:
            self._doubt_timer.cancel()  # the walk for an earlier loss: this one passes the rest of the table, too
        self._doubt_timer = None
        if following:
            self._doubt_timer = self._clock.call_later(0, partial(self._doubt_all, following), Context())

    def serves_periodic(self) -> bool:
        """Whether periodic saves may begin; after an outage, when all are due, they do so at a steady rate."""
        return not self._pacing.is_active or self._pacing.allows()

    # Batches

    async def serve(self, worker: Worker) -> bool:
        batches = self._batches
        if batches is None or self._pacing.is_active or self._link.down or not self._autosave.serves_periodic():
            return await self._serve_each(worker)
        # batches and sessions alone take turns, so that neither kind starves the other
        takes_batch = batches.has_due() and (self._batch_is_next or not self._table.has_due(False))
        self._batch_is_next = not takes_batch
        if takes_batch:
            return await self._serve_batch(batches.batch(), worker)
        return await self._serve_each(worker, periodic=not batches.has_due())

    async def _serve_batch(self, batch: SaveBatch, worker: Worker) -> bool:
        """Save due sessions in one batch of the core. Those that the core leaves out of it get rows of their own."""
        autosave, writer = self._autosave, self._writer
        rows: list[Row] = []
        hanging: list[Hanging] = []
        taken = 0

        def rest() -> list[Row]:
            # what the core still holds of the batch becomes rows, which `writer` and `results` can handle one by one
            handed = [self._handed_over(batch, *each) for each in autosave.end_batch(batch)]
            rows.extend(handed)
            return handed

        try:
            while taken < MOST_ROWS and batch.size < MOST_BYTES:
                if taken and self._loop.is_turn_over():
                    await self._loop.take_turn()
                number = autosave.take_into(
                    batch, min(ROWS_AT_ONCE, MOST_ROWS - taken), min(BYTES_AT_ONCE, MOST_BYTES - batch.size)
                )
                for taken_alone in autosave.take_left_out(batch):
                    # the core could not encode these, or a caller has asked for them meanwhile: they go on as usual
                    row = Row(*taken_alone)
                    rows.append(row)
                    self._fix(row)
                if not number:
                    break
                taken += number
            worker.start()
            if not taken:
                return False
            autosave.employ()
            others = [row for row in rows if row.is_pending]
            if len(batch) and not writer.trouble(hanging):
                error = await writer.call(batch.records, rest, hanging, batch)
                if error is not None:  # the call has failed for all of them: go on in halves
                    await writer.write(rest(), hanging, tried=error)
            await writer.write([*rest(), *others], hanging)
            await writer.finish(rows, hanging)
        except asyncio.CancelledError:
            autosave.interrupt()
            raise
        finally:
            self.unchanged += batch.unchanged
            # Reached also when this task was cancelled. Every session that was taken has to be settled here, or it
            # would stay under way for ever.
            rows += (Row(*each) for each in autosave.take_left_out(batch))
            rest()
            self._fail_unsettled(rows)
        return True

    def _handed_over(
        self, batch: SaveBatch, session: SessionCore, version: int, save: Save, digest: int, place: int
    ) -> Row:
        row = Row(session, version, save)
        row.record = batch.records[place]
        if self._table.state(session) != "gone":  # nothing would drop it any more
            self._results.unknown.setdefault(session, set()).add((version, digest))
        return row

    async def _serve_each(self, worker: Worker, *, periodic: bool = True) -> bool:
        """Save due sessions, each with a row of its own; without `periodic`, only those for which a save was asked."""
        autosave, writer = self._autosave, self._writer
        rows: list[Row] = []
        try:
            await self._fill(rows, periodic=periodic)
            worker.start()
            if not rows:
                return False
            autosave.employ()
            open_rows = [row for row in rows if row.is_pending]
            # a row that failed before may be the reason for it, and never shares a call with rows that have not
            failed_before = [row for row in open_rows if self._results.failures(row)]
            clean = [row for row in open_rows if row not in failed_before] if failed_before else open_rows
            hanging: list[Hanging] = []
            await writer.write(clean, hanging)
            await writer.write_failed(failed_before, hanging)
            await writer.finish(rows, hanging)
        except asyncio.CancelledError:
            autosave.interrupt()
            raise
        finally:
            self._fail_unsettled(rows)
        return True

    def _fail_unsettled(self, rows: list[Row]) -> None:
        for row in rows:
            if row.is_pending:
                self._results.fail(row, ListenerCancelledError("the event loop was shut down during the save"))

    async def _fill(self, rows: list[Row], *, periodic: bool) -> None:
        """Take sessions and fix their bytes, until the call is full or none is left."""
        pacing = self._pacing
        size = 0
        most = 1 if self._link.down else MOST_ROWS  # this call shows whether the store is back
        while len(rows) < most and size < MOST_BYTES:
            if rows and self._loop.is_turn_over():
                await self._loop.take_turn()
            taken = self._autosave.take(periodic=periodic)
            if taken is None:
                if pacing.is_active and not self._table.has_due():
                    pacing.end()
                break
            row = Row(*taken)
            rows.append(row)
            # a session that a caller waits for, or that is being ended, takes no token
            if pacing.is_active and not row.save.has_waiters and not self._table.is_ending(row.session):
                pacing.spend()
            size += self._fix(row)

    def _fix(self, row: Row) -> int:
        """Fix the bytes of a session, or settle it if there is nothing to send. Returns how many bytes there are."""
        session = row.session
        user_id = session.user_id
        assert user_id is not None
        if (loss := self._autosave.loss_of(session)) is not None:
            row.move(Stage.SETTLED)
            self._autosave.drop(session, row.version, row.save, loss)
            return 0
        try:
            body = self.body(session)
        except UnsavableError as error:
            self._results.refuse(row, error.with_traceback(None))
            return 0
        fingerprint = self._identity.digest(body)
        # the store has refused these very bytes: sending them again would get the same answer
        refused = self._results.refused.get(session)
        if refused is not None and refused[0] == fingerprint:
            self._results.refuse(row, refused[1])
            return 0
        is_ending = self._table.is_ending(session)
        # the last save of a session releases the user in the same write
        release = is_ending and self._link.store.shared and self._table.is_final(session)
        try:
            version = self._table.fix(session, fingerprint)
        except UnsavableError as error:  # no version is left
            self._results.refuse(row, error.with_traceback(None))
            return 0
        row.changed = version > 0  # 0: the store has acknowledged these bytes
        if self._sanitizer is not None:
            by_timer = self._is_marked_only and not row.save.is_retried and not is_ending
            self._sanitizer.saving(session, found_changed=by_timer and row.changed)
        if version:
            row.version = version
        elif not release:
            self.unchanged += 1
            self._results.acknowledge(row, time.time())
            return 0
        if is_ending:
            # whatever an earlier save did, the user counts as released only when this one is acknowledged
            self._table.set_released(session, False)
        row.record = Record(
            user_id,
            self._table.epoch(session),
            self._identity.owner,
            row.version,
            self.encoding.schema,
            body,
            time.time(),
            release,
        )
        # until it is acknowledged the store may or may not have it, whatever becomes of the call
        self._results.unknown.setdefault(session, set()).add((row.version, fingerprint))
        return len(body)

    def body(self, session: SessionCore) -> bytes:
        """The data of a session as it is to be stored now. Raises `UnsavableError`."""
        assert session.user_id is not None
        try:
            # a silent session holds what an edit has loaded: there is no live state of the program to copy
            if self._before_save is not None and not self._table.is_silent(session):
                self._copy_live_state(self._before_save, session)
            return self.encoding.dump(session.user_data)
        except END_OF_PROCESS:
            raise
        except BaseException as error:
            raise _unsavable(session.user_id, error) from error

    def _copy_live_state(self, before_save: Callable[[SessionCore], object], session: SessionCore) -> None:
        result = before_save(session)
        if inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                result.close()  # else Python warns that it was never awaited
            raise EncodingError("before_save returned something to await; it has to be done when it returns")

    def is_saved(self, session: SessionCore) -> bool:
        """Whether the store is known to have the data of a session as it is now."""
        try:
            return self._table.is_current(session, self._identity.digest(self.body(session)))
        except UnsavableError:
            return False

    def refusal(self, session: SessionCore) -> UnsavableError | None:
        """Why the data of a session cannot be saved as it is, as far as that can be told without the store; or None."""
        try:
            body = self.body(session)
        except UnsavableError as error:
            return error.with_traceback(None)
        refused = self._results.refused.get(session)
        if refused is not None and refused[0] == self._identity.digest(body):
            return refused[1]
        return None


def _unsavable(user_id: int | str, error: BaseException) -> UnsavableError:
    path = error.path if isinstance(error, EncodingError) else None
    reason = str(error) if isinstance(error, EncodingError) else f"before_save raised {type(error).__name__}"
    message = f"the data of user {quote(user_id)} cannot be saved: {reason}"
    return UnsavableError(message, user_id=user_id, path=path)
