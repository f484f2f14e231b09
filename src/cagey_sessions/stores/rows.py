"""The checks of a user's row, for all engines, and the text form of user ids in keys.

A row may have been written by hand, by another program or by a fault of the engine, so each field may be anything. A
row that is in none of the four states of `contract.py` is *damaged*: its error names the user, and it is neither
loaded nor claimed nor overwritten. Only `erase`, which has to be called for it, removes it.

The same checks are written again in the languages of the engines (SQL, Lua), where a statement must not change a
damaged row.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .._core import check_user_id
from ..errors import CorruptRecordError, InvalidUserIdError, StoreError
from ..wording import quote
from .contract import MAX_NUMBER, Claim, Outcome, Record, Verdict

__all__ = [
    "LAST_CLAIMED",
    "StoredRow",
    "check_claim",
    "check_record",
    "damaged",
    "key_of",
    "no_id",
    "user_id_of",
    "verdict_of_damage",
]

LAST_CLAIMED = MAX_NUMBER - 2
"""The highest epoch, and the highest version, of a row that may be claimed: each has to have a next one."""


class StoredRow(NamedTuple):
    """The row of one user as an engine has it: each field as it came, whatever it is, and None for a missing one.

    An engine that stores flags or numbers in another form converts those that it recognizes, and gives anything else as
    it is.
    """

    epoch: Any
    """The epoch of the last claim, or of the erasure."""
    owner: Any
    """The owner that made the last claim."""
    released: Any
    """Whether that owner has released the user."""
    version: Any
    """0 for a user who was never saved, or erased."""
    schema: Any
    """As in `Record`; like `saved_at` it means nothing if there is no body."""
    body: Any
    """As in `Record`; None for a user who was never saved, or erased."""
    saved_at: Any
    """As in `Record`."""
    erased: Any
    """Whether the row is a tombstone."""

    def fence_fault(self) -> str:
        """What is wrong with the fields that say whose the row is and what may overwrite it; empty if nothing is."""
        if fault := _number_fault("epoch", self.epoch, 1) or _number_fault("version", self.version, 0):
            return fault
        for name, flag in (("released", self.released), ("erased", self.erased)):
            if type(flag) is not bool:
                return f"its field {name} is {'missing' if flag is None else 'neither true nor false'}"
        if not self.released and (type(self.owner) is not str or not self.owner):
            return "it is not released, and nobody has it"
        if self.erased and not self.released:
            return "it is erased, and somebody has it"
        return ""

    def fault(self) -> str:
        """What is wrong with the row, so that it is in none of the four states; empty if nothing is."""
        if fault := self.fence_fault():
            return fault
        if self.body is None:
            return f"it has version {self.version}, and no body" if self.version else ""
        if self.erased:
            return "it is erased, and has a body"
        if not self.version:
            return "it has a body, and version 0"
        return _body_fault(self.schema, self.body, self.saved_at)

    def record(self, user_id: int | str) -> Record | None:
        """The record to return from `Store.load`: None without a body. Raises `CorruptRecordError` if it is damaged."""
        if fault := self.fault():
            raise self.damage(user_id, fault)
        if self.body is None:
            return None
        owner = "" if self.released else self.owner
        return Record(user_id, self.epoch, owner, self.version, self.schema, self.body, self.saved_at)

    def holder(self, user_id: int | str) -> tuple[str, int]:
        """The answer of `Store.holder`. Raises `CorruptRecordError` if the owner or the epoch cannot be read."""
        if fault := self.fence_fault():
            raise self.damage(user_id, fault)
        return "" if self.released else self.owner, self.epoch

    def claim_refusal(self, user_id: int | str) -> CorruptRecordError | None:
        """The error for a claim that the row does not allow to anybody; None if the row is sound."""
        fault = self.fault()
        if not fault and (self.epoch > LAST_CLAIMED or self.version > LAST_CLAIMED):
            fault = "no epoch or no version is left for what would be written next"
        return self.damage(user_id, fault) if fault else None

    def damage(self, user_id: int | str, fault: str) -> CorruptRecordError:
        """The error for a fault of this row."""
        return damaged(user_id, fault, self.body if type(self.body) is bytes else b"")


def damaged(user_id: int | str, fault: str, body: bytes = b"") -> CorruptRecordError:
    """The error for a damaged row; `fault` is a clause that says what is wrong, without quoting the row."""
    return CorruptRecordError(
        f"the record of user {quote(user_id)} is damaged, and is left as it is: {fault}", user_id=user_id, body=body
    )


def verdict_of_damage(fault: str) -> Verdict:
    """The verdict on a record whose row is damaged, and so is not written."""
    return Verdict(Outcome.FAILED, f"the row is damaged, and is left as it is: {fault}")


def _number_fault(name: str, value: object, least: int) -> str:
    if type(value) is int and least <= value < MAX_NUMBER:
        return ""
    return f"its field {name} is {'missing' if value is None else f'no whole number from {least} to 2**53 - 1'}"


def _body_fault(schema: object, body: object, saved_at: object) -> str:
    if type(body) is not bytes:
        return "its body is no text"
    if fault := _number_fault("schema", schema, 0):
        return fault
    if (type(saved_at) is float and math.isfinite(saved_at)) or (type(saved_at) is int and abs(saved_at) < MAX_NUMBER):
        return ""
    return f"its field saved_at is {'missing' if saved_at is None else 'no time'}"


def check_claim(claim: Claim) -> None:
    """Raise `CorruptRecordError` if a granted claim has a damaged record, or one without a next epoch or version.

    Called for the claims of every store, because a store may be the program's own.
    """
    if claim.record is not None and (refusal := _as_row(claim.epoch, claim.record).claim_refusal(claim.user_id)):
        raise refusal


def check_record(record: Record) -> Record:
    """Return a record that a store has loaded, or raise `CorruptRecordError` if its fields are damaged."""
    _as_row(1, record).record(record.user_id)
    return record


def _as_row(epoch: int, record: Record) -> StoredRow:
    """A record as a released row, to check its fields by the same rules."""
    return StoredRow(epoch, "", True, record.version, record.schema, record.body, record.saved_at, False)


# Keys


def key_of(user_id: int | str) -> str:
    """A user id as text: a number as it is, a text in quotes. It is not JSON, whose escapes would make it longer."""
    return f'"{user_id}"' if isinstance(user_id, str) else int.__repr__(user_id)


def user_id_of(key: str) -> int | str:
    """The user id in a key. Raises `StoreError` for a text that `key_of` would not have made."""
    try:
        user_id = key[1:-1] if key.startswith('"') else int(key)
        check_user_id(user_id)
    except (ValueError, InvalidUserIdError):
        raise no_id(key) from None
    if key_of(user_id) != key:
        raise no_id(key)
    return user_id


def no_id(key: object) -> StoreError:
    """The error for a row whose key is not a user id."""
    return StoreError(f"the key {quote(key)} among the users is none of ours")
