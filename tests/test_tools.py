"""The tools for a store on the command line: what they print, write and refuse, and their exit statuses.

On SQLite each of them; on PostgreSQL and Redis, where they are there, what only a shared store has.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import select
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
import redis

import cagey_sessions
from cagey_sessions import SessionManager, cli
from cagey_sessions.stores import SQLiteStore, open_store
from cagey_sessions.testing.conformance.values import ODD_IDS
from cagey_sessions.testing.store_conformance import claim, opened, record, save
from support import POSTGRES, REDIS, drop_schema, skip_without

with suppress(ImportError):
    import pty

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cagey_sessions.__file__).parents[1])}
COMMAND = [sys.executable, "-W", "error", "-m", "cagey_sessions", "store"]

posix = pytest.mark.skipif(sys.platform == "win32", reason="terminals, signals and shells are others there")
TOOLS = ["stats", "show", "export", "import", "erase"]


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.encode().splitlines()]  # of bytes: a text has other line ends


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a tool in an empty folder, with this as its stdin."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        try:
            status = cli.main(["store", *arguments])
        except SystemExit as end:
            status = end.code
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture
def url() -> str:
    return "sqlite:///players.db"


def put(url: str, *users: tuple[int | str, bytes], schema: int = 0, owner: str = "a", release: bool = True) -> None:
    """Save users as a server does that ends then."""

    async def put() -> None:
        async with opened(open_store(url)) as store:
            for number, (user_id, body) in enumerate(users):
                granted = await claim(store, user_id, owner)
                assert granted.granted
                saved_at = 1767225600.0 + number
                new = record(user_id, 1 if granted.record is None else granted.record.version + 1, owner=owner)
                await save(
                    store,
                    new._replace(epoch=granted.epoch, body=body, schema=schema, saved_at=saved_at, release=release),
                )

    asyncio.run(put())


def line(user_id: Any, body: Any, **more: Any) -> bytes:
    return orjson.dumps({"user_id": user_id, **more, "body": body}) + b"\n"


def users(done: Done) -> dict[Any, Any]:
    return {each["user_id"]: each["body"] for each in done.lines}


# Engines


def postgres() -> Iterator[str]:
    schema = f"cagey_{uuid.uuid4().hex}"

    skip_without(POSTGRES)
    yield f"{POSTGRES}{'&' if '?' in POSTGRES else '?'}schema={schema}"
    asyncio.run(drop_schema(schema))


def in_redis() -> Iterator[str]:
    prefix = f"cagey-{uuid.uuid4().hex}:"
    skip_without(REDIS)
    with redis.Redis.from_url(REDIS) as client:
        yield f"{REDIS}{'&' if '?' in REDIS else '?'}prefix={prefix}"
        for key in client.scan_iter(f"{prefix}*", count=1000):
            client.delete(key)


def in_a_file() -> Iterator[str]:
    yield "sqlite:///players.db"


ENGINES = {"sqlite": in_a_file, "postgres": postgres, "redis": in_redis}


@pytest.fixture(params=["postgres", "redis"])
def shared(request, tmp_path, monkeypatch):
    """The URL of a place of one's own in an engine that servers share."""
    yield from ENGINES[request.param]()


@pytest.fixture(params=list(ENGINES))
def anywhere(request):
    """The URL of a place of one's own in each engine."""
    yield from ENGINES[request.param]()


# Arguments


@pytest.mark.parametrize("tool", [[], *([tool] for tool in TOOLS)])
def test_help_says_what_each_exit_status_means_and_shows_a_command(run, tool):
    done = run(*tool, "--help")
    assert done.status == 0
    assert re.search(r"Exit status: 0 done, 1 .* 2 ", done.out)
    assert f"cagey-sessions store {' '.join(tool)}" in done.out.partition("Exit status")[0].partition("\n")[2]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("stats",),
        ("show", "sqlite:///players.db"),
        ("import", "sqlite:///players.db"),
        ("erase", "sqlite:///players.db"),
        ("dance", "sqlite:///players.db"),
    ],
)
def test_wrong_arguments_are_status_2(run, arguments):
    assert run(*arguments).status == 2


