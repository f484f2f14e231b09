"""What only a process of its own shows: exits, signals, forks, and what lands on stderr."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import weakref

import pytest

import support
from cagey_sessions import SessionManager
from cagey_sessions.stores import MemoryStore
from support import Db, turns

PRELUDE = """
import asyncio, gc, os, signal, sys, threading
from cagey_sessions import *

saved = []

async def begin(**options):
    manager = SessionManager(**{"interval": "1h", **options})
    manager.on("persist_user_data", lambda session: saved.append(session.user_id))
    for user_id in range(3):
        session = await manager.create(str(user_id))
        await session.set_user(user_id, {"gold": user_id})
    return manager
"""


def python(script: str, *, status: int = 0, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    return support.python(script, PRELUDE, status=status, timeout=timeout)


def test_all_is_saved_when_run_returns_after_destroy():
    done = python(
        """
        async def main():
            manager = await begin()
            await manager.destroy(True)
        asyncio.run(main())
        print(saved)
        """
    )
    assert done.stdout == "[0, 1, 2]\n"
    assert done.stderr == ""


def test_a_forgotten_destroy_warns_with_the_number_of_users():
    done = python(
        """
        async def main():
            await begin()
        asyncio.run(main())
        """
    )
    assert "unsaved users: 3" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    ["interval=None, persist_on=['shutdown']", "interval='10s'", "interval=None"],
    ids=["events", "timer", "neither"],
)
def test_a_manager_that_is_only_dropped_warns_too(options):
    done = python(
        f"""
        async def main():
            await begin({options})
            gc.collect()
            print("dropped", file=sys.stderr)
        asyncio.run(main())
        """
    )
    lines = done.stderr.splitlines()
    assert sorted(lines) == ["dropped", lines[lines.index("dropped") - 1]]
    assert any("unsaved users: 3" in line for line in lines)


def test_a_manager_that_never_saves_does_not_warn():
    done = python(
        """
        async def main():
            manager = SessionManager()
            session = await manager.create()
            await session.set_user(1, {})
        asyncio.run(main())
        """
    )
    assert done.stderr == ""


@pytest.mark.parametrize("attempt", range(6))  # what is thrown away depends on the order of a set of tasks
def test_a_loop_that_ends_in_the_middle_of_saves_and_of_a_drain_says_so_and_nothing_else(attempt):
    done = python(
        """
        async def main(drain):
            manager = await begin()
            manager.on("persist_user_data", lambda session: asyncio.sleep(60))
            for session in manager.sessions():
                task = asyncio.create_task(session.persist_now())
            if drain:
                task = asyncio.create_task(manager.destroy(True))
            await asyncio.sleep(0.01)
        asyncio.run(main(False))
        asyncio.run(main(True))
        gc.collect()
        """
    )
    assert done.stderr.count("unsaved users: 3") == 2
    assert "Traceback" not in done.stderr
    assert "never" not in done.stderr.replace("was never awaited", "")


def test_signal_handlers_are_left_alone():
    done = python(
        """
        seen = []
        signal.signal(signal.SIGTERM, lambda *_: seen.append("mine"))
        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
        async def main():
            manager = await begin()
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0)
            await manager.destroy(True)
        asyncio.run(main())
        print(seen, before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)])
        """
    )
    assert done.stdout == "['mine'] True\n"


@pytest.mark.guarantee("I28")
@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
def test_a_forked_child_can_neither_use_nor_warn_about_the_manager():
    done = python(
        """
        async def main():
            manager = await begin()
            child = os.fork()
            if child == 0:
                try:
                    manager.find_by_key("1")
                except WrongLoopError as error:
                    print("refused", flush=True)
                os._exit(0)
            os.waitpid(child, 0)
            assert manager.find_by_key("1") is not None
            await manager.destroy(True)
        asyncio.run(main())
        """
    )
    assert done.stdout == "refused\n"
    assert done.stderr == ""


async def test_a_manager_without_references_goes_on_saving(clock, store):
    """It has users, and an interval: somebody may be playing."""

    async def forget() -> weakref.ref[object]:
        manager = SessionManager(store=store, clock=clock, interval="30s")
        session = await manager.open("ann", default={"n": 0})
        session.user_data["n"] = 1
        return weakref.ref(session)

    session = await forget()
    gc.collect()
    await clock.advance("31s")
    assert store.stored("ann") == {"n": 1}
    left = session()
    assert left is not None and left.alive
    left.user_data["n"] = 2
    del left
    gc.collect()
    await clock.advance("31s")
    assert store.stored("ann") == {"n": 2}
    await session().destroy()


def test_a_manager_without_references_ends_with_its_loop(caplog):
    async def forget() -> weakref.ref[object]:
        manager = SessionManager(store=MemoryStore(), interval="1h")
        session = weakref.ref(await manager.open("ann", default={}))
        del manager
        await asyncio.sleep(0)
        gc.collect()
        assert session() is not None
        assert not caplog.records
        return session

    session = asyncio.run(forget())
    gc.collect()
    assert session() is None
    assert [record.message[:16] for record in caplog.records] == ["unsaved users: 1"]


def test_a_listener_that_ends_the_process_can():
    done = python(
        """
        async def main():
            manager = await begin()
            manager.on("persist_user_data", lambda session: sys.exit(3))
            await manager.persist_all_user_data()
        asyncio.run(main())
        """,
        status=3,
    )
    assert "unsaved users: 3" in done.stderr


@pytest.mark.guarantee("I26")
@pytest.mark.slow
def test_twenty_thousand_calls_leave_nothing_behind():
    done = python(
        """
        async def main():
            manager = await begin()
            session = manager.find_by_key("1")
            manager.on("persist_user_data", lambda session: saved.clear())
            async def calls(saves, lives):
                for _ in range(saves):
                    await session.persist_now()
                for _ in range(lives):
                    other = await manager.create("x")
                    await other.start()
                    await other.set_user("x", {})
                    await other.destroy()
            async def counts():
                await asyncio.sleep(0.01)
                gc.collect()
                return len(gc.get_objects()), sys.getallocatedblocks()
            await calls(1000, 1000)
            before = await counts()
            await calls(20_000, 5_000)
            after = await counts()
            print(after[0] - before[0], after[1] - before[1])
            await manager.destroy()
        asyncio.run(main())
        """,
        timeout=120,
    )
    objects, blocks = map(int, done.stdout.split())
    assert objects < 200
    assert blocks < 500


def test_a_claim_under_way_in_a_loop_that_is_thrown_away_raises_nothing_of_ours():
    done = python(
        """
        from cagey_sessions.stores import MemoryStore

        class Hanging(MemoryStore):
            async def claim_many(self, user_ids, owner):
                await asyncio.Event().wait()

        async def main(manager):
            await manager.__aenter__()
            session = await manager.create()
            manager.login = asyncio.ensure_future(session.login("ann"))
            await asyncio.sleep(0.05)

        loop = asyncio.new_event_loop()
        manager = SessionManager(store=Hanging())
        loop.run_until_complete(main(manager))
        del loop, manager
        gc.collect()
        """
    )
    assert "Task was destroyed" in done.stderr, "asyncio's own word for it"
    assert "RuntimeError" not in done.stderr


def test_without_its_core_the_package_says_what_to_do():
    done = support.python("import sys; sys.modules['cagey_sessions._core'] = None; import cagey_sessions", status=1)
    said = done.stderr.splitlines()[-1]
    assert said.startswith("ImportError: the compiled core of cagey-sessions cannot be loaded (")
    assert "pip install -e ." in said


async def test_the_warning_comes_when_the_last_session_goes_not_when_the_manager_object_does(caplog, clock):
    caplog.set_level(logging.WARNING)
    db = Db(clock)

    async def begin():
        manager = SessionManager(clock=clock)
        manager.on("persist_user_data", db.save)
        return await manager.create()

    session = await begin()
    gc.collect()
    await session.set_user(1, {})
    assert "unsaved" not in caplog.text
    del session
    await turns()
    gc.collect()
    assert "unsaved users: 1" in caplog.text
