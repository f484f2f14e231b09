"""Snapshots: writes the data of all users to one file while the server goes on, and reads such a file.

The data of each user is encoded in one step, so it is of one moment; users who come later in the file are of a later
one. Between users the loop gets its turn, and a thread writes the file.

See also `files.format`, for the format of the lines.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from ..errors import ManagerClosedError, OptionError, SnapshotError
from ..files import format as savefile
from ..files.format import DISK, Files, NewFile
from ..options import SECOND, path_text
from ..records import Snapshot, SnapshotReport
from ..threads import PATIENCE, in_thread
from .entries import entry_of
from .server import Server

__all__ = ["read_snapshot", "take_snapshot"]

KIND = "snapshot"


def read_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """Read the file of a snapshot or of a spill. Do not call this on an event loop, because it waits for the disk.

    Damaged lines are only in ``damaged``, with their bytes, and with their user as far as that can be told; so what is
    in ``entries`` is what was written. ``complete`` says whether the file has everything that was written to it.

    Raises `SnapshotError` if the file is none of these, is of a later format or cannot be read, and `OptionError` if
    `path` is not a path. O(size), all of it in memory.
    """
    text = path_text("path", path)
    try:
        return savefile.read(text)
    except FileNotFoundError as error:
        raise SnapshotError(f"there is no file {text}") from error


async def take_snapshot(server: Server, path: str | os.PathLike[str], files: Files = DISK) -> SnapshotReport:
    """See `SessionManager.snapshot`."""
    server.enter()
    path = path_text("path", path)
    if server.closed:
        raise ManagerClosedError(
            "this manager has been destroyed: a snapshot of nobody would take the place of another"
        )
    if server.spill is not None and server.spill.is_at(path):
        raise OptionError("this is the file of the spill, which a snapshot would replace; write it to another one")
    started = server.clock.now()
    new = NewFile(path, files)
    seen: set[int | str] = set()
    left_out: list[int | str] = []
    chunk = [savefile.first_line(KIND, time.time(), server.owner if server.link is not None else "")]
    size = 0
    try:
        with server.table.oldest_first(to_the_end=True) as everybody:
            for session in everybody:
                user_id = session.user_id
                # a session that is saved meanwhile moves to the end of the walk, and is met a second time
                if user_id is not None and user_id not in seen:
                    seen.add(user_id)
                    try:
                        chunk.append(savefile.entry_line(entry_of(server, session)))
                        size += len(chunk[-1])
                    except Exception:
                        left_out.append(user_id)
                if size >= savefile.CHUNK:
                    await in_thread(new.write, b"".join(chunk))
                    chunk, size = [], 0
                await server.loop.take_turn()
        saved = len(seen) - len(left_out)
        chunk.append(savefile.last_line(KIND, saved))
        await in_thread(new.write, b"".join(chunk))
        await in_thread(new.finish)  # synced to the disk, but not in place: if this is cancelled the old file stays
        await in_thread(new.commit)
    except GeneratorExit:  # the loop was closed, so nothing can be awaited
        new.abandon()
        raise
    except BaseException:
        with suppress(TimeoutError):  # the disk hangs: the thread removes the new file when the disk answers
            await in_thread(new.abandon, limit=PATIENCE)
        raise
    return SnapshotReport(saved, tuple(left_out), new.size, (server.clock.now() - started) / SECOND)
