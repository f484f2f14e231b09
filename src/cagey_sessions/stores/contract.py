"""The store contract: what a record is, the methods that every store has, and what their answers mean.

Ownership follows the sequencers of Chubby (Burrows, OSDI 2006), which others call fencing tokens: a claim raises the
row's `epoch`, a number that never falls, and a write is accepted only from the owner of the current epoch. Within an
epoch the `version` counts the writes, so that a write that is repeated, or comes late, changes nothing.

A row is in one of four states, *new*, *released*, *owned* and *erased*:

    state      what is stored                                          who may claim
    new        nothing, or a row that was claimed and never saved      everybody
    released   body and version, no owner                              everybody
    owned      the owner; body and version unless never saved          the same owner; everybody, if the owner is dead
    erased     a tombstone with the epoch; no body                     everybody; it is new again

A row in none of these states is *damaged*: fields are missing, of another type or out of bounds. Whose it is cannot be
told, so it is neither claimed nor written, and every call for its user gets a `CorruptRecordError` until the user is
erased.

See also `rows.py`, the checks of rows, and ``testing/conformance``, the tests that every store has to pass.
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
"""Epochs and versions are below it: any engine, and any JSON reader that takes numbers for floats, keeps them exact."""


class Record(NamedTuple):
    """One user, as the store keeps it or is to keep it.

    In a record that was read, `epoch` and `owner` are those of the row at that moment. In the record of a granted claim
    they are those of the claim.
    """

    user_id: int | str
    """Whose it is."""
    epoch: int
    """The epoch of the claim under which the record is written."""
    owner: str
    """The owner that writes the record; in a record that was read, the one that has the user now, or empty if none."""
    version: int
    """Counts the writes of one user from 1; never used for different bytes within an epoch."""
    schema: int
    """The program's own number for the shape of the data; 0 where it has none."""
    body: bytes
    """JSON in UTF-8."""
    saved_at: float
    """When the body was encoded, by the writer's wall clock, in Unix seconds. For people: nothing is decided by it."""
    release: bool = False
    """Whether this is the last save, so that the same write also releases the user."""

    def __repr__(self) -> str:
        """All fields but the data, which must not get into a log."""
        fields = {name: repr(value) for name, value in zip(self._fields, self, strict=True) if name != "body"}
        fields["body"] = f"<{len(self.body)} bytes>"
        return f"Record({', '.join(f'{name}={fields[name]}' for name in self._fields)})"

    def value(self) -> Any:
        """Parse `body`, and return the data as plain Python values.

        Raises `CorruptRecordError` if it is not JSON, or has a number or text that Python cannot represent. O(size).
        """
        try:
            return decode_plain(self.body)
        except EncodingError as error:
            reason = str(error)
        # outside of the `except`: the EncodingError would be its context, and its traceback holds the whole value
        raise CorruptRecordError(
            f"the record of user {quote(self.user_id)} cannot be read, and is left as it is: {reason}",
            user_id=self.user_id,
            body=self.body,
        )


class Outcome(StrEnum):
    """What became of one record in a call of `Store.save_many`."""

    SAVED = "saved"
    """Written."""
    ALREADY = "already"
    """The store had this version, or a later one, already: a repeated write, and as good as written."""
    FENCED = "fenced"
    """Another owner, or a later epoch, has the row; nothing was written."""
    MISSING = "missing"
    """There is no row; nothing was written."""
    ERASED = "erased"
    """The row is a tombstone; nothing was written."""
    INVALID = "invalid"
    """The engine will never accept this body; `detail` says why."""
    FAILED = "failed"
    """Not written now; it may succeed when it is repeated."""


class Verdict(NamedTuple):
    """The outcome for one record, with the reason where there is one."""

    outcome: Outcome
    """What became of it."""
    detail: str = ""
    """For `INVALID` and `FAILED` the reason, which quotes nothing of the body."""


class Claim(NamedTuple):
    """The answer to a claim of one user."""

    user_id: int | str
    """The user."""
    epoch: int
    """The new epoch if granted; the current one if not."""
    record: Record | None
    """The stored record, if the claim was granted; None for a user who is new."""
    owner: str = ""
    """The owner that has the user, if the claim was refused; empty if it was granted."""

    @property
    def granted(self) -> bool:
        """Whether the user now belongs to the owner that made the claim."""
        return not self.owner


Answers: TypeAlias = Sequence[Claim | StoreError]
"""What `Store.claim_many` returns."""


