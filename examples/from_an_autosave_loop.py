"""A game that used to save its players in a loop of its own: the comments say what stood there before.
Run it: python examples/from_an_autosave_loop.py game.db, then nc 127.0.0.1 4000, say a name, and dig.
"""

import asyncio
import sqlite3
import sys
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from cagey_sessions import CageySessionsError, SessionManager, dataclass_codec
from cagey_sessions.stores import CallbackStore

TABLE = "CREATE TABLE IF NOT EXISTS players (name TEXT PRIMARY KEY, gold INTEGER NOT NULL, depth INTEGER NOT NULL)"
LOAD = "SELECT gold, depth FROM players WHERE name = ?"
SAVE = "INSERT INTO players VALUES (:name, :gold, :depth) ON CONFLICT (name) DO UPDATE SET gold = :gold, depth = :depth"


@dataclass(slots=True)
class Player:
    gold: int = 0
    depth: int = 0


def execute(path, statement, rows):
    with closing(sqlite3.connect(path)) as connection, connection:
        return [connection.execute(statement, row).fetchone() for row in rows]


def make_manager(path):
    async def load(name):
        (row,) = await asyncio.to_thread(execute, path, LOAD, [(name,)])
        return row and {"gold": row[0], "depth": row[1]}

    async def save_many(records):  # before, all at once every minute, and ended by the first failure:
        # while True:
        #     await asyncio.sleep(60)
        #     for name, player in list(players.items()):
        #         await asyncio.to_thread(save, name, player)
        rows = [{"name": record.user_id, **record.value()} for record in records]
        await asyncio.to_thread(execute, path, SAVE, rows)

    codec = dataclass_codec(Player)
    store = CallbackStore(load, save_many)
    return SessionManager(store=store, interval="60s", encode=codec.encode, decode=codec.decode, user_id=str)


async def play(manager, reader, writer):
    try:
        async with manager.create() as session:  # before: try, finally: await save(name, players.pop(name))
            session.on("destroy", writer.close)
            writer.write(b"your name? ")
            name = (await reader.readline()).decode().strip()
            await session.login(name, default=Player)  # before: players[name] = await load(name) or Player()
            async for line in reader:
                player = session.user_data  # before: players[name]
                player.depth += line.strip() == b"dig"
                player.gold += player.depth
                writer.write(f"{player}\n".encode())
                await writer.drain()
    except (CageySessionsError, OSError, ValueError) as error:
        print("a player:", error, flush=True)  # logged in elsewhere, database down, no name, shutdown
    finally:
        writer.close()


async def main(path, port="4000"):
    execute(path, TABLE, [()])
    manager = make_manager(path)
    async with manager:  # before: asyncio.create_task(autosave())
        server = await asyncio.start_server(partial(play, manager), "127.0.0.1", int(port))
        status = await manager.run_until_signal()  # before: nothing, and up to a minute was lost
        server.close()
    return status


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main(*sys.argv[1:])))
