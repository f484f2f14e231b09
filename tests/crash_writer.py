"""A server to be killed: users who change all the time, on the SQLite file that the first argument names.

Tells on standard output, as ``user version n``, what was acknowledged as soon as it knows: each save that the store
says it has made, and each receipt of a `persist_now`.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from cagey_sessions import Session, SessionManager
from cagey_sessions.stores import Outcome, Record, SQLiteStore, Verdict

USERS = 40
BUSY = 0.01


class TellingStore(SQLiteStore):
    """Whoever asks for a save, its acknowledgement passes here."""

    async def save_many(self, records: Sequence[Record]) -> list[Verdict]:
        verdicts = await super().save_many(records)
        saved = (record for record, verdict in zip(records, verdicts, strict=True) if verdict.outcome == Outcome.SAVED)
        tell((record.user_id, record.version, record.value()["n"]) for record in saved)
        return verdicts


def tell(acknowledged: Iterable[tuple[Any, ...]]) -> None:
    os.write(1, "".join("{} {} {}\n".format(*each) for each in acknowledged).encode())


def new_player() -> dict[str, Any]:
    return {"n": 0, "twice": 0, "of": None, "text": ""}


async def play(manager: SessionManager, user_id: str, chance: random.Random) -> None:
    session: Session = await manager.open(user_id, default=new_player)
    while True:
        data = session.user_data
        data["n"] += 1
        data["text"] = "x" * chance.randrange(200)
        data["of"] = user_id
        data["twice"] = 2 * data["n"]
        if chance.random() < 0.2:
            n = data["n"]
            receipt = await session.persist_now()
            assert receipt is not None
            tell([(user_id, receipt.version, n)])
        else:
            await asyncio.sleep(chance.random() * 0.02)  # and wait for a periodic save


async def compute() -> None:
    """Keep the loop busy, as games do: what is on the disk by then is acknowledged later, and a kill comes between."""
    while True:
        until = time.perf_counter() + BUSY
        while time.perf_counter() < until:
            pass
        await asyncio.sleep(BUSY / 2)


async def main(path: str, seed: int) -> None:
    chance = random.Random(seed)
    async with SessionManager(store=TellingStore(path), interval="20ms") as manager:
        os.write(1, b"open\n")
        async with asyncio.TaskGroup() as group:
            group.create_task(compute())
            for number in range(USERS):
                group.create_task(play(manager, f"user-{number}", random.Random(chance.random())))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
