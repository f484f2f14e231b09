"""Every program of the pages runs as printed, and prints what the page says. Those of the pages about stores: see
test_docs_stores.py; those of the README: test_readme.py.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest

import cagey_sessions
from cagey_sessions import CorruptRecordError, SessionManager
from cagey_sessions.stores import MemoryStore
from support.engines import RedisEngine, free_port, need

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cagey_sessions.__file__).parents[1])}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$\n*(?:prints (.*?)\.(?:\s|$))?", re.MULTILINE | re.DOTALL)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def programs(page: str) -> list[tuple[str, list[str] | None]]:
    """The Python blocks of a page, each with the lines it is said to print."""
    found = []
    for language, code, said in BLOCK.findall(read(page)):
        if language == "python":
            found.append((code, re.findall(r"`([^`]+)`", said) if said else None))
    return found


def run(code: str, folder: Path) -> tuple[list[str], str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=ENVIRONMENT,
        timeout=60,
    )
    return done.stdout.splitlines(), done.stderr


COUNTS = {
    "README.md": 3,
    "CHANGELOG.md": 0,
    "CONTRIBUTING.md": 0,
    "SECURITY.md": 0,
    "docs/api.md": 0,
    "docs/architecture.md": 0,
    "docs/concepts.md": 0,
    "docs/from-node.md": 2,
    "docs/gc-and-memory.md": 1,
    "docs/design.md": 0,
    "docs/guarantees.md": 0,
    "docs/index.md": 1,
    "docs/operations.md": 2,
    "docs/performance.md": 0,
    "docs/platforms.md": 0,
    "docs/quickstart.md": 4,
    "docs/security.md": 0,
    "docs/settings.md": 0,
    "docs/snapshots.md": 3,
    "docs/own-store.md": 2,
    "docs/own-tables.md": 7,
    "docs/stores.md": 3,
    "docs/testing.md": 5,
    "docs/user-data.md": 6,
}
SAYS_WHAT_IT_PRINTS = [
    ("docs/index.md", 0),
    ("docs/quickstart.md", 2),
    ("docs/quickstart.md", 3),
    ("docs/snapshots.md", 0),
    ("docs/snapshots.md", 2),
] + [("docs/user-data.md", number) for number in range(COUNTS["docs/user-data.md"])]
LOGGED = {
    # nobody has set up logging, so that warnings and errors go to stderr
    ("docs/quickstart.md", 3): "the data of user 'alice' cannot be saved: a value in user_data: set is not JSON; only ",
    ("docs/user-data.md", 0): "the data of user 'alice' cannot be saved: a value in user_data: nan is not JSON; ",
}


def test_every_program_of_every_page_is_known_here():
    pages = [path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]]
    assert {page: len(programs(page)) for page in pages} == COUNTS
    fences = {page: re.findall(r"^ *```\w+$", read(page), re.MULTILINE) for page in pages}
    assert {fence for found in fences.values() for fence in found} == {
        "```python",
        "```console",  # what the tools print: tests/tools
        "```js",
        "```py",  # of Django, which is not installed here: test_docs_stores.py compiles it
        "```sql",
        "```text",
    }
    assert [page for page in fences if "```py" in fences[page]] == ["docs/own-tables.md"]


@pytest.mark.parametrize(("page", "number"), SAYS_WHAT_IT_PRINTS)
def test_a_program_prints_what_the_page_says(tmp_path, page, number):
    code, said = programs(page)[number]
    printed, complaints = run(code, tmp_path)
    logged = LOGGED.get((page, number), "")
    assert complaints.startswith(logged) if logged else complaints == ""
    assert len(complaints.splitlines()) == bool(logged)
    assert printed == said


def test_the_program_that_puts_users_back(tmp_path):
    take, back, _ = (code for code, _ in programs("docs/snapshots.md"))
    run(take, tmp_path)
    query = "UPDATE cagey_sessions SET body = '{\"gold\":0,\"bag\":[]}' WHERE user_id = 'ann'"
    with closing(sqlite3.connect(tmp_path / "players.db")) as connection, connection:
        connection.execute(query)
    assert run(back, tmp_path) == ([], "")
    with closing(sqlite3.connect(tmp_path / "players.db")) as connection:
        bodies = connection.execute("SELECT body FROM cagey_sessions").fetchall()
    assert bodies == [('{"gold":10}',)] * 2


def test_the_lines_about_the_collector_do_what_the_page_says(tmp_path):
    [(code, _)] = programs("docs/gc-and-memory.md")
    check = "\nprint(gc.get_freeze_count() > 0, gc.get_threshold())"
    assert run(code + check, tmp_path) == (["True (50000, 50, 100)"], "")


async def test_the_listener_of_the_page_for_node_saves(make_manager, clock):
    (code, _), _ = programs("docs/from-node.md")
    written: dict[Any, bytes] = {}

    class Db:
        async def write(self, user_id: Any, body: bytes) -> None:
            await asyncio.sleep(0)
            written[user_id] = body

    manager = SessionManager(interval="30s", clock=clock)
    exec(code, {"manager": manager, "db": Db(), "orjson": orjson})
    session = await manager.create()
    await session.set_user("ann", {"gold": 1})
    await clock.advance("30s")
    assert written == {"ann": b'{"gold":1}'}
    await manager.destroy()


async def test_the_functions_of_the_page_for_node_load_and_save(tmp_path, monkeypatch):
    _, (code, _) = programs("docs/from-node.md")
    stored: dict[Any, bytes] = {"ann": b'{"gold":1}'}

    class Db:
        async def read(self, user_id: Any) -> bytes | None:
            await asyncio.sleep(0)
            return stored.get(user_id)

        async def write(self, user_id: Any, body: bytes) -> None:
            await asyncio.sleep(0)
            stored[user_id] = body

    names: dict[str, Any] = {"db": Db()}
    exec(code, names)
    async with names["manager"] as manager:
        ann, bob = await manager.open("ann"), await manager.open("bob", default={"gold": 0})
        ann.user_data["gold"] += 10
        await bob.destroy()
        assert stored == {"ann": b'{"gold":1}', "bob": b'{"gold":0}'}
    assert stored == {"ann": b'{"gold":11}', "bob": b'{"gold":0}'}


def reports(page: str) -> list[str]:
    """What the page says that a failed `crash_test` prints."""
    return re.findall(r"^```text\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def test_the_function_of_the_page_about_tests_builds_a_manager():
    (code, _), *_ = programs("docs/testing.md")
    names: dict[str, Any] = {}
    exec(code, names)
    assert isinstance(names["make_manager"](store=MemoryStore()), SessionManager)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_tests_of_the_page_pass_and_report_what_it_says(tmp_path, number):
    code, _ = programs("docs/testing.md")[number]
    (tmp_path / "test_game.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "test_game.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=ENVIRONMENT,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if number > 1:
        said = reports("docs/testing.md")[number - 2]
        first, _, rest = said.partition("\n")
        if sys.version_info[:2] == (3, 11):  # the page shows a run of that version
            assert said in done.stdout
        else:
            assert first.split(" after")[0] in done.stdout
            assert "what is stored:" in rest


@need("redis-server")
def test_the_program_with_a_bad_network_prints_what_the_page_says(tmp_path, monkeypatch):
    code, said = programs("docs/testing.md")[4]
    with RedisEngine(port=free_port()) as engine:
        monkeypatch.setitem(ENVIRONMENT, "REDIS_URL", engine.url)
        printed, _ = run(code, tmp_path)  # the log says besides that the store was down
    assert printed == said


# What the pages say, and no program shows


async def test_a_body_that_can_be_read_but_not_be_written_again():
    backing = MemoryStore().backing
    data = {"bag": "x" * 100}
    async with SessionManager(store=MemoryStore(backing)) as manager:
        await manager.open("ann", default=data)
    async with SessionManager(store=MemoryStore(backing), max_bytes=50) as manager:
        with pytest.raises(CorruptRecordError) as caught:
            await manager.open("ann")
        assert orjson.loads(caught.value.body) == data
        assert await manager.read("ann") == data
    async with SessionManager(store=MemoryStore(backing)) as manager:
        assert await manager.read("ann") == data, "nothing was saved over it"


@pytest.mark.parametrize("users", [0, 1])
async def test_the_end_of_a_block_after_an_end_without_saves(users):
    backing = MemoryStore().backing
    async with SessionManager(store=MemoryStore(backing)) as manager:
        for number in range(users):
            await manager.open(number, default={})
        assert (await manager.destroy(False)).unsaved == ()
    assert all(row.record is None for row in backing.rows.values()), "the first call has said what to save"


# The game


class Game:
    """The program of the quickstart as a process, or with another end."""

    def __init__(self, folder: Path, *, until_a_signal: bool = False) -> None:
        self.port = free_port()
        (code, _), (end, _), *_ = programs("docs/quickstart.md")
        if until_a_signal:
            code = code[: code.index("async def main():")] + end
        assert code.count("4000") == 2
        (folder / "game.py").write_text(code.replace("4000", str(self.port)), encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "game.py"],
            cwd=folder,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        self.output = self.process.stdout

    def __enter__(self) -> Game:
        assert self.output.readline() == f"playing on port {self.port}\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(10)
        self.output.close()

    def connect(self, *lines: str) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.sendall("".join(f"{line}\n" for line in lines).encode())
        return connection

    def play(self, *lines: str) -> list[str]:
        """Say lines, hang up, and return all the lines the game has said."""
        with self.connect(*lines) as connection:
            connection.shutdown(socket.SHUT_WR)
            return hear(connection)

    def end(self, number: int) -> str:
        self.process.send_signal(number)
        assert self.process.wait(20) == (0 if number == signal.SIGTERM else -number)
        return self.output.read()


def hear(connection: socket.socket) -> list[str]:
    """What the game says until it hangs up."""
    said = b""
    while chunk := connection.recv(4096):
        said += chunk
    return said.decode().removeprefix("your name? ").splitlines()


def wait_for(connection: socket.socket, text: str) -> None:
    said = ""
    while text not in said:
        heard = connection.recv(4096)
        assert heard, f"{text!r} is not in {said!r}"
        said += heard.decode()


needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="loops have no signal handlers there")


@pytest.mark.slow
@needs_signals
def test_the_game_remembers_what_it_was_stopped_or_killed_with(tmp_path):
    with Game(tmp_path) as game:
        assert game.play("ada", "+gold", "+gold", "look", "quit") == [
            "{'gold': 1, 'visits': 1}",
            "{'gold': 2, 'visits': 1}",
            "{'gold': 2, 'visits': 1}",
        ]
        with game.connect("ada", "+gold", "dance") as connection:
            wait_for(connection, "say +gold, bank, look or quit")
            assert game.play("bob", "look") == ["{'gold': 0, 'visits': 1}"], "somebody else meanwhile"
            assert game.end(signal.SIGTERM) == "everybody is saved\n"
            assert hear(connection) == []
    with Game(tmp_path) as game, game.connect("ada", "+gold", "bank") as connection:
        wait_for(connection, "{'gold': 4, 'visits': 3}\nsaved as version")
        game.end(signal.SIGKILL)
    with Game(tmp_path) as game:
        assert game.play("ada", "look") == ["{'gold': 4, 'visits': 4}"]
        (query,) = re.findall(r'^sqlite3 players.db "(.*)"$', read("docs/quickstart.md"), re.MULTILINE)
        with closing(sqlite3.connect(tmp_path / "players.db")) as reader:
            bodies = {user_id: orjson.loads(body) for user_id, _, body in reader.execute(query)}
        assert bodies == {"ada": {"gold": 4, "visits": 4}, "bob": {"gold": 0, "visits": 1}}
        game.end(signal.SIGTERM)


@pytest.mark.slow
@needs_signals
def test_the_game_that_runs_until_a_signal_saves_everybody(tmp_path):
    with Game(tmp_path, until_a_signal=True) as game, game.connect("ada", "+gold") as connection:
        wait_for(connection, "{'gold': 1, 'visits': 1}")
        assert game.end(signal.SIGTERM) == ""
    with Game(tmp_path) as game:
        assert game.play("ada", "look") == ["{'gold': 1, 'visits': 2}"]


@pytest.mark.slow
@needs_signals
def test_the_server_with_a_probe_is_ready_until_it_is_told_to_end(tmp_path):
    (code, _), _ = programs("docs/operations.md")
    port = free_port()
    assert code.count("8081") == 1
    program = code.replace("8081", str(port)).replace("        ...  ", '        print("up", flush=True)  ')
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10) as answer:
                assert (answer.status, answer.read()) == (200, b"ok\n")
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=20) == ("", "")
            assert process.returncode == 0
        finally:
            process.kill()
    assert (tmp_path / "players.db").exists()


def test_the_program_that_weighs_a_user(tmp_path):
    _, (code, _) = programs("docs/operations.md")
    (line,), complaints = run(code, tmp_path)
    assert complaints == ""
    body, memory = map(int, re.fullmatch(r"(\d+) bytes of JSON are (\d+) in memory", line).groups())
    assert 200 < body < memory < 100 * body


@pytest.mark.slow
@needs_signals
def test_the_game_survives_its_players(tmp_path):
    with Game(tmp_path) as game:
        with game.connect("ada", "look") as older:
            wait_for(older, "'visits': 1")
            assert game.play("ada", "look") == ["{'gold': 0, 'visits': 2}"]
            assert hear(older) == [], "it is hung up on"
        assert game.play("") == []
        assert game.play("x" * 100_000) == []
        said = game.end(signal.SIGTERM).splitlines()
        assert said.pop() == "everybody is saved"
        assert said and all(line.startswith("a player: ") for line in said), said


@pytest.mark.slow
@needs_signals
def test_the_game_says_so_when_a_player_cannot_be_loaded(tmp_path):
    with Game(tmp_path) as game:
        game.play("ada", "+gold", "quit")
        game.end(signal.SIGTERM)
    with closing(sqlite3.connect(tmp_path / "players.db")) as connection, connection:
        connection.execute("UPDATE cagey_sessions SET body = '{' WHERE user_id = 'ada'")
    with Game(tmp_path) as game:
        assert game.play("ada", "look") == ["the bank is closed, come back later"]
        assert game.play("bob", "look") == ["{'gold': 0, 'visits': 1}"]
        assert game.end(signal.SIGTERM).startswith("the store: ")
