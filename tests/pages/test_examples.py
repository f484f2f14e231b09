"""The programs of examples/, each run as it is: used by a client of its kind, and stopped by a signal."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import aiohttp.web
import asyncpg
import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

import cagey_sessions
from cagey_sessions import SessionManager
from cagey_sessions.stores import MemoryStore
from support import POSTGRES, drop_schema, needs_server
from support.engines import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = ["arena_aiohttp.py", "chat_fastapi.py", "from_an_autosave_loop.py", "gateway.py", "test_trade.py"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cagey_sessions.__file__).parents[1])}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nobody can send SIGTERM there")


class Program:
    """A program under way; its output, once it has been stopped."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.out = self.err = ""

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.out, self.err = self.process.communicate(timeout=60)
        assert "Traceback" not in self.err, self.err
        return self.process.returncode


@contextmanager
def running(path: Path, *arguments: str, **environment: str) -> Iterator[Program]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, str(path), *arguments]
    with subprocess.Popen(command, text=True, env=ENVIRONMENT | environment, **pipes) as process:
        try:
            yield Program(process)
        finally:
            process.kill()


async def until_it_listens(port: str) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", int(port))
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                await writer.wait_closed()
                return


def rows(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def test_every_example_is_short_says_how_it_is_run_and_is_listed():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == PROGRAMS
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name in PROGRAMS:
        code = (EXAMPLES / name).read_text(encoding="utf-8")
        assert len(code.splitlines()) < 80, name
        assert f"python examples/{name}" in (ast.get_docstring(ast.parse(code)) or ""), name
        assert '\nif __name__ == "__main__":\n' in code, name
        assert f"[{name}]({name})" in listed, name


# A chat with FastAPI on one's own table


async def said_to(member: ClientConnection) -> Any:
    async with asyncio.timeout(20):
        return await member.recv()


@pytest.fixture
def members() -> Iterator[tuple[str, str]]:
    """The table of the docstring, in a schema of its own: the schema, and an address that finds it."""
    schema = f"examples_{uuid.uuid4().hex}"
    (create,) = re.findall("CREATE TABLE .*[)]", (EXAMPLES / "chat_fastapi.py").read_text(encoding="utf-8"))

    async def make() -> None:
        connection = await asyncpg.connect(POSTGRES)
        await connection.execute(f"CREATE SCHEMA {schema}; SET search_path TO {schema}; {create}")
        await connection.execute("INSERT INTO members (name, email) VALUES ('ann', 'ann@example.org')")
        await connection.close()

    asyncio.run(make())
    yield schema, f"{POSTGRES}{'&' if '?' in POSTGRES else '?'}search_path={schema}"
    asyncio.run(drop_schema(schema))


@pytest.mark.slow
@needs_server(POSTGRES)
def test_the_chat_keeps_its_members_in_their_table(tmp_path, members):
    schema, address = members
    code = (EXAMPLES / "chat_fastapi.py").read_text(encoding="utf-8")
    columns = 'columns=["messages", "last"]'
    assert code.count(columns) == 1
    program = tmp_path / "chat.py"
    program.write_text(code.replace(columns, f'{columns}, schema="{schema}"'), encoding="utf-8")
    port = str(free_port())
    server = f"127.0.0.1:{port}"

    async def talk(program: Program) -> None:
        await until_it_listens(port)
        chat = f"ws://{server}/chat"
        async with (
            httpx.AsyncClient(base_url=f"http://{server}", timeout=20) as web,
            connect(f"{chat}/ann") as ann,
            connect(f"{chat}/bob") as bob,
        ):
            assert json.loads(await said_to(bob)) == {"messages": 0, "last": ""}
            assert json.loads(await said_to(ann)) == {"messages": 0, "last": ""}
            await ann.send("hello")
            assert [await said_to(ann), await said_to(bob)] == ["ann: hello"] * 2
            assert (await web.get("/members/ann")).json() == {"messages": 1, "last": "hello"}
            assert (await web.get("/members/eve")).status_code == 404
            health = await web.get("/health")
            assert (health.status_code, health.json()["state"]) == (200, "ok")
            async with connect(f"{chat}/ann") as again:
                assert json.loads(await said_to(again)) == {"messages": 1, "last": "hello"}
                with pytest.raises(ConnectionClosed):  # the newer connection has taken the place of the older
                    await said_to(ann)
                await again.send("here again")
                assert await said_to(bob) == "ann: here again"
                assert await asyncio.to_thread(program.stop) == -signal.SIGTERM, "uvicorn ends by the signal it got"

    async def come_back() -> None:
        await until_it_listens(port)
        async with connect(f"ws://{server}/chat/ann") as ann:
            assert json.loads(await said_to(ann)) == {"messages": 2, "last": "here again"}

    async def stored() -> list[Any]:
        connection = await asyncpg.connect(address)
        try:
            return await connection.fetch("SELECT name, email, messages, last FROM members ORDER BY name")
        finally:
            await connection.close()

    with running(program, DATABASE_URL=address, PORT=port) as chat:
        asyncio.run(talk(chat))
    assert [tuple(row) for row in asyncio.run(stored())] == [
        ("ann", "ann@example.org", 2, "here again"),
        ("bob", None, 0, ""),
    ]
    with running(program, DATABASE_URL=address, PORT=port) as chat:
        asyncio.run(come_back())
        chat.stop()


# How a connection is closed with its session

STARLETTE = """
import sys
import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from cagey_sessions import CageySessionsError, SessionManager
from cagey_sessions.stores import MemoryStore

{hang_up}

async def play(socket):
    await socket.accept()
    try:
        async with await manager.create() as session:
            {listens}
            await session.login(socket.path_params["name"], default={{}})
            async for text in socket.iter_text():
                if text == "leave":
                    break
                await socket.send_text(text)
    except CageySessionsError as error:
        print(type(error).__name__, flush=True)


async def main():
    global manager
    async with SessionManager(store=MemoryStore()) as manager:
        app = Starlette(routes=[WebSocketRoute("/{{name}}", play)])
        config = uvicorn.Config(app, port=int(sys.argv[1]), ws=sys.argv[2], timeout_graceful_shutdown=2)
        await uvicorn.Server(config).serve()


import asyncio
asyncio.run(main())
"""
WEB_SOCKETS = ["websockets", "websockets-sansio"]
"""What uvicorn speaks to a client with."""


def of_the_page() -> tuple[str, str]:
    """The function that the page of the examples shows, and how it is to be used."""
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (use,) = re.findall(r'`(session\.on\("destroy", lambda: .*?)`', page)
    return code, use


async def gone(program: Program, client: ClientConnection) -> None:
    """Wait until a connection that the server closes is closed."""
    async with asyncio.timeout(20):
        with pytest.raises(ConnectionClosed):
            while True:
                await client.recv()


async def come_and_go(program: Program, port: str) -> None:
    """A connection ends in every way there is."""
    await until_it_listens(port)
    url = f"ws://127.0.0.1:{port}"

    async def arrive(name: str) -> ClientConnection:
        client = await connect(f"{url}/{name}")
        await client.send("hello")
        assert await said_to(client) == "hello"
        return client

    await (await arrive("closes")).close()
    (await arrive("vanishes")).transport.abort()
    leaves = await arrive("leaves")
    await leaves.send("leave")
    await gone(program, leaves)
    older, newer = await arrive("twice"), await arrive("twice")
    await gone(program, older)
    stays = await arrive("stays")
    await asyncio.to_thread(program.process.send_signal, signal.SIGTERM)
    await asyncio.gather(gone(program, newer), gone(program, stays))


@pytest.mark.slow
@pytest.mark.parametrize("ws", WEB_SOCKETS)
def test_the_advice_for_starlette_closes_a_connection_however_it_ends(tmp_path, ws):
    code, use = of_the_page()
    program, port = tmp_path / "server.py", str(free_port())
    program.write_text(STARLETTE.format(hang_up=code, listens=use), encoding="utf-8")
    with running(program, port, ws) as server:
        asyncio.run(come_and_go(server, port))
        server.out, server.err = server.process.communicate(timeout=60)
    assert "Traceback" not in server.err, server.err
    assert set(server.out.split()) <= {"SessionEndedError"}, "who has logged in again has no session any more"


@pytest.mark.slow
def test_without_the_advice_an_ordinary_disconnect_raises(tmp_path):
    program, port = tmp_path / "server.py", str(free_port())
    listens = 'session.on("destroy", socket.close)'
    program.write_text(STARLETTE.format(hang_up="", listens=listens), encoding="utf-8")
    with running(program, port, WEB_SOCKETS[1]) as server:
        asyncio.run(come_and_go(server, port))
        server.out, server.err = server.process.communicate(timeout=60)
    assert "ListenerError" in server.out.split()


async def until_it_ends(manager: SessionManager[Any], socket: Any, read: Any, raised: list[BaseException]) -> None:
    """What a handler does with its connection."""
    try:
        async with await manager.create() as session:
            session.on("destroy", socket.close)
            await session.login("ann", default={})
            await read()
    except BaseException as error:
        raised.append(error)
        raise


async def read_all(messages: Any) -> None:
    async for _ in messages:
        pass


@asynccontextmanager
async def served(kind: str, manager: SessionManager[Any], raised: list[BaseException]) -> AsyncIterator[int]:
    """A server of that kind: its port."""
    if kind == "asyncio":
        done = []

        async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            done.append(asyncio.current_task())
            with suppress(ConnectionError):
                await until_it_ends(manager, writer, lambda: read_all(reader), raised)

        server = await asyncio.start_server(stream, "127.0.0.1", 0)
        yield server.sockets[0].getsockname()[1]
        server.close()
        await asyncio.wait(done)
    elif kind == "websockets":

        async def answer(socket: Any) -> None:
            await until_it_ends(manager, socket, lambda: read_all(socket), raised)

        async with serve(answer, "127.0.0.1", 0) as sockets:
            yield next(iter(sockets.sockets)).getsockname()[1]
    else:

        async def handle(request: aiohttp.web.Request) -> aiohttp.web.WebSocketResponse:
            socket = aiohttp.web.WebSocketResponse()
            await socket.prepare(request)
            await until_it_ends(manager, socket, lambda: read_all(socket), raised)
            return socket

        runner = aiohttp.web.AppRunner(aiohttp.web.Application())
        runner.app.router.add_get("/", handle)
        await runner.setup()
        site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield runner.addresses[0][1]
        await runner.cleanup()


@pytest.mark.parametrize("vanishes", [False, True])
@pytest.mark.parametrize("kind", ["asyncio", "aiohttp", "websockets"])
async def test_the_others_are_closed_by_the_listener_alone(kind, vanishes):
    manager: SessionManager[Any] = SessionManager(store=MemoryStore())
    raised: list[BaseException] = []
    ended = asyncio.Event()
    manager.on("destroy", lambda session: ended.set())
    identified = asyncio.Event()
    manager.on("identified", lambda *_: identified.set())
    async with served(kind, manager, raised) as port, asyncio.timeout(30):
        if kind == "asyncio":
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            transport, close = writer.transport, writer.close
        else:
            client = await connect(f"ws://127.0.0.1:{port}/")
            transport, close = client.transport, client.close
        await identified.wait()
        left = transport.abort() if vanishes else close()
        if left is not None:
            await left
        await ended.wait()
    assert [error for error in raised if not isinstance(error, ConnectionError | ConnectionClosed)] == []
    await manager.destroy()


# An arena with aiohttp


async def pictures_until(player: aiohttp.ClientWebSocketResponse, seen: Any) -> Any:
    async with asyncio.timeout(20):
        while not seen(picture := await player.receive_json()):
            pass
    return picture


async def hung_up_on(player: aiohttp.ClientWebSocketResponse) -> bool:
    async with asyncio.timeout(20):
        async for _ in player:
            pass
    return player.closed


@pytest.mark.slow
def test_the_arena_stores_where_everybody_is(tmp_path):
    port = str(free_port())
    file = tmp_path / "arena.db"

    async def fight(program: Program) -> float:
        await until_it_listens(port)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as web:
            ann, bob = await web.ws_connect("/play/ann"), await web.ws_connect("/play/bob")
            await ann.send_json({"dx": 50, "dy": 0})
            await pictures_until(bob, lambda picture: picture.get("ann", {}).get("x", 0) > 0.2)
            again = await web.ws_connect("/play/ann")
            assert await hung_up_on(ann)
            found = await pictures_until(
                again, lambda picture: picture.get("ann", {}).get("dx") == 0
            )  # of the new connection
            assert found["ann"]["x"] > 0.2, "where the older one was"
            await again.send_json({"dx": 0, "dy": -1})
            await pictures_until(again, lambda picture: picture.get("ann", {}).get("y", 0) < 0)
            await bob.send_str("what is this?")
            assert await hung_up_on(bob)
            picture = await pictures_until(again, lambda picture: list(picture) == ["ann"])
            stopping = asyncio.create_task(asyncio.to_thread(program.stop))
            assert await hung_up_on(again)
            assert await stopping == 0
            return picture["ann"]["x"]

    with running(EXAMPLES / "arena_aiohttp.py", str(file), port) as arena:
        x = asyncio.run(fight(arena))
    assert arena.out.startswith("bob leaves: JSONDecodeError")
    found = {name: json.loads(body) for name, body in rows(file, "SELECT user_id, body FROM cagey_sessions")}
    assert set(found) == {"ann", "bob"}
    assert found["ann"]["x"] == x
    assert found["ann"]["y"] < 0
    assert found["bob"] == {"x": 0.0, "y": 0.0}


# A game that gives up its autosave loop


@pytest.mark.slow
def test_the_game_goes_on_with_its_old_table(tmp_path):
    port = str(free_port())
    file = tmp_path / "game.db"
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(
            "CREATE TABLE players (name TEXT PRIMARY KEY, gold INTEGER NOT NULL, depth INTEGER NOT NULL)"
        )
        connection.execute("INSERT INTO players VALUES ('ann', 6, 3)")

    async def dig(program: Program) -> None:
        await until_it_listens(port)
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        silent, other = await asyncio.open_connection("127.0.0.1", int(port))
        async with asyncio.timeout(20):
            writer.write(b"ann\ndig\nlook\n")
            assert await reader.readline() == b"your name? Player(gold=10, depth=4)\n"
            assert await reader.readline() == b"Player(gold=14, depth=4)\n"
            assert await asyncio.to_thread(program.stop) == 0
            assert await reader.read() == b""
            assert await silent.read() == b"your name? "
            for each in (writer, other):
                each.close()
                await each.wait_closed()

    with running(EXAMPLES / "from_an_autosave_loop.py", str(file), port) as game:
        asyncio.run(dig(game))
    assert rows(file, "SELECT * FROM players") == [("ann", 14, 4)]


# A gateway


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it counts memory as Linux does")
@pytest.mark.parametrize(("users", "active"), [(2000, 100), (200_000, 2000)])
def test_the_gateway_says_what_a_user_takes_and_saves_who_has_said_something(tmp_path, users, active):
    file = tmp_path / "gateway.db"
    with running(EXAMPLES / "gateway.py", str(file), str(users), str(active)) as gateway:
        found = re.fullmatch(r"([\d,]+) users are connected: (\d+) bytes each\n", gateway.line())
        assert found, gateway.stop()
        assert found[1] == f"{users:,}"
        said = gateway.line()
        assert said.startswith(f"{users:,} are here, {active:,} have said something, "), said
        assert gateway.stop() == 0
    if users == 200_000:  # else it is the noise of the allocator
        assert 200 < int(found[2]) < 400, "a session, its key, and no dict"
    assert f"{active} users saved" in gateway.err
    bodies = [json.loads(body) for (body,) in rows(file, "SELECT body FROM cagey_sessions")]
    assert len(bodies) == active
    assert {body["last"] for body in bodies} <= {"hello", "again"}


# Game logic in virtual time


def pytest_of(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(path)]
    return subprocess.run(command, text=True, env=ENVIRONMENT, capture_output=True, check=False, timeout=100)


@pytest.mark.slow
def test_the_trade_is_safe_and_its_tests_would_find_one_that_is_not(tmp_path):
    done = pytest_of(EXAMPLES / "test_trade.py")
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
    code = (EXAMPLES / "test_trade.py").read_text(encoding="utf-8")
    for fault in ("    await buyer.persist_now()\n", '            if number not in seller["answers"]:\n'):
        assert code.count(fault) == 1
        broken = tmp_path / "test_broken.py"
        broken.write_text(code.replace(fault, "            if True:\n" if "if" in fault else ""), encoding="utf-8")
        done = pytest_of(broken)
        assert done.returncode == 1, done.stdout
        assert "CrashTestError" in done.stdout
