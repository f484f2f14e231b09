"""A file of users, one a line. What lives here: the format that snapshots and spills share, reading it, and replacing a
file as a whole. What must not: who is in such a file, and why.

Every line is the CRC-32 of what follows, as eight hexadecimal digits, a space, and a JSON object:

    5f0c8e1a {"format":"cagey_sessions","version":1,"kind":"snapshot","taken_at":1767225600.0,"owner":"node-1"}
    90ab12cd {"user_id":"alice","key":null,"epoch":3,"owner":"node-1","version":12,"schema":0,"body":{"gold":10}}
    03e4f5a6 {"end":1,"format":"cagey_sessions","version":1,"kind":"snapshot"}

The id comes first, so that a line that was cut still tells whose it was; the body comes last, so that its bytes can be
told from the rest without another writing of them. The end repeats the version, so that the entries can be read when
the first line cannot. In every later version of the format the first line is to be understood by this one.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from zlib import crc32

import orjson

from .._core import check_user_id, decode_plain
from ..errors import EncodingError, InvalidUserIdError, SnapshotError
from ..paths import RefusedNameError, open_regular, target_of
from ..records import DamagedEntry, Snapshot, SnapshotEntry

__all__ = [
    "CHUNK",
    "DISK",
    "MOST",
    "Files",
    "NewFile",
    "entry_line",
    "first_line",
    "last_line",
    "read",
    "read_entry",
    "remove_whole",
    "write_whole",
]

FORMAT = "cagey_sessions"
VERSION = 1
MOST = 2**53
"""Epochs, versions and schemas stay below it, as in every store."""
CHUNK = 1024 * 1024
"""How much is written at a time."""
_BODY = b',"body":'  # no JSON string can hold this: the quote would have a backslash before it
_ID = re.compile(rb'\{"user_id":(-?\d{1,19}|"(?:[^"\\]|\\.)*")[,}]')


class Files:
    """What is done with the disk; tests put one that fails in its place. Every method raises `OSError`."""

    def create(self, path: str) -> int:
        """A new file that only its owner may read; where anything has that name already, a link too, it is none."""
        return open_regular(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)

    def write(self, file: int, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(file, left) :]

    def sync(self, file: int) -> None:
        os.fsync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def replace(self, source: str, target: str) -> None:
        os.replace(source, target)

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable."""
        if sys.platform == "win32":  # a folder cannot be opened there
            return
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self, path: str) -> None:
        os.remove(path)

    def read(self, path: str) -> bytes:
        with os.fdopen(open_regular(path, os.O_RDONLY, follow=True), "rb") as file:
            return file.read()


DISK = Files()


class NewFile:
    """A file written beside the one it is to replace, which stays whole until `commit`, and after `abandon`.

    `path` may be a symbolic link, of this user or of root: what it leads to is replaced, and the link stays. One thread
    at a time takes a step. `abandon` is for any thread at any time: where a step is under way, that one removes the
    file when it is done, so that nobody closes a descriptor that somebody else is writing to.

    Raises `SnapshotError` where the disk does not do what it is told, and for a link of another user.
    """

    def __init__(self, path: str | os.PathLike[str], files: Files = DISK) -> None:
        try:
            self.path: str = target_of(path)
        except RefusedNameError as error:
            raise unwritable(os.fspath(path), error) from error
        self.size: int = 0
        self._files = files
        self._temporary = f"{self.path}.{os.urandom(4).hex()}.tmp"
        self._file: int | None = None
        self._exists = False
        self._is_abandoned = False
        self._step = threading.Lock()

    def write(self, data: bytes) -> None:
        """Append to the new file."""
        with self._taking_a_step():
            if self._file is None:
                self._file = self._files.create(self._temporary)
                self._exists = True
            self._files.write(self._file, data)
            self.size += len(data)

    def finish(self) -> None:
        """Have all of it safe on the disk, beside the old one."""
        with self._taking_a_step():
            assert self._file is not None
            self._files.sync(self._file)
            file, self._file = self._file, None
            self._files.close(file)

    def commit(self) -> None:
        """Put the new file, which is finished, in the place of the old one, durably."""
        with self._taking_a_step():
            self._files.replace(self._temporary, self.path)
            self._exists = False
            self._files.sync_folder(os.path.dirname(self.path))

    def abandon(self) -> None:
        """Remove what there is of the new file, if it has not been committed."""
        self._is_abandoned = True
        if self._step.acquire(blocking=False):
            try:
                self._remove()
            finally:
                self._step.release()

    @contextmanager
    def _taking_a_step(self) -> Iterator[None]:
        try:
            with self._step:
                if self._is_abandoned:
                    raise SnapshotError(f"{self.path}: the new file was given up, and the old one stays")
                yield
        except OSError as error:
            raise unwritable(self.path, error) from error
        finally:
            if self._is_abandoned:
                self.abandon()  # it was, meanwhile

    def _remove(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):
                self._files.close(file)
        if self._exists:
            self._exists = False
            with suppress(OSError):
                self._files.remove(self._temporary)


