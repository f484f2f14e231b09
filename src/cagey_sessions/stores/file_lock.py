"""A file that one process has at a time. What lives here: the lock, and who has it. What must not: what it is for."""

from __future__ import annotations

import errno
import os
import sys
import weakref

from ..errors import StoreInUseError, StoreLayoutError
from ..paths import RefusedNameError, open_regular

__all__ = ["FileLock"]

TAKEN = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
"""What systems say of a lock that somebody else has."""
LONGEST_PID = 20
"""The process id is padded to so many characters, so that nothing is left of another one that it is written over."""


class FileLock:
    """An OS lock that ends with the process, on a file that says whose it is.

    The file is made if there is none. One that is there is used only if it can be ours: a regular file, not opened
    through a link, that holds a process id or nothing. Any other is not written to, and none is ever made shorter.
    """

    def __init__(self) -> None:
        self._file: int | None = None
        self._place: tuple[int, int] | None = None
        """Device and inode: two names may be of one file."""

    @staticmethod
    def look_at(path: str | os.PathLike[str]) -> None:
        """Raise `StoreLayoutError` if what has that name is no lock file; `OSError` if that cannot be told."""
        try:
            file = _open(path, os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            _read_pid(file, path)
        finally:
            os.close(file)

    def acquire(self, path: str | os.PathLike[str]) -> None:
        """Take the lock or say at once who has it.

        Raises `StoreInUseError`, `StoreLayoutError` for something else in the place of the file, and `OSError` for a
        file that cannot be made or a file system that has no locks.
        """
        file = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            try:
                _lock(file)
            except OSError as error:
                if error.errno not in TAKEN:
                    raise
                name = os.path.basename(path).removesuffix(".lock")
                if _is_ours(_place_of(file)):  # the id alone would not tell: in each container there is a process 1
                    raise StoreInUseError(
                        f"{name} is in use in this very process ({os.getpid()}), by another store or manager; end that "
                        "one first, or share it",
                        pid=os.getpid(),
                    ) from None
                pid = _read_pid(file, path)
                raise StoreInUseError(
                    f"{name} is in use by process {pid or 'of unknown id'}; it has one process at a time, end that one "
                    "first",
                    pid=pid,
                ) from None
            _read_pid(file, path)  # or it is none of ours
            os.lseek(file, 0, os.SEEK_SET)
            os.write(file, b"%-*d\n" % (LONGEST_PID, os.getpid()))
        except BaseException:
            os.close(file)
            raise
        self._file, self._place = file, _place_of(file)
        _held.add(self)

    def release(self) -> None:
        """The lock file stays: to remove it would let two processes lock two files of one name."""
        file, self._file, self._place = self._file, None, None
        if file is not None:
            os.close(file)


def _place_of(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_dev, status.st_ino


def _is_ours(place: tuple[int, int]) -> bool:
    return any(lock._place == place for lock in list(_held))


def _open(path: str | os.PathLike[str], flags: int) -> int:
    try:
        return open_regular(path, flags, 0o644)
    except RefusedNameError as error:
        raise StoreLayoutError(f"{path} {error.strerror}, and no lock file: it is left as it is; remove it") from error


def _read_pid(file: int, path: str | os.PathLike[str]) -> int | None:
    """Whose lock file that is, or was."""
    content = os.read(file, LONGEST_PID + 2)
    if not content:
        return None  # just made
    if len(content) > LONGEST_PID + 1 or not content.strip().isdigit():
        raise StoreLayoutError(f"{path} holds something else than a lock file does: it is left as it is; remove it")
    return int(content)


if sys.platform == "win32":
    import msvcrt

    LOCKED_BYTE = 1 << 20
    """Beyond the process id, which others must be able to read."""

    def _lock(file: int) -> None:
        os.lseek(file, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """A child of a fork shares the locks; it must not keep them when the parent is gone."""
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
