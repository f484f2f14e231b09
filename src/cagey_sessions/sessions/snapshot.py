"""Everybody in one file. What lives here: writing a snapshot while the server goes on, and reading one. What must not:
the format of its lines, or what a store does.

Each user's data is encoded in one step, so it is of one moment; users who come later in the file are of a later one.
Between two users others get their turn, and what is to be written is written by a thread.
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
    """What the file of a snapshot, or of a spill, has; not to be called on an event loop, for it waits for the disk.

    Lines that are damaged are in ``damaged``, with their bytes and the user they are of as far as that can be told, and
    nowhere else: what is in ``entries`` is what was written. ``complete`` says whether that is everybody.

    Raises `SnapshotError` for a file that is none, or of a later format, or cannot be read, and `OptionError` for what
    is no path. O(size), all of it in memory.
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
                if user_id is not None and user_id not in seen:  # who is saved meanwhile is met again, at the end
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
        await in_thread(new.finish)  # cancelled here, too, the old file stays
        await in_thread(new.commit)
    except GeneratorExit:  # the loop has been closed, and nothing can be waited for
        new.abandon()
        raise
    except BaseException:
        with suppress(TimeoutError):  # the disk hangs: when it answers the thread goes on with that
            await in_thread(new.abandon, limit=PATIENCE)
        raise
    return SnapshotReport(saved, tuple(left_out), new.size, (server.clock.now() - started) / SECOND)
