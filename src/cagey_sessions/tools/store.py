"""The tools for stores: figures, showing one user, exporting and importing users as lines of JSON, erasing.

Everything goes through the store contract, so the rules of servers hold for the tools, too: a user whom a live server
has is neither written nor erased. Arguments and exit statuses are in `cli.py`.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import socket
import stat
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from .._core import check_user_id, decode_plain
from ..data import LAST_SCHEMA, Encoding
from ..errors import InvalidUserIdError, OptionError, OwnedElsewhereError, SnapshotError, StoreError
from ..files.format import CHUNK, NewFile
from ..options import suggest
from ..stores import MAX_NUMBER, Claim, Outcome, Record, Store, open_store
from ..stores.urls import engine_of
from ..threads import outlast
from ..wording import quote

__all__ = ["Found", "erase", "export_users", "find", "import_users", "statistics"]

USERS_IN_A_BATCH = 200
BYTES_IN_A_BATCH = 1024 * 1024
FIELDS = ("user_id", "version", "schema", "saved_at", "body")
"""The fields of a line. In a line to be imported all but the first and the last may be left out."""
SHOW_AFTER = 0.5
"""After how many seconds of work a progress bar is shown."""
SHOW_EVERY = 0.1
LAST_VERSION = MAX_NUMBER // 2
"""The highest version that is imported. It leaves room for more saves than a user ever has."""
ENCODING = Encoding(max_bytes=sys.maxsize)
"""Checks that a server can load what is imported. Its size is not limited: programs set their own limits."""

READ: dict[str, dict[str, Any]] = {"sqlite": {"read_only": True}, "postgres": {"create": False}}
CHANGE: dict[str, dict[str, Any]] = {"postgres": {"create": False}}
"""The options of each engine by which it creates no tables: a mistyped URL must not make an empty store."""

Say = Callable[[str], None]


def _store(url: str, options: dict[str, dict[str, Any]]) -> Store:
    engine = engine_of(url)
    if engine == "memory":
        raise OptionError("users in memory are gone with their process; name a store that lasts")
    return open_store(url, **options.get(engine, {}))


@asynccontextmanager
async def _opened(store: Store) -> AsyncIterator[Store]:
    try:
        await store.open()
        yield store
    finally:
        await store.close()


# Looking


def statistics(url: str, say: Say) -> dict[str, Any]:
    """Return figures of a whole store; reads every body. `say` is called for each damaged row, which is not counted."""
    return asyncio.run(_statistics(_store(url, READ), say))


async def _statistics(store: Store, say: Say) -> dict[str, Any]:
    users = damaged = size = owned = largest = 0
    largest_user: int | str | None = None
    oldest, newest = math.inf, -math.inf
    schemas: Counter[int] = Counter()
    async with _opened(store):
        with _progress("users read") as tell:
            async for record in store.scan():
                if isinstance(record, StoreError):
                    damaged += 1
                    say(f"passed over: {record}")
                    continue
                users += 1
                size += len(record.body)
                owned += bool(record.owner)
                schemas[record.schema] += 1
                oldest, newest = min(oldest, record.saved_at), max(newest, record.saved_at)
                if len(record.body) > largest:
                    largest, largest_user = len(record.body), record.user_id
                tell(users)
        return {
            "store": store.name,
            "loss_class": store.loss_class,
            "users": users,
            "damaged": damaged,
            # in a store for one process users need not be released, so `owned` would mean nothing
            "owned": owned if store.shared else None,
            "released": users - owned if store.shared else None,
            "body_bytes": {
                "total": size,
                "mean": round(size / users, 1) if users else 0,
                "largest": largest,
                "largest_user": largest_user,
            },
            "saved_at": {"oldest": _moment(oldest), "newest": _moment(newest)} if users else None,
            "schemas": {str(schema): count for schema, count in sorted(schemas.items())},
        }


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):  # a time that is out of the range of dates
        return repr(seconds)


class Found(NamedTuple):
    """One user in a store."""

    record: Record | None
    """None for a user who was never saved, or erased."""
    owner: str
    """The owner that has the user now; empty if none has."""


def find(url: str, user_id: int | str) -> Found:
    """Return one user and its owner. Raises `CorruptRecordError` for a damaged row."""

    async def look(store: Store) -> Found:
        async with _opened(store):
            record = await store.load(user_id)
            owner, _ = await store.holder(user_id) if record is None else (record.owner, record.epoch)
            return Found(record, owner)

    check_user_id(user_id)
    return asyncio.run(look(_store(url, READ)))


# Erasing


def erase(url: str, user_id: int | str) -> bool:
    """Erase a user, and return whether there was anything to erase.

    Raises `OwnedElsewhereError` while a live server has the user.
    """

    async def erase(store: Store) -> bool:
        async with _opened(store):
            return await store.erase(user_id)

    check_user_id(user_id)
    try:
        return asyncio.run(erase(_store(url, CHANGE)))
    except OwnedElsewhereError as error:
        raise OwnedElsewhereError(f"{error}; {_IF_DEAD}", user_id=user_id, owner=error.owner) from None


_IF_DEAD = "if that server is gone, ask again in some seconds: it is given the time to show that it lives"


# Out


def export_users(url: str, path: Path | None, say: Say, *, replace: bool = False) -> tuple[int, int]:
    """Write all users as lines of JSON to a file, or to stdout; returns how many were written, and how many left out.

    Users are left out if their row is damaged, or their body could not be loaded as it is; `say` is called for each.
    The file appears as a whole, at the end. If there is one already, it raises `OptionError` unless `replace` is true.
    """
    if path is None:
        return asyncio.run(_export(_store(url, READ), sys.stdout.buffer.write, say, sys.stdout.isatty()))
    if path.exists() and not (replace and path.is_file()):
        remedy = "give --force to replace it" if path.is_file() else "and is no file"
        raise OptionError(f"{path} is there already; {remedy}")
    file = NewFile(path)
    try:
        file.write(b"")
        counts = asyncio.run(_export(_store(url, READ), file.write, say))
        file.finish()
        file.commit()
    finally:
        file.abandon()
    return counts


async def _export(store: Store, write: Callable[[bytes], object], say: Say, hidden: bool = False) -> tuple[int, int]:
    written = damaged = size = 0
    lines: list[bytes] = []
    async with _opened(store):
        with _progress("users exported", hidden=hidden) as tell:
            async for record in store.scan():
                try:
                    if isinstance(record, StoreError):
                        raise record
                    lines.append(_line(record))
                except StoreError as error:
                    damaged += 1
                    say(f"left out: {error}")
                    continue
                written += 1
                size += len(lines[-1])
                if size >= CHUNK:
                    write(b"".join(lines))
                    lines, size = [], 0
                tell(written)
    write(b"".join(lines))
    return written, damaged


def _line(record: Record) -> bytes:
    record.value()  # raises for a body that neither a server nor an import could load
    # A body that was changed by hand may have line ends. In JSON they are between tokens only, so a space will do.
    body = orjson.Fragment(record.body.replace(b"\n", b" ").replace(b"\r", b" "))
    values = (record.user_id, record.version, record.schema, record.saved_at, body)
    return orjson.dumps(dict(zip(FIELDS, values, strict=True)), option=orjson.OPT_APPEND_NEWLINE)


# In


class _User(NamedTuple):
    """The user of one line."""

    user_id: int | str
    version: int
    schema: int
    saved_at: float
    body: bytes


def import_users(url: str, path: Path | None, say: Say, *, replace: bool = False) -> tuple[int, int]:
    """Save the users in lines of JSON, from a file or from stdin; returns how many were written, and how many refused.

    Users are refused if a live server has them, if they are in the store already and `replace` is false, or if the
    engine does not accept their body; `say` is called for each. Raises `SnapshotError` for a damaged line: with a file
    before anything is written, with stdin or a pipe after the lines before it are.
    """
    store = _store(url, {})
    if path is None:
        return _import(store, sys.stdin.buffer, None, say, replace)
    try:
        with path.open("rb") as file:
            total = None
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                total = sum(1 for _ in _users(file))
                file.seek(0)
            return _import(store, file, total, say, replace)
    except OSError as error:
        raise SnapshotError(f"{path} could not be read ({error.strerror or type(error).__name__})") from error


def _import(store: Store, lines: Iterable[bytes], total: int | None, say: Say, replace: bool) -> tuple[int, int]:
    importer = _Importer(store, say, replace)
    with asyncio.Runner() as runner:
        try:
            runner.run(store.open())
            with _progress("users imported", total) as tell:
                for batch in _batches(_users(lines)):  # not in a run: an interrupt then ends a wait for stdin
                    runner.run(_finish(importer.write(batch)))
                    tell(importer.written)
        except BaseException:
            if importer.written:
                say(f"{importer.written} users had been written by then, and stay")
            raise
        finally:
            runner.run(store.close())
    return importer.written, importer.refused


def _users(lines: Iterable[bytes]) -> Iterator[_User]:
    """The users in some lines. Raises `SnapshotError` at the first line that cannot be read."""
    seen: dict[int | str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            user = _user(line)
            first = seen.setdefault(user.user_id, number)
            if first != number:
                raise ValueError(f"user {quote(user.user_id)} is in line {first} already")
        except (ValueError, InvalidUserIdError) as error:
            raise SnapshotError(f"line {number} is not one of an export: {error}") from None
        yield user


def _user(line: bytes) -> _User:
    fields = decode_plain(line, "")
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    for name in fields:
        if name not in FIELDS:
            raise ValueError(f"there is no field {quote(name)}{suggest(name, FIELDS)}")
    for name in ("user_id", "body"):
        if fields.get(name) is None:
            raise ValueError(f"there is no {name}")
    check_user_id(fields["user_id"])
    version, schema, saved_at = fields.get("version", 1), fields.get("schema", 0), fields.get("saved_at", time.time())
    if type(version) is not int or not 0 < version <= LAST_VERSION:
        raise ValueError(f"version is not a whole number from 1 to {LAST_VERSION}")
    if type(schema) is not int or not 0 <= schema <= LAST_SCHEMA:
        raise ValueError(f"schema is not a whole number from 0 to {LAST_SCHEMA}")
    if type(saved_at) not in (int, float):
        raise ValueError("saved_at is not a number of seconds")
    return _User(fields["user_id"], version, schema, float(saved_at), ENCODING.dump(fields["body"]))


def _batches(users: Iterable[_User]) -> Iterator[list[_User]]:
    batch: list[_User] = []
    size = 0
    for user in users:
        if batch and (len(batch) == USERS_IN_A_BATCH or size + len(user.body) > BYTES_IN_A_BATCH):
            yield batch
            batch, size = [], 0
        batch.append(user)
        size += len(user.body)
    if batch:
        yield batch


async def _finish(work: Coroutine[Any, Any, None]) -> None:
    """Await some work to its end even if cancelled: a batch is written as a whole, and its users are released."""
    await outlast(asyncio.ensure_future(work))


class _Importer:
    """Writes batches, and counts the users."""

    def __init__(self, store: Store, say: Say, replace: bool) -> None:
        self.written = 0
        self.refused = 0
        self._store = store
        self._say = say
        self._replace = replace
        self._owner = f"import-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}"

    async def write(self, users: list[_User]) -> None:
        claims = await self._store.claim_many([user.user_id for user in users], self._owner)
        records: list[Record] = []
        unused: list[Claim] = []
        for user, claim in zip(users, claims, strict=True):
            if isinstance(claim, StoreError):
                self.refused += 1
                self._say(f"refused: {claim}; --replace does not write over it, erase does away with it")
            elif not claim.granted:
                self._refuse(user.user_id, f"is on another server ({claim.owner}) now; {_IF_DEAD}")
            elif claim.record is not None and not self._replace:
                self._refuse(user.user_id, "is there already; --replace writes over them")
                unused.append(claim)
            else:
                records.append(self._record(user, claim))
        for record, verdict in zip(records, await self._store.save_many(records), strict=True):
            if verdict.outcome in (Outcome.SAVED, Outcome.ALREADY):
                self.written += 1
            else:
                self._refuse(record.user_id, f"was not taken by the store: {verdict.detail or verdict.outcome}")
                unused.append(Claim(record.user_id, record.epoch, None))
        await self._store.release_many([(each.user_id, each.epoch) for each in unused], self._owner)

    def _record(self, user: _User, claim: Claim) -> Record:
        stored = 0 if claim.record is None else claim.record.version
        return Record(
            user.user_id,
            claim.epoch,
            self._owner,
            max(user.version, stored + 1),
            user.schema,
            user.body,
            user.saved_at,
            release=True,
        )

    def _refuse(self, user_id: int | str, reason: str) -> None:
        self.refused += 1
        self._say(f"refused: user {quote(user_id)} {reason}")


# How far it is


@contextmanager
def _progress(what: str, total: int | None = None, *, hidden: bool = False) -> Iterator[Callable[[int], None]]:
    """A block with a function that shows on stderr how far the work is; it shows nothing if that is not a terminal."""
    if hidden or not sys.stderr.isatty():
        yield lambda done: None
        return
    try:
        bar = _rich_bar(what, total)
    except ImportError:
        bar = _counter(what, total)
    next_time = time.monotonic() + SHOW_AFTER

    def tell(done: int) -> None:
        nonlocal next_time
        now = time.monotonic()
        if now >= next_time:
            next_time = now + SHOW_EVERY
            bar.send(done)

    next(bar)
    try:
        yield tell
    finally:
        bar.close()


_Bar = Any


def _rich_bar(what: str, total: int | None) -> _Bar:
    from rich.console import Console  # noqa: PLC0415 - an extra
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn  # noqa: PLC0415

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=total)

    def show() -> Iterator[None]:
        try:
            while True:
                bar.update(task, completed=(yield))
                bar.start()
        finally:
            bar.stop()

    return show()


def _counter(what: str, total: int | None) -> _Bar:
    text = ""
    try:
        while True:
            done = yield
            text = f"{done}{f' of {total}' if total else ''} {what}"
            print(f"\r{text}", end="", file=sys.stderr, flush=True)
    finally:
        if text:
            print(f"\r{' ' * len(text)}\r", end="", file=sys.stderr, flush=True)
