"""What is unsaved when a process exits without an end of its manager is spilled, and saved by the next process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest

import cagey_sessions
from cagey_sessions import read_snapshot
from support import UNHURRIED, inside, turns

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cagey_sessions.__file__).parents[1])}


PRELUDE = """
import asyncio, atexit, logging, os, sys, threading
from cagey_sessions import *
from cagey_sessions.stores import *

class Flaky(SQLiteStore):
    down = False
    async def save_many(self, records):
        if self.down:
            await asyncio.sleep(60)
        return await super().save_many(records)

store = Flaky("players.db")
manager = SessionManager(store=store, spill="spill")

async def play():
    ann = await manager.open("ann", default={"gold": 0})
    ann.user_data["gold"] = 1
    await ann.persist_now()
    ann.user_data["gold"] = 2
    bob = await manager.open("bob", default={"gold": 5})
    eve = await manager.open("eve", default={"gold": 6})
    await eve.persist_now()
    return ann
"""


def python(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    code = UNHURRIED + PRELUDE + textwrap.dedent(script)
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error::RuntimeWarning", "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=ENVIRONMENT,
        timeout=60,
        check=False,
    )


ENDINGS = {
    "a forgotten destroy": "asyncio.run(play())",
    "dropped": "asyncio.run(play()); del manager, store; import gc; gc.collect()",
    "sys.exit": """
        async def main():
            await play()
            sys.exit(3)
        asyncio.run(main())
        """,
    "an exception": """
        async def main():
            await play()
            1 / 0
        asyncio.run(main())
        """,
    "in the middle of a save": """
        async def main():
            ann = await play()
            store.down = True
            task = asyncio.create_task(ann.persist_now())
            await asyncio.sleep(0.05)
        asyncio.run(main())
        """,
    "in the middle of a drain": """
        async def main():
            ann = await play()
            store.down = True
            task = asyncio.create_task(manager.destroy())
            await asyncio.sleep(0.05)
        asyncio.run(main())
        """,
    "another thread": "thread = threading.Thread(target=lambda: asyncio.run(play())); thread.start(); thread.join()",
    "a child that was forked": """
        async def main():
            await play()
            if os.fork() == 0:
                atexit._run_exitfuncs()
                os._exit(os.path.exists("spill"))
            os.wait()
        asyncio.run(main())
        """,
}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_unsaved_when_the_process_exits_is_spilled_and_saved_by_the_next(tmp_path, ending):
    if ending == "a child that was forked" and not hasattr(os, "fork"):
        pytest.skip("there is no fork here")
    done = python(tmp_path, ENDINGS[ending])
    assert "unsaved at exit: 2 users are in" in done.stderr, done.stderr
    assert {entry.user_id: entry.body for entry in read_snapshot(tmp_path / "spill").entries} == {
        "ann": b'{"gold":2}',
        "bob": b'{"gold":5}',
    }
    done = python(
        tmp_path,
        """
        async def main():
            async with manager:
                print(sorted(manager.spill_report.replayed), manager.spill_report.conflicts)
                print([await manager.read(user_id) for user_id in ("ann", "bob", "eve")])
        asyncio.run(main())
        print(os.path.exists("spill"))
        """,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["['ann', 'bob'] ()", "[{'gold': 2}, {'gold': 5}, {'gold': 6}]", "False"]


@pytest.mark.slow
def test_a_process_that_ends_as_it_should_spills_nothing(tmp_path):
    done = python(
        tmp_path,
        """
        async def main():
            async with manager:
                await play()
        asyncio.run(main())
        print(os.path.exists("spill"))
        """,
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


async def test_a_manager_that_has_closed_is_not_kept_for_the_exit(cluster):
    manager = await cluster.start()
    life = weakref.ref(inside(manager))
    await manager.open("ann", default={})
    await manager.destroy()
    del manager
    cluster.store = None
    cluster.clock._timers.clear()  # cancelled ones, which a loop's own clock would have let go of
    await turns()
    gc.collect()
    assert life() is None