def unwritable(path: str, error: OSError) -> SnapshotError:
    """What to say of a disk that refuses."""
    remedy = {
        errno.ENOSPC: "free some space, or give a path on another disk",
        errno.EDQUOT: "free some space, or give a path on another disk",
        errno.ENOENT: "make its folder first",
        errno.EACCES: "let this process write to its folder",
        errno.EROFS: "give a path that can be written to",
        errno.EISDIR: "give the path of a file, not of a folder",
        errno.ELOOP: "give the path of the file itself",
    }.get(error.errno or 0, "look at the disk, or give another path")
    return SnapshotError(
        f"{path} could not be written ({error.strerror or type(error).__name__}): {remedy}. "
        "Nothing that this file was to hold is safe in it yet"
    )


# Lines


def _line(content: bytes) -> bytes:
    return b"%08x %b\n" % (crc32(content), content)


def first_line(kind: str, taken_at: float, owner: str) -> bytes:
    """The header."""
    return _line(
        orjson.dumps({"format": FORMAT, "version": VERSION, "kind": kind, "taken_at": taken_at, "owner": owner})
    )


def last_line(kind: str, entries: int) -> bytes:
    """The footer."""
    return _line(orjson.dumps({"end": entries, "format": FORMAT, "version": VERSION, "kind": kind}))


def entry_line(entry: SnapshotEntry, **more: object) -> bytes:
    """One user; `more` are fields that only some kinds of file have."""
    return _line(
        orjson.dumps(
            {
                "user_id": entry.user_id,
                "key": entry.key,
                "epoch": entry.epoch,
                "owner": entry.owner,
                "version": entry.version,
                "schema": entry.schema,
                **more,
                "body": orjson.Fragment(entry.body),
            }
        )
    )


def read_entry(fields: dict[str, Any], body: bytes) -> SnapshotEntry:
    """An entry of its fields. Raises `ValueError` for what is not one."""
    check_user_id(fields["user_id"])
    key, owner = fields["key"], fields["owner"]
    if not (key is None or isinstance(key, str)) or not isinstance(owner, str):
        raise ValueError("key or owner is not a str")
    for name in ("epoch", "version", "schema"):
        if type(fields[name]) is not int or not 0 <= fields[name] < MOST:
            raise ValueError(f"{name} is not a whole number from 0 to 2**53 - 1")
    return SnapshotEntry(fields["user_id"], key, fields["epoch"], owner, fields["version"], fields["schema"], body)


# Reading


def read(
    path: str | os.PathLike[str],
    kind: str | None = None,
    parse: Callable[[dict[str, Any], bytes], SnapshotEntry] = read_entry,
    files: Files = DISK,
) -> Snapshot:
    """Everything a file has, what is damaged set aside; see `read_snapshot`. Raises `FileNotFoundError` as it is."""
    try:
        data = files.read(os.fspath(path))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SnapshotError(f"{path} could not be read ({error.strerror or type(error).__name__})") from error
    return _Reader(os.fspath(path), kind, parse).read(data)


class _Damaged(Exception):
    """A line that cannot be taken for what it should be."""


