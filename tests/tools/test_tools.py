"""The tools for a store on the command line: arguments, figures, one user, and what the page shows of them.

On SQLite each of them; on PostgreSQL and Redis, where they are there, what only a shared store has.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cagey_sessions.stores import open_store
from cagey_sessions.testing.store_conformance import claim, opened
from tools.running import ENVIRONMENT, TOOLS, damage, line, posix, postgres, put, users

ROOT = Path(__file__).parents[2]


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


def test_a_damaged_body_is_shown_as_text(run, url):
    put(url, ("ann", b"1"))
    damage("ann", '{"gold":')
    done = run("show", url, "ann")
    assert done.status == 1
    assert done.json["damaged_body"] == '{"gold":'
    assert "not JSON" in done.err


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
