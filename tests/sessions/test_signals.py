"""`run_until_signal` in processes of their own, on both loops."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from typing import Any

import pytest

from cagey_sessions import DurationError, SessionManager, UsageError
from support import python

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nobody can send a signal there")

PRELUDE = """
import asyncio, gc, logging, os, signal, sys, threading, time
import uvloop
from cagey_sessions import *
from cagey_sessions.stores import MemoryStore

LOOP = None  # set by the test
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
logging.getLogger("asyncio").setLevel(logging.WARNING)
backing = MemoryStore().backing

class Slow(MemoryStore):
    delay = 0.0

    async def save_many(self, records):
        await asyncio.sleep(self.delay)
        return await super().save_many(records)

class Dead(MemoryStore):
    async def save_many(self, records):
        raise StoreUnavailableError("dead")

def shot(number=signal.SIGTERM, after=0.0):
    '''Have somebody else send us a signal: the loop sleeps in its select by then.'''
    threading.Timer(0.05 + after, os.kill, (os.getpid(), number)).start()

def stored():
    return sum(row.record is not None for row in backing.rows.values())

def handlers():
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

async def fill(manager, users=200):
    for user_id in range(users):
        await manager.open(user_id, default={"gold": user_id})

def run(main):
    with asyncio.Runner(loop_factory=LOOP) as runner:
        return runner.run(main)
