"""Plain facts handed to the caller. What lives here: frozen records and enums. What must not: behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["DrainReport", "EndReason", "Health", "Receipt", "Statistics", "UnsavedUser"]


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
    """Another node has taken the user over; what was not saved by then is not saved."""
    ERASED = "erased"
    """The user was erased."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """The store has acknowledged a save."""

    version: int
    """Of the user's data as it is stored now; rises by one with each change that is written."""
    saved_at: float
    """When the bytes were fixed, by this machine's wall clock, in Unix seconds."""
    changed: bool
    """Whether anything had to be written; False if the store had these very bytes already."""
    store: str
    """The name of the store."""


@dataclass(frozen=True, slots=True)
class UnsavedUser:
    """A user whose last save was not acknowledged in time."""

    user_id: int | str
    age: float
    """Seconds since the state last acknowledged; what is lost is at most this much."""
    error: Exception
    """What the last attempt raised, or a `DrainDeadlineError` where none has come to an end."""


@dataclass(frozen=True, slots=True)
class DrainReport:
    """How the end of a manager went."""

    saved: int
    """Last saves acknowledged."""
    unsaved: tuple[UnsavedUser, ...]
    """Who was not saved, oldest acknowledged state first."""
    seconds: float
    """How long it took."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a manager is doing at one instant."""

    live: int
    """Sessions in the table, those that are ending included."""
    identified: int
    """Those of them that have a user."""
    ending: int
    """Sessions being ended, until their last ``destroy`` listener has run."""
    created: int
    """Sessions made since the start; ``created == live + ended``."""
    ended: int
    """Sessions that have left the table since the start."""
    pending: int
    """Saves that are due or asked for and wait for a free slot."""
    in_flight: int
    """Saves under way."""
    overdue: int
    """Saves under way for longer than the interval."""
    oldest_unsaved: float | None
    """Age in seconds of the oldest state that is still the last one acknowledged of some user; None without users."""
    saved: int
    """Saves acknowledged since the start, those that found nothing changed included."""
    unchanged: int
    """Of these, how many found that the store had the very bytes already, and wrote nothing."""
    failed: int
    """Attempts that failed since the start."""
    fenced: int
    """Sessions ended since the start because another node had taken the user over."""
    unsavable: int
    """Users whose data is not saved at present because it cannot be, as it is."""
    store: str | None
    """The name of the store; None without one."""
    store_up: bool
    """Whether the last call that came to an end reached the store; True without one."""
    store_latency: float
    """How many seconds a call of the store takes, as a moving average; 0 before the first."""
    tick_lag: float
    """By how many seconds the last wake-up of the wheel came late."""
    slice_overruns: int
    """How often since the start a piece of work held the loop for more than a millisecond."""


@dataclass(frozen=True, slots=True)
class Health:
    """Whether users are being saved as they should, for a monitoring probe."""

    state: str
    """``"ok"``, ``"degraded"`` (saves go on, but something needs a look) or ``"down"`` (nothing is being saved)."""
    reason: str
    """Why, in one line; empty if all is well."""

    def __bool__(self) -> bool:
        return self.state != "down"
