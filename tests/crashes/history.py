"""What writers tell before they die. What lives here: the events, their lines in a file, and a writer's own pen. What
must not: what follows from them (`judge.py`).

A line goes to the file in one call, so what was told stays told when the process is killed in the next instant; of a
line that was cut only the rest is missed. Times are those of the monotonic clock, which all processes of a machine
share.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Event", "Pen", "is_whole", "n_of", "read_history", "state"]


class Event(NamedTuple):
    """Something that was asked for at `began` and known to have happened at `at`, in nanoseconds.

    =========  ========================================================================  ===========================
    kind       what happened                                                             version, n
    =========  ========================================================================  ===========================
    sent       a save is about to be asked for                                           of the save
    saved      the store has acknowledged it                                             of the save
    repeated   the store says that it was there already                                  of the save
    fenced     the store says that another owner has the user                            of the save
    failed     the store has not saved it, or nobody knows                               of the save
    claimed    the store has granted a user; `data` is what it had                       of `data`; 0 if it was new
    refused    another owner, `owner`, has the user; `data` is who has asked             0
    releasing  the store is about to be asked to let go of a user without a save         0
    released   the store has let go of a user without a save                             0
    login      a session has begun, with this data                                       of the data; version is 0
    receipt    the program was told that its data is saved                               of the data
    left       the program was told that a session has ended, with its data saved        of the data; version is 0
    read       what the engine has, as somebody saw it who is no part of the library     of `data`; 0 if there is none
    =========  ========================================================================  ===========================
    """

    kind: str
    began: int
    at: int
    user: str
    epoch: int
    owner: str
    version: int
    n: int
    release: bool = False
    """Of a save: the user is let go of by the same write. Of a read: nobody has the user."""
    data: Any = None


def state(user: str, n: int, text: str) -> dict[str, Any]:
    """Data that shows whose it is, and whether all of it is of one moment."""
    return {"n": n, "of": user, "text": text, "twice": 2 * n, "check": zlib.crc32(text.encode())}


def is_whole(data: Any) -> bool:
    """Whether data is what `state` makes, of whichever user."""
    try:
        return bool(data == state(data["of"], data["n"], data["text"]))
    except (KeyError, TypeError, AttributeError):
        return False


def n_of(data: Any) -> Any:
    """Which of the states data is; 0 if it is none at all."""
    return data.get("n", 0) if isinstance(data, dict) else 0


class Pen:
    """Writes events to the end of a file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def tell(self, events: Iterable[Event]) -> None:
        """Write events; when this returns no kill takes them back."""
        lines = "".join(json.dumps(event, separators=(",", ":")) + "\n" for event in events).encode()
        while lines:
            lines = lines[os.write(self._file, lines) :]

    def close(self) -> None:
        os.close(self._file)

    @staticmethod
    def now() -> int:
        return time.monotonic_ns()


def read_history(path: str | os.PathLike[str]) -> list[Event]:
    """What one writer has told, in order."""
    lines = Path(path).read_bytes().splitlines(keepends=True)
    return [Event(*json.loads(line)) for line in lines if line.endswith(b"\n")]
