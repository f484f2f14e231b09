"""The store contract. What lives here: the record, the verdicts, and the methods every store has. What must not: any
engine, any retry, any choice of when to save.

Ownership follows the sequencers of Chubby (Burrows, OSDI 2006), which others call fencing tokens: a claim raises the
record's `epoch`, a number that never falls, and a write is accepted only from the owner of the current epoch. Within an
epoch the `version` counts the writes, so that one that is repeated, or comes late, changes nothing.

The words *new*, *released*, *owned* and *erased* below are the four states of a row:

    state      what is stored                                          who may claim
    new        nothing, or a row that was claimed and never saved      everybody
    released   body and version, no owner                              everybody
    owned      the owner; body and version unless never saved          the same owner; anybody, if the owner is dead
    erased     a tombstone with the epoch; no body                     everybody; it is new again

A row that is in none of them is *damaged*: fields are missing, of another type or out of bounds. It is of nobody and is
not new, so whoever asks for its user is told (`CorruptRecordError`) and it stays as it is, until it is erased.
"""

from __future__ import annotations

import asyncio
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, TypeAlias

from .._core import decode_plain
from ..errors import CorruptRecordError, EncodingError, StoreContractError, StoreError
from ..wording import quote

__all__ = [
    "MAX_NUMBER",
    "Answers",
    "Claim",
    "Outcome",
    "Record",
    "Store",
    "Verdict",
    "latest_of",
    "text_of",
    "verdicts_of",
]

MAX_NUMBER = 2**53
"""Epochs and versions stay below it, so that any engine and any JSON reader keeps them exact."""


class Record(NamedTuple):
    """One user as the store has it, or is to have it.

    In what is read, `epoch` and `owner` are those of the row at that moment, and in a granted claim those of the claim.
    """

    user_id: int | str
    """Whose it is."""
    epoch: int
    """Of the claim under which it is written."""
    owner: str
    """The node that writes it; in what is read, the one that has the user now, empty if none has."""
    version: int
    """Counts the writes of one user from 1; never used for different bytes within an epoch."""
    schema: int
    """The program's own number for the shape of the data; 0 where it has none."""
    body: bytes
    """JSON in UTF-8."""
    saved_at: float
    """When the bytes were fixed, by the writer's wall clock, in Unix seconds; for people to read, not for decisions."""
    release: bool = False
    """This is the last save: the user is released by the same write."""

    def __repr__(self) -> str:
        """All but the data: what is shown somewhere ends up in a log."""
        fields = {name: repr(value) for name, value in zip(self._fields, self, strict=True) if name != "body"}
        fields["body"] = f"<{len(self.body)} bytes>"
        return f"Record({', '.join(f'{name}={fields[name]}' for name in self._fields)})"

    def value(self) -> Any:
        """The data as plain Python values: `body`, parsed.

        Raises `CorruptRecordError` if it is not JSON, or if a value cannot hold what it says. O(size).
        """
        try:
            return decode_plain(self.body)
        except EncodingError as error:
            reason = str(error)
        raise CorruptRecordError(
            f"the record of user {quote(self.user_id)} cannot be read, and is left as it is: {reason}",
            user_id=self.user_id,
            body=self.body,
        )


class Outcome(StrEnum):
    """What became of one record of a `Store.save_many`."""

    SAVED = "saved"
    """Written."""
    ALREADY = "already"
    """This very version was there already: a repeat, and as good as written."""
    FENCED = "fenced"
    """Another owner, or a later epoch, has the row; nothing was written."""
    MISSING = "missing"
    """There is no row; nothing was written."""
    ERASED = "erased"
    """The row is a tombstone; nothing was written."""
    INVALID = "invalid"
    """The engine will never take this body; `detail` says why."""
    FAILED = "failed"
    """Not written now; may succeed when repeated."""


class Verdict(NamedTuple):
    """The outcome for one record, with the reason where there is one."""

    outcome: Outcome
    """What became of it."""
    detail: str = ""
    """For `INVALID` and `FAILED`: why, in words without the body."""


