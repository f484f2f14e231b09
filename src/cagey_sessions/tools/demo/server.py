"""The game server of the demo: players earn and buy over WebSockets, and a `SessionManager` saves them.

It is saved by a store, or through a listener. The server does nothing that a real one would not do, and does not know
that it is being tested.

Run as a process: ``python -m cagey_sessions.tools.demo.server URL INTERVAL LISTENING_FD store|events``. It reports on
standard output, one line of JSON at a time, and ends at SIGTERM.
"""

from __future__ import annotations

import asyncio
import copy
import queue
import signal
import socket
import sqlite3
import sys
import threading
import time
from contextlib import AsyncExitStack, closing, suppress
from typing import Any, NamedTuple, Self

import orjson
import uvloop
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from cagey_sessions import (
    ManagerClosedError,
    OwnedElsewhereError,
    Receipt,
    Session,
    SessionEndedError,
    SessionManager,
    UserActiveError,
)
from cagey_sessions.stores import open_store

PRICES = {"map": 12, "potion": 20, "shield": 35, "sword": 50}
GRACE = 0.3
"""How many seconds a session waits for a player to come back whose connection was lost."""
REPORT_EVERY = 0.5
BACKLOG = 4096
"""How many players may connect at the same time; after a restart all of them do."""
CONNECTION = "connection"
"""The name in a session's bag for the connection that may change it, or for the `Absence` of one."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS players (
    user_id TEXT PRIMARY KEY,
    body TEXT NOT NULL,
    saved_at REAL NOT NULL,
    saves INTEGER NOT NULL
)"""
LOAD = "SELECT body FROM players WHERE user_id = ?"
SAVE = """
INSERT INTO players VALUES (?, ?, ?, 1)
ON CONFLICT (user_id) DO UPDATE SET body = excluded.body, saved_at = excluded.saved_at, saves = saves + 1"""


class PlayerFile:
    """Players in an SQLite file, for a server that saves in a listener.

    One thread writes it. All saves that wait for the thread share the next transaction, because a transaction costs one
    flush to the disk, however many rows it has.
    """

    def __init__(self, path: str) -> None:
        self._db = sqlite3.connect(path, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute(SCHEMA)
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="player file")
        self._thread.start()

    async def load(self, user_id: str) -> Any:
        """Return the player's data as last saved, or None."""
        row = await self._run(LOAD, (user_id,))
        return row and orjson.loads(row[0])

    async def save(self, user_id: str, body: str) -> None:
        """Save a player's data; returns when it is on the disk."""
        await self._run(SAVE, (user_id, body, time.time()))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._jobs.put(None)  # the thread closes the file even if this call is cancelled
        await asyncio.to_thread(self._thread.join)

    async def _run(self, statement: str, values: tuple[object, ...]) -> Any:
        job = _Job(statement, values, self._loop.create_future())
        self._jobs.put(job)
        return await job.done

    def _work(self) -> None:
        with closing(self._db):
            while (job := self._jobs.get()) is not None:
                jobs = [job]
                while not self._jobs.empty() and (job := self._jobs.get()) is not None:
                    jobs.append(job)
                self._loop.call_soon_threadsafe(_settle, jobs, self._commit(jobs))
                if job is None:
                    return

    def _commit(self, jobs: list[_Job]) -> list[Any] | sqlite3.Error:
        try:
            with self._db:
                return [self._db.execute(job.statement, job.values).fetchone() for job in jobs]
        except sqlite3.Error as error:
            return error


class _Job(NamedTuple):
    """One statement for the writer thread."""

    statement: str
    values: tuple[object, ...]
    done: asyncio.Future[Any]


def _settle(jobs: list[_Job], outcome: list[Any] | sqlite3.Error) -> None:
    for number, job in enumerate(jobs):
        if job.done.done():
            continue
        if isinstance(outcome, sqlite3.Error):
            job.done.set_exception(outcome)
        else:
            job.done.set_result(outcome[number])


class Absence:
    """Stands for a connection that was lost. Each loss is an object of its own, so that two can be told apart."""


def new_player(user_id: str) -> dict[str, Any]:
    return {"name": user_id, "seq": 0, "gold": 0, "items": {}}


