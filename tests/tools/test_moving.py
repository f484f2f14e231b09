"""Exports and imports: what goes out comes in the same, and what cannot come in is refused by name."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import time

import orjson
import pytest

from cagey_sessions import SessionManager
from cagey_sessions.stores import SQLiteStore, open_store
from cagey_sessions.testing.conformance.values import ODD_IDS
from support import made_by_another_user
from tools.running import COMMAND, ENVIRONMENT, TOOLS, Done, damage, line, posix, postgres, put, tool, users

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
    damage("ann", '{\n "b": 1.50,\r\n "a": 1E2,\n "c": "\\n"}')
    done = run("export", url)
    assert done.out.count("\n") == 1
    assert done.out.endswith('"body":{  "b": 1.50,   "a": 1E2,  "c": "\\n"}}\n')


def test_a_damaged_body_is_left_out_by_name(run, url):
    put(url, ("ann", b"1"), ("bob", b"2"))
    damage("ann", "{")
    done = run("export", url)
    assert (done.status, users(done)) == (1, {"bob": 2})
    assert "left out: the record of user 'ann' cannot be read" in done.err
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


@posix
def test_a_link_that_another_user_has_made_is_not_replaced_through(run, url, tmp_path, monkeypatch):
    put(url, ("ann", b"1"))
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "players.jsonl").symlink_to(tmp_path / "precious")
    made_by_another_user(tmp_path / "players.jsonl", monkeypatch)
    done = run("export", url, "players.jsonl", "--force")
    assert done.status == 2 and "another user" in done.err
    assert (tmp_path / "precious").read_text() == "precious"


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


def test_after_the_highest_version_of_an_import_there_is_room_for_saves(run, anywhere):
    assert run("import", anywhere, "-", stdin=line("ann", {"gold": 0}, version=2**52)).status == 0

    async def play() -> None:
        async with SessionManager(store=open_store(anywhere)) as manager:
            session = await manager.open("ann")
            for gold in (1, 2, 3):
                session.user_data["gold"] = gold
                receipt = await session.persist_now()
                assert (receipt.version, receipt.changed) == (2**52 + gold, True)

    asyncio.run(play())
    assert users(run("export", anywhere)) == {"ann": {"gold": 3}}


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
    b'{"user_id":"bob","body":1,"version":9007199254740991}': "version is not a whole number from 1 to 45035",
    b'{"user_id":"bob","body":1,"version":4503599627370497}': "version",
    b'{"user_id":"bob","body":1,"version":18446744073709551616}': "the int at byte 36 does not fit into 64 bits",
    b'{"user_id":"bob","body":1,"schema":-1}': "schema",
    b'{"user_id":"bob","body":1,"schema":2147483648}': "schema",
    b'{"user_id":"bob","body":1,"saved_at":"today"}': "saved_at",
    b'{"user_id":"bob","body":1,"shcema":1}': "did you mean 'schema'",
    b'{"user_id":"ann","body":2}': "line 1 already",
    b'{"user_id":"bob","body":%b1%b}' % (b"[" * 201, b"]" * 201): "nested",
    b'{"user_id":"bob","body":[9223372036854775808]}': "64",
    b'{"user_id":"bob","body":[18446744073709551616]}': "the int at byte 25 does not fit into 64 bits",
    b'{"user_id":"bob","body":{"gold":1e-999}}': "the number at byte 32 has more digits, or is smaller, than a float",
    b'{"user_id":"bob","body":{"gold":1,"gold":2}}': "an object has two members of one name",
    b'{"user_id":"bob","body":1,"user_id":"cleo"}': "an object has two members of one name",
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
        monkeypatch.setattr(
            "cagey_sessions.stores.postgres.store.text_of", lambda body: None if len(body) > 1000 else "1"
        )
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
