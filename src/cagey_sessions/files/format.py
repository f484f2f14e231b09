"""The format of snapshot and spill files, reading it, and replacing such a file as a whole.

A file has a header, one line for each user, and a footer. Every line is the CRC-32 of what follows, as eight
hexadecimal digits, a space, and a JSON object:

    5f0c8e1a {"format":"cagey_sessions","version":1,"kind":"snapshot","taken_at":1767225600.0,"owner":"node-1"}
    90ab12cd {"user_id":"alice","key":null,"epoch":3,"owner":"node-1","version":12,"schema":0,"body":{"gold":10}}
    03e4f5a6 {"end":1,"format":"cagey_sessions","version":1,"kind":"snapshot"}

The user id comes first, so that it can still be read in a line that was cut short. The body comes last, so that its
bytes can be taken from the line as they are; parsed and written again they could differ. The footer repeats the format
and the version, so that the entries can be read even if the header is damaged. Every later version of the format has to
keep a header that this one can read, so that it can refuse the file by its version.
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
"""Epochs, versions and schemas are below it, as in every store."""
CHUNK = 1024 * 1024
"""How many bytes are written at a time."""
_BODY = b',"body":'  # no JSON string can hold this: the quote would have a backslash before it
# finds the id in a damaged line, too, which is not JSON any more
_ID = re.compile(rb'\{"user_id":(-?\d{1,19}|"(?:[^"\\]|\\.)*")[,}]')


class Files:
    """Every use of the disk; tests replace it by a disk that fails. All methods raise `OSError`."""

    def create(self, path: str) -> int:
        """Create a file that only its owner may read. Fails if anything has that name already, even a dangling link."""
        return open_regular(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)

    def write(self, file: int, data: bytes) -> None:
        left = memoryview(data)  # `os.write` may write less than it is given
        while left:
            left = left[os.write(file, left) :]

    def sync(self, file: int) -> None:
        os.fsync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def replace(self, source: str, target: str) -> None:
        os.replace(source, target)

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable; a file that was renamed may else have its old name after a crash."""
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
    """A new file, written beside the one that it is to replace. Until `commit` the old file stays as it is.

    `path` may be a symbolic link made by this user or by root: the file that it leads to is replaced, and the link
    stays. `write`, `finish` and `commit` are called one after the other, from any thread. `abandon` may be called by
    any thread at any time: if one of the three is under way, it removes the new file itself when it is done, because
    its descriptor must not be closed while it is written to.

    All methods raise `SnapshotError` if the disk fails; the constructor does so for a link made by another user.
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
        """Append to the new file; the first call creates it."""
        with self._taking_a_step():
            if self._file is None:
                self._file = self._files.create(self._temporary)
                self._exists = True
            self._files.write(self._file, data)
            self.size += len(data)

    def finish(self) -> None:
        """Make the content of the new file durable, beside the old one."""
        with self._taking_a_step():
            assert self._file is not None
            self._files.sync(self._file)
            file, self._file = self._file, None
            self._files.close(file)

    def commit(self) -> None:
        """Replace the old file by the new one, which has to be finished, and make that durable."""
        with self._taking_a_step():
            self._files.replace(self._temporary, self.path)
            self._exists = False
            self._files.sync_folder(os.path.dirname(self.path))

    def abandon(self) -> None:
        """Remove the new file unless it was committed, now or when the step that is under way is done."""
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
                self.abandon()  # it was called during this step, and could not remove the file

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
    """The error for a file that could not be written, with what to do about it."""
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
    """A line of the file: the checksum, and the content that it is of."""
    return b"%08x %b\n" % (crc32(content), content)


def first_line(kind: str, taken_at: float, owner: str) -> bytes:
    """The header of a file; `taken_at` is in Unix seconds, `owner` the name of the server in the store."""
    return _line(
        orjson.dumps({"format": FORMAT, "version": VERSION, "kind": kind, "taken_at": taken_at, "owner": owner})
    )


def last_line(kind: str, entries: int) -> bytes:
    """The footer of a file with so many entries; without it a reader knows that the file was cut short."""
    return _line(orjson.dumps({"end": entries, "format": FORMAT, "version": VERSION, "kind": kind}))


def entry_line(entry: SnapshotEntry, **more: object) -> bytes:
    """The line of one user; `more` are fields that only some kinds of file have."""
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
    """The entry that the fields of a line describe. Raises `ValueError`, `KeyError` or `TypeError` if there is none."""
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
    """Read a file: its entries, and the lines that are damaged; see `read_snapshot`. O(size of the file).

    Raises `FileNotFoundError` if there is none, and `SnapshotError` if it cannot be read, is not of this format, is of
    a later version of it, or is of another `kind`.
    """
    try:
        data = files.read(os.fspath(path))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SnapshotError(f"{path} could not be read ({error.strerror or type(error).__name__})") from error
    return _Reader(os.fspath(path), kind, parse).read(data)


class _Damaged(Exception):
    """A line cannot be read; the text says why. The lines after it are read all the same."""


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
                damaged.append(DamagedEntry(number, _readable_id(raw), raw, str(error)))
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
        """The fields of the header or the footer."""
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


def _readable_id(raw: bytes) -> int | str | None:
    """The user id in a damaged line, if it can still be read; it may be damaged, too."""
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
    """Remove a file whose entries are all saved. Does nothing if there is none. Raises `SnapshotError`."""
    try:
        with suppress(FileNotFoundError):
            files.remove(path)
        files.sync_folder(os.path.dirname(path))
    except OSError as error:
        raise SnapshotError(
            f"{path} could not be removed ({error.strerror}); what is in it is saved already, and no harm"
        ) from error


def write_whole(path: str, lines: Iterable[bytes], files: Files = DISK) -> None:
    """Replace a file by one with these lines. Raises `SnapshotError`; the old file is then as it was. Blocks."""
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