@pytest.mark.parametrize("arguments", [["stats"], ["show"], ["export"], ["import"], ["erase"]])
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("players.db", "sqlite:///players.db"),
        ("mysql://game:hunter2@db/players", "there is no store for mysql"),
        ("memory:", "name a store that lasts"),
        ("sqlite:///no/such/folder/players.db", "No such file"),
        ("postgresql://game:hunter2@127.0.0.1:1/players", "cannot be reached"),
        ("redis://game:hunter2@127.0.0.1:1/0", "cannot be reached"),
    ],
)
def test_a_store_that_cannot_be_used_is_status_2_and_one_line_without_a_password(run, arguments, bad, said):
    more = {"show": ["ann"], "import": ["-"], "erase": ["ann", "--yes"]}.get(arguments[0], [])
    done = run(*arguments, bad, *more, stdin=line("ann", 1))
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("cagey-sessions: ") and said in done.err
    assert len(done.err.splitlines()) == 1
    assert "hunter2" not in done.err


@pytest.mark.parametrize("tool", ["show", "erase"])
@pytest.mark.parametrize("user_id", ["seven", "", str(2**63), "\udcff"])
def test_an_id_that_is_none_is_status_2(run, url, tool, user_id):
    put(url, ("ann", b"1"))
    number = ["--int"] if user_id[:1].isalnum() else []
    done = run(tool, url, user_id, *number)
    assert (done.status, done.out) == (2, "")


def test_a_tool_that_reads_makes_no_file(run, url, tmp_path):
    for arguments in (["stats", url], ["show", url, "ann"], ["export", url], ["erase", url, "ann", "--yes"]):
        assert run(*arguments).status == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tool", [["stats"], ["show", "ann"], ["export"], ["erase", "ann", "--yes"]])
def test_a_tool_that_reads_makes_no_tables(run, tool):
    for place in postgres():
        done = run(tool[0], place, *tool[1:])
        assert (done.status, done.out) == (2, "")
        assert "there is no table" in done.err


# Figures


def test_stats_of_users(run, url):
    put(url, ("ann", b'{"gold":1}'), (7, b"[1,2]"), schema=3)
    put(url, ("bob", b'"x"'))
    done = run("stats", url)
    assert (done.status, done.err) == (0, "")
    figures = done.json
    assert (figures["store"], figures["users"]) == ("SQLiteStore", 3)
    assert figures["body_bytes"] == {"total": 18, "mean": 6.0, "largest": 10, "largest_user": "ann"}
    assert figures["saved_at"] == {"oldest": "2026-01-01T00:00:00+00:00", "newest": "2026-01-01T00:00:01+00:00"}
    assert figures["schemas"] == {"0": 1, "3": 2}
    assert (figures["owned"], figures["released"]) == (None, None), "one process has them all, or none"
    assert "reading only" in figures["loss_class"]


def test_stats_of_nobody(run, url):
    put(url)
    figures = run("stats", url).json
    assert (figures["users"], figures["saved_at"], figures["schemas"]) == (0, None, {})
    assert figures["body_bytes"] == {"total": 0, "mean": 0, "largest": 0, "largest_user": None}


def test_stats_say_whom_servers_have_now(run, shared):
    put(shared, ("ann", b"1"), ("bob", b"2"), release=False)
    put(shared, ("cleo", b"3"))
    figures = run("stats", shared).json
    assert (figures["users"], figures["owned"], figures["released"]) == (3, 2, 1)
    assert figures["loss_class"]


def test_a_time_that_no_calendar_has_is_shown_as_it_is(run, url):
    run("import", url, "-", stdin=line(1, 1, saved_at=1e300))
    assert run("stats", url).json["saved_at"] == {"oldest": "1e+300", "newest": "1e+300"}


# One user