"""


@pytest.fixture(params=["asyncio.new_event_loop", "uvloop.new_event_loop"], ids=["asyncio", "uvloop"])
def script(request: pytest.FixtureRequest) -> Any:
    """Run a script on one of the loops and expect its exit status."""

    def run(text: str, *, status: int = 0, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        return python(text, PRELUDE + f"\nLOOP = {request.param}\n", status=status, timeout=timeout)

    return run


@pytest.mark.guarantee("I22")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_everybody_and_ends_with_0(script, number):
    done = script(
        f"""
        before = handlers()
        async def main():
            async with SessionManager(store=MemoryStore(backing)) as manager:
                await fill(manager)
                inside = handlers()
                shot(signal.{number})
                status = await manager.run_until_signal()
                print(inside == handlers())
                return status
        status = run(main())
        print(stored(), before == handlers())
        raise SystemExit(status)
        """
    )
    assert done.stdout == "True\n200 True\n"
    assert f"INFO {number}: the manager is being destroyed" in done.stderr
    assert "INFO the manager has ended after" in done.stderr
    assert "200 users saved" in done.stderr
    assert "ERROR" not in done.stderr


def test_a_signal_in_the_middle_of_saves(script):
    done = script(
        """
        async def main():
            store = Slow(backing)
            store.delay = 0.2
            async with SessionManager(store=store, interval="50ms") as manager:
                await fill(manager)
                for session in manager.sessions():
                    session.user_data["gold"] = -1
                shot()
                return await manager.run_until_signal()
        status = run(main())
        print({row.record.value()["gold"] for row in backing.rows.values()}, stored())
        raise SystemExit(status)
        """
    )
    assert done.stdout == "{-1} 200\n"


@pytest.mark.guarantee("I22")
@pytest.mark.parametrize(("store", "deadline"), [("Dead", "0s"), ("Dead", "1s"), ("Slow", "500ms")])
def test_a_store_that_does_not_take_it_in_time_ends_with_1_and_names_who(script, store, deadline):
    done = script(
        f"""
        async def main():
            store = {store}(backing)
            store.delay = 30
            async with SessionManager(store=store) as manager:
                await fill(manager, 20)
                shot()
                began = time.monotonic()
                try:
                    return await manager.run_until_signal(deadline="{deadline}")
                finally:
                    print(time.monotonic() - began < 5)
        raise SystemExit(run(main()))
        """,
        status=1,
    )
    assert done.stdout == "True\n"
    assert "0 users saved, 20 not: " in done.stderr
    assert "Traceback" not in done.stderr
    assert "destroyed but it is pending" not in done.stderr


def test_a_slow_store_with_time_enough_ends_with_0(script):
    done = script(
        """
        async def main():
            store = Slow(backing)
            store.delay = 0.3
            async with SessionManager(store=store, max_in_flight=1) as manager:
                await fill(manager, 500)
                shot()
                return await manager.run_until_signal(deadline="10s")
        status = run(main())
        print(stored())
        raise SystemExit(status)
        """
    )
    assert done.stdout == "500\n"


@pytest.mark.guarantee("I22")
@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
def test_a_second_signal_is_logged_and_aborts_nothing(script, second):
    done = script(
        f"""
        async def main():
            store = Slow(backing)
            store.delay = 1
            async with SessionManager(store=store) as manager:
                await fill(manager, 10)
                shot(signal.SIGINT)
                shot(signal.{second}, 0.3)
                shot(signal.{second}, 0.6)  # later: two that wait for a busy process become one
                return await manager.run_until_signal()
        status = run(main())
        print(stored())
        raise SystemExit(status)
        """
    )
    assert done.stdout == "10\n"
    assert done.stderr.count(f"WARNING {second} while the manager is being destroyed: it goes on") == 2


def test_a_handler_of_the_host_is_called_and_put_back(script):
    done = script(
        """
        seen = []
        def mine(number, frame):
            seen.append(number)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, mine)
        async def main():
            async with SessionManager(store=MemoryStore(backing)) as manager:
                await fill(manager, 3)
                shot()
                return await manager.run_until_signal()
        status = run(main())
        print(seen == [signal.SIGTERM], handlers() == [mine, mine], status, stored())
        """
    )
    assert done.stdout == "True True 0 3\n"


def test_a_handler_of_the_hosts_loop_goes_on_working(script):
    done = script(
        """
        seen = []
        async def main():
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGTERM, seen.append, "loop")
            async with SessionManager(store=MemoryStore(backing)) as manager:
                await fill(manager, 3)
                before = handlers()
                shot()
                status = await manager.run_until_signal()
                after = handlers()
                shot()
                await asyncio.sleep(0.3)
            print(seen, before == after, status, stored())
        run(main())
        """
    )
    assert done.stdout == "['loop', 'loop'] True 0 3\n"


def test_what_ends_the_process_is_not_called_but_put_back(script):
    done = script(
        """
        async def main():
            loop = asyncio.get_running_loop()
            for number, handler in [(signal.SIGTERM, signal.SIG_IGN), (signal.SIGINT, signal.default_int_handler)]:
                signal.signal(number, handler)
            before = handlers()
            async with SessionManager(store=MemoryStore(backing)) as manager:
                await fill(manager, 3)
                shot(signal.SIGINT)
                shot(signal.SIGTERM, 0.01)
                status = await manager.run_until_signal()
                print(handlers() == before, status, stored())
        run(main())
        """
    )
    assert done.stdout == "True 0 3\n"


def test_a_handler_that_replaces_ours_meanwhile_stays(script):
    done = script(
        """
        theirs = lambda *_: None
        async def main():
            async with SessionManager(store=MemoryStore(backing)) as manager:
                waiting = asyncio.create_task(manager.run_until_signal())
                await asyncio.sleep(0.05)
                signal.signal(signal.SIGTERM, theirs)
                os.kill(os.getpid(), signal.SIGINT)
                print(await waiting, signal.getsignal(signal.SIGTERM) is theirs)
        run(main())
        """
    )
    assert done.stdout == "0 True\n"


def test_two_managers_hear_the_same_signal_and_leave_nothing(script):
    done = script(
        """
        before = handlers()
        async def main():
            slow = Slow(backing)
            slow.delay = 0.2
            async with SessionManager(store=slow) as one, SessionManager(store=MemoryStore()) as other:
                await fill(one, 3)
                await fill(other, 3)
                shot()
                print(await asyncio.gather(one.run_until_signal(), other.run_until_signal()))
        run(main())
        print(stored(), before == handlers())
        """
    )
    assert done.stdout == "[0, 0]\n3 True\n"


def test_somebody_elses_destroy_ends_the_wait(script):
    done = script(
        """
        async def main():
            async with SessionManager(store=Dead(backing)) as manager:
                await fill(manager, 3)
                before = handlers()
                waiting = asyncio.create_task(manager.run_until_signal())
                await asyncio.sleep(0.05)
                try:
                    await manager.destroy(deadline="100ms")
                except DrainError as error:
                    print(len(error.user_ids))
                print(await waiting, handlers() == before)
                print(await manager.run_until_signal())
        run(main())
        """
    )
    assert done.stdout == "3\n1 True\n1\n"


def test_a_destroy_without_saves_is_no_failure(script):
    done = script(
        """
        async def main():
            async with SessionManager(store=MemoryStore(backing), persist_on=[]) as manager:
                await fill(manager, 3)
                shot()
                return await manager.run_until_signal()
        status = run(main())
        print(status, stored())
        """
    )
    assert done.stdout == "0 0\n"


def test_without_a_store_the_listeners_save(script):
    done = script(
        """
        saved = []
        async def main(listens):
            manager = SessionManager(persist_on=["shutdown"])
            if listens:
                manager.on("persist_user_data", lambda session: saved.append(session.user_id))
            async with manager:
                session = await manager.create()
                await session.set_user(1, {})
                shot()
                return await manager.run_until_signal()
        print(run(main(True)), saved)
        print(run(main(False)), saved)
        """
    )
    assert done.stdout == "0 [1]\n1 [1]\n"
    assert "ERROR 1 users are not saved: nobody would perform this save" in done.stderr


def test_a_listener_that_raises_is_logged_and_no_failure(script):
    done = script(
        """
        async def main():
            manager = SessionManager(store=MemoryStore(backing))
            manager.on("destroy", lambda session: 1 / 0)
            async with manager:
                await fill(manager, 1)
                shot()
                return await manager.run_until_signal()
        print(run(main()), stored())
        """
    )
    assert done.stdout == "0 1\n"
    assert "ERROR at the end of the manager: listener main.<locals>.<lambda> of event 'destroy' raised" in done.stderr


def test_a_cancelled_wait_puts_the_handlers_back_and_ends_no_session(script):
    done = script(
        """
        async def main():
            async with SessionManager(store=MemoryStore(backing)) as manager:
                await fill(manager, 3)
                before = handlers()
                waiting = asyncio.create_task(manager.run_until_signal())
                await asyncio.sleep(0.05)
                changed = handlers() != before
                waiting.cancel()
                await asyncio.wait([waiting])
                print(changed, handlers() == before, len(manager))
        run(main())
        """
    )
    assert done.stdout == "True True 3\n"


def test_another_thread_is_refused_before_anything_changes(script):
    done = script(
        """
        async def main():
            manager = SessionManager(store=MemoryStore(backing))
            before = handlers()
            try:
                await manager.run_until_signal()
            except UsageError as error:
                print(error, before == handlers())
        thread = threading.Thread(target=run, args=(main(),))
        thread.start()
        thread.join()
        """
    )
    assert done.stdout == "signals are handed to the main thread only: call this in a loop that runs there True\n"


def test_a_loop_that_is_closed_hears_no_signal(script):
    done = script(
        """
        async def main():
            manager = SessionManager(store=MemoryStore(backing))
            waiting = asyncio.create_task(manager.run_until_signal())
            await asyncio.sleep(0.01)
            before = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda *args: before(*args))
        run(main())
        os.kill(os.getpid(), signal.SIGTERM)
        print("alive")
        """
    )
    assert done.stdout == "alive\n"
    assert "Traceback" not in done.stderr


# A process that ends without it


def test_a_run_that_ends_in_the_middle_of_saves_names_the_number_and_makes_no_noise(script):
    done = script(
        """
        async def main():
            store = Slow(backing)
            store.delay = 10
            manager = SessionManager(store=store)
            await manager.__aenter__()
            await fill(manager, 7)
            saves = [asyncio.create_task(session.persist_now()) for session in manager.sessions()]
            await asyncio.sleep(0.05)
            print(manager.statistics().in_flight)
        run(main())
        gc.collect()
        """
    )
    assert done.stdout == "7\n"
    assert done.stderr.count("WARNING unsaved users: 7") == 1
    assert "Traceback" not in done.stderr
    assert "destroyed but it is pending" not in done.stderr
    assert "never" not in done.stderr.replace("was not called, or did not finish", "")


def test_an_interpreter_that_exits_with_live_sessions_names_their_number(script):
    done = script(
        """
        kept = []
        async def main():
            manager = SessionManager(store=MemoryStore(backing))
            await manager.__aenter__()
            await fill(manager, 7)
            kept.append(manager)
        run(main())
        print("over")
        sys.exit(3)
        """,
        status=3,
    )
    assert done.stdout == "over\n"
    assert done.stderr == (
        "WARNING unsaved users: 7; `await manager.destroy(persist=True)` was not called, or did not finish\n"
    )


# In this process


async def test_a_bad_deadline_is_refused_at_once():
    manager = SessionManager()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(DurationError):
        await manager.run_until_signal(deadline="soon")
    assert signal.getsignal(signal.SIGTERM) is before
    await manager.destroy()


def test_a_handler_that_is_not_pythons_is_left_alone(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    getsignal = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGINT else getsignal(number))

    async def main() -> None:
        with pytest.raises(UsageError, match="SIGINT has a handler that is not Python's"):
            await SessionManager().run_until_signal()

    asyncio.run(main())
    assert getsignal(signal.SIGTERM) is before
