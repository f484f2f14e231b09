"""`MemoryStore`: users in the memory of this process.

It is the contract over a dict, in the plainest form: a reference for other stores, and what the simulations run on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from ..errors import (
    CorruptRecordError,
    OptionError,
    OwnedElsewhereError,
    StoreContractError,
    StoreError,
    StoreUnavailableError,
)
from ..wording import quote
from .contract import Answers, Claim, Outcome, Record, Store, Verdict, latest_of
from .rows import StoredRow, verdict_of_damage

__all__ = ["MemoryBacking", "MemoryStore", "Row"]


class Row:
    """The row of one user; `record` is None until the first save, and after an erasure."""

    __slots__ = ("claimant", "epoch", "erased", "record", "released")

    def __init__(self, epoch: int = 0) -> None:
        self.epoch: int = epoch
        self.claimant: str = ""
        self.released: bool = True
        self.record: Record | None = None
        self.erased: bool = False

    @property
    def owner(self) -> str:
        """The owner that has the user now; empty if it was released."""
        return "" if self.released else self.claimant

    def as_stored(self) -> StoredRow:
        """The row for the checks of `rows.py`; the record was given to this store, so its fields may be anything."""
        version, schema, body, saved_at = (0, 0, None, None) if self.record is None else self.record[3:7]
        return StoredRow(self.epoch, self.claimant, self.released, version, schema, body, saved_at, self.erased)


class MemoryBacking:
    """The rows that several `MemoryStore` share, as several servers share one database."""

    def __init__(self) -> None:
        self.rows: dict[int | str, Row] = {}
        self.highest_lost = 0
        """Tests that lose rows raise it: new rows start above it, so that no epoch of a lost row is given again."""
        self.dead: set[str] = set()


class MemoryStore(Store):
    """Users in the memory of this process: for tests, and for servers that may lose their users.

    Stores made with the same `backing` share their users, as several servers share a database. An owner is dead once
    `bury` was called for it. All data is lost when the process ends.
    """

    shared = True
    loss_class = "everything is lost with the process"

    def __init__(self, backing: MemoryBacking | None = None) -> None:
        if backing is not None and not isinstance(backing, MemoryBacking):
            raise OptionError(f"backing is the `backing` of another MemoryStore, not {quote(backing)}")
        self.backing: MemoryBacking = MemoryBacking() if backing is None else backing
        self._is_open = False

    async def open(self) -> None:
        if self._is_open:
            raise StoreContractError("this MemoryStore is open already; make one for each manager, on one backing")
        self._is_open = True

    async def close(self) -> None:
        self._is_open = False

    def bury(self, owner: str) -> None:
        """Declare an owner dead: others may claim its users, and a claim fences off its late writes."""
        self.backing.dead.add(owner)

    async def claim_many(self, user_ids: Sequence[int | str], owner: str) -> Answers:
        self._require_open()
        return [self._claim(user_id, owner) for user_id in user_ids]

    def _claim(self, user_id: int | str, owner: str) -> Claim | StoreError:
        row = self.backing.rows.get(user_id)
        if row is None:
            row = self.backing.rows[user_id] = Row(self.backing.highest_lost)
        elif refusal := row.as_stored().claim_refusal(user_id):
            return refusal
        if row.owner and row.owner != owner and row.owner not in self.backing.dead:
            return Claim(user_id, row.epoch, None, row.owner)
        row.epoch += 1
        row.claimant = owner
        row.released = False
        row.erased = False
        return Claim(user_id, row.epoch, row.as_stored().record(user_id))

    async def save_many(self, records: Sequence[Record]) -> list[Verdict]:
        self._require_open()
        latest = latest_of(records)
        verdicts = {user_id: self._verdict(record) for user_id, record in latest.items()}
        return [verdicts[record.user_id] for record in records]

    def _verdict(self, record: Record) -> Verdict:
        row = self.backing.rows.get(record.user_id)
        fault = "" if row is None else row.as_stored().fence_fault()
        return verdict_of_damage(fault) if fault else Verdict(self._save(record))

    def _save(self, record: Record) -> Outcome:
        row = self.backing.rows.get(record.user_id)
        if row is None:
            return Outcome.MISSING
        if row.erased:
            return Outcome.ERASED
        if record.epoch != row.epoch or record.owner != row.claimant:
            return Outcome.FENCED
        # From here on the record is of the row's last claim. After a release only a repeat of what was saved before it
        # may come: a new version would change a user whom another server may claim now.
        version = 0 if row.record is None else row.record.version
        if record.version > version and row.released:
            return Outcome.FENCED
        if record.version >= version and record.release:
            row.released = True
        if record.version <= version:
            return Outcome.ALREADY
        row.record = record._replace(release=False)
        return Outcome.SAVED

    async def release_many(self, claims: Sequence[tuple[int | str, int]], owner: str) -> list[bool]:
        self._require_open()
        return [self._release(user_id, epoch, owner) for user_id, epoch in claims]

    def _release(self, user_id: int | str, epoch: int, owner: str) -> bool:
        row = self.backing.rows.get(user_id)
        if row is None or row.epoch != epoch or row.owner != owner or row.as_stored().fence_fault():
            return False
        row.released = True
        return True

    async def erase(self, user_id: int | str, owner: str = "") -> bool:
        self._require_open()
        row = self.backing.rows.get(user_id)
        if row is None:
            return False
        if row.owner and row.owner != owner and row.owner not in self.backing.dead:
            raise OwnedElsewhereError(
                f"user {quote(user_id)} is on another server ({row.owner}) and cannot be erased now",
                user_id=user_id,
                owner=row.owner,
            )
        had_data = row.record is not None
        row.epoch += 1  # fences off late writes of a session that had the user
        row.released = True
        row.record = None
        row.erased = True
        return had_data

    async def load(self, user_id: int | str) -> Record | None:
        self._require_open()
        row = self.backing.rows.get(user_id)
        return None if row is None else row.as_stored().record(user_id)

    async def holder(self, user_id: int | str) -> tuple[str, int]:
        self._require_open()
        row = self.backing.rows.get(user_id)
        return ("", 0) if row is None else row.as_stored().holder(user_id)

    async def scan(self) -> AsyncIterator[Record | StoreError]:
        self._require_open()
        for user_id, row in list(self.backing.rows.items()):  # a copy, because saves go on
            try:
                record = row.as_stored().record(user_id)
            except CorruptRecordError as error:
                yield error
            else:
                if record is not None:
                    yield record

    def _require_open(self) -> None:
        if not self._is_open:
            raise StoreUnavailableError("this MemoryStore is not open")
