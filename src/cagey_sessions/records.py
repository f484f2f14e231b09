"""Plain facts handed to the caller. What lives here: frozen records and enums. What must not: behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["DrainReport", "EndReason", "Statistics", "UnsavedUser"]


class EndReason(StrEnum):
    """Why a session ended."""

    DESTROYED = "destroyed"
    """`Session.destroy` was called."""
    REPLACED = "replaced"
    """A session created with ``replace=True`` took its key."""
    CREATE_FAILED = "create failed"
    """A ``created`` listener raised, or whoever called `create` was cancelled."""
    DRAINED = "drained"
    """The manager was destroyed."""
    UNSAVED = "unsaved"
    """The manager was destroyed, and its deadline passed before the user's last save was acknowledged."""


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
    """Saves acknowledged since the start."""
    failed: int
    """Attempts that failed since the start."""
    tick_lag: float
    """By how many seconds the last wake-up of the wheel came late."""
