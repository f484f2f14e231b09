"""`Reclaiming`: claims users again whose rows the store has lost or fenced, and decides whether a session may go on.

A store answers "not yours" for several reasons. Another server may have taken the user over; then the session has lost
them. Or the row was lost, or a claim of ours was granted after we had given it up; then the session goes on, under a
new epoch, if what is stored is what it has saved itself.

See also `ownership.claims`, for the first claim of a user, and `writing`, for the write that follows.
"""

from __future__ import annotations

from .._core import SessionTable
from ..errors import StoreError, StoreUnavailableError
from ..ownership import Claims
from ..process import Identity
from ..stores import Claim
from ..stores.contract import claims_of
from ..stores.link import StoreLink
from .row import Row, Stage
from .verdicts import Results

__all__ = ["Reclaiming"]

MOST_REFUSALS = 8
"""How many saves in a row may fail because an engine has lost our claim, and with it the previous owner's release."""


class Reclaiming:
    """Claims users again for one owner."""

    def __init__(
        self,
        table: SessionTable,
        link: StoreLink,
        identity: Identity,
        claims: Claims,
        results: Results,
    ) -> None:
        self._table = table
        self._link = link
        self._identity = identity
        self._claims = claims
        self._results = results

    async def reclaim(self, rows: list[Row]) -> list[Row]:
        """Claim the users of these rows again. Returns the rows that may be written now; the others are settled."""
        results = self._results
        for row in list(rows):
            row.claims += 1
            if self._is_lost(row):
                # the store would grant the claim, as we are its owner, and fence the newer session that has the user
                results.fence(row)
                rows.remove(row)
        if not rows:
            return []
        if not self._link.may_call():
            results.fail_all(rows, StoreUnavailableError(f"{self._link.name} is down"), report=False)
            return []
        user_ids = [row.user_id for row in rows]
        call = self._link.start(user_ids, self._link.store.claim_many, user_ids, self._identity.owner)
        try:
            answers = claims_of(self._link.store, await call.answer(), user_ids)
        except BaseException as error:
            self._claims.doubt(user_ids, call.task)  # it may be granted after all
            if not isinstance(error, Exception):
                raise
            results.fail_all(rows, error)
            return []
        owned = []
        for row, claim in zip(rows, answers, strict=True):
            assert row.record is not None
            if isinstance(claim, StoreError):
                results.fail(row, claim)
            elif not claim.granted and self._has_lost_ours(row, claim):
                results.fail(row, StoreUnavailableError(f"{claim.owner} has not let go of this user again"))
            elif not claim.granted:
                results.fence(row)
            elif self._is_lost(row) or not self._is_ours(row, claim):
                results.fence(row)
                self._claims.disown(claim)  # we own the user now, although this session may not go on
            else:
                self._table.own(row.session, claim.epoch)
                row.record = row.record._replace(epoch=claim.epoch)
                row.move(Stage.OPEN)
                owned.append(row)
        return owned

    def _has_lost_ours(self, row: Row, claim: Claim) -> bool:
        """Whether the previous owner holds the user because the engine has lost our claim. They release them soon."""
        return 0 < claim.epoch < self._table.epoch(row.session) and self._results.failures(row) < MOST_REFUSALS

    def _is_lost(self, row: Row) -> bool:
        """Whether a session has ended, or has lost its user, while its save is under way."""
        return self._table.is_lost(row.session)

    def _is_ours(self, row: Row, claim: Claim) -> bool:
        """Whether what is stored is what this session has saved, or may have saved, so that it may go on from there."""
        assert row.record is not None
        stored = claim.record
        _, acknowledged = self._table.versions(row.session)
        if row.was_fenced and claim.epoch <= self._table.epoch(row.session):
            # epochs never fall unless an engine has lost its newest writes: then what is stored has to be older, too
            return stored is None or stored.version <= acknowledged
        if stored is None:
            return not (row.was_fenced and acknowledged)  # otherwise the user was erased, and claimed by somebody since
        found = stored.version, self._identity.digest(stored.body)
        return (
            found == (row.version, self._identity.digest(row.record.body))
            or self._table.is_stored(row.session, *found)
            or found in self._results.unknown.get(row.session, ())
        )