def test_show_tells_a_number_from_its_text(run, url):
    put(url, (7, b'{"gold":7}'), ("7", b'{"gold":"text"}'), (-7, b"[]"), schema=2)
    number, text, negative = run("show", url, "7", "--int"), run("show", url, "7"), run("show", url, "--int", "-7")
    assert number.json == {
        "user_id": 7,
        "owner": None,
        "epoch": 1,
        "version": 1,
        "schema": 2,
        "saved_at": 1767225600.0,
        "body": {"gold": 7},
    }
    assert (text.json["user_id"], text.json["body"]) == ("7", {"gold": "text"})
    assert negative.json["user_id"] == -7
    assert number.out.count("\n") > 5, "indented"
    assert (number.status, number.err) == (0, "")


def test_show_says_who_has_a_user(run, anywhere):
    put(anywhere, ("ann", b"1"), owner="node-1", release=False)
    assert run("show", anywhere, "ann").json["owner"] == "node-1"


def test_a_user_who_is_not_stored_is_status_1(run, url):
    put(url, ("ann", b"1"))
    done = run("show", url, "bob")
    assert (done.status, done.out, done.err) == (1, "", "cagey-sessions: 'bob' is not stored\n")


def test_a_user_who_was_never_saved_is_said_to_be_with_their_server(run, shared):
    async def claimed() -> None:
        async with opened(open_store(shared)) as store:
            await claim(store, "ann", "node-1")

    asyncio.run(claimed())
    done = run("show", shared, "ann")
    assert (done.status, done.out) == (1, "")
    assert "node-1 has them, and has not saved them yet" in done.err


def damage(user_id: str, body: str) -> None:
    with closing(sqlite3.connect("players.db")) as connection, connection:
        connection.execute("UPDATE cagey_sessions SET body = ? WHERE user_id = ?", (body, user_id))


def test_a_damaged_body_is_shown_as_text(run, url):
    put(url, ("ann", b"1"))
    damage("ann", '{"gold":')
    done = run("show", url, "ann")
    assert done.status == 1
    assert done.json["damaged_body"] == '{"gold":'
    assert "not JSON" in done.err


# Out


def test_an_export_has_one_line_for_each_user(run, url):
    put(url, ("ann", b'{"gold":1}'), (7, b"[1,2]"), ("7", b'"x"'), schema=4)
    done = run("export", url)
    assert done.status == 0
    assert done.lines == [
        {"user_id": "ann", "version": 1, "schema": 4, "saved_at": 1767225600.0, "body": {"gold": 1}},
        {"user_id": 7, "version": 1, "schema": 4, "saved_at": 1767225601.0, "body": [1, 2]},
        {"user_id": "7", "version": 1, "schema": 4, "saved_at": 1767225602.0, "body": "x"},
    ]
    assert done.err == "exported 3, left out 0\n"


def test_a_body_changed_by_hand_stays_one_line_and_the_same_bytes(run, url):
    put(url, ("ann", b"1"))
    damage("ann", '{\n "b": 1.50,\r\n "a": 100000000000000000000,\n "b": "\\n"}')
    done = run("export", url)
    assert done.out.count("\n") == 1
    assert done.out.endswith('"body":{  "b": 1.50,   "a": 100000000000000000000,  "b": "\\n"}}\n')


def test_a_damaged_body_is_left_out_by_name(run, url):
    put(url, ("ann", b"1"), ("bob", b"2"))
    damage("ann", "{")
    done = run("export", url)
    assert (done.status, users(done)) == (1, {"bob": 2})
    assert "left out: the body of user 'ann' is not JSON" in done.err
    assert done.err.endswith("exported 1, left out 1\n")


@posix
def test_a_file_is_written_as_a_whole(run, url, tmp_path):
    put(url, *[(number, b'"%d"' % number) for number in range(1500)])
    done = run("export", url, "players.jsonl")
    assert (done.status, done.out) == (0, "")
    path = tmp_path / "players.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [orjson.loads(each)["user_id"] for each in path.read_bytes().splitlines()] == list(range(1500))
    assert not list(tmp_path.glob("*.tmp"))


