"""A claim and a save, to be killed at a system call: ``python -m crashes.saver``. What lives here: what it does, and
the telling of it. What must not: any look at whether it is right.

It ends without closing its store, as one that is killed does, except for the one that begins with no file at all.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import secrets
import sys
import time

import orjson

from cagey_sessions.stores import Record

from .history import Pen, n_of, state
from .writer import Telling, telling_store

__all__ = ["ACKNOWLEDGED", "SCENARIOS", "USER", "save_again"]

USER = "user"
ACKNOWLEDGED = "acknowledged"
"""The line among the system calls that says when the answer was there."""
SCENARIOS = {"new file": "", "save": "save", "checkpoint": "full log"}
"""What is done under the eyes of the shim, each with what has been done to the file before."""
PAGES_IN_A_LOG = 1000
"""By then SQLite copies them into the file, within the save that comes first."""
BYTES_OF_A_PAGE = 4096 + 24


class _Claimed:
    """A user who is ours."""

    def __init__(self, store: Telling, owner: str, epoch: int, version: int, n: int) -> None:
        self.store, self.owner, self.epoch, self.version, self.n = store, owner, epoch, version, n

    async def save(self) -> None:
        self.version += 1
        self.n += 1
        body = orjson.dumps(state(USER, self.n, "x" * 100))
        await self.store.save_many([Record(USER, self.epoch, self.owner, self.version, 0, body, time.time())])


async def _claim(store: Telling) -> _Claimed:
    owner = f"saver-{secrets.token_hex(8)}"
    (claim,) = await store.claim_many([USER], owner)
    if claim.record is None:
        return _Claimed(store, owner, claim.epoch, 0, 0)
    return _Claimed(store, owner, claim.epoch, claim.record.version, n_of(claim.record.value()))


async def save_again(path: str, history: str) -> None:
    """Open the file, claim the user and save them: whoever comes after one that was killed."""
    pen = Pen(history)
    store = telling_store(f"sqlite:{path}", "", pen, random.Random(0))
    try:
        await store.open()
        try:
            await (await _claim(store)).save()
        finally:
            await store.close()
    finally:
        pen.close()


async def _fill_log(claimed: _Claimed, log: str) -> None:
    """Save until the log is full but for one save."""
    size, grown = os.stat(log).st_size, 0
    while size + grown < PAGES_IN_A_LOG * BYTES_OF_A_PAGE:
        await claimed.save()
        grown, size = os.stat(log).st_size - size, os.stat(log).st_size


async def main(path: str, history: str, what: str, at: int, moment: int, trace: str) -> None:
    store = telling_store(f"sqlite:{path}", "", Pen(history), random.Random(0))
    calls = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def arm() -> None:
        ctypes.CDLL(None).crash_arm(path.encode(), at, moment, calls)

    if what == "new file":
        arm()
    await store.open()
    if what == "checkpoint":
        arm()
    claimed = await _claim(store)
    if what == "full log":
        await claimed.save()
        await _fill_log(claimed, f"{path}-wal")
        return
    if what == "save":
        arm()
    await claimed.save()
    os.write(calls, f"{ACKNOWLEDGED}\n".encode())
    if what == "new file":
        await store.close()


if __name__ == "__main__":
    path, history, what, at, moment, trace = sys.argv[1:]
    asyncio.run(main(path, history, what, int(at), int(moment), trace))
    os._exit(0)
