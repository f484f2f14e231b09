"""Every error that this library raises or reports, and the tree in which the classes stand.

    CageySessionsError
    |-- UsageError                   the caller's: the call was wrong, and nothing has changed
    |   |-- OptionError              an option's name or value (also a ValueError)
    |   |   `-- DurationError        a duration that cannot be understood or used
    |   |-- InvalidKeyError          (also a ValueError and a TypeError)
    |   |-- InvalidUserIdError       (also a ValueError and a TypeError)
    |   |-- InvalidUserDataError     (also a ValueError)
    |   |-- EncodingError            a value that is not JSON or not what the decoder takes; `.path` (also a ValueError)
    |   |-- UnknownEventError        (also a ValueError)
    |   |-- InvalidListenerError     (also a TypeError)
    |   |-- KeyTakenError            another live session has the key
    |   |-- UserActiveError          another session has the user; `.session` is that session
    |   |-- AlreadyIdentifiedError
    |   |-- NotIdentifiedError
    |   |-- SessionEndedError
    |   |-- ManagerClosedError
    |   |-- NothingSavesError        a save was asked for, and there is neither a store nor a listener that saves
    |   |-- StoreModeError           the call needs a manager with a store, or one without
    |   |-- UserNotFoundError        the store has no such user, and no default was given (also a LookupError)
    |   |-- MissingExtraError        a package that is not installed; `.extra` (also an ImportError)
    |   |-- WouldDeadlockError       a listener waits for the very save it is part of
    |   `-- WrongLoopError           another event loop, another thread, or after a fork (also a RuntimeError)
    |-- StoreError                   the store's: it could not do what it was asked for, or refused it
    |   |-- StoreUnavailableError    it failed, hangs or cannot be reached; the call may have taken effect or not
    |   |-- StoreInUseError          another process, or another store of this one, has it; `.pid`
    |   |-- StoreLayoutError         what is there is not ours, or was made by a newer version; left untouched
    |   |-- StoreContractError       a store, or a function given to `CallbackStore`, does not keep its contract
    |   `-- RecordError              about one user, `.user_id`
    |       |-- OwnedElsewhereError  another live server has the user; `.owner`
    |       |-- FencedError          another server has taken the user over; nothing more of this session is saved
    |       |-- UserErasedError      the user was erased; nothing more of this session is saved
    |       |-- LostRecordError      the store no longer has the record; it is claimed and saved again
    |       |-- CorruptRecordError   a stored body that cannot be read; `.body`, `.path`
    |       |-- SpillConflictError   the store has something newer than what was spilled; the spill is kept
    |       `-- NewerSchemaError     written by a newer version of the program; `.schema`
    |-- UnsavableError               data that cannot be saved as it is; `.user_id`, `.path`
    |-- SnapshotError                a snapshot or a spill cannot be written, or the file is none
    |-- ListenerError                a group: what the listeners of one event raised
    |-- UnsavedError                 a group: users who could not be saved, in `.user_ids`
    |   `-- DrainError               the same at the end of a manager, with a `.report`
    |-- SaveOverdueError             saves take longer than they should; reported, never raised
    |-- ListenerCancelledError       a listener was cancelled from outside, or raised something that is not an Exception
    `-- DrainDeadlineError           the deadline of a drain passed before a user was saved

Where a line says "also a ...", the error can be caught as that exception of Python's own, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from .records import DrainReport

__all__ = [
    "AlreadyIdentifiedError",
    "CageySessionsError",
    "CorruptRecordError",
    "DrainDeadlineError",
    "DrainError",
    "DurationError",
    "EncodingError",
    "FencedError",
    "InvalidKeyError",
    "InvalidListenerError",
    "InvalidUserDataError",
    "InvalidUserIdError",
    "KeyTakenError",
    "ListenerCancelledError",
    "ListenerError",
    "LostRecordError",
    "ManagerClosedError",
    "MissingExtraError",
    "NewerSchemaError",
    "NotIdentifiedError",
    "NothingSavesError",
    "OptionError",
    "OwnedElsewhereError",
    "RecordError",
    "SaveOverdueError",
    "SessionEndedError",
    "SnapshotError",
    "SpillConflictError",
    "StoreContractError",
    "StoreError",
    "StoreInUseError",
    "StoreLayoutError",
    "StoreModeError",
    "StoreUnavailableError",
    "UnknownEventError",
    "UnsavableError",
    "UnsavedError",
    "UsageError",
    "UserActiveError",
    "UserErasedError",
    "UserNotFoundError",
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
    """A key is not a `str`, or is empty."""


class InvalidUserIdError(UsageError, ValueError, TypeError):
    """A user id is neither an `int` of 64 bits nor a usable `str`."""


class InvalidUserDataError(UsageError, ValueError):
    """The value given as user data cannot be kept, for example None."""


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
    """A save was asked for, and the manager has neither a store nor a listener of ``persist_user_data``."""


class StoreModeError(UsageError):
    """The call needs a manager with a store, or one without."""


class EncodingError(UsageError, ValueError):
    """A value that is not JSON, or that `decode` does not accept.

    `path` says where it is, as a Python expression: ``user_data["bag"][3]["price"]``. The text of the error contains
    neither names nor values of the data, because they may be private; a program that may show them reads `path`.
    """

    def __init__(self, message: str, *, path: str = "user_data") -> None:
        super().__init__(message)
        self.path = path


class UserNotFoundError(UsageError, LookupError):
    """The store has no such user, and no default was given."""


class MissingExtraError(UsageError, ImportError):
    """A package is not installed: ``pip install "cagey-sessions[extra]"`` with `extra` in the brackets installs it."""

    def __init__(self, message: str, *, extra: str) -> None:
        super().__init__(message)
        self.extra = extra


class WouldDeadlockError(UsageError):
    """A listener awaits a save, or an end, that is itself waiting for that listener; or an edit awaits itself.

    Such a wait would never end, so it is refused.
    """


class WrongLoopError(UsageError, RuntimeError):
    """The manager is used from another event loop or thread, or after a fork."""


class StoreError(CageySessionsError):
    """The store could not do what it was asked for, or refused it."""


class StoreUnavailableError(StoreError):
    """The store failed, hangs or cannot be reached. The call may have taken effect or not."""


class StoreInUseError(StoreError):
    """Another process, or another store of this process, has the file open.

    `pid` is the id of the process that has it, or None if it is unknown.
    """

    def __init__(self, message: str, *, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class StoreLayoutError(StoreError):
    """What is in the store's place is not ours, or a newer version of this library made it; it is left untouched."""


