"""Writing rows to a store. What lives here: the calls, what is tried again in smaller ones, and calls that hang. What
must not: whose rows these are, what is in them, or what a verdict means.
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
"""Of one call."""
MOST_ALONE = 8
"""After how many rows that fail alone, and none that does not, it is the store and not the rows."""

Hanging = tuple[Call[list[Verdict]], list[Row]]
"""A call that has not returned at its deadline, and the rows that wait for it nevertheless."""


class Writer:
    """Writes the rows of one worker after the other. Each has a list of those of its calls that hang."""

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
        """How many rows that had not failed before have failed alone since the last call that was answered."""

    async def write(
        self, rows: list[Row], hanging: list[Hanging], *, failed_before: bool = False, tried: Exception | None = None
    ) -> None:
        """Write rows; where a call fails as a whole, in halves, until the row it fails for is alone.

        `tried` is what a call for all of them has raised already.
        """
        fail_all = self._results.fail_all
        pending = [rows] if rows else []
        alone, any_success = 0, False
        was_down = self._link.down  # and that has been said
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
                    # not the fault of a row
                    if not isinstance(error, StoreUnavailableError) and not failed_before:
                        self._link.failed(self._clock.now(), error)
                    for others in pending:
                        fail_all(others, error, report=not was_down)
                    return

    async def write_failed(self, rows: list[Row], hanging: list[Hanging]) -> None:
        """Write rows that have failed before: the more often, the fewer at a time."""
        self._identity.random.shuffle(rows)
        while rows:
            most = max(1, MOST_ROWS >> max(self._results.failures(row) for row in rows))
            part, rows = rows[:most], rows[most:]
            await self.write(part, hanging, failed_before=True)

    async def finish(self, rows: list[Row], hanging: list[Hanging]) -> None:
        """Claim again what has to be, and wait for the calls that hang."""
        while unowned := [row for row in rows if row.stage is Stage.UNOWNED]:
            await self.write(await self._reclaiming.reclaim(unowned), hanging)
        for call, late in hanging:
            await self._outlive(call, late)

    def trouble(self, hanging: list[Hanging]) -> str:
        """Why nothing more is sent now, if so."""
        if hanging:
            return "hangs"  # not behind a call that may never return: another worker takes them
        return "" if self._link.may_call() else "is down"  # it has gone down since these rows were taken

    async def call(
        self,
        records: list[Record],
        rows_of: Callable[[], list[Row]],
        hanging: list[Hanging],
        batch: SaveBatch | None = None,
    ) -> Exception | None:
        """One call of the store; None once it has been answered and each row settled, or if it hangs.

        `rows_of` gives the rows of the records; of those of a `batch` only if they are needed.
        """
        results = self._results
        call = self._link.write(records)
        try:
            verdicts = await call.answer()
        except CallTimedOutError as error:
            rows = rows_of()
            if self._link.store.fenced:
                results.fail_all(rows, error)
                hanging.append((call, []))
            else:
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
        """A call hangs. It keeps its slot until it returns, and its users too where nothing fences off a late write."""
        try:
            await call.end()
        except asyncio.CancelledError:
            self._abandon(call, rows)
            raise
        self._settle_late(call, rows)

    def _abandon(self, call: Call[list[Verdict]], rows: list[Row]) -> None:
        """The worker is thrown away, its call is not: its users are not free before it has returned."""
        for row in rows:
            row.move(Stage.ORPHANED)
        call.task.add_done_callback(lambda _: self._settle_late(call, rows))

    def _settle_late(self, call: Call[list[Verdict]], rows: list[Row]) -> None:
        """A call has returned that its worker no longer waits for."""
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
