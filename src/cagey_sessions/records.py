"""Frozen records that calls of the library return: receipts, reports, statistics, the entries of files."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

__all__ = [
    "DamagedEntry",
    "DrainReport",
    "EndReason",
    "Health",
    "Receipt",
    "Snapshot",
    "SnapshotEntry",
    "SnapshotReport",
    "SpillReport",
    "Statistics",
    "UnsavedUser",
]


class EndReason(StrEnum):
    """Why a session ended."""

    DESTROYED = "destroyed"
    """`Session.destroy` was called."""
    REPLACED = "replaced"
    """A session created with ``replace=True`` took its key, or a later login its user."""
    CREATE_FAILED = "create failed"
    """A ``created`` listener raised, or whoever called `create` was cancelled."""
    DRAINED = "drained"
    """The manager was destroyed."""
    UNSAVED = "unsaved"
    """The manager was destroyed, and its deadline passed before the user's last save was acknowledged."""
    FENCED = "fenced"
    """Another server has taken the user over; unsaved changes are lost."""
    ERASED = "erased"
    """The user was erased."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """The store has acknowledged a save."""

    version: int
    """The version of the stored data; rises by one with each write."""
    saved_at: float
    """When the data was encoded, by this machine's wall clock, in Unix seconds."""
    changed: bool
    """Whether anything had to be written; False if the store had exactly these bytes already."""
    store: str
    """The name of the store."""


@dataclass(frozen=True, slots=True)
class UnsavedUser:
    """A user whose last save was not acknowledged in time."""

    user_id: int | str
    """Who it is."""
    age: float
    """Seconds since the last acknowledged state was encoded; at most so much play is lost."""
    error: Exception
    """What the last attempt raised, or a `DrainDeadlineError` if no attempt came to an end."""
    spilled: bool = False
    """Whether the data is in the spill file, from which the next start saves it."""


@dataclass(frozen=True, slots=True)
class DrainReport:
    """How the end of a manager went."""

    saved: int
    """Last saves acknowledged."""
    unsaved: tuple[UnsavedUser, ...]
    """The users who were not saved; the one whose last acknowledged state is oldest comes first."""
    seconds: float
    """How long it took."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a manager is doing at one instant."""

    live: int
    """Sessions now, ending ones included."""
    identified: int
    """Those of them that have a user."""
    ending: int
    """Sessions being ended, until their last ``destroy`` listener has run."""
    created: int
    """Sessions made since the start; ``created == live + ended``."""
    ended: int
    """Sessions that have left the table since the start."""
    pending: int
    """Saves that are due or asked for, and wait for a free slot."""
    in_flight: int
    """Saves under way."""
    overdue: int
    """Saves under way for longer than the interval."""
    oldest_unsaved: float | None
    """How many seconds of play a crash would cost at most: the age of the oldest state that is some user's last
    acknowledged one. None without users."""
    saved: int
    """Saves acknowledged since the start, including those that found nothing changed."""
    unchanged: int
    """How many of these wrote nothing, because the store had exactly these bytes already."""
    failed: int
    """Attempts that failed since the start."""
    fenced: int
    """Sessions ended since the start because another server had taken the user over."""
    unsavable: int
    """Users whose data cannot be saved as it is now."""
    store: str | None
    """The name of the store; None without one."""
    store_up: bool
    """Whether the last completed call reached the store; True without a store."""
    store_latency: float
    """How many seconds a call of the store takes, as a moving average; 0 before the first."""
    tick_lag: float
    """How many seconds late the last wake-up of the timing wheel was."""
    slice_overruns: int
    """How often since the start a piece of the library's work held the loop for more than a millisecond."""


@dataclass(frozen=True, slots=True)
class Health:
    """Whether users are being saved as they should, for a monitoring probe."""

    state: Literal["ok", "degraded", "down"]
    """``"ok"``, ``"degraded"`` (saves go on, but something needs a look) or ``"down"`` (nothing is being saved)."""
    reason: str
    """Why, in one line; empty if all is well."""

    def __bool__(self) -> bool:
        return self.state != "down"


@dataclass(frozen=True, slots=True)
class SnapshotReport:
    """A snapshot has been written."""

    saved: int
    """Users in it."""
    left_out: tuple[int | str, ...]
    """Users who are not in it, because their data cannot be encoded as it is."""
    size: int
    """Bytes."""
    seconds: float
    """How long it took."""


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """One user of a snapshot or a spill."""

    user_id: int | str
    """Who it is."""
    key: str | None = field(repr=False)
    """The session's key, or None; always None in a spill."""
    epoch: int
    """The epoch of the claim under which that server had the user; 0 without a store."""
    owner: str
    """The server's name in the store; empty without one."""
    version: int
    """The version that the store acknowledged last; `body` may be newer. 0 without a store, or if never saved."""
    schema: int
    """The program's number for the shape of the data."""
    body: bytes = field(repr=False)
    """JSON in UTF-8."""


@dataclass(frozen=True, slots=True)
class DamagedEntry:
    """A line of a snapshot or a spill file that cannot be read."""

    line: int
    """Its number, from 1."""
    user_id: int | str | None
    """Whose line it is, if that much can be read, else None. It may be wrong: the damage may be in the id itself."""
    raw: bytes = field(repr=False)
    """The bytes of the line, without its newline."""
    reason: str
    """What is wrong with it."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a snapshot or a spill file contains."""

    kind: Literal["snapshot", "spill"]
    """``"snapshot"`` or ``"spill"``."""
    taken_at: float | None
    """When writing it began, in Unix seconds; None if the first line is damaged."""
    owner: str | None
    """The name of the server that wrote it, empty if it had no store; None if the first line is damaged."""
    entries: tuple[SnapshotEntry, ...]
    """The users that can be read, in the order of the file."""
    damaged: tuple[DamagedEntry, ...]
    """The lines that cannot be read, in the order of the file."""
    expected: int | None
    """How many entries were written. The last line says so; None if it is missing, because the file was cut short."""

    @property
    def complete(self) -> bool:
        """Whether everything that was written is in `entries`."""
        return not self.damaged and self.expected == len(self.entries)


@dataclass(frozen=True, slots=True)
class SpillReport:
    """What became of the users of a spill file."""

    replayed: tuple[int | str, ...]
    """Saved to the store, now or by an earlier attempt."""
    pending: tuple[int | str, ...]
    """Still in the file: another server has them, or the store did not take them. Saved when they log in."""
    conflicts: tuple[int | str, ...]
    """Still in the file, and not saved, because the user was saved by another server, or erased, since."""
    damaged: tuple[DamagedEntry, ...]
    """Lines that cannot be read; still in the file."""
    complete: bool
    """Whether everything that was written to the file could be read."""