class Claim(NamedTuple):
    """The answer to a claim of one user."""

    user_id: int | str
    """Who was asked for."""
    epoch: int
    """The new epoch if granted; the current one if not."""
    record: Record | None
    """What is stored, if the claim was granted and anything is; None for a user who is new."""
    owner: str = ""
    """Who has the user, if the claim was refused; empty if it was granted."""

    @property
    def granted(self) -> bool:
        """Whether the user is ours now."""
        return not self.owner


Answers: TypeAlias = Sequence[Claim | StoreError]
"""What `Store.claim_many` returns."""


class Store(ABC):
    """Where user data is kept. Subclass it to write an adapter; `cagey_sessions` calls every method on one event loop.

    A method that cannot reach its engine, or does not know what became of a call, raises `StoreUnavailableError`; it
    never answers "new" because a read failed. Any other exception of a call counts as a failure of the whole call: a
    call for several users is then repeated for fewer of them.
    Methods are called concurrently. They are not cancelled by the library while the loop runs: `abort` ends a call.
    """

    fenced: bool = True
    """Whether `save_many` refuses what comes from an owner or an epoch that is not the row's, and what comes late.

    Where it does not, the library waits for the end of each call before it writes the same users again.
    """
    shared: bool = False
    """Whether several processes use the store at a time. Where they do, the library releases users it no longer has."""
    keeps_schema: bool = True
    """Whether the schema of a record comes back with it; where not, what is loaded is taken to be of today's."""
    independent: bool = False
    """Whether a call that fails or hangs says nothing about other users than its own.

    Where it does not, the store counts as down only after the calls of several users have failed one after the other,
    and each user is claimed by a call of its own.
    """
    can_erase: bool = True
    """Whether `erase` is there at all."""
    loss_class: str = ""
    """What a crash may cost of what was acknowledged, in one line, as read from the engine at `open`."""

    incarnation: str = ""
    """Tells one life of the engine from the next, where what was acknowledged may be gone in between; else empty.

    Once it has changed the library writes every user again, and claims those whom the engine has forgotten.
    """

    _link: weakref.ref[Any] | None = None
    """Of the manager that was the last to open it: no other may, before that one has closed it."""

    @property
    def name(self) -> str:
        """What receipts, statistics and logs call the store; without credentials."""
        return type(self).__name__

    @abstractmethod
    async def open(self) -> None:
        """Connect, check the layout, create what is missing.

        Raises `StoreInUseError`, `StoreLayoutError`, `StoreUnavailableError`.
        """

    @abstractmethod
    async def close(self) -> None:
        """Finish what is under way and let go of everything; does nothing on a store that is not open."""

    @abstractmethod
    async def claim_many(self, user_ids: Sequence[int | str], owner: str) -> Answers:
        """Claim users for `owner`, each in one atomic step; answers in the order of `user_ids`, which are distinct.

        What is wrong with one row is the answer for that row: a `StoreError`, such as a `CorruptRecordError`, in the
        place of its claim. It is raised to whoever wants that user, and the row stays as it was.

        Granted if the user is new, released, erased, owned by this very `owner`, or owned by one that is dead by the
        store's own rule; the epoch is then raised by one. Refused otherwise, and nothing changes. A new row gets an
        epoch above any that was ever given for that user, also by an engine that has lost rows since: its clock in
        microseconds is one.

        What is wrong with one row is that user's alone: in the place of the claim stands a `StoreError`, which is
        raised to whoever wants that user, and the row is not changed. For a damaged row, or one without a next epoch or
        version below `MAX_NUMBER`, that is a `CorruptRecordError`.
        """

    @abstractmethod
    async def save_many(self, records: Sequence[Record]) -> list[Verdict]:
        """Write records of claimed users; one verdict each, in order.

        A record is written if its row is owned by the same owner under the same epoch and has a lower version. Only
        rows that exist are updated. `release` releases the row in the same write, also where the same version is there
        already. ``already`` is the answer to the owner and epoch of the row's last claim, whether the row has been
        released since or not, for the version that is there and for a lower one, which has come late and changes
        nothing, a release included. A later version for a row that has been released is ``fenced``. Of several records
        of one user the latest, by epoch and version, is written, and all of them get its verdict. A record that can
        never be written makes no other fail. Nothing is written to a row of which epoch, owner, version or flags are
        damaged: ``failed``.
        """

    @abstractmethod
    async def release_many(self, claims: Sequence[tuple[int | str, int]], owner: str) -> list[bool]:
        """Let go of users without a save: pairs of a user, each another one, and the epoch of the claim.

        Answers for each, in order, whether it was still owned by `owner` under that epoch, and so is released; else
        nothing changes. If the call raises, any of them may be released or not: it is repeated, for fewer at a time
        where the cause may be one of them.

        A row is removed by that only if it was never saved.
        """

    @abstractmethod
    async def erase(self, user_id: int | str, owner: str = "") -> bool:
        """Put a tombstone in the place of a user, with the epoch raised by one: whether there was anything to erase.

        A damaged row is erased, too, which is how one gets rid of it; where its epoch cannot be told the tombstone gets
        that of a new row. Raises `OwnedElsewhereError` while a live owner other than `owner` has the user.
        """

    @abstractmethod
    async def load(self, user_id: int | str) -> Record | None:
        """The record as stored, whoever owns it; None for a user who is new or erased. Claims nothing.

        Raises `CorruptRecordError` for a damaged row.
        """

    async def holder(self, user_id: int | str) -> tuple[str, int]:
        """Who has a user, empty if nobody, and the epoch of the row; ("", 0) where there is none. Claims nothing.

        As it is here it sees the rows that `load` sees. A shared store answers for those without a body, too: else a
        user who was never saved stays with a process whose claim came in late, until that process ends. Raises
        `CorruptRecordError` where a damaged row does not say it.
        """
        record = await self.load(user_id)
        return ("", 0) if record is None else (record.owner, record.epoch)

    @abstractmethod
    def scan(self) -> AsyncIterator[Record | StoreError]:
        """All records with a body, in no order; for tools. Saves go on meanwhile.

        In the place of a damaged row stands its error, and the scan goes on: a `CorruptRecordError`, or for a row that
        is of no user a `StoreError`.
        """

    def abort(self, call: asyncio.Task[Any]) -> None:
        """End a call that has not returned at its deadline, by closing the connection under it.

        `call` is the task that runs the method; the method is to raise `StoreUnavailableError` soon. May do nothing
        where that is impossible: the call then keeps its place among those in flight.
        """
        return


