"""A server to be killed: users who change all the time, on the SQLite file that the first argument names.

Says each receipt on standard output once it has it, as ``user version n``, in one write.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from typing import Any

from cagey_sessions import SessionManager
from cagey_sessions.stores import SQLiteStore

USERS = 40


def new_player() -> dict[str, Any]:
    return {"n": 0, "twice": 0, "of": None, "text": ""}


async def play(session: Any, chance: random.Random) -> None:
    while True:
        data = session.user_data
        data["n"] += 1
        data["text"] = "x" * chance.randrange(200)
        data["of"] = session.user_id
        data["twice"] = 2 * data["n"]
        if chance.random() < 0.5:
            n = data["n"]
            receipt = await session.persist_now()
            os.write(1, f"{session.user_id} {receipt.version} {n}\n".encode())
        else:
            await asyncio.sleep(chance.random() * 0.01)


async def main(path: str, seed: int) -> None:
    chance = random.Random(seed)
    async with SessionManager(store=SQLiteStore(path), interval="20ms") as manager:
        sessions = [await manager.open(f"user-{number}", default=new_player) for number in range(USERS)]
        os.write(1, b"ready\n")
        await asyncio.gather(*(play(session, random.Random(chance.random())) for session in sessions))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
