"""What a row of a user has to be, on every engine. What lives here: the four states as checks of fields that may be
anything, and how a key with a user id in it is written. What must not: any engine.

Rows can be written by hand, by another program or by a fault of the engine. A row that is in none of the four states is
*damaged*: it is told with the user it is of, and neither loaded nor claimed nor written over. Only an erasure, which
somebody has to ask for, removes it.
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
"""The highest epoch, and version, of a row that may be claimed: there has to be a next one of each."""


class StoredRow(NamedTuple):
    """What an engine has of one user: each field as it came, whatever that is, and None for one that is not there.

    An engine that keeps flags or numbers as something else hands over what it takes for one as such, and anything else
    as it is.
    """

    epoch: Any
    """Of the last claim, or of the erasure."""
    owner: Any
    """Who has made the last claim."""
    released: Any
    """Whether that owner has let go of the user."""
    version: Any
    """0 for a user who was never saved, or erased."""
    schema: Any
    """As in `Record`; like the next two without meaning where there is no body."""
    body: Any
    """As in `Record`; None for a user who was never saved, or erased."""
    saved_at: Any
    """As in `Record`."""
    erased: Any
    """Whether the row is a tombstone."""

    def fence_fault(self, first_epoch: int = 1) -> str:
        """Why it cannot be told whose the row is, and what it may be overwritten by; empty if it can."""
        if fault := _number_fault("epoch", self.epoch, first_epoch) or _number_fault("version", self.version, 0):
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
        """What keeps the row from being in one of the four states; empty if nothing does."""
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
        """The row as `Store.load` answers: None without a body. Raises `CorruptRecordError` for a damaged one."""
        if fault := self.fault():
            raise self.damage(user_id, fault)
        if self.body is None:
            return None
        owner = "" if self.released else self.owner
        return Record(user_id, self.epoch, owner, self.version, self.schema, self.body, self.saved_at)

    def holder(self, user_id: int | str) -> tuple[str, int]:
        """The row as `Store.holder` answers. Raises `CorruptRecordError` if it cannot be told."""
        if fault := self.fence_fault():
            raise self.damage(user_id, fault)
        return "" if self.released else self.owner, self.epoch

    def claim_refusal(self, user_id: int | str) -> CorruptRecordError | None:
        """Why nobody may claim the user; None if that is no fault of the row."""
        fault = self.fault()
        if not fault and (self.epoch > LAST_CLAIMED or self.version > LAST_CLAIMED):
            fault = "no epoch or no version is left for what would be written next"
        return self.damage(user_id, fault) if fault else None

    def damage(self, user_id: int | str, fault: str) -> CorruptRecordError:
        """The error that says so."""
        return damaged(user_id, fault, self.body if type(self.body) is bytes else b"")


def damaged(user_id: int | str, fault: str, body: bytes = b"") -> CorruptRecordError:
    """The error for a row that cannot be taken for one of ours; `fault` is a clause about it, without its content."""
    return CorruptRecordError(
        f"the record of user {quote(user_id)} is damaged, and is left as it is: {fault}", user_id=user_id, body=body
    )


def verdict_of_damage(fault: str) -> Verdict:
    """The verdict on a record whose row cannot be written because of a fault of the row."""
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
    """See to it that a granted claim can be gone on from, whichever store it is of. Raises `CorruptRecordError`."""
    if claim.record is not None and (refusal := _free(claim.epoch, claim.record).claim_refusal(claim.user_id)):
        raise refusal


def check_record(record: Record) -> Record:
    """A record that was loaded, if its body can be read, whichever store it is of. Raises `CorruptRecordError`."""
    _free(1, record).record(record.user_id)
    return record


def _free(epoch: int, record: Record) -> StoredRow:
    return StoredRow(epoch, "", True, record.version, record.schema, record.body, record.saved_at, False)


# Keys


def key_of(user_id: int | str) -> str:
    """A user id as text: a number as it is, a text in quotes. No JSON, which escapes, and so may be too long."""
    return f'"{user_id}"' if isinstance(user_id, str) else int.__repr__(user_id)


def user_id_of(key: str) -> int | str:
    """Whose key that is. Raises `StoreError` for what `key_of` has not made."""
    try:
        user_id = key[1:-1] if key.startswith('"') else int(key)
        check_user_id(user_id)
    except (ValueError, InvalidUserIdError):
        raise no_id(key) from None
    if key_of(user_id) != key:
        raise no_id(key)
    return user_id


def no_id(key: object) -> StoreError:
    """The error for a row that is of nobody."""
    return StoreError(f"the key {quote(key)} among the users is none of ours")
