"""The players of the demo: bots that play, drop their connections and come back.

Each bot keeps a ledger of what the server told it. A bot knows nothing of how the server saves, so its ledger can be
compared with the database.

Run as a process: ``python -m cagey_sessions.tools.demo.bots NUMBER PORT``. It obeys ``write FILE`` and ``look`` on
standard input, reports on standard output, one line of JSON at a time, and ends when its input does.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import uvloop
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from .server import GRACE, PRICES

State = dict[str, Any]

PACE = 0.2
"""Seconds between two actions of a bot, on average."""
PURCHASE = 0.1
DROP = 0.02
STROLL = 0.01
"""Chances that an action is a purchase, that the bot drops its connection instead, and that before it drops it, it only
looks around for a while, so that the server has nothing to save."""
LOOKS = (15, 30)
"""How many times a bot looks around before it goes on playing, at least and at most."""
REPORT_EVERY = 0.5


class Ledger:
    """What one bot knows about its own player.

    States older than the last confirmed purchase are not kept: with that purchase everything before it was saved.
    """

    def __init__(self) -> None:
        self.logins: int = 0
        self.receipts: int = 0
        self.forget()

    def forget(self) -> None:
        """Begin anew after a kill, which may have lost what the bot knows."""
        self.receipt: State | None = None
        self.version: int | None = None  # that the store has given it
        self.known: list[tuple[float, State]] = []  # what the server acknowledged, and when
        self.awaited: State | None = None  # what the server will say if it has heard of the last request
        self.shown: list[tuple[State, State | None, State]] = []  # known and awaited before a look, and seen then

    def last(self) -> State:
        return self.known[-1][1]

    def returned(self, seen: State) -> None:
        self.logins += 1
        self.looked(seen)

    def looked(self, seen: State) -> None:
        if self.known:
            self.shown.append((self.last(), self.awaited, seen))
        self._acknowledged(seen)

    def answered(self, state: State, version: int | None, *, confirmed: bool) -> None:
        if confirmed:
            self.receipts += 1
            self.receipt, self.version = state, version
            self.known.clear()
        self._acknowledged(state)

    def _acknowledged(self, state: State) -> None:
        self.awaited = None
        if not self.known or state != self.last():
            self.known.append((time.monotonic(), state))


class Bot:
    """One player."""

    def __init__(self, number: int, port: int) -> None:
        self.user_id: str = f"bot-{number:05}"
        self.ledger: Ledger = Ledger()
        self.offline: asyncio.Event = asyncio.Event()
        self.offline.set()
        self._uri = f"ws://127.0.0.1:{port}"
        self._key = secrets.token_urlsafe(16)
        self._half_open: ClientConnection | None = None

    async def live(self, *, play: bool) -> None:
        """Play until cancelled; without `play` only see which state the server still has."""
        await asyncio.sleep(random.random())
        while True:
            try:
                await self._visit(play)
            except (OSError, WebSocketException):
                await asyncio.sleep(random.uniform(0.1, 0.5))  # the server is down, or refuses logins now

    async def _visit(self, play: bool) -> None:
        connection = await self._arrive()
        self.offline.clear()
        try:
            await (self._play(connection) if play else connection.wait_closed())
        finally:
            self.offline.set()
            if connection is not self._half_open:
                connection.transport.abort()

    async def _arrive(self) -> ClientConnection:
        connection = await connect(self._uri, compression=None, ping_interval=None, close_timeout=1, proxy=None)
        try:
            await connection.send(json.dumps({"key": self._key, "user_id": self.user_id}))
            self.ledger.returned(json.loads(await connection.recv())["player"])
        except BaseException:
            connection.transport.abort()
            raise
        finally:
            self._let_go_of_half_open()
        return connection

    async def _play(self, connection: ClientConnection) -> None:
        while random.random() >= DROP:
            if random.random() < STROLL:
                await self._stroll(connection)
            await asyncio.sleep(random.uniform(0.5, 1.5) * PACE)
            request = self._decide()
            answer = await self._ask(connection, request)
            self.ledger.answered(answer["player"], answer["version"], confirmed="buy" in request)
        await self._drop(connection)

    async def _stroll(self, connection: ClientConnection) -> None:
        for _ in range(random.randint(*LOOKS)):
            await asyncio.sleep(random.uniform(0.5, 1.5) * PACE)
            answer = await self._ask(connection, {"look": "around"})
            self.ledger.looked(answer["player"])

    async def _ask(self, connection: ClientConnection, request: dict[str, Any]) -> Any:
        await connection.send(json.dumps(request))
        return json.loads(await connection.recv())

    def _decide(self) -> dict[str, Any]:
        """Choose the next request, and note in the ledger which state it leads to."""
        state = self.ledger.last()
        gold, items = state["gold"], state["items"]
        item = random.choice(list(PRICES))
        request: dict[str, Any]
        if gold >= PRICES[item] and random.random() < PURCHASE:
            request = {"buy": item}
            gold, items = gold - PRICES[item], items | {item: items.get(item, 0) + 1}
        else:
            request = {"earn": random.randint(1, 9)}
            gold += request["earn"]
        self.ledger.awaited = state | {"seq": state["seq"] + 1, "gold": gold, "items": items}
        return request

    async def _drop(self, connection: ClientConnection) -> None:
        """Lose the connection, in one of three ways, and stay away for a while."""
        way = random.choice(("goodbye", "abrupt", "half open"))
        if way == "goodbye":
            await connection.close()
        else:
            await connection.send(json.dumps(self._decide()))  # without reading the answer
        if way == "half open":
            self._half_open = connection
        else:
            connection.transport.abort()
            just_too_late = GRACE + random.uniform(-0.005, 0.015)  # while the server saves the ended session
            await asyncio.sleep(random.choice((random.uniform(0, GRACE), just_too_late, 2 * GRACE)))

    def _let_go_of_half_open(self) -> None:
        if self._half_open is not None:
            self._half_open.transport.abort()
            self._half_open = None


class Crowd:
    """All bots, and the commands that they obey."""

    def __init__(self, bots: list[Bot], group: asyncio.TaskGroup) -> None:
        self._bots = bots
        self._group = group
        self._begin(play=True)

    def _begin(self, *, play: bool) -> None:
        self._tasks = [self._group.create_task(bot.live(play=play)) for bot in self._bots]

    async def obey(self, commands: asyncio.StreamReader) -> None:
        """Perform one command after the other, and report each; return at the end of the input."""
        while line := (await commands.readline()).decode().strip():
            match line.split(maxsplit=1):
                case ["write", path]:
                    await self._write(Path(path))
                case ["look"]:
                    await self._look()
            _say(done=line)
        await self._leave()

    async def _write(self, path: Path) -> None:
        """Write all ledgers to a file, after every answer that has reached this process was read."""
        for bot in self._bots:
            await bot.offline.wait()
        self._dump(path)

    def _dump(self, path: Path) -> None:
        path.write_text(json.dumps({bot.user_id: vars(bot.ledger) for bot in self._bots}))

    async def _look(self) -> None:
        """Log in with each bot, only to see which states are left after a kill."""
        await self._leave()
        for bot in self._bots:
            bot.ledger.forget()
        self._begin(play=False)

    async def _leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


async def _report(ledgers: list[Ledger]) -> None:
    while True:
        _say(
            known=sum(bool(ledger.known) for ledger in ledgers),
            receipts=sum(ledger.receipts for ledger in ledgers),
            reconnects=sum(max(0, ledger.logins - 1) for ledger in ledgers),
        )
        await asyncio.sleep(REPORT_EVERY)


async def main(number: int, port: int) -> None:
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    bots = [Bot(n, port) for n in range(number)]
    async with asyncio.TaskGroup() as group:  # if one bot fails, all end, and the demo fails
        report = group.create_task(_report([bot.ledger for bot in bots]))
        await Crowd(bots, group).obey(commands)
        report.cancel()


def _say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2])))