@posix
def test_a_file_that_is_there_is_replaced_only_by_force(run, url, tmp_path):
    put(url, ("ann", b"1"))
    path = tmp_path / "players.jsonl"
    path.write_text("precious")
    done = run("export", url, "players.jsonl")
    assert (done.status, path.read_text()) == (2, "precious")
    assert "--force" in done.err
    assert run("export", url, "players.jsonl", "--force").status == 0
    assert orjson.loads(path.read_bytes())["user_id"] == "ann"
    assert run("export", url, ".", "--force").status == 2
    os.mkfifo(tmp_path / "pipe")  # and not a real device, which a fault here would take from everybody
    assert run("export", url, "pipe", "--force").status == 2, "nothing but a file is replaced by a file"
    assert (tmp_path / "pipe").is_fifo()


def test_an_export_that_fails_leaves_the_file_as_it_was(run, url, tmp_path):
    path = tmp_path / "players.jsonl"
    path.write_text("precious")
    assert run("export", url, "players.jsonl", "--force").status == 2
    assert path.read_text() == "precious"
    put(url, ("ann", b"1"))
    done = run("export", url, "no/players.jsonl")
    assert done.status == 2 and "make its folder first" in done.err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["players.db", "players.db.lock", "players.jsonl"]


# In


def test_what_goes_out_comes_in_the_same(run, anywhere, tmp_path):
    """Every id and value, with the order of keys, on every engine, by a file and by a pipe."""
    bodies = {
        user_id: [
            {"z": number, "a": {"é": "\U0001f409", "": None}, "1": [True, False, 0.1, -0.0, 1e300, 5e-324, 2**63 - 1]},
            'a\u0000b\n\u2028"\\',
            [],
        ][number % 3]
        for number, user_id in enumerate(ODD_IDS)
    }
    put("sqlite:///source.db", *[(user_id, orjson.dumps(body)) for user_id, body in bodies.items()], schema=2**31 - 1)
    exported = run("export", "sqlite:///source.db").out.encode()
    (tmp_path / "players.jsonl").write_bytes(exported)
    done = run("import", anywhere, "players.jsonl")
    assert (done.status, done.err) == (0, f"imported {len(ODD_IDS)}, refused 0\n")
    back = run("export", anywhere).out.encode()
    assert sorted(back.splitlines()) == sorted(exported.splitlines())
    assert run("import", anywhere, "-", "--replace", stdin=back).status == 0
    again = {type(each["user_id"]).__name__ + str(each["user_id"]): each for each in run("export", anywhere).lines}
    assert len(again) == len(ODD_IDS)
    assert {each["version"] for each in again.values()} == {2}, "a later version than the one that was there"
    assert {each["schema"] for each in again.values()} == {2**31 - 1}


def test_who_was_imported_may_log_in_at_once(run, anywhere):
    assert run("import", anywhere, "-", stdin=line("ann", {"gold": 1}, version=12)).status == 0

    async def play() -> tuple[int, int]:
        async with SessionManager(store=open_store(anywhere)) as manager:
            session = await manager.open("ann")
            session.user_data["gold"] += 1
            receipt = await session.persist_now()
            return session.user_data["gold"], receipt.version

    assert asyncio.run(play()) == (2, 13)


def test_only_the_id_and_the_body_have_to_be_there(run, url):
    before = time.time()
    assert run("import", url, "-", stdin=b'\n{"body": {"gold": 1}, "user_id": "ann"}\n\n').status == 0
    (found,) = run("export", url).lines
    assert (found["version"], found["schema"], found["body"]) == (1, 0, {"gold": 1})
    assert before <= found["saved_at"] <= time.time()


def test_who_is_there_already_is_refused_unless_replaced(run, anywhere):
    put(anywhere, ("ann", b'"old"'))
    both = line("ann", "new", version=5) + line("bob", "new")
    done = run("import", anywhere, "-", stdin=both)
    assert done.status == 1
    assert "refused: user 'ann' is there already; --replace" in done.err
    assert done.err.endswith("imported 1, refused 1\n")
    assert users(run("export", anywhere)) == {"ann": "old", "bob": "new"}
    assert run("show", anywhere, "ann").json["owner"] is None, "nobody is kept by nobody"
    assert run("import", anywhere, "-", "--replace", stdin=both).status == 0
    assert users(run("export", anywhere)) == {"ann": "new", "bob": "new"}


