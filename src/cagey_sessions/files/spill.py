"""The spill file: data that could not be saved, kept on the local disk until the store takes it.

An entry may be saved only on top of what its process left in the store; otherwise it would overwrite newer data. So an
entry lists what that may be: the version that was acknowledged last, and the versions whose saves had no answer, each
with the digest of its body. If the store has anything else, another server has saved the user since. The entry is then
a conflict, and stays in the file for a person to look at.

Digests are keyed, with a new key in each process, and a file may have entries of several processes. So each entry has
the key of its own digests.

See also `format.py`, the lines of the file, and `sessions/spilling.py`, which decides who is spilled and does the calls
of the store.
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
"""How many seconds a write waits for another one of the same file."""
WAIT_FOR_LOCK = 0.02
"""How many seconds lie between two attempts to get the lock of the file."""


@dataclass(frozen=True, slots=True)
class SpillEntry(SnapshotEntry):
    """A user whose data was not saved, and the versions that the store may have of it.

    `fixed_at` is when the data was encoded, in Unix seconds.
    """

    fixed_at: float
    digest_key: bytes = field(repr=False)
    known: frozenset[tuple[int, int]]
    """Pairs of a version, and the digest of its body under the key."""

    def line(self) -> bytes:
        """The entry as a line of the file."""
        known = [[version, f"{digest:016x}"] for version, digest in sorted(self.known)]
        return savefile.entry_line(self, fixed_at=self.fixed_at, digest_key=self.digest_key.hex(), known=known)

    def is_in(self, stored: Record, store: Store) -> bool:
        """Whether the store already has this body."""
        return stored.body == self.body and (stored.schema == self.schema or not store.keeps_schema)

    def follows(self, claim: Claim, stored: Record | None, store: Store) -> bool:
        """Whether `stored` is what the process of this entry left in the store, so that the entry may follow it.

        `claim` is the one under which the entry would be saved. A store that is not fenced keeps neither epochs nor
        versions, so there only the bodies are compared.
        """
        if stored is None:
            # The user was never saved, or was erased since. An erasure raises the epoch, as a claim by another would.
            return not self.version and (not store.fenced or claim.epoch == self.epoch + 1)
        digest = Digest(self.digest_key)(stored.body)
        if not store.fenced:
            return any(digest == other for _, other in self.known)
        if claim.epoch == self.epoch + 1 and stored.version < self.version:
            return True  # no claim in between: the engine has lost saves that it had acknowledged
        # Version 0 with a body is a row of a `PostgresTable` that only others have written; a session that loads it
        # counts it as version 1.
        return (max(stored.version, 1), digest) in self.known


@dataclass(slots=True)
class Plan:
    """What is to be done with the entries of one user, who has just been claimed."""

    claim: Claim
    write: Record | None
    """The record to save; None if there is nothing to write."""
    saved: list[SpillEntry]
    """The entries that are in the store once `write` is."""
    conflicts: list[SpillEntry]
    error: Exception | None = None
    """What went wrong with the write; None before it, and if nothing did."""


class SpillFile(NamedTuple):
    """The content of a spill file."""

    entries: list[SpillEntry]
    damaged: tuple[DamagedEntry, ...]
    complete: bool


class Spill:
    """The spill file of one manager, and the entries of it that wait to be saved.

    `read` and `write` block, and are called in a thread; the task that waits for the thread may give up, so the event
    loop may go on while they work. All other methods are called on the event loop. Raises `OptionError` for a path that
    cannot be used.
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
        self._replayed: dict[int | str, None] = {}  # a set in the order of insertion, for the report
        self._collected: list[SpillEntry] = []  # not in the file yet
        self._written: list[SpillEntry] = []  # collected before, and perhaps still in the file
        self._settled: set[SpillEntry] = set()  # perhaps still in the file
        self._writing = threading.Lock()
        self._check()

    def is_at(self, path: str) -> bool:
        """Whether a path is that of this spill file."""
        return os.path.realpath(path) == self.path

    def _check(self) -> None:
        """Raise `OptionError` if the path cannot be written: at the end, when it is needed, it would be too late."""
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
            return  # no locks here; `_alone` writes without one then

    @property
    def _lock_path(self) -> str:
        return f"{self.path}.lock"

    def open(self, found: SpillFile) -> None:
        """Take over what earlier processes left in the file, as `read` returned it."""
        self._damaged, self._was_complete = found.damaged, found.complete
        for entry in found.entries:
            self.pending.setdefault(entry.user_id, []).append(entry)
        self.is_open = True

    def report(self) -> SpillReport:
        """What has become of the users in the file so far."""
        return SpillReport(
            tuple(self._replayed), tuple(self.pending), tuple(self._conflicts), self._damaged, self._was_complete
        )

    # Into the store: the manager claims users who are in the file, and asks `plan` what to write

    def plan(self, claim: Claim, owner: str, store: Store, encoding: Encoding, *, release: bool) -> Plan:
        """Decide what to do with the entries of a user, who has just been claimed. Changes nothing.

        With several entries each may follow the one before, and only the last of these is written. O(size of the user's
        entries).
        """
        stored, write = claim.record, None
        saved, conflicts = [], []
        for entry in self.pending.get(claim.user_id, ()):
            schema, body = entry.schema, entry.body
            if schema != encoding.schema and not store.keeps_schema:  # it will be read as one of today's schema
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
        """Count entries as replayed: the store has them, and the next `write` removes them from the file."""
        for entry in entries:
            self._take(entry)
            self._settled.add(entry)
            self._replayed[entry.user_id] = None

    def set_aside(self, entries: Iterable[SpillEntry]) -> None:
        """Count entries as conflicts: they are not saved, and stay in the file."""
        for entry in entries:
            self._take(entry)
            self._conflicts.setdefault(entry.user_id, []).append(entry)

    def postpone(self, plan: Plan) -> None:
        """Keep the entries of a plan whose write failed, or had no answer.

        The claim has raised the epoch. An entry of a user who was never saved is recognized by the epoch alone, so it
        gets the new one: the next claim then sees that there was none in between but ours.
        """
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
        """Remove an erased user from the file, with the next `write`; returns whether there was anything to remove."""
        dropped = [*self.pending.pop(user_id, ()), *self._conflicts.pop(user_id, ())]
        # In this order, because a write that is under way in a thread moves entries from the first list to the second:
        # one that moves meanwhile is then seen twice, and not missed.
        ours = [*self._collected, *self._written]
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
        """Read the file, and return what is in it; changes nothing here. Blocks. Raises `SnapshotError`."""
        try:
            found = savefile.read(self.path, KIND, _parse, self._files)
        except FileNotFoundError:
            return SpillFile([], (), True)
        entries = [entry for entry in found.entries if isinstance(entry, SpillEntry)]
        return SpillFile(entries, found.damaged, found.complete)

    def collect(self, entry: SpillEntry) -> None:
        """Put an entry into the file with the next `write`."""
        self._collected.append(entry)

    @property
    def is_stale(self) -> bool:
        """Whether `write` has anything to do."""
        return bool(self._collected or self._settled)

    def write(self) -> int:
        """Bring the file up to date: add what was collected, and remove what was saved, dropped or replaced.

        Entries that other processes have added meanwhile are kept. A file without entries is removed. Returns how many
        entries were added. Blocks. Raises `SnapshotError`; the file is then as it was, and the next call does all of
        it.
        """
        with self._alone():
            # copies, because the event loop may change the lists while this thread works
            collected, settled = list(self._collected), set(self._settled)
            there, damaged, _ = self.read()
            # without doubles: an entry may be in the file already, if an earlier write failed after the rename
            kept = list(dict.fromkeys(entry for entry in (*there, *collected) if entry not in settled))
            if kept or damaged:  # damaged lines are kept: a person may still read something from them
                savefile.write_whole(self.path, self._lines(kept, damaged), self._files)
            elif there:
                savefile.remove_whole(self.path, self._files)
            self._written = [entry for entry in (*self._written, *collected) if entry not in settled]
            del self._collected[: len(collected)]
            self._settled -= settled
            return len(collected)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads and processes from writing the file: two writers at once would lose one's entries."""
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
                    break  # no locks here, or not our lock file: to write without a lock is better than not to write
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