class StoreContractError(StoreError):
    """A store, or a function given to `CallbackStore`, does not do what its contract says.

    `path` says where in the data that it returned the fault is, as in `EncodingError`; None where that does not apply.
    """

    def __init__(self, message: str, *, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path


class RecordError(StoreError):
    """Something is wrong with the record of one user, `user_id`."""

    def __init__(self, message: str, *, user_id: int | str) -> None:
        super().__init__(message)
        self.user_id = user_id


class OwnedElsewhereError(RecordError):
    """Another live server has the user: `owner`."""

    def __init__(self, message: str, *, user_id: int | str, owner: str) -> None:
        super().__init__(message, user_id=user_id)
        self.owner = owner


class FencedError(RecordError):
    """Another server has taken the user over: nothing more of this session is saved."""


class UserErasedError(RecordError):
    """The user was erased: nothing more of this session is saved."""


class LostRecordError(RecordError):
    """The store no longer has the record of a live user. The library claims the user again and saves the data."""


class CorruptRecordError(RecordError):
    """A stored record that cannot be read. The library never overwrites it.

    `body` is the stored body as it is. `path` says where in it the fault is, as in `EncodingError`, or is None if that
    is not known.
    """

    def __init__(self, message: str, *, user_id: int | str, body: bytes, path: str | None = None) -> None:
        super().__init__(message, user_id=user_id)
        self.body = body
        self.path = path


class NewerSchemaError(RecordError):
    """A newer version of the program wrote the stored body, with `schema` as its number. It is never overwritten."""

    def __init__(self, message: str, *, user_id: int | str, schema: int) -> None:
        super().__init__(message, user_id=user_id)
        self.schema = schema


class SpillConflictError(RecordError):
    """Spilled data was not saved, because the store has something newer or the user was erased.

    The entry stays in the spill file.
    """


class SnapshotError(CageySessionsError):
    """The file of a snapshot or a spill cannot be written, or its content cannot be read as one."""


class UnsavableError(CageySessionsError):
    """Data that cannot be saved as it is: not JSON, too large, or refused by the store for good.

    `user_id` says whose data it is; `path` says where in it the fault is, as in `EncodingError`, or is None if that is
    not known. What was saved last is untouched.
    """

    def __init__(self, message: str, *, user_id: int | str, path: str | None = None) -> None:
        super().__init__(message)
        self.user_id = user_id
        self.path = path


class ListenerError(CageySessionsError, ExceptionGroup[Exception]):
    """What the listeners of one event raised, as a group.

    The message of the group, and a note on each of its errors, name the event and the listener.
    """

    def derive(self, exceptions: Sequence[Exception]) -> Self:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self)(self.message, exceptions)


class UnsavedError(CageySessionsError, ExceptionGroup[Exception]):
    """Users could not be saved. `user_ids` names them; the first of `exceptions` are the reasons, in the same order."""

    def __new__(cls, message: str, exceptions: Sequence[Exception], **_: object) -> Self:
        return super().__new__(cls, message, exceptions)

    def __init__(self, message: str, exceptions: Sequence[Exception], *, user_ids: Sequence[int | str] = ()) -> None:
        super().__init__(message, exceptions)
        self.user_ids: tuple[int | str, ...] = tuple(user_ids)

    def derive(self, exceptions: Sequence[Exception]) -> UnsavedError:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        return UnsavedError(self.message, exceptions)


class DrainError(UnsavedError):
    """A manager has ended, and some users were not saved or some listeners raised; `report` is the whole account.

    `exceptions` are first the reasons why users were not saved, one for each of `user_ids`, then what listeners raised.
    """

    def __init__(
        self, message: str, exceptions: Sequence[Exception], *, user_ids: Sequence[int | str], report: DrainReport
    ) -> None:
        super().__init__(message, exceptions, user_ids=user_ids)
        self.report = report


class SaveOverdueError(CageySessionsError):
    """Saves take longer than the interval: `count` of them do, and the oldest began `oldest_age` seconds ago.

    It is never raised: it goes to the listeners of ``error``, or to the log.
    """

    def __init__(self, count: int, oldest_age: float) -> None:
        super().__init__(
            f"{count} {'save is' if count == 1 else 'saves are'} overdue, the oldest under way for {oldest_age:.1f} s; "
            "what never returns keeps its slot"
        )
        self.count = count
        self.oldest_age = oldest_age


class ListenerCancelledError(CageySessionsError):
    """A listener was cancelled from outside, or raised something that is not an `Exception`.

    It counts as a listener that failed. `__cause__` is what it raised.
    """


class DrainDeadlineError(CageySessionsError):
    """The deadline of a drain passed before a user was saved."""
