"""Every error of this library. What lives here: the classes and their tree. What must not: anything that raises them.

CageySessionsError
|-- UsageError                   yours: the call was wrong, and nothing has changed
|   |-- OptionError              an option's name or value (also a ValueError)
|   |   `-- DurationError        a duration that cannot be understood or used
|   |-- InvalidKeyError          (also a ValueError and a TypeError)
|   |-- InvalidUserIdError       (also a ValueError and a TypeError)
|   |-- InvalidUserDataError     (also a ValueError)
|   |-- UnknownEventError        (also a ValueError)
|   |-- InvalidListenerError     (also a TypeError)
|   |-- KeyTakenError            another live session has the key
|   |-- UserActiveError          another session has the user; `.session` is that session
|   |-- AlreadyIdentifiedError
|   |-- NotIdentifiedError
|   |-- SessionEndedError
|   |-- ManagerClosedError
|   |-- NothingSavesError        a save is asked for, and nobody would perform it
|   |-- WouldDeadlockError       a listener waits for the very save it is part of
|   `-- WrongLoopError           another event loop, another thread, or after a fork (also a RuntimeError)
|-- ListenerError                a group: what the listeners of one event raised
|-- UnsavedError                 a group: who could not be saved, in `.user_ids`
|   `-- DrainError               the same at the end of a manager, in full in `.report`
|-- SaveOverdueError             saves take longer than they should; reported, never raised
|-- ListenerCancelledError       a listener was cancelled from outside: it failed like one that raises
`-- DrainDeadlineError           the time of a drain was over before a user was saved
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from .records import DrainReport

__all__ = [
    "AlreadyIdentifiedError",
    "CageySessionsError",
    "DrainDeadlineError",
    "DrainError",
    "DurationError",
    "InvalidKeyError",
    "InvalidListenerError",
    "InvalidUserDataError",
    "InvalidUserIdError",
    "KeyTakenError",
    "ListenerCancelledError",
    "ListenerError",
    "ManagerClosedError",
    "NotIdentifiedError",
    "NothingSavesError",
    "OptionError",
    "SaveOverdueError",
    "SessionEndedError",
    "UnknownEventError",
    "UnsavedError",
    "UsageError",
    "UserActiveError",
    "WouldDeadlockError",
    "WrongLoopError",
]


class CageySessionsError(Exception):
    """The root of every error this library raises."""


class UsageError(CageySessionsError):
    """The call was wrong; nothing has changed."""


class OptionError(UsageError, ValueError):
    """An option has an unknown name or an unusable value."""


class DurationError(OptionError):
    """A duration cannot be understood, or is out of range; the text is quoted."""


class InvalidKeyError(UsageError, ValueError, TypeError):
    """A key is not a non-empty `str`."""


class InvalidUserIdError(UsageError, ValueError, TypeError):
    """A user id is neither an `int` of 64 bits nor a usable `str`."""


class InvalidUserDataError(UsageError, ValueError):
    """User data that cannot be kept."""


class UnknownEventError(UsageError, ValueError):
    """There is no event of that name."""


class InvalidListenerError(UsageError, TypeError):
    """A listener cannot be called."""


class KeyTakenError(UsageError):
    """Another live session has the key."""


class UserActiveError(UsageError):
    """Another session of this manager has the user.

    `session` is that session. While it is ending, ``await error.session.wait_ended()`` waits for its last save.
    """

    def __init__(self, message: str, *, session: Any = None) -> None:
        super().__init__(message)
        self.session = session


class AlreadyIdentifiedError(UsageError):
    """The session has a user already."""


class NotIdentifiedError(UsageError):
    """The session has no user yet."""


class SessionEndedError(UsageError):
    """The session has ended, or is past its last save."""


class ManagerClosedError(UsageError):
    """The manager is being destroyed, or has been."""


class NothingSavesError(UsageError):
    """A save is asked for, and nobody would perform it."""


class WouldDeadlockError(UsageError):
    """A listener waits for the save, or the end, that itself waits for this listener."""


class WrongLoopError(UsageError, RuntimeError):
    """The manager is used from another event loop or thread, or after a fork."""


class ListenerError(CageySessionsError, ExceptionGroup[Exception]):
    """What the listeners of one event raised, each with a note that names the listener."""

    def derive(self, exceptions: Sequence[Exception]) -> Self:  # type: ignore[override]
        return type(self)(self.message, exceptions)


class UnsavedError(CageySessionsError, ExceptionGroup[Exception]):
    """Users who could not be saved: `user_ids`, in the order of the first of `exceptions`."""

    def __new__(cls, message: str, exceptions: Sequence[Exception], **_: object) -> Self:
        return super().__new__(cls, message, exceptions)

    def __init__(self, message: str, exceptions: Sequence[Exception], *, user_ids: Sequence[int | str] = ()) -> None:
        super().__init__(message, exceptions)
        self.user_ids = tuple(user_ids)

    def derive(self, exceptions: Sequence[Exception]) -> UnsavedError:  # type: ignore[override]
        return UnsavedError(self.message, exceptions)


class DrainError(UnsavedError):
    """A manager has ended, and not everything went well: `report` says who was not saved, and why.

    The exceptions are first the reasons, one for each of `user_ids`, then what listeners raised meanwhile.
    """

    def __init__(
        self, message: str, exceptions: Sequence[Exception], *, user_ids: Sequence[int | str], report: DrainReport
    ) -> None:
        super().__init__(message, exceptions, user_ids=user_ids)
        self.report = report


class SaveOverdueError(CageySessionsError):
    """Saves take longer than the interval: `count` of them, the oldest for `oldest_age` seconds."""

    def __init__(self, count: int, oldest_age: float) -> None:
        super().__init__(
            f"{count} {'save is' if count == 1 else 'saves are'} overdue, the oldest under way for {oldest_age:.1f} s; "
            "a listener that never returns keeps its slot"
        )
        self.count = count
        self.oldest_age = oldest_age


class ListenerCancelledError(CageySessionsError):
    """A listener was cancelled from outside; it failed like one that raises."""


class DrainDeadlineError(CageySessionsError):
    """The time of a drain was over before a user was saved."""
