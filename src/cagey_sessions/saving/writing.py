"""`Writer`: the calls that write rows to a store, what is tried again in smaller calls, and calls that hang.

See also `to_store`, which fixes the bytes; `verdicts`, which knows what an answer means; `reclaiming`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from .._core import SaveBatch
from ..clock import Clock
from ..errors import StoreUnavailableError
from ..process import Identity
from ..stores import Record, Verdict
from ..stores.link import Call, CallTimedOutError, StoreLink
from .autosave import Autosave
from .reclaiming import Reclaiming
from .row import Row, Stage
from .verdicts import Results

__all__ = ["MOST_ROWS", "Hanging", "Writer"]

MOST_ROWS = 200
"""How many rows are written by one call."""
MOST_ALONE = 8
"""After so many rows that failed alone, and none that was stored, the fault is taken to be the store's."""

Hanging = tuple[Call[list[Verdict]], list[Row]]
"""A call that has not returned by its deadline, and the rows that have to wait for it nevertheless."""


class Writer:
    """Writes the rows of all workers. Each worker has a list of those of its calls that hang."""

    def __init__(
        self,
        autosave: Autosave,
        link: StoreLink,
        clock: Clock,
        results: Results,
        reclaiming: Reclaiming,
        identity: Identity,
    ) -> None:
        self._autosave = autosave
        self._link = link
        self._clock = clock
        self._results = results
        self._reclaiming = reclaiming
        self._identity = identity
        self._alone = 0
        """How many rows that had not failed before have failed alone since the last call that got an answer."""

    async def write(
        self, rows: list[Row], hanging: list[Hanging], *, failed_before: bool = False, tried: Exception | None = None
    ) -> None:
        """Write rows. If a call fails as a whole it is made again in halves, until the row that it fails for is alone.

        `tried` is the error of a call that was made for all of these rows already.
        """
        fail_all = self._results.fail_all
        pending = [rows] if rows else []
        alone, any_success = 0, False
        was_down = self._link.down  # then the outage has been reported
        while pending:
            part = pending.pop()
            if tried is None and (trouble := self.trouble(hanging)):
                fail_all(part, StoreUnavailableError(f"{self._link.name} {trouble}"), report=False)
                continue
            if tried is None:
                records = [row.record for row in part if row.record is not None]
                error = await self.call(records, partial(list, part), hanging)
            else:
                error, tried = tried, None
            if error is None:
                any_success = True
            elif len(part) > 1 and not isinstance(error, StoreUnavailableError):
                half = len(part) // 2
                pending += [part[half:], part[:half]]
            else:
                fail_all(part, error, report=not was_down)
                alone += 1
                self._alone += not (failed_before or any_success)
                is_hopeless = not any_success and (alone if failed_before else self._alone) > MOST_ALONE
                if isinstance(error, StoreUnavailableError) or is_hopeless:
                    # the store fails, not the row: stop, for the other rows would fail the same way
                    if not isinstance(error, StoreUnavailableError) and not failed_before:
                        self._link.failed(self._clock.now(), error)
                    for others in pending:
                        fail_all(others, error, report=not was_down)
                    return

    async def write_failed(self, rows: list[Row], hanging: list[Hanging]) -> None:
        """Write rows that have failed before: the more often they have, the fewer in one call."""
        self._identity.random.shuffle(rows)
        while rows:
            most = max(1, MOST_ROWS >> max(self._results.failures(row) for row in rows))
            part, rows = rows[:most], rows[most:]
            await self.write(part, hanging, failed_before=True)

    async def finish(self, rows: list[Row], hanging: list[Hanging]) -> None:
        """Claim users again where that is needed, and wait for the calls that hang."""
        while unowned := [row for row in rows if row.stage is Stage.UNOWNED]:
            await self.write(await self._reclaiming.reclaim(unowned), hanging)
        for call, late in hanging:
            await self._outlive(call, late)

    def trouble(self, hanging: list[Hanging]) -> str:
        """Why nothing more is sent now; empty if something may be."""
        if hanging:
            return "hangs"  # the call may never return: the rows fail, and another worker takes them
        return "" if self._link.may_call() else "is down"  # it may have gone down since these rows were taken

    async def call(
        self,
        records: list[Record],
        rows_of: Callable[[], list[Row]],
        hanging: list[Hanging],
        batch: SaveBatch | None = None,
    ) -> Exception | None:
        """Make one call of the store. None if it was answered, and the rows settled, or if it hangs.

        `rows_of` makes rows for the records, except for those that the core has settled as a `batch` by then.
        """
        results = self._results
        call = self._link.write(records)
        try:
            verdicts = await call.answer()
        except CallTimedOutError as error:
            rows = rows_of()
            if self._link.store.fenced:
                # the same version may be sent again at once: written twice or late, it changes nothing that is newer
                results.fail_all(rows, error)
                hanging.append((call, []))
            else:
                # a late write would land on top of the next one: the callers are answered, but the sessions stay under
                # way, so that no other save of them begins, until the call returns
                for row in rows:
                    row.save.resolve(error)
                results.report(rows, error)
                hanging.append((call, rows))
            return None
        except asyncio.CancelledError:
            self._abandon(call, rows_of())
            raise
        except Exception as error:
            return error
        self._alone = 0
        if batch is not None and isinstance(verdicts, list) and self._autosave.settle_batch(batch, verdicts):
            for row in rows_of():
                assert row.record is not None
                results.acknowledge(row, row.record.saved_at)
            return None
        return results.settle(rows_of(), verdicts)

    async def _outlive(self, call: Call[list[Verdict]], rows: list[Row]) -> None:
        """Wait for a call that hangs: it keeps its slot until it returns, and without a fence its users, too."""
        try:
            await call.end()
        except asyncio.CancelledError:
            self._abandon(call, rows)
            raise
        self._settle_late(call, rows)

    def _abandon(self, call: Call[list[Verdict]], rows: list[Row]) -> None:
        """This worker is cancelled, but its call goes on: its rows are settled when the call returns."""
        for row in rows:
            row.move(Stage.ORPHANED)
        call.task.add_done_callback(lambda _: self._settle_late(call, rows))

    def _settle_late(self, call: Call[list[Verdict]], rows: list[Row]) -> None:
        """A call has returned whose worker does not wait for it any more."""
        error: Exception | None
        for row in rows:
            if row.stage is Stage.ORPHANED:
                row.move(Stage.OPEN)
        try:
            error = self._results.settle(rows, call.result())
        except Exception as raised:
            error = raised
        unsettled = [row for row in rows if row.is_pending]
        error = error or StoreUnavailableError("it has to be claimed again")
        self._results.fail_all(unsettled, error, report=False)
        self._autosave.kick()