class _Reader:
    def __init__(self, path: str, kind: str | None, parse: Callable[[dict[str, Any], bytes], SnapshotEntry]) -> None:
        self._path = path
        self._kind = kind
        self._parse = parse

    def read(self, data: bytes) -> Snapshot:
        lines = data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        header: dict[str, Any] | None = None
        footer: dict[str, Any] | None = None
        entries: list[SnapshotEntry] = []
        damaged: list[DamagedEntry] = []
        for number, raw in enumerate(lines, 1):
            try:
                content = _checked(raw)
                if number == 1 and content.startswith(b'{"format":'):
                    header = self._frame(content)
                elif number == len(lines) and content.startswith(b'{"end":'):
                    footer = self._frame(content)
                else:
                    entries.append(self._entry(content))
            except _Damaged as error:
                damaged.append(DamagedEntry(number, _told_id(raw), raw, str(error)))
        frame = header or footer
        if frame is None:
            raise SnapshotError(
                f"{self._path} is not a snapshot of cagey-sessions, or neither its beginning nor its end can be read"
            )
        return Snapshot(
            kind=frame["kind"],
            taken_at=header["taken_at"] if header else None,
            owner=header["owner"] if header else None,
            entries=tuple(entries),
            damaged=tuple(damaged),
            expected=footer["end"] if footer else None,
        )

    def _frame(self, content: bytes) -> dict[str, Any]:
        """The fields of the first or the last line."""
        fields: dict[str, Any] = _object(content)
        version = fields.get("version")
        if fields.get("format") != FORMAT or type(version) is not int:
            raise _Damaged("neither the first nor the last line of a snapshot")
        if version > VERSION:
            raise SnapshotError(
                f"{self._path} has format {version}, and this version of cagey-sessions reads up to {VERSION}; "
                "read it with the version that wrote it. The file is left as it is"
            )
        kind = fields.get("kind")
        if not isinstance(kind, str) or type(fields.get("end", 0)) is not int:
            raise _Damaged("neither the first nor the last line of a snapshot")
        if "end" not in fields and not (
            isinstance(fields.get("owner"), str) and type(fields.get("taken_at")) in (int, float)
        ):
            raise _Damaged("the first line says neither when nor by whom it was written")
        if self._kind is not None and kind != self._kind:
            raise SnapshotError(f"{self._path} is a {kind}, not a {self._kind}; give another path")
        return fields

    def _entry(self, content: bytes) -> SnapshotEntry:
        head, found, body = content.partition(_BODY)
        if not found or not body.endswith(b"}"):
            raise _Damaged("no entry")
        body = body[:-1]
        fields = _object(head + b"}")
        _parsed(body, "the body: ")
        try:
            return self._parse(fields, body)
        except InvalidUserIdError:
            raise _Damaged("the user id is none") from None
        except KeyError as error:
            raise _Damaged(f"there is no field {error}") from None
        except (ValueError, TypeError) as error:
            raise _Damaged(str(error)) from None


def _checked(raw: bytes) -> bytes:
    content = raw[9:]
    if raw[:9] != b"%08x " % crc32(content):
        raise _Damaged("the checksum is that of other bytes")
    return content


def _parsed(content: bytes, prefix: str = "") -> Any:
    try:
        return decode_plain(content, prefix)
    except EncodingError as error:
        raise _Damaged(str(error)) from None


def _object(content: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = _parsed(content)
    if not isinstance(fields, dict):
        raise _Damaged("not a JSON object")
    return fields


def _told_id(raw: bytes) -> int | str | None:
    """Whose line it is, as far as it still says so."""
    match = _ID.search(raw)
    if match is None:
        return None
    try:
        user_id: int | str = orjson.loads(match[1])
        check_user_id(user_id)
    except (orjson.JSONDecodeError, InvalidUserIdError):
        return None
    return user_id


def remove_whole(path: str, files: Files = DISK) -> None:
    """Remove a file that has nothing more to say. Raises `SnapshotError`."""
    try:
        with suppress(FileNotFoundError):
            files.remove(path)
        files.sync_folder(os.path.dirname(path))
    except OSError as error:
        raise SnapshotError(
            f"{path} could not be removed ({error.strerror}); what is in it is saved already, and no harm"
        ) from error


def write_whole(path: str, lines: Iterable[bytes], files: Files = DISK) -> None:
    """Replace a file by these lines. Raises `SnapshotError`; then the old file is as it was."""
    new = NewFile(path, files)
    try:
        chunk, size = [], 0
        for line in lines:
            chunk.append(line)
            size += len(line)
            if size >= CHUNK:
                new.write(b"".join(chunk))
                chunk, size = [], 0
        new.write(b"".join(chunk))
        new.finish()
        new.commit()
    finally:
        new.abandon()
