"""What could not be saved, kept in a file until it can be. What lives here: the entries of that file, when one of them
may be saved, and the file. What must not: claims, calls of the store, or who is spilled.

An entry may be saved only on top of what its process left behind. So it says what that may be: the version last
acknowledged, and those whose saves had no answer, each with the digest of its body. Who has something else in the store
by then was saved by somebody since, and the entry is a conflict: it stays in the file for a human to look at. The keys
of digests differ from process to process and a file may have entries of several, so each entry has its own.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from .._core import Digest
from ..data import Encoding
from ..errors import OptionError, SnapshotError, StoreInUseError, StoreLayoutError
from ..options import path_text
from ..paths import RefusedNameError, target_of
from ..records import DamagedEntry, SnapshotEntry, SpillReport
from ..stores import Claim, Record, Store
from ..stores.file_lock import FileLock
from . import format as savefile
from .format import DISK, Files

__all__ = ["Plan", "Spill", "SpillEntry"]

KIND = "spill"
LONGEST_WRITE = 10
"""For how many seconds a write waits for another one of the same file."""
WAIT_FOR_LOCK = 0.02


@dataclass(frozen=True, slots=True)
class SpillEntry(SnapshotEntry):
    """A user whose data was not saved, and what the store may have of them."""

    fixed_at: float
    digest_key: bytes = field(repr=False)
    known: frozenset[tuple[int, int]]
    """Versions, and the digests of their bodies under the key."""

    def line(self) -> bytes:
        """The entry in a file."""
        known = [[version, f"{digest:016x}"] for version, digest in sorted(self.known)]
        return savefile.entry_line(self, fixed_at=self.fixed_at, digest_key=self.digest_key.hex(), known=known)

    def is_in(self, stored: Record, store: Store) -> bool:
        """Whether the store has this very body."""
        return stored.body == self.body and (stored.schema == self.schema or not store.keeps_schema)

    def follows(self, claim: Claim, stored: Record | None, store: Store) -> bool:
        """Whether what is stored is what the process of this entry has left behind.

        Without a body in the store that is so if there never was one, and nobody has claimed the user in between: who
        was erased has a higher epoch. A store that is not fenced keeps neither epochs nor versions.
        """
        if stored is None:
            return not self.version and (not store.fenced or claim.epoch == self.epoch + 1)
        digest = Digest(self.digest_key)(stored.body)
        if not store.fenced:
            return any(digest == other for _, other in self.known)
        if claim.epoch == self.epoch + 1 and stored.version < self.version:
            return True  # nobody has claimed the user since: the engine has lost what it had acknowledged
        return (max(stored.version, 1), digest) in self.known


@dataclass(slots=True)
class Plan:
    """What is to become of the entries of one user who is claimed."""

    claim: Claim
    write: Record | None
    """To be saved; None if there is nothing to write."""
    saved: list[SpillEntry]
    """Those that are in the store then."""
    conflicts: list[SpillEntry]
    error: Exception | None = None
    """What went wrong with the write."""


class SpillFile(NamedTuple):
    """What a spill file holds."""

    entries: list[SpillEntry]
    damaged: tuple[DamagedEntry, ...]
    complete: bool


class Spill:
    """The spill file of one manager, and what of it waits to be saved.

    Raises `OptionError` for a path that cannot be used. `read` and `write` are for a thread that may wait, and
    whoever waits for it may give up; the others are for the event loop.
    """

    def __init__(self, path: str | os.PathLike[str], files: Files = DISK) -> None:
        text = path_text("spill", path)
        try:
            self.path: str = target_of(text)
        except RefusedNameError as error:
            raise OptionError(f"spill: {text} {error.strerror}; give the path of the file itself") from error
        self.is_open: bool = False
        self.pending: dict[int | str, list[SpillEntry]] = {}
        self._files = files
        self._conflicts: dict[int | str, list[SpillEntry]] = {}
        self._damaged: tuple[DamagedEntry, ...] = ()
        self._was_complete = True
        self._replayed: dict[int | str, None] = {}
        self._collected: list[SpillEntry] = []  # not in the file yet
        self._written: list[SpillEntry] = []  # collected before, and perhaps still in the file
        self._settled: set[SpillEntry] = set()  # perhaps still in the file
        self._writing = threading.Lock()
        self._check()

    def is_at(self, path: str) -> bool:
        """Whether that is this very file."""
        return os.path.realpath(path) == self.path

    def _check(self) -> None:
        """Better to refuse a path at the start than to find out at the end."""
        if os.path.isdir(self.path):
            raise OptionError(f"spill is the path of a file, and {self.path} is a folder")
        probe = f"{self.path}.{os.urandom(4).hex()}.tmp"
        try:
            self._files.close(self._files.create(probe))
            self._files.remove(probe)
        except OSError as error:
            raise OptionError(f"spill: nothing can be written beside {self.path} ({error.strerror})") from error
        try:
            FileLock.look_at(self._lock_path)
        except StoreLayoutError as error:
            raise OptionError(f"spill: {error}") from error
        except OSError:
            return  # see `_alone`

    @property
    def _lock_path(self) -> str:
        return f"{self.path}.lock"

    def open(self, found: SpillFile) -> None:
        """From now on know what an earlier process has left, as `read` found it."""
        self._damaged, self._was_complete = found.damaged, found.complete
        for entry in found.entries:
            self.pending.setdefault(entry.user_id, []).append(entry)
        self.is_open = True

    def report(self) -> SpillReport:
        """How it stands."""
        return SpillReport(
            tuple(self._replayed), tuple(self.pending), tuple(self._conflicts), self._damaged, self._was_complete
        )

    # Into the store

    def plan(self, claim: Claim, owner: str, store: Store, encoding: Encoding, *, release: bool) -> Plan:
        """What is to be done about a user who is claimed. O(size of the user's entries)."""
        stored, write = claim.record, None
        saved, conflicts = [], []
        for entry in self.pending.get(claim.user_id, ()):
            schema, body = entry.schema, entry.body
            if schema != encoding.schema and not store.keeps_schema:  # nobody could tell the schema of it later
                try:
                    body = encoding.dump(encoding.load(_record(entry, claim, owner, 1, schema, body)))
                except Exception:
                    conflicts.append(entry)
                    continue
                schema = encoding.schema
            if stored is not None and entry.is_in(stored, store):
                saved.append(entry)
            elif entry.follows(claim, stored, store):
                saved.append(entry)
                version = (0 if stored is None else stored.version) + 1
                stored = write = _record(entry, claim, owner, version, schema, body, release)
            else:
                conflicts.append(entry)
        return Plan(claim, write, saved, conflicts)

    def settle(self, entries: Iterable[SpillEntry]) -> None:
        """These are in the store, and no longer wanted in the file."""
        for entry in entries:
            self._take(entry)
            self._settled.add(entry)
            self._replayed[entry.user_id] = None

    def set_aside(self, entries: Iterable[SpillEntry]) -> None:
        """These cannot be saved; they stay in the file."""
        for entry in entries:
            self._take(entry)
            self._conflicts.setdefault(entry.user_id, []).append(entry)

    def postpone(self, plan: Plan) -> None:
        """The write has failed, or nobody knows. Up to this claim nobody had saved the user: the next may follow it."""
        for entry in plan.saved:
            if not entry.version:
                self._take(entry)
                later = replace(entry, epoch=plan.claim.epoch)
                if later == entry:
                    self.pending.setdefault(entry.user_id, []).append(entry)
                    continue
                self._settled.add(entry)
                self.pending.setdefault(entry.user_id, []).append(later)
                self._collected.append(later)

    def drop(self, user_id: int | str) -> bool:
        """The user was erased, and is to be in no file either: whether they were."""
        dropped = [*self.pending.pop(user_id, ()), *self._conflicts.pop(user_id, ())]
        ours = [*self._collected, *self._written]  # in this order: a write under way moves them
        dropped += [entry for entry in ours if entry.user_id == user_id]
        self._settled.update(dropped)
        return bool(dropped)

    def _take(self, entry: SpillEntry) -> None:
        waiting = self.pending[entry.user_id]
        waiting.remove(entry)
        if not waiting:
            del self.pending[entry.user_id]

    # The file

    def read(self) -> SpillFile:
        """What is in the file. Waits for the disk, and changes nothing here. Raises `SnapshotError`."""
        try:
            found = savefile.read(self.path, KIND, _parse, self._files)
        except FileNotFoundError:
            return SpillFile([], (), True)
        entries = [entry for entry in found.entries if isinstance(entry, SpillEntry)]
        return SpillFile(entries, found.damaged, found.complete)

    def collect(self, entry: SpillEntry) -> None:
        """Have a user in the file at the next `write`."""
        self._collected.append(entry)

    @property
    def is_stale(self) -> bool:
        """Whether `write` has anything to do."""
        return bool(self._collected or self._settled)

    def write(self) -> int:
        """Bring the file up to date, keeping what others have put there meanwhile; removes it when nothing is left.

        Returns how many entries have come to it.

        Waits for the disk. Raises `SnapshotError`; then the file is as it was, and the next call does all of it.
        """
        with self._alone():  # with copies, for the loop goes on
            collected, settled = list(self._collected), set(self._settled)
            there, damaged, _ = self.read()
            kept = list(dict.fromkeys(entry for entry in (*there, *collected) if entry not in settled))
            if kept or damaged:
                savefile.write_whole(self.path, self._lines(kept, damaged), self._files)
            elif there:
                savefile.remove_whole(self.path, self._files)
            self._written = [entry for entry in (*self._written, *collected) if entry not in settled]
            del self._collected[: len(collected)]
            self._settled -= settled
            return len(collected)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within this block nobody else writes the file, in this process or another: what they add would be lost."""
        until = time.monotonic() + LONGEST_WRITE
        if not self._writing.acquire(timeout=LONGEST_WRITE):
            raise SnapshotError(f"{self.path}: an earlier write has not ended within {LONGEST_WRITE} s: the disk hangs")
        lock = FileLock()
        try:
            while True:
                try:
                    lock.acquire(self._lock_path)
                    break
                except StoreInUseError as error:
                    if time.monotonic() >= until:
                        raise SnapshotError(f"{self.path} is being written by process {error.pid}") from error
                    time.sleep(WAIT_FOR_LOCK)
                except (OSError, StoreLayoutError):
                    break  # no locks here, or something else in their place: unguarded is better than not written
            yield
        finally:
            lock.release()
            self._writing.release()

    def _lines(self, entries: list[SpillEntry], damaged: tuple[DamagedEntry, ...]) -> Iterable[bytes]:
        yield savefile.first_line(KIND, time.time(), entries[-1].owner if entries else "")
        yield from (entry.line() for entry in entries)
        yield from (entry.raw + b"\n" for entry in damaged)
        yield savefile.last_line(KIND, len(entries) + len(damaged))


def _record(
    entry: SpillEntry, claim: Claim, owner: str, version: int, schema: int, body: bytes, release: bool = False
) -> Record:
    return Record(claim.user_id, claim.epoch, owner, version, schema, body, entry.fixed_at, release)


def _parse(fields: dict[str, Any], body: bytes) -> SpillEntry:
    entry = savefile.read_entry(fields, body)
    fixed_at, digest_key = fields["fixed_at"], bytes.fromhex(fields["digest_key"])
    if type(fixed_at) not in (int, float) or len(digest_key) != 16:
        raise ValueError("fixed_at or digest_key is wrong")
    known = frozenset(_known(*each) for each in fields["known"])
    return SpillEntry(
        entry.user_id,
        entry.key,
        entry.epoch,
        entry.owner,
        entry.version,
        entry.schema,
        entry.body,
        fixed_at,
        digest_key,
        known,
    )


def _known(version: Any, digest: Any) -> tuple[int, int]:
    if type(version) is not int or not 0 < version < savefile.MOST or not _DIGEST.fullmatch(digest):
        raise ValueError("known is wrong")
    return version, int(digest, 16)


_DIGEST = re.compile("[0-9a-f]{16}")
