"""Rows that no server could load: each tool names them, goes on with everybody else, and leaves them as they are."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from urllib.parse import parse_qs, urlsplit

import pytest
import redis

from support import REDIS, execute
from tools.running import damage, line, put, users

SAYS = "the record of user 'ann' is damaged, and is left as it is: its field version is"


def spoil(url: str, user_id: str) -> None:
    """Make the version of a user no number from 0 up."""
    place = parse_qs(urlsplit(url).query)
    if url.startswith("sqlite"):
        with closing(sqlite3.connect("players.db")) as connection, connection:
            connection.execute("UPDATE cagey_sessions SET version = 'x' WHERE user_id = ?", (user_id,))
    elif url.startswith("redis"):
        with redis.Redis.from_url(REDIS) as client:
            client.hset(f'{place["prefix"][0]}user:"{user_id}"', "version", "x")
    else:
        table = f"{place['schema'][0]}.cagey_sessions"
        asyncio.run(execute(f"UPDATE {table} SET version = -1 WHERE user_id = '\"{user_id}\"'"))


@pytest.fixture
def spoilt(run, anywhere):
    put(anywhere, ("ann", b'{"gold":1}'), ("bob", b'{"gold":2}'), ("cleo", b'{"gold":3}'))
    spoil(anywhere, "ann")
    return anywhere


def test_stats_count_it_apart_and_name_it(run, spoilt):
    done = run("stats", spoilt)
    assert done.status == 1
    assert done.err.startswith(f"passed over: {SAYS}")
    assert (done.json["users"], done.json["damaged"], done.json["schemas"]) == (2, 1, {"0": 2})


def test_an_export_leaves_it_out_by_name(run, spoilt):
    done = run("export", spoilt)
    assert (done.status, users(done)) == (1, {"bob": {"gold": 2}, "cleo": {"gold": 3}})
    assert done.err.startswith(f"left out: {SAYS}")
    assert done.err.endswith("exported 2, left out 1\n")


def test_show_says_what_is_wrong_and_shows_the_body(run, spoilt):
    done = run("show", spoilt, "ann")
    assert done.status == 1
    assert done.json == {"user_id": "ann", "damaged_body": '{"gold":1}'}
    assert SAYS in done.err
    assert run("show", spoilt, "bob").status == 0


@pytest.mark.parametrize("replace", [(), ("--replace",)], ids=["", "replace"])
def test_an_import_does_not_write_over_it(run, spoilt, replace):
    done = run("import", spoilt, "-", *replace, stdin=line("ann", 4) + line("dora", 5))
    assert done.status == 1
    assert done.err.startswith(f"refused: {SAYS}")
    assert done.err.endswith("imported 1, refused 1\n")
    assert users(run("export", spoilt)) == {"bob": {"gold": 2}, "cleo": {"gold": 3}, "dora": 5}
    assert run("show", spoilt, "ann").json["damaged_body"] == '{"gold":1}'


def test_erase_does_away_with_it(run, spoilt):
    done = run("erase", spoilt, "ann", "--yes")
    assert (done.status, SAYS in done.err) == (0, True)
    assert run("show", spoilt, "ann").err == "cagey-sessions: 'ann' is not stored\n"
    assert run("import", spoilt, "-", stdin=line("ann", 4)).status == 0
    assert users(run("export", spoilt))["ann"] == 4


def test_stats_go_on_where_the_time_of_a_row_is_missing(run, url):
    put(url, ("ann", b"1"), ("bob", b"2"))
    with closing(sqlite3.connect("players.db")) as connection, connection:
        connection.execute("UPDATE cagey_sessions SET saved_at = NULL WHERE user_id = 'ann'")
    done = run("stats", url)
    assert (done.status, done.json["users"], done.json["damaged"]) == (1, 1, 1)
    assert "user 'ann' is damaged, and is left as it is: its field saved_at is missing" in done.err


@pytest.mark.parametrize("body", ['{"gold":18446744073709551616}', '{"gold":1,"gold":2}', "[1e-999]"])
def test_an_export_leaves_out_a_body_that_no_server_could_load(run, url, body):
    put(url, ("ann", b"1"), ("bob", b"2"))
    damage("ann", body)
    done = run("export", url)
    assert (done.status, users(done)) == (1, {"bob": 2})
    assert done.err.startswith("left out: the record of user 'ann' cannot be read, and is left as it is: ")
    assert run("show", url, "ann").json["damaged_body"] == body
