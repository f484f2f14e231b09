"""A gateway for 200,000 users, most of whom only listen: the memory each takes, in one process.
Run it: python examples/gateway.py gateway.db [users] [of them active], and stop it with Ctrl-C.
"""

import asyncio
import gc
import logging
import random
import resource
import secrets
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cagey_sessions import ManagerClosedError, Session, SessionEndedError, SessionManager, dataclass_codec
from cagey_sessions.stores import SQLiteStore


@dataclass(slots=True)
class User:
    messages: int = 0
    last: str = ""


async def connected(manager: SessionManager[User], key: str) -> Session[User]:
    """A connection is a session with a key: no task, no timer, no call of the store."""
    return manager.find_by_key(key) or await manager.create(key)


async def received(manager: SessionManager[User], key: str, text: str) -> None:
    """The first message loads the user's data; from then on it is saved when it has changed."""
    session = await connected(manager, key)
    if session.user_id is None:
        await session.login(int(key.partition("-")[0]), default=User)  # your login would know whose key it is
    session.user_data.messages += 1
    session.user_data.last = text
    session.mark_changed()


def memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()  # Linux only


async def traffic(manager: SessionManager[User], users: int, active: int) -> None:
    """Simulated users; a real connection takes some kilobytes more."""
    before, keys = memory(), []
    for user in range(users):
        key = f"{user}-{secrets.token_hex(8)}"
        await connected(manager, key)
        if user < active:
            keys.append(key)
    gc.collect()
    gc.freeze()  # the collector no longer walks over them
    print(f"{users:,} users are connected: {(memory() - before) / users:.0f} bytes each", flush=True)
    for first in range(0, active, 500):
        await asyncio.gather(*(received(manager, key, "hello") for key in keys[first : first + 500]))
    while True:
        now = manager.statistics()
        print(f"{now.live:,} are here, {now.identified:,} have said something, {now.saved:,} saves", flush=True)
        await asyncio.sleep(1)
        await asyncio.gather(*(received(manager, key, "again") for key in random.sample(keys, active // 20)))


async def main(path: str, users: str = "200000", active: str = "2000") -> int:
    data = dataclass_codec(User)
    manager = SessionManager(store=SQLiteStore(path), tracking="marked", encode=data.encode, decode=data.decode)
    async with manager:
        coming = asyncio.create_task(traffic(manager, int(users), int(active)))
        status = await manager.run_until_signal()
        with suppress(ManagerClosedError, SessionEndedError, asyncio.CancelledError):
            coming.cancel()
            await coming
    return status


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    raise SystemExit(asyncio.run(main(*sys.argv[1:])))