def test_an_erased_user_is_no_user_and_may_come_back(run, anywhere):
    put(anywhere, ("ann", b"1"))
    assert run("erase", anywhere, "ann", "--yes").status == 0
    assert run("import", anywhere, "-", stdin=line("ann", 2)).status == 0
    assert users(run("export", anywhere)) == {"ann": 2}


@pytest.mark.slow
@pytest.mark.parametrize("replace", [[], ["--replace"]])
def test_a_user_whom_a_live_server_has_is_refused_by_name(run, shared, replace):
    async def beside_a_server() -> tuple[Done, Done]:
        async with SessionManager(store=open_store(shared)) as manager:
            session = await manager.open("ann", default={"gold": 1})
            await session.persist_now()
            imported = await tool("import", shared, "-", *replace, stdin=line("ann", "new") + line("bob", 2))
            erased = await tool("erase", shared, "ann", "--yes")
            session.user_data["gold"] = 2
            assert (await session.persist_now()).changed, "the server has not noticed anything"
        return imported, erased

    imported, erased = asyncio.run(beside_a_server())
    assert (imported.status, erased.status) == (1, 1)
    assert re.search(r"refused: user 'ann' is on another server \(\S+-\d+-\w+\) now", imported.err)
    assert imported.err.endswith("imported 1, refused 1\n")
    assert re.search(r"user 'ann' is on another server \(\S+-\d+-\w+\)", erased.err)
    assert users(run("export", shared)) == {"ann": {"gold": 2}, "bob": 2}


