"""Opens files without being fooled by symbolic links and pipes.

Another user who may write to our folder can put something else in the place of a file: a symbolic link, so that the
server overwrites one of its own files elsewhere, or a pipe, so that opening it hangs. Two rules prevent that:

- A name that the library makes up itself (a lock file, a temporary file) is never followed if it is a link.
- A path that the program gives may be a link, for example to another disk, and is followed. The file that it leads to
  may be replaced as a whole, so a link made by another user is refused, as Linux does in folders like ``/tmp``. Links
  made by root are followed: root needs no link to do harm.
"""

from __future__ import annotations

import errno
import os
import stat

__all__ = ["RefusedNameError", "open_regular", "target_of"]

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
# Flags without effect on a regular file. Anything else is opened before it can be refused, and opening a pipe must not
# block, and opening a terminal must not make it ours.
_NO_EFFECT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_BINARY = getattr(os, "O_BINARY", 0)
MOST_LINKS = 40
"""How many links may lead to each other; as many as Linux follows."""


class RefusedNameError(OSError):
    """What has this name must not be used; the text is a clause that says why, such as "is a symbolic link"."""


def open_regular(path: str | os.PathLike[str], flags: int, mode: int = 0o600, *, follow: bool = False) -> int:
    """Open a regular file and return its descriptor; `flags` and `mode` are those of `os.open`.

    Raises `RefusedNameError` for any other kind of file, and for a link unless `follow`; otherwise `OSError` as
    `os.open` does.
    """
    # Windows has no flag that refuses links, so the name is examined before and after the file is opened.
    by_look = not follow and not _NO_FOLLOW
    if by_look and os.path.islink(path):
        raise _refusal("is a symbolic link", path)
    try:
        file = os.open(path, flags | _NO_EFFECT | _BINARY | (0 if follow else _NO_FOLLOW), mode)
    except OSError as error:
        if not follow and os.path.islink(path):  # errno differs: ELOOP, EMLINK, EFTYPE
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
    """The absolute path of the file that a path leads to, through links made by this user or by root.

    Raises `RefusedNameError` for a link of anybody else. The file need not exist.
    """
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
