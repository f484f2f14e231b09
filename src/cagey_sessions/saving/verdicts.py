"""How saves to a store come to their end. What lives here: rows, what each verdict means for them, and what is kept of
a session until the store has acknowledged it. What must not: calls of the store, or the bytes of a row.
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
"""How often a user is claimed again for one save."""


Lost = Callable[[SessionCore, FencedError | UserErasedError], None]
"""Is told that a session has lost its user: the store takes nothing more of it."""


class Results:
    """Settles rows: tells autosave and the host what became of each."""

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
        """Sessions whose data cannot be saved as it is, with the fault that was last told, and where it is."""
        self.refused: dict[SessionCore, tuple[int, UnsavableError]] = {}
        """What the store has refused: the digest, and why."""
        self.unknown: dict[SessionCore, set[tuple[int, int]]] = {}
        """Writes that may be stored, or be about to, by version and digest, since the last one acknowledged."""

    def failures(self, row: Row) -> int:
        """How often in a row the saves of its session have failed."""
        if self._table.state(row.session) == "gone":
            return 0
        return self._table.failures(row.session)

    # Verdicts

    def settle(self, rows: list[Row], verdicts: object) -> Exception | None:
        """Settle rows as the store has answered, but for those to be claimed again. Returns what is wrong with it."""
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
            if session.alive:
                self.refused[session] = (self._identity.digest(record.body), invalid)
            self.refuse(row, invalid)
        elif outcome is Outcome.FAILED or row.claims >= MOST_CLAIMS:
            failed = StoreUnavailableError(
                f"{self._link.name} could not save user {quote(user_id)}: {detail or outcome}"
            )
            self.fail(row, failed)
        elif outcome is Outcome.MISSING:
            row.move(Stage.UNOWNED)
            if not self.failures(row) and not row.claims:
                lost = f"the store no longer has the record of user {quote(user_id)}; it is claimed and saved again"
                self._reports.error(LostRecordError(lost, user_id=user_id), session)
        elif outcome is Outcome.FENCED and not self._link.store.fenced:
            self.fence(row)  # it can only know from somewhere else
        elif outcome is Outcome.FENCED:
            # perhaps by ourselves: a claim whose reply came too late, or a last save after which the data has changed
            row.move(Stage.UNOWNED)
            row.was_fenced = True
        else:
            self._drop(
                row, UserErasedError(f"user {quote(user_id)} was erased while the session lived", user_id=user_id)
            )

    # Ends

    def acknowledge(self, row: Row, saved_at: float) -> None:
        """The store has it."""
        row.move(Stage.SETTLED)
        self.forget(row.session)
        if row.record is not None and row.record.release and self._table.state(row.session) != "gone":
            self._table.set_released(row.session, True)
        self._autosave.acknowledge(
            row.session, row.version, row.save, Receipt(row.version, saved_at, row.changed, self._link.name)
        )

    def fail(self, row: Row, error: Exception) -> None:
        """It is tried again."""
        row.move(Stage.SETTLED)
        self._autosave.fail(row.session, row.version, row.save, error)

    def fail_all(self, rows: list[Row], error: Exception, *, report: bool = True) -> None:
        """They are tried again, and it is told once."""
        if not isinstance(error, CageySessionsError):
            raised, error = error, StoreUnavailableError(f"{self._link.name} raised {type(error).__name__}")
            error.__cause__ = raised
        if report:
            self.report(rows, error)
        for row in rows:
            row.move(Stage.SETTLED)
            self._autosave.fail(row.session, row.version, row.save, error, report=False)

    def report(self, rows: list[Row], error: Exception) -> None:
        """Tell the host what has failed for all of them."""
        if len(rows) == 1:
            self._reports.error(error, rows[0].session)
            return
        failed = StoreUnavailableError(f"{len(rows)} users were not saved; they are tried again")
        failed.__cause__ = error
        self._reports.error(failed, None)

    def refuse(self, row: Row, error: UnsavableError) -> None:
        """Its data cannot be saved as it is."""
        row.move(Stage.SETTLED)
        fault = str(error), error.path
        if self.unsavable.get(row.session) != fault and row.session.alive and not self._table.is_silent(row.session):
            self.unsavable[row.session] = fault
            self._reports.unsavable(error, row.session)
        self._autosave.fail(row.session, row.version, row.save, error, report=False)

    def fence(self, row: Row) -> None:
        """Somebody else has the user."""
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
        if not self._table.is_silent(row.session):  # the call that holds the user raises it
            self._reports.error(error, row.session)
        self._on_lost(row.session, error)

    def forget(self, session: SessionCore) -> None:
        """Nothing is wrong with the data of a session any more, or the session is gone."""
        if self.unsavable:
            self.unsavable.pop(session, None)
        if self.refused:
            self.refused.pop(session, None)
        if self.unknown:
            self.unknown.pop(session, None)