async def tool(*arguments: str, stdin: bytes = b"") -> Done:
    """A tool as a process."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(*COMMAND, *arguments, env=ENVIRONMENT, **pipes)
    out, err = await process.communicate(stdin)
    return Done(process.returncode, out.decode(), err.decode())


@pytest.mark.slow
def test_a_file_that_a_server_has_can_be_read_and_not_be_written(run, url):
    async def beside_a_server() -> dict[str, Done]:
        async with SessionManager(store=SQLiteStore("players.db")) as manager:
            session = await manager.open("ann", default={"gold": 1})
            await session.persist_now()
            more = {"show": ["ann"], "import": ["-"], "erase": ["ann", "--yes"]}
            done = {name: await tool(name, url, *more.get(name, []), stdin=line("bob", 1)) for name in TOOLS}
            session.user_data["gold"] = 2
            assert (await session.persist_now()).changed
        return done

    done = asyncio.run(beside_a_server())
    assert {name: each.status for name, each in done.items()} == {
        "stats": 0,
        "show": 0,
        "export": 0,
        "import": 2,
        "erase": 2,
    }
    assert done["show"].json["body"] == {"gold": 1}
    for name in ("import", "erase"):
        assert f"players.db is in use by process {os.getpid()}" in done[name].err
    assert users(run("export", url)) == {"ann": {"gold": 2}}


BAD_LINES = {
    b"{": "not JSON",
    b"\xff": "not JSON",
    b"[]": "not a JSON object",
    b'{"user_id":"bob"}': "there is no body",
    b'{"user_id":"bob","body":null}': "there is no body",
    b'{"body":1}': "there is no user_id",
    b'{"user_id":true,"body":1}': "user",
    b'{"user_id":1.0,"body":1}': "user",
    b'{"user_id":9223372036854775808,"body":1}': "user",
    b'{"user_id":"","body":1}': "user",
    b'{"user_id":"a\\u0000b","body":1}': "user",
    b'{"user_id":"bob","body":1,"version":0}': "version",
    b'{"user_id":"bob","body":1,"version":true}': "version",
    b'{"user_id":"bob","body":1,"version":9007199254740992}': "version",
    b'{"user_id":"bob","body":1,"schema":-1}': "schema",
    b'{"user_id":"bob","body":1,"schema":2147483648}': "schema",
    b'{"user_id":"bob","body":1,"saved_at":"today"}': "saved_at",
    b'{"user_id":"bob","body":1,"shcema":1}': "did you mean 'schema'",
    b'{"user_id":"ann","body":2}': "line 1 already",
    b'{"user_id":"bob","body":%b1%b}' % (b"[" * 201, b"]" * 201): "nested",
    b'{"user_id":"bob","body":[9223372036854775808]}': "64",
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_file_with_a_damaged_line_changes_nothing(run, url, tmp_path, bad):
    (tmp_path / "players.jsonl").write_bytes(line("ann", 1) + b"\n" + bad + b"\n" + line("cleo", 3))
    done = run("import", url, "players.jsonl")
    assert done.status == 2
    assert done.err.startswith("cagey-sessions: line 3 is not one of an export: ")
    assert BAD_LINES[bad] in done.err
    assert not (tmp_path / "players.db").exists()


def test_a_damaged_line_from_stdin_says_how_many_were_written(run, url):
    good = b"".join(line(number, number) for number in range(250))
    done = run("import", url, "-", stdin=good + b"{\n")
    assert done.status == 2
    assert done.err.splitlines()[0] == "200 users had been written by then, and stay"
    assert "line 251 is not one of an export" in done.err
    assert len(run("export", url).lines) == 200


@posix
def test_a_pipe_that_has_a_name_is_read_once(run, url, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["sh", "-c", "printf '%s' \"$1\" > pipe", "sh", line("ann", 1).decode()], cwd=tmp_path)
    assert run("import", url, "pipe").status == 0
    assert writer.wait(10) == 0
    assert users(run("export", url)) == {"ann": 1}


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_file_that_cannot_be_read_is_status_2(run, url, tmp_path, name):
    done = run("import", url, name)
    assert done.status == 2 and "could not be read" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_body_that_the_engine_does_not_take_is_refused_alone(run, monkeypatch):
    """As PostgreSQL refuses one that is too large; the user is let go of, and leaves nothing behind."""
    for place in postgres():
        big = b'{"user_id":"big","body":"' + b"x" * (1 << 20) + b'"}\n'
        monkeypatch.setattr("cagey_sessions.stores.postgres.text_of", lambda body: None if len(body) > 1000 else "1")
        done = run("import", place, "-", stdin=line("ann", 1) + big)
        assert done.status == 1
        assert "refused: user 'big' was not taken by the store: the body is not text" in done.err
        assert users(run("export", place)) == {"ann": 1}
        assert run("show", place, "big").err == "cagey-sessions: 'big' is not stored\n"


@posix
@pytest.mark.slow
def test_a_move_by_a_pipe(run, anywhere, tmp_path):
    put("sqlite:///source.db", *[(number, b"[%d]" % number) for number in range(3000)])
    command = " ".join(COMMAND)
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} export sqlite:///source.db | {command} import '{anywhere}' -"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stderr.splitlines()) == ["exported 3000, left out 0", "imported 3000, refused 0"]
    assert users(run("export", anywhere)) == {number: [number] for number in range(3000)}


# Erasing


def test_erase_needs_a_yes_where_there_is_no_terminal(run, url):
    put(url, ("ann", b"1"))
    done = run("erase", url, "ann")
    assert done.status == 2 and "--yes" in done.err
    assert users(run("export", url)) == {"ann": 1}
    assert run("erase", url, "ann", "--yes").status == 0
    assert users(run("export", url)) == {}


def test_erase_takes_a_number_for_another_user_than_its_text(run, anywhere):
    put(anywhere, (7, b"1"), ("7", b"2"))
    assert run("erase", anywhere, "7", "--int", "--yes").status == 0
    assert users(run("export", anywhere)) == {"7": 2}


def test_to_erase_nobody_is_status_1(run, url):
    put(url, ("ann", b"1"))
    done = run("erase", url, "bob", "--yes")
    assert (done.status, done.err) == (1, "cagey-sessions: 'bob' is not stored; nothing was erased\n")


def test_whom_a_server_has_left_behind_may_be_erased(run, anywhere):
    put(anywhere, ("ann", b"1"), release=False)
    assert run("erase", anywhere, "ann", "--yes").status == 0
    assert users(run("export", anywhere)) == {}


# Terminals


class Terminal:
    """A tool with a terminal as its stdin and stderr."""

    def __init__(self, *arguments: str, prelude: str = "") -> None:
        self._master, slave = pty.openpty()
        code = f"import sys\n{prelude}\nfrom cagey_sessions.cli import main\nsys.exit(main())"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "store", *arguments],
            env=ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "100"},
            stdin=slave,
            stderr=slave,
            stdout=subprocess.PIPE,
        )
        os.close(slave)
        self.shown = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(20)
        self.process.stdout.close()
        os.close(self._master)

    def see(self, text: str) -> None:
        """Wait until it shows a text."""
        while text not in self.shown:
            assert self._read(), f"{text!r} is not in {self.shown!r}"

    def _read(self) -> bool:
        ready, _, _ = select.select([self._master], [], [], 20)
        assert ready, f"nothing more than {self.shown!r}"
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the other end is closed
            return False
        self.shown += data.decode()
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self) -> Done:
        while self._read():
            pass
        out = self.process.stdout.read().decode()
        return Done(self.process.wait(20), out, self.shown)


@posix
@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "status", "left"), [("y", 0, {}), ("yes", 0, {}), ("", 1, {"ann": 1}), ("n", 1, {"ann": 1})]
)
def test_erase_asks_at_a_terminal(run, url, answer, status, left):
    put(url, ("ann", b"1"))
    with Terminal("erase", url, "ann") as terminal:
        terminal.see("Erase user 'ann' for good? [y/N] ")
        terminal.type(f"{answer}\n")
        assert terminal.end().status == status
    assert users(run("export", url)) == left


SLOW = "import cagey_sessions.tools as t; t.SHOW_AFTER = t.SHOW_EVERY = 0"
WITHOUT_RICH = f"{SLOW}; sys.modules['rich'] = sys.modules['rich.console'] = None"


@posix
@pytest.mark.slow
@pytest.mark.parametrize(("prelude", "shown"), [(SLOW, "━"), (WITHOUT_RICH, "\r600 of 600 users imported")])
def test_long_work_shows_how_far_it_is_at_a_terminal(run, url, tmp_path, prelude, shown):
    (tmp_path / "players.jsonl").write_bytes(b"".join(line(number, number) for number in range(600)))
    with Terminal("import", url, "players.jsonl", prelude=prelude) as terminal:
        done = terminal.end()
    assert done.status == 0
    assert shown in done.err
    assert "imported 600, refused 0" in done.err
    with Terminal("export", url, prelude=prelude) as terminal:
        done = terminal.end()
    assert len(done.lines) == 600, "stdout has the lines, and nothing else"
    assert "users exported" in done.err.rpartition("exported 600, left out 0")[0]


@posix
@pytest.mark.slow
def test_short_work_shows_nothing_but_its_end(run, url, tmp_path):
    (tmp_path / "players.jsonl").write_bytes(line("ann", 1))
    with Terminal("import", url, "players.jsonl") as terminal:
        assert terminal.end().err == "imported 1, refused 0\r\n"


# Interrupts


def wait_until(seconds: float, test: Any) -> None:
    deadline = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.01)


def count_users(path: Path) -> int:
    if not path.exists():
        return 0
    with closing(sqlite3.connect(path)) as connection:
        try:
            return connection.execute("SELECT count(*) FROM cagey_sessions WHERE body IS NOT NULL").fetchone()[0]
        except sqlite3.OperationalError:
            return 0  # the table is not made yet


@posix
@pytest.mark.slow
def test_an_interrupted_import_says_what_it_has_written(run, url, tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*COMMAND, "import", url, "-"], env=ENVIRONMENT, **pipes) as process:
        process.stdin.write(b"".join(line(number, number) for number in range(300)))
        process.stdin.flush()
        wait_until(20, lambda: count_users(tmp_path / "players.db") == 200)
        process.send_signal(signal.SIGINT)
        process.wait(20)
        assert process.stderr.read() == b"200 users had been written by then, and stay\n"
    assert process.returncode == 130
    assert run("stats", url).json["users"] == 200
    assert run("import", url, "-", stdin=line("ann", 1)).status == 0, "the file is free again"


@posix
@pytest.mark.slow
def test_a_batch_that_is_being_written_is_finished_before_an_interrupt_ends_it(run, url, tmp_path):
    (tmp_path / "players.jsonl").write_bytes(b"".join(line(number, number) for number in range(300)))
    code = f"""
