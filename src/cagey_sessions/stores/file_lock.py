"""A lock file: keeps a second process away from a file, and says which process has it."""

from __future__ import annotations

import errno
import os
import sys
import weakref

from ..errors import StoreInUseError, StoreLayoutError
from ..paths import RefusedNameError, open_regular

__all__ = ["FileLock"]

TAKEN = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
"""The errors of operating systems for a lock that another process has."""
LONGEST_PID = 20
"""The process id is padded to so many characters, so that it overwrites a longer one completely."""


class FileLock:
    """A lock of the operating system, on a file that contains the id of the process that has it.

    The lock ends with the process, however that ends. The file is created if there is none. A file that exists is used
    only if it can be a lock file of ours: a regular file, not a symbolic link, that holds a process id or nothing.
    Anything else is not written to. No file is ever truncated.
    """

    def __init__(self) -> None:
        self._file: int | None = None
        self._place: tuple[int, int] | None = None
        """Device and inode of the file, because it may have two names."""

    @staticmethod
    def look_at(path: str | os.PathLike[str]) -> None:
        """Raise `StoreLayoutError` if what has this name is not a lock file; `OSError` if that cannot be told."""
        try:
            file = _open(path, os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            _read_pid(file, path)
        finally:
            os.close(file)

    def acquire(self, path: str | os.PathLike[str]) -> None:
        """Take the lock, without waiting.

        Raises `StoreInUseError` if another process, or this one, has it; `StoreLayoutError` if something else has the
        name of the file; and `OSError` if the file cannot be created, or the file system has no locks.
        """
        file = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            try:
                _lock(file)
            except OSError as error:
                if error.errno not in TAKEN:
                    raise
                name = os.path.basename(path).removesuffix(".lock")
                if _is_ours(_place_of(file)):  # by the file, not by the process id: each container has a process 1
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
        """Give the lock up. The file stays: if it were removed, two processes could lock two files of the same name."""
        file, self._file, self._place = self._file, None, None
        if file is not None:
            os.close(file)


def _place_of(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_dev, status.st_ino


def _is_ours(place: tuple[int, int]) -> bool:
    """Whether another lock of this process has the file."""
    return any(lock._place == place for lock in list(_held))


def _open(path: str | os.PathLike[str], flags: int) -> int:
    try:
        return open_regular(path, flags, 0o644)
    except RefusedNameError as error:
        raise StoreLayoutError(f"{path} {error.strerror}, and no lock file: it is left as it is; remove it") from error


def _read_pid(file: int, path: str | os.PathLike[str]) -> int | None:
    """The process id in a lock file, of the process that has or had it. Raises `StoreLayoutError` for other content."""
    content = os.read(file, LONGEST_PID + 2)
    if not content:
        return None  # just created
    if len(content) > LONGEST_PID + 1 or not content.strip().isdigit():
        raise StoreLayoutError(f"{path} holds something else than a lock file does: it is left as it is; remove it")
    return int(content)


if sys.platform == "win32":
    import msvcrt

    LOCKED_BYTE = 1 << 20
    """Beyond the process id: what is locked on Windows cannot be read, and other processes have to read the id."""

    def _lock(file: int) -> None:
        os.lseek(file, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _release_in_child() -> None:
    """Close the lock files in a forked child: it shares the locks, and would keep them after the parent has ended."""
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