class Store(ABC):
    """Where user data is kept. Subclass it to write a store for another engine.

    A method that cannot reach its engine, or does not know what became of a call, raises `StoreUnavailableError`. It
    must never answer "new" because a read failed: the user would begin with empty data. Any other exception counts as a
    failure of the whole call; a call for several users is then repeated for fewer of them at a time.

    All methods are called on one event loop, and concurrently. While the loop runs the library does not cancel them: it
    ends a call by `abort`.
    """

    fenced: bool = True
    """Whether `save_many` refuses writes from an owner or an epoch that is not the row's, and writes that come late.

    If it does not, the library waits until each call has returned before it writes the same users again.
    """
    shared: bool = False
    """Whether several processes may use the store at a time. If so, the library releases users when it is done."""
    keeps_schema: bool = True
    """Whether the schema of a record is stored with it. If not, the library takes loaded data for today's schema."""
    independent: bool = False
    """Whether a call that fails or hangs says nothing about users of other calls.

    If so, the store counts as down only after the calls of several users have failed one after the other, and each user
    is claimed by a call of its own.
    """
    can_erase: bool = True
    """Whether the store can erase users."""
    loss_class: str = ""
    """Which acknowledged saves a crash may lose, in one line; read from the engine's settings at `open`."""

    incarnation: str = ""
    """Changes when the engine was restarted, or replaced, in a way that may have lost acknowledged saves; else empty.

    When it changes, the library writes every user again, and claims those again that the engine no longer has.
    """

    _link: weakref.ref[Any] | None = None
    """The link of the manager that opened the store last. No other manager may open it before that one closed it."""

    @property
    def name(self) -> str:
        """The name of the store in receipts, statistics and logs; without credentials."""
        return type(self).__name__

    @abstractmethod
    async def open(self) -> None:
        """Connect, check the layout, and create what is missing.

        Raises `StoreInUseError`, `StoreLayoutError`, `StoreUnavailableError`.
        """

    @abstractmethod
    async def close(self) -> None:
        """Finish the calls under way, and close all connections and files. Does nothing on a store that is not open."""

    @abstractmethod
    async def claim_many(self, user_ids: Sequence[int | str], owner: str) -> Answers:
        """Claim users for `owner`, each in one atomic step; answers in the order of `user_ids`, which are distinct.

        A claim is granted if the user is new, released, erased, owned by the same `owner`, or owned by one that is dead
        by the store's own rule; the epoch is then raised by one. Otherwise it is refused, and nothing changes.

        A new row gets an epoch above any that was ever given to that user, even if the engine has lost rows since: else
        a late write from before the loss would be accepted. The engine's clock in microseconds will do.

        If something is wrong with one row, the answer for that user is a `StoreError` in the place of the claim, and
        the row is not changed; the library raises it to the caller who wants that user. For a damaged row, or one whose
        next epoch or version would not be below `MAX_NUMBER`, that is a `CorruptRecordError`.
        """

    @abstractmethod
    async def save_many(self, records: Sequence[Record]) -> list[Verdict]:
        """Write records of claimed users; returns one verdict for each, in order.

        - A record is written (``saved``) if its row is owned by the same owner under the same epoch and has a lower
          version. Rows are only updated: a user without a row is ``missing``.
        - `release` releases the row in the same write. It also does so if the row has exactly this version already.
        - A record of the owner and epoch of the row's last claim, with the row's version or a lower one, is
          ``already``, whether the row has been released since or not. A lower version has come late: nothing changes,
          and its `release` is ignored.
        - A higher version for a row that was released is ``fenced``, like any other owner or epoch.
        - Of several records of one user the latest, by epoch and version, is written; all of them get its verdict.
        - A record that can never be written is ``invalid``, and makes no other record fail.
        - A row whose epoch, owner, version or flags are damaged is not written: ``failed``.
        """

    @abstractmethod
    async def release_many(self, claims: Sequence[tuple[int | str, int]], owner: str) -> list[bool]:
        """Release users without a save. `claims` are pairs of a user, each a different one, and the epoch of the claim.

        Returns for each, in order, whether the user was still owned by `owner` under that epoch, and is now released;
        if not, nothing changes. If the call raises, any of them may be released or not; the library then repeats it,
        for fewer users at a time if one of them may be the cause.

        The row of a user who was never saved may be removed.
        """

    @abstractmethod
    async def erase(self, user_id: int | str, owner: str = "") -> bool:
        """Replace a user by a tombstone, with the epoch raised by one; returns whether there was anything to erase.

        This is also the way to get rid of a damaged row; if its epoch cannot be read, the tombstone gets the epoch of a
        new row. Raises `OwnedElsewhereError` while a live owner other than `owner` has the user.
        """

    @abstractmethod
    async def load(self, user_id: int | str) -> Record | None:
        """Read the stored record, whoever owns the user; None for a user who is new or erased. Claims nothing.

        Raises `CorruptRecordError` for a damaged row.
        """

    async def holder(self, user_id: int | str) -> tuple[str, int]:
        """Return the owner that has a user, or "" if none has, and the epoch of the row; ("", 0) if there is no row.

        Claims nothing. The library calls it after a claim that timed out, to see whether it was granted all the same.
        This implementation uses `load`, and so sees only users with a body. A shared store has to answer for users who
        were never saved, too: else such a user stays claimed until this process ends. Raises `CorruptRecordError` for a
        row so damaged that its owner or epoch cannot be read.
        """
        record = await self.load(user_id)
        return ("", 0) if record is None else (record.owner, record.epoch)

    @abstractmethod
    def scan(self) -> AsyncIterator[Record | StoreError]:
        """Read all records with a body, in no particular order; for tools. Saves go on meanwhile.

        For a damaged row it yields the error in the place of the record, and goes on: a `CorruptRecordError`, or a
        `StoreError` if the row's key is not a user id.
        """

    def abort(self, call: asyncio.Task[Any]) -> None:
        """End a call that has not returned at its deadline, for example by closing its connection.

        `call` is the task that runs the method; the method should raise `StoreUnavailableError` soon. A store that
        cannot end a call does nothing here. The call then counts as in flight until it returns, and takes up a place
        that another save could have.
        """
        return


def latest_of(records: Sequence[Record]) -> dict[int | str, Record]:
    """The latest record of each user, by epoch and version; a help for `Store.save_many`."""
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
    """A body as text that an SQL database can store; None if it is not UTF-8, or has a NUL in it."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


_OUTCOMES = frozenset(Outcome)


def verdicts_of(store: Store, answer: object, count: int) -> list[Verdict]:
    """Check what `Store.save_many` returned, and return it.

    Raises `StoreContractError` if it is not a list with one verdict for each record: a store is the program's code.
    """
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
    """Check what `Store.claim_many` returned, and return it.

    Raises `StoreContractError` if it is not, for each user in their order, a claim of that user or a `StoreError`.
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