import asyncio, sys
from cagey_sessions import cli
from cagey_sessions.stores import SQLiteStore
save_many = SQLiteStore.save_many
async def slow(self, records):
    print("saving", flush=True)
    while not any(task.cancelling() for task in asyncio.all_tasks()):
        await asyncio.sleep(0.01)
    return await save_many(self, records)
SQLiteStore.save_many = slow
sys.exit(cli.main(["store", "import", {url!r}, "players.jsonl"]))
"""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"saving\n"
        process.send_signal(signal.SIGINT)
        process.wait(20)
        assert process.stderr.read() == b"200 users had been written by then, and stay\n"
    assert process.returncode == 130
    assert run("stats", url).json["users"] == 200
    with closing(sqlite3.connect("players.db")) as connection:
        assert connection.execute("SELECT count(*) FROM cagey_sessions WHERE NOT released").fetchone() == (0,)


@posix
@pytest.mark.slow
def test_an_interrupted_export_leaves_no_file(run, url, tmp_path):
    put(url, ("ann", b"1"))
    code = f"""
import asyncio, signal, sys
from cagey_sessions import cli
from cagey_sessions.stores import SQLiteStore
scan = SQLiteStore.scan
async def slow(self):
    async for each in scan(self):
        yield each
        print("there", flush=True)
        await asyncio.sleep(60)
