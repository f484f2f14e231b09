"""`Results`: what the store's answers mean for the rows, and what is kept of a session until a save is acknowledged.

Each verdict settles its row (acknowledged, failed, refused, lost) or leaves it to be claimed again (`reclaiming`). The
same methods settle rows for which there was no answer.

See also `row`, for the stages of a row, and `writing`, which makes the calls.
"""

from __future__ import annotations

from collections.abc import Callable

from .._core import SessionCore, SessionTable
from ..errors import (
    CageySessionsError,
    FencedError,
    LostRecordError,
    StoreContractError,
    StoreUnavailableError,
    UnsavableError,
    UserErasedError,
)
from ..events.reports import Reports
from ..process import Identity
from ..records import Receipt
from ..stores import Outcome
from ..stores.contract import verdicts_of
from ..stores.link import StoreLink
from ..wording import quote
from .autosave import Autosave
from .row import Row, Stage

__all__ = ["Lost", "Results"]

MOST_CLAIMS = 2
"""How often a user is claimed again for one save; after that the save has failed, and is tried again later."""


Lost = Callable[[SessionCore, FencedError | UserErasedError], None]
"""Called when a session has lost its user: the store takes no save of it any more."""


class Results:
    """Settles rows: tells autosave, the log and the sessions what has become of each."""

    def __init__(
        self,
        autosave: Autosave,
        table: SessionTable,
        link: StoreLink,
        identity: Identity,
        reports: Reports,
        on_lost: Lost,
    ) -> None:
        self._autosave = autosave
        self._table = table
        self._link = link
        self._identity = identity
        self._reports = reports
        self._on_lost = on_lost
        self.fenced: int = 0
        self.unsavable: dict[SessionCore, tuple[str, str | None]] = {}
        """Sessions whose data cannot be saved as it is, with the fault that was reported last and its path."""
        self.refused: dict[SessionCore, tuple[int, UnsavableError]] = {}
        """The data that the store has refused last: its digest, and the error."""
        self.unknown: dict[SessionCore, set[tuple[int, int]]] = {}
        """Writes since the last acknowledged one that the store has or may still get: version and digest."""

    def failures(self, row: Row) -> int:
        """How many saves of the row's session have failed in a row."""
        if self._table.state(row.session) == "gone":  # ended by force while its save was under way
            return 0
        return self._table.failures(row.session)

    # Verdicts

    def settle(self, rows: list[Row], verdicts: object) -> Exception | None:
        """Settle rows as the store has answered, except those that have to be claimed again.

        Returns an error, and settles nothing, if the answer is not one that a store may give.
        """
        try:
            sound = verdicts_of(self._link.store, verdicts, len(rows))
        except StoreContractError as error:
            return error
        for row, verdict in zip(rows, sound, strict=True):
            self._settle_one(row, Outcome(verdict.outcome), verdict.detail)
        return None

    def _settle_one(self, row: Row, outcome: Outcome, detail: str) -> None:
        session, record = row.session, row.record
        assert record is not None
        user_id = record.user_id
        if outcome is Outcome.SAVED or outcome is Outcome.ALREADY:
            self.acknowledge(row, record.saved_at)
        elif outcome is Outcome.INVALID:
            reason = detail or "it does not say why"
            invalid = UnsavableError(f"the store refuses the data of user {quote(user_id)}: {reason}", user_id=user_id)
            if session.alive:  # else nothing would drop it any more
                self.refused[session] = (self._identity.digest(record.body), invalid)
            self.refuse(row, invalid)
        elif outcome is Outcome.FAILED or row.claims >= MOST_CLAIMS:
            failed = StoreUnavailableError(
                f"{self._link.name} could not save user {quote(user_id)}: {detail or outcome}"
            )
            self.fail(row, failed)
        elif outcome is Outcome.MISSING:
            row.move(Stage.UNOWNED)
            # reported once: this is the first attempt, or else the loss was reported with an earlier one
            if not self.failures(row) and not row.claims:
                lost = f"the store no longer has the record of user {quote(user_id)}; it is claimed and saved again"
                self._reports.error(LostRecordError(lost, user_id=user_id), session)
        elif outcome is Outcome.FENCED and not self._link.store.fenced:
            self.fence(row)  # without a fence of its own it knows from elsewhere that somebody has taken the user over
        elif outcome is Outcome.FENCED:
            # It may be our own doing: a claim of ours was granted after it had been given up, or a last save has
            # released the user and its answer was lost. Claiming again tells.
            row.move(Stage.UNOWNED)
            row.was_fenced = True
        else:
            self._drop(
                row, UserErasedError(f"user {quote(user_id)} was erased while the session lived", user_id=user_id)
            )

    # Ends

    def acknowledge(self, row: Row, saved_at: float) -> None:
        """The store has the row: settle it, and drop what was kept for the case that it had not."""
        row.move(Stage.SETTLED)
        self.forget(row.session)
        # the next save of an ending session need not release the user any more
        if row.record is not None and row.record.release and self._table.state(row.session) != "gone":
            self._table.set_released(row.session, True)
        self._autosave.acknowledge(
            row.session, row.version, row.save, Receipt(row.version, saved_at, row.changed, self._link.name)
        )

    def fail(self, row: Row, error: Exception) -> None:
        """Settle a row whose save has failed; it is tried again."""
        row.move(Stage.SETTLED)
        self._autosave.fail(row.session, row.version, row.save, error)

    def fail_all(self, rows: list[Row], error: Exception, *, report: bool = True) -> None:
        """Settle rows that have failed together; they are tried again, and reported once."""
        if not isinstance(error, CageySessionsError):
            # an exception of a driver: its text may quote data, so it is only the cause
            raised, error = error, StoreUnavailableError(f"{self._link.name} raised {type(error).__name__}")
            error.__cause__ = raised
        if report:
            self.report(rows, error)
        for row in rows:
            row.move(Stage.SETTLED)
            self._autosave.fail(row.session, row.version, row.save, error, report=False)

    def report(self, rows: list[Row], error: Exception) -> None:
        """Report what has failed for all of these rows."""
        if len(rows) == 1:
            self._reports.error(error, rows[0].session)
            return
        failed = StoreUnavailableError(f"{len(rows)} users were not saved; they are tried again")
        failed.__cause__ = error
        self._reports.error(failed, None)

    def refuse(self, row: Row, error: UnsavableError) -> None:
        """Settle a row whose data cannot be saved as it is. The same fault of a session is reported once."""
        row.move(Stage.SETTLED)
        fault = str(error), error.path
        if self.unsavable.get(row.session) != fault and row.session.alive and not self._table.is_silent(row.session):
            self.unsavable[row.session] = fault
            self._reports.unsavable(error, row.session)
        self._autosave.fail(row.session, row.version, row.save, error, report=False)

    def fence(self, row: Row) -> None:
        """Settle a row whose user somebody else has taken over; the session has lost them."""
        self.fenced += 1
        message = (
            f"somebody else has taken over user {quote(row.user_id)}: "
            "what this session had not saved by then is not saved"
        )
        if self._table.is_silent(row.session):
            outcome = (
                "whether this edit was written before that is not known"
                if self.failures(row)
                else "nothing was written"
            )
            message = f"another server has taken over user {quote(row.user_id)}; {outcome}"
        self._drop(row, FencedError(message, user_id=row.user_id))

    def _drop(self, row: Row, error: FencedError | UserErasedError) -> None:
        row.move(Stage.SETTLED)
        self.forget(row.session)
        self._autosave.drop(row.session, row.version, row.save, error)
        if not self._table.is_silent(row.session):  # else the call that holds it raises the error
            self._reports.error(error, row.session)
        self._on_lost(row.session, error)

    def forget(self, session: SessionCore) -> None:
        """Drop what is kept of a session: its data is stored, or the session has ended or lost its user."""
        # the dicts are nearly always empty, and hashing a session for each of them is not free
        if self.unsavable:
            self.unsavable.pop(session, None)
        if self.refused:
            self.refused.pop(session, None)
        if self.unknown:
            self.unknown.pop(session, None)
