"""A server that forks after its manager is made: preloading workers, `multiprocessing`, daemons; on every store."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

import cagey_sessions
from cagey_sessions import read_snapshot
from support import POSTGRES, REDIS, drop_schema, server_answers

# a fork is what this is about, and Windows has none
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")]

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cagey_sessions.__file__).parents[1])}

# the manager is made at import, as by a server that loads its program before it forks its workers
PROGRAM = """
import asyncio, json, multiprocessing, os, sys
from cagey_sessions import *
from cagey_sessions.stores import *

manager = SessionManager(store=open_store(os.environ["URL"]))

async def play(has, done):
    told = {"acknowledged": 0, "refused": None, "owner": None}
    try:
        async with manager:
            session = await manager.open("ann", default={"gold": 0})
            for _ in range(5):
                session.user_data["gold"] += 1
                await session.persist_now()
                told["acknowledged"] += 1
            os.write(has, b"x")
            await asyncio.to_thread(os.read, done, 1)
    except (OwnedElsewhereError, StoreInUseError) as refused:
        told["refused"] = type(refused).__name__
        os.write(has, b"x")
    told["owner"] = manager._server.owner
    return told

def work(name, has, done):
    for each in (has, done):
        os.set_inheritable(each, True)
    with open(name, "w") as file:
        json.dump(asyncio.run(play(has, done)), file)

def start_by_os_fork(*args):
    pid = os.fork()
    if pid:
        return lambda: os.waitpid(pid, 0)
    try:
        work(*args)
    finally:
        os._exit(0)

def start_by_multiprocessing(*args):
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    return process.join

def two_workers_want_one_user(start):
    ends = []
    for name in ("one", "two"):
        (here, has), (done, end) = os.pipe(), os.pipe()
        ends.append((end, start(name, has, done)))
        os.close(has)
        os.read(here, 1)  # it has the user, or was refused
    for end, join in ends:
        os.write(end, b"x")
        join()
"""


@pytest.fixture(params=["sqlite", "postgres", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a store that nobody else uses."""
    name = f"cagey_{uuid.uuid4().hex}"
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/players.db"
    elif request.param == "postgres":
        if not server_answers(POSTGRES):
            pytest.skip("there is no PostgreSQL here")
        yield f"{POSTGRES}{'&' if '?' in POSTGRES else '?'}schema={name}"
        asyncio.run(drop_schema(name))
    else:
        if not server_answers(REDIS):
            pytest.skip("there is no Redis here")
        yield f"{REDIS}{'&' if '?' in REDIS else '?'}prefix={name}:"
        with redis.Redis.from_url(REDIS) as client:
            for key in client.scan_iter(f"{name}:*"):
                client.delete(key)


def run(script: str, folder: Path, url: str = "memory:") -> subprocess.CompletedProcess[str]:
    """Run a program of several processes; what it prints is of all of them."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=ENVIRONMENT | {"URL": url},
        timeout=60,
        check=False,
    )


@pytest.mark.guarantee("I20")
@pytest.mark.parametrize("start", ["start_by_os_fork", "start_by_multiprocessing"])
def test_a_user_is_on_one_of_two_workers_that_share_a_manager_made_before_the_fork(url, start, tmp_path):
    done = run(f"two_workers_want_one_user({start})", tmp_path, url)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert (one["acknowledged"], one["refused"]) == (5, None), done.stderr
    assert (two["acknowledged"], two["refused"]) == (
        0,
        "StoreInUseError" if url.startswith("sqlite") else "OwnedElsewhereError",
    )
    assert one["owner"] != two["owner"]


def test_workers_that_are_spawned_have_a_manager_each(url, tmp_path):
    (tmp_path / "server.py").write_text(
        PROGRAM.replace('get_context("fork")', 'get_context("spawn")')
        + """
def spawned(name):
    with open(name, "w") as file:
        json.dump(asyncio.run(play(os.open(os.devnull, os.O_WRONLY), os.open(os.devnull, os.O_RDONLY))), file)

if __name__ == "__main__":
    for name in ("one", "two"):
        process = multiprocessing.get_context("spawn").Process(target=spawned, args=(name,))
        process.start()
        process.join()
"""
    )
    done = subprocess.run(
        [sys.executable, "server.py"],
        cwd=tmp_path,
        env=ENVIRONMENT | {"URL": url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert one["acknowledged"] == two["acknowledged"] == 5
    assert one["owner"] != two["owner"]


EXITS = {
    "a daemon": """
        if os.fork():
            os.wait()
            os._exit(0)
        asyncio.run(crash())
        """,
    "a daemon that forks twice": """
        for _ in range(2):
            if os.fork():
                os.wait()
                os._exit(0)
        asyncio.run(crash())
        """,
    "a worker of multiprocessing": """
        process = multiprocessing.get_context("fork").Process(target=lambda: asyncio.run(crash()))
        process.start()
        process.join()
        """,
}


@pytest.mark.parametrize("how", EXITS)
def test_a_process_forked_after_its_manager_was_made_warns_and_spills_at_its_exit(how, tmp_path):
    done = run(
        textwrap.dedent(
            """
            manager = SessionManager(store=SQLiteStore("players.db"), spill="spill")

            async def crash():
                await manager.__aenter__()
                ann = await manager.open("ann", default={"gold": 0})
                await ann.persist_now()
                ann.user_data["gold"] = 7
                raise SystemExit(1)
            """
        )
        + textwrap.dedent(EXITS[how]),
        tmp_path,
    )
    assert [(entry.user_id, entry.body) for entry in read_snapshot(tmp_path / "spill").entries] == [
        ("ann", b'{"gold":7}')
    ]
    assert done.stderr.count("unsaved users: 1;") == 1, done.stderr


@pytest.mark.guarantee("I28")
def test_a_manager_that_was_opened_before_a_fork_is_refused_in_the_child_on_every_loop(tmp_path):
    done = run(
        """
        def refused(call):
            try:
                call()
            except WrongLoopError:
                return "refused"
            return "taken"

        async def open_ann():
            return await manager.open("ann", default={"gold": 0})

        loop = asyncio.new_event_loop()
        ann = loop.run_until_complete(open_ann())
        if not os.fork():
            told = [
                refused(lambda: asyncio.run(open_ann())),
                refused(lambda: loop.run_until_complete(open_ann())),
                refused(lambda: loop.run_until_complete(ann.persist_now())),
                refused(lambda: loop.run_until_complete(manager.destroy())),
                refused(lambda: manager.find_by_user("ann")),
            ]
            print(told, flush=True)
            os._exit(0)
        os.wait()
        ann.user_data["gold"] = 1
        print(loop.run_until_complete(ann.persist_now()).changed, flush=True)
        loop.run_until_complete(manager.destroy())
        loop.close()
        """,
        tmp_path,
    )
    assert done.stdout.splitlines() == [str(["refused"] * 5), "True"], done.stderr
    assert done.stderr == ""