def latest_of(records: Sequence[Record]) -> dict[int | str, Record]:
    """Of several records of one user the latest, by epoch and version; for `Store.save_many`."""
    latest = {record.user_id: record for record in records}
    if len(latest) == len(records):
        return latest
    latest.clear()
    for record in records:
        known = latest.setdefault(record.user_id, record)
        if (record.epoch, record.version) > (known.epoch, known.version):
            latest[record.user_id] = record
    return latest


def text_of(body: bytes) -> str | None:
    """A body as text that an SQL database takes; None if it takes none of it."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


_OUTCOMES = frozenset(Outcome)


def verdicts_of(store: Store, answer: object, count: int) -> list[Verdict]:
    """What `Store.save_many` has answered. Raises `StoreContractError` if that is not one verdict for each record."""
    if (
        isinstance(answer, list)
        and len(answer) == count
        and all(
            isinstance(each, Verdict) and isinstance(each.outcome, str) and each.outcome in _OUTCOMES for each in answer
        )
    ):
        return answer
    raise StoreContractError(f"{store.name} did not answer with one verdict for each record")


def claims_of(store: Store, answers: object, user_ids: Sequence[int | str]) -> list[Claim | StoreError]:
    """What `Store.claim_many` has answered: for each user, in their order, a claim or what is wrong with the row.

    Raises `StoreContractError` if it is anything else.
    """
    if (
        isinstance(answers, list | tuple)
        and len(answers) == len(user_ids)
        and all(_is_sound(answer, user_id) for answer, user_id in zip(answers, user_ids, strict=True))
    ):
        return list(answers)
    raise StoreContractError(f"{store.name} did not answer with one claim for each user")


def _is_sound(answer: object, user_id: int | str) -> bool:
    if not isinstance(answer, Claim):
        return isinstance(answer, StoreError)
    epoch = answer.epoch
    return (
        type(answer.user_id) is type(user_id)
        and answer.user_id == user_id
        and type(epoch) is int
        and (0 < epoch < MAX_NUMBER or not answer.granted)
    )
