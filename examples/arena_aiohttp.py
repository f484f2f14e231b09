"""An arena where everybody sees everybody move, with aiohttp. Nobody checks who a player is here.
Run it: python examples/arena_aiohttp.py arena.db, connect to ws://127.0.0.1:8080/play/ann, and send {"dx": 1, "dy": 0}.
"""

import asyncio
import sys
from contextlib import suppress
from types import SimpleNamespace

import orjson
from aiohttp import web

from cagey_sessions import CageySessionsError, Session, SessionManager
from cagey_sessions.stores import SQLiteStore

STEP = 0.05


class Arena:
    def __init__(self, path: str) -> None:
        self.manager = SessionManager(store=SQLiteStore(path), before_save=self.copy_position, user_id=str)
        self.manager.on("before_destroy", lambda session: self.fighters.pop(session.user_id, None))
        self.fighters: dict[str, SimpleNamespace] = {}
        self.picture = "{}"

    def copy_position(self, session: Session) -> None:
        if fighter := session.get("fighter"):  # still there at the last save
            session.user_data.update(x=fighter.x, y=fighter.y)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(STEP)
            for fighter in self.fighters.values():
                fighter.x, fighter.y = fighter.x + fighter.dx * STEP, fighter.y + fighter.dy * STEP
            self.picture = orjson.dumps(self.fighters, default=vars).decode()

    async def show(self, socket: web.WebSocketResponse) -> None:
        with suppress(ConnectionError):
            while True:  # at each player's own pace: a slow one gets fewer frames, and holds up nobody
                await socket.send_str(self.picture)
                await asyncio.sleep(STEP)

    async def play(self, request: web.Request) -> web.WebSocketResponse:
        name = request.match_info["name"]
        socket = web.WebSocketResponse(heartbeat=20, max_msg_size=1000)
        await socket.prepare(request)
        showing = asyncio.create_task(self.show(socket))
        try:
            async with self.manager.create() as session:
                session.on("destroy", socket.close)  # also when the player logs in elsewhere
                await session.login(name, default={"x": 0.0, "y": 0.0})
                fighter = self.fighters[name] = SimpleNamespace(**session.user_data, dx=0.0, dy=0.0)
                session.set("fighter", fighter)
                async for message in socket:
                    wanted = orjson.loads(message.data)
                    fighter.dx, fighter.dy = (max(-1.0, min(1.0, float(wanted[axis]))) for axis in ("dx", "dy"))
        except (CageySessionsError, LookupError, TypeError, ValueError) as error:
            print(f"{name} leaves: {error!r}", flush=True)
        finally:
            showing.cancel()
        return socket


async def main(path: str, port: str = "8080") -> int:
    arena = Arena(path)
    runner = web.AppRunner(web.Application(), shutdown_timeout=3)
    runner.app.router.add_get(r"/play/{name:\w{1,40}}", arena.play)
    async with arena.manager, asyncio.TaskGroup() as tasks:
        running = tasks.create_task(arena.run())
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", int(port)).start()
        status = await arena.manager.run_until_signal()  # everybody's last save; each end closes a socket
        await runner.cleanup()
        running.cancel()
    return status


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main(*sys.argv[1:])))