SQLiteStore.scan = slow
sys.exit(cli.main(["store", "export", {url!r}, "players.jsonl"]))
"""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"there\n"
        process.send_signal(signal.SIGINT)
        process.wait(20)
        assert process.stderr.read() == b""
    assert process.returncode == 130
    assert sorted(each.name for each in tmp_path.iterdir()) == ["players.db", "players.db.lock"]


@posix
@pytest.mark.slow
def test_whoever_reads_an_export_may_stop(run, url):
    put(url, *[(number, b'"%b"' % (b"x" * 1000)) for number in range(3000)])
    with subprocess.Popen(
        [*COMMAND, "export", url], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline().startswith(b'{"user_id":0,')
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 2


# The page


SESSIONS = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
def test_the_page_shows_what_a_shell_shows(url, tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    put(url, ("ann", b'{"gold":10,"bag":["rope"]}'), (7, b'{"gold":7}'))
    session = SESSIONS.findall((ROOT / "docs" / "operations.md").read_text(encoding="utf-8"))[number]
    tool = f'cagey-sessions() {{ {sys.executable} -W error -m cagey_sessions "$@"; }}\n'
    shown = ""
    for command in re.findall(r"^\$ (.*)$", session, re.MULTILINE):
        done = subprocess.run(
            ["bash", "-c", tool + command],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        shown += f"$ {command}\n{done.stdout}"
    assert shown == session


def test_every_command_of_the_page_is_one_that_there_is(run):
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    named = re.findall(r"cagey-sessions store (\w+)", page)
    assert set(named) == set(TOOLS)
    for name, flags in re.findall(r"^cagey-sessions store (\w+) +URL (.*?)   ", page, re.MULTILINE):
        usage = run(name, "--help").out.partition("\n\n")[0]
        for flag in re.findall(r"--\w+", flags):
            assert f"[{flag}]" in usage