class Game:
    """The rules of the game. The manager loads and saves; in `GameWithEvents` the program does it itself."""

    def __init__(self, manager: SessionManager) -> None:
        self.slowest_save: float = 0.0
        self.drained: asyncio.Event = asyncio.Event()
        self.manager = manager
        self.manager.on("before_destroy", self._detach)

    async def serve_player(self, connection: ServerConnection) -> None:
        """Serve one connection, from login to its end."""
        try:
            session = await self._enter(connection, **orjson.loads(await connection.recv()))
            try:
                await connection.send(_answer(session.user_data))
                async for message in connection:
                    if session.get(CONNECTION) is not connection:
                        await connection.close(CloseCode.GOING_AWAY)
                        return
                    await connection.send(await self._act(session, orjson.loads(message)))
            finally:
                await self._leave(session, connection)
        except ConnectionClosed:
            pass
        # OwnedElsewhereError: the store may still take the server that was killed for alive
        except (ManagerClosedError, OwnedElsewhereError, SessionEndedError):
            await connection.close(CloseCode.TRY_AGAIN_LATER)

    async def _enter(self, connection: ServerConnection, key: str, user_id: str) -> Session:
        """Return the session of a player who comes back in time, or a new one.

        If the session still has a connection, that is half open: the player has left, and the network has not reported
        it. The session is replaced, not shared, so that requests still on the old connection cannot change the data.
        """
        session = self.manager.find_by_key(key)
        holder = session and session.get(CONNECTION)
        if session is None or not isinstance(holder, Absence):
            session = await self.manager.create(key, replace=True)
        session.set(CONNECTION, connection)
        if isinstance(holder, ServerConnection):
            holder.transport.abort()
        if session.user_id is None:
            await self._identify(session, user_id)
        return session

    async def _identify(self, session: Session, user_id: str) -> None:
        """Log in. If the player has a session under another key, that is saved and ended first."""
        await session.login(user_id, default=lambda: new_player(user_id))

    async def _act(self, session: Session, request: dict[str, Any]) -> bytes:
        """Do what the player asks for. A purchase is confirmed once it is saved, anything else at once."""
        data = session.user_data
        if "look" in request:
            return _answer(data)
        item = request.get("buy")
        if item is None:
            data["gold"] += request["earn"]
        elif PRICES[item] <= data["gold"]:
            data["gold"] -= PRICES[item]
            data["items"][item] = data["items"].get(item, 0) + 1
        data["seq"] += 1
        if item is None:
            return _answer(data)
        confirmed = copy.deepcopy(data)  # changes during the save are not confirmed by it
        started = time.monotonic()
        receipt = await session.persist_now()
        self._note_save(started)
        return _answer(confirmed, receipt)

    def _note_save(self, started: float) -> None:
        self.slowest_save = max(self.slowest_save, time.monotonic() - started)

    async def _leave(self, session: Session, connection: ServerConnection) -> None:
        """Give a player whose connection was lost a moment to come back, then end the session."""
        if session.get(CONNECTION) is not connection:
            return
        absence = Absence()
        session.set(CONNECTION, absence)
        with suppress(TimeoutError):
            await asyncio.wait_for(self.drained.wait(), GRACE)
        if session.get(CONNECTION) is absence and not self.drained.is_set():
            await session.destroy(self.manager.will_persist_user_data_on("disconnect"))

    def _detach(self, session: Session) -> None:
        """Detach the connection when the end begins: later changes could miss the last save, so none may be made."""
        session.set(CONNECTION, None)


class GameWithEvents(Game):
    """The same game without a store: the program loads, and saves in a listener."""

    def __init__(self, manager: SessionManager, players: PlayerFile) -> None:
        super().__init__(manager)
        self._players = players
        self.manager.on("persist_user_data", self._save)

    async def _identify(self, session: Session, user_id: str) -> None:
        """Load the player, but only after their last session was saved: otherwise the data would be older than that."""
        while True:
            data = await self._players.load(user_id) or new_player(user_id)
            try:
                await session.set_user(user_id, data)
                return
            except UserActiveError as error:
                # with a connection it is not ending: the player is here under another key
                if error.session.get(CONNECTION) is not None:
                    await error.session.destroy(self.manager.will_persist_user_data_on("disconnect"))
                await error.session.wait_ended()

    async def _save(self, session: Session) -> None:
        started = time.monotonic()
        body = orjson.dumps(session.user_data).decode()  # before the first await, because the player goes on playing
        await self._players.save(str(session.user_id), body)
        self._note_save(started)


def _answer(player: dict[str, Any], receipt: Receipt | None = None) -> bytes:
    """The answer to a player: the state and, if a store has confirmed it, its version."""
    return orjson.dumps({"player": player, "version": receipt and receipt.version})


async def main(url: str, interval: float, listener: socket.socket, how: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with AsyncExitStack() as stack:
        if how == "store":
            game = Game(SessionManager(store=open_store(url), interval=interval))
        else:
            players = await stack.enter_async_context(PlayerFile(url.removeprefix("sqlite:///")))
            game = GameWithEvents(SessionManager(interval=interval, persist_on=["disconnect", "shutdown"]), players)
        options: dict[str, Any] = {"backlog": BACKLOG, "compression": None, "close_timeout": 1}
        await stack.enter_async_context(serve(game.serve_player, sock=listener, **options))
        await stack.enter_async_context(game.manager)
        await _report_until(stop, game)
        drained = await game.manager.destroy(game.manager.will_persist_user_data_on("shutdown"))
        game.drained.set()
        now = game.manager.statistics()
        _say(drained=drained.saved, seconds=drained.seconds, saved=now.saved - now.unchanged, skipped=now.unchanged)


async def _report_until(stop: asyncio.Event, game: Game) -> None:
    while not stop.is_set():
        now, health = game.manager.statistics(), game.manager.health()
        _say(
            online=now.identified,
            saved=now.saved - now.unchanged,
            skipped=now.unchanged,
            pending=now.pending,
            in_flight=now.in_flight,
            oldest=now.oldest_unsaved,
            slowest=game.slowest_save,
            latency=now.store_latency,
            health=health.state,
            reason=health.reason,
        )
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), REPORT_EVERY)


def _say(**facts: object) -> None:
    print(orjson.dumps(facts).decode(), flush=True)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], float(sys.argv[2]), socket.socket(fileno=int(sys.argv[3])), sys.argv[4]))
