"""Files by their names. What lives here: opening them, and where a symbolic link leads. What must not: what is in them.

Whoever may write to a folder can put something else in the place of a file: a symbolic link, so that the server writes
to one of its files elsewhere, or a pipe, so that it hangs. So a name that the library makes up itself (a lock file, a
temporary file) is never followed. A path that the program gives may be a link, for example to another disk, and is
followed; but what it leads to may be replaced as a whole, so a link that another user has made is refused, as Linux
does in folders like ``/tmp``. Links of root are followed, for root needs no link to do harm.
"""

from __future__ import annotations

import errno
import os
import stat

__all__ = ["RefusedNameError", "open_regular", "target_of"]

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
# they change nothing for a regular file; anything else must not block or take over the terminal until it is refused
_NO_EFFECT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_BINARY = getattr(os, "O_BINARY", 0)
MOST_LINKS = 40
"""One after the other, as in Linux."""


class RefusedNameError(OSError):
    """What has that name is not to be used; the text says what it is."""


def open_regular(path: str | os.PathLike[str], flags: int, mode: int = 0o600, *, follow: bool = False) -> int:
    """A descriptor of a regular file. Raises `RefusedNameError` for any other kind, and for a link unless `follow`.

    Raises `OSError` as `os.open` does. Where the system cannot refuse a link by itself (Windows), the name is looked at
    before and after the file is opened.
    """
    by_look = not follow and not _NO_FOLLOW
    if by_look and os.path.islink(path):
        raise _refusal("is a symbolic link", path)
    try:
        file = os.open(path, flags | _NO_EFFECT | _BINARY | (0 if follow else _NO_FOLLOW), mode)
    except OSError as error:
        if not follow and os.path.islink(path):  # each system has a number of its own for that
            raise _refusal("is a symbolic link", path) from error
        raise
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise _refusal("is no regular file", path)
        if by_look and not os.path.samestat(status, os.lstat(path)):
            raise _refusal("is a symbolic link", path)
    except BaseException:
        os.close(file)
        raise
    return file


def target_of(path: str | os.PathLike[str]) -> str:
    """Where a path leads to, through links of this user and of root. Raises `RefusedNameError` for others."""
    place = os.fspath(path)
    for _ in range(MOST_LINKS):
        try:
            status = os.lstat(place)
        except OSError:
            break
        if not stat.S_ISLNK(status.st_mode):
            break
        if hasattr(os, "geteuid") and status.st_uid not in (0, os.geteuid()):
            raise _refusal("is a symbolic link that another user has made", place)
        place = os.path.join(os.path.dirname(place), os.readlink(place))
    return os.path.realpath(place)


def _refusal(reason: str, path: str | os.PathLike[str]) -> RefusedNameError:
    return RefusedNameError(errno.ELOOP, reason, os.fspath(path))
