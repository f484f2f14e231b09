"""One process at a time has the file of a `SQLiteStore`, and it is free when that has ended, however it did."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from cagey_sessions import StoreContractError, StoreInUseError, StoreLayoutError, StoreUnavailableError
from cagey_sessions.stores import Record, SQLiteStore
from cagey_sessions.stores.sqlite import store as sqlite
from cagey_sessions.testing.conformance.base import SAVED
from cagey_sessions.testing.store_conformance import claim, opened, record, save
from support import UNHURRIED, end_of_threads, turns
from support.watched_sqlite import Writer, connect_really, reading, saved

no_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")


@pytest.fixture
def store(path: Path) -> SQLiteStore:
    return SQLiteStore(path)


PRELUDE = """
import asyncio, os, sys
from cagey_sessions import *
from cagey_sessions.stores import *
path = sys.argv[1]
"""


def script(text: str, path: Path) -> list[str]:
    return [sys.executable, "-X", "dev", "-c", UNHURRIED + PRELUDE + textwrap.dedent(text), str(path)]


def python(text: str, path: Path) -> str:
    """What a script prints that ends well and says nothing on stderr."""
    done = subprocess.run(script(text, path), capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


HOLDER = """
async def main():
    await SQLiteStore(path).open()
    print("open", flush=True)
    sys.stdin.read()
asyncio.run(main())
"""


# One process has the file


async def test_a_second_store_in_this_process_is_refused(path, store):
    async with opened(store):
        await saved(store, 1)
        with pytest.raises(StoreInUseError) as caught:
            await SQLiteStore(path).open()
        assert caught.value.pid == os.getpid()
        assert f"in use in this very process ({os.getpid()})" in str(caught.value)
        assert (await store.load(1)) is not None, "the one that has it goes on"
        with pytest.raises(StoreContractError):
            await store.open()
        with pytest.raises(StoreInUseError):
            await SQLiteStore(path).open()
    async with opened(SQLiteStore(path)) as again:
        assert (await again.load(1)) is not None


@pytest.mark.slow
def test_a_second_process_is_refused_and_told_whose_it_is(path):
    async def hold() -> str:
        async with opened(SQLiteStore(path)):
            return await asyncio.to_thread(
                python,
                """
                async def main():
                    try:
                        await SQLiteStore(path).open()
                    except StoreInUseError as error:
                        print(error.pid)
                asyncio.run(main())
                """,
                path,
            )

    assert asyncio.run(hold()) == f"{os.getpid()}\n"


@pytest.mark.slow
@no_sigkill
def test_the_file_is_free_when_its_holder_was_killed(path):
    with subprocess.Popen(script(HOLDER, path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "open\n"

        async def refused() -> None:
            with pytest.raises(StoreInUseError) as caught:
                await SQLiteStore(path).open()
            assert caught.value.pid == holder.pid
            assert f"in use by process {holder.pid}" in str(caught.value)

        asyncio.run(refused())
        # another container may have a process of the very same id
        (path.parent / f"{path.name}.lock").write_text(str(os.getpid()), encoding="ascii")

        async def refused_as_another() -> None:
            with pytest.raises(StoreInUseError, match=f"in use by process {os.getpid()}"):
                await SQLiteStore(path).open()

        asyncio.run(refused_as_another())
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)

        async def granted() -> None:
            async with opened(SQLiteStore(path)) as store:
                assert (await claim(store)).granted

        asyncio.run(granted())


@pytest.mark.slow
# a fork is what this is about, and Windows has none
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_keeps_nothing_of_the_store(path):
    printed = python(
        """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside a thread is what this is about
        loop = asyncio.new_event_loop()
        store = SQLiteStore(path)
        loop.run_until_complete(store.open())
        ready, say_ready = os.pipe()
        end, say_end = os.pipe()
        child = os.fork()
        if not child:
            try:
                async def use():
                    try:
                        await asyncio.wait_for(store.load(1), 5)
                    except WrongLoopError:
                        os.write(say_ready, b"refused ")
                loop.run_until_complete(use())
                asyncio.run(use())
                loop.run_until_complete(store.close())
                os.write(say_ready, b".")
                os.read(end, 1)
            finally:
                os._exit(0)
        os.close(say_ready)
        said = b""
        while not said.endswith(b"."):
            more = os.read(ready, 100)
            assert more, "the child has failed"
            said += more
        print(said.decode())
        loop.run_until_complete(store.load(1))
        loop.run_until_complete(store.close())
        loop.run_until_complete(store.open())  # though the child lives
        print(os.waitpid(child, os.WNOHANG))
        loop.run_until_complete(store.close())
        loop.close()
        os.write(say_end, b".")
        os.waitpid(child, 0)
        """,
        path,
    )
    assert printed == "refused refused .\n(0, 0)\n"


async def test_the_file_is_free_after_a_failed_open(path):
    path.write_text("this is not a database, and long enough not to be taken for an empty one")
    for _ in range(2):
        with pytest.raises(StoreLayoutError):
            await SQLiteStore(path).open()
    path.unlink()
    async with opened(SQLiteStore(path)) as store:
        assert (await claim(store)).granted


async def test_a_store_whose_open_failed_may_try_again(path, store):
    path.mkdir()
    with pytest.raises(StoreLayoutError):
        await store.open()
    with pytest.raises(StoreUnavailableError):
        await store.load(1)
    await store.close()
    path.rmdir()
    async with opened(store):
        assert (await claim(store)).granted


class Gate:
    """Where the thread of a store stops, at the beginning of a statement, until it is let go."""

    def __init__(self, writer: Writer, statement: str) -> None:
        self._reached = threading.Event()
        self.go = threading.Event()
        writer.at[statement] = self._hold

    def _hold(self) -> None:
        self._reached.set()
        assert self.go.wait(60)

    async def is_reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, 20)


async def cancel_in_vain(work: asyncio.Future[Any]) -> None:
    for _ in range(3):
        work.cancel()
        await turns()
        assert not work.done(), "the thread is still at work"


async def test_the_file_is_free_after_an_open_that_was_cancelled_however_often(path, store, writer):
    gate = Gate(writer, "PRAGMA journal_mode")
    opening = asyncio.ensure_future(store.open())
    await gate.is_reached()
    await cancel_in_vain(opening)
    gate.go.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    async with opened(SQLiteStore(path)) as other:
        assert (await claim(other)).granted
    async with opened(store):
        assert (await claim(store)).granted


async def test_the_file_is_free_after_a_close_that_was_cancelled_however_often(path, store, writer):
    await store.open()
    epochs = await saved(store, 1)
    gate = Gate(writer, "COMMIT")
    call = asyncio.ensure_future(save(store, record(1, 2, epoch=epochs[1])))
    await gate.is_reached()
    closing = asyncio.ensure_future(store.close())
    await turns()
    await cancel_in_vain(closing)
    gate.go.set()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert await call == [SAVED]
    async with opened(SQLiteStore(path)) as other:
        assert (await other.load(1)).version == 2


async def test_a_disk_that_hangs_holds_up_a_cancelled_open_or_close_no_longer_than_it_may(
    path, store, writer, monkeypatch
):
    """The thread is left alone then, and lets go of the file when the disk answers."""
    monkeypatch.setattr(sqlite, "HANGING_PATIENCE", 0)
    gate = Gate(writer, "PRAGMA journal_mode")
    opening = asyncio.ensure_future(store.open())
    await gate.is_reached()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    gate.go.set()
    end_of_threads()
    await store.open()
    gate = Gate(writer, "SAVEPOINT")
    call = asyncio.ensure_future(claim(store))
    await gate.is_reached()
    closing = asyncio.ensure_future(store.close())
    await turns()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    gate.go.set()
    assert (await call).granted
    end_of_threads()
    async with opened(SQLiteStore(path)) as other:
        assert (await claim(other)).granted


def test_a_loop_that_is_closed_while_the_file_is_opened_leaves_it_free(path, store, writer, caplog):
    async def begin() -> asyncio.Future[None]:
        opening = asyncio.ensure_future(store.open())
        await gate.is_reached()
        return opening

    gate = Gate(writer, "PRAGMA journal_mode")
    loop = asyncio.new_event_loop()
    opening = loop.run_until_complete(begin())
    loop.close()
    gate.go.set()
    end_of_threads()
    del opening
    gc.collect()

    async def open_again() -> None:
        async with opened(store):
            assert (await claim(store)).granted

    asyncio.run(open_again())
    assert [each.getMessage().splitlines()[0] for each in caplog.records] == ["Task was destroyed but it is pending!"]


async def test_without_a_thread_there_is_an_error_and_another_attempt(store, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(StoreUnavailableError, match="thread"):
            await store.open()
    async with opened(store):
        assert (await claim(store)).granted


async def test_an_open_that_was_cancelled_and_fails_tells_nobody(path, store):
    """Not even the loop: a failure that nobody asks about would be logged as one that was overlooked."""
    path.write_text("this is not a database, and long enough not to be taken for an empty one")
    opening = asyncio.ensure_future(store.open())
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    path.unlink()
    async with opened(store):
        assert (await claim(store)).granted


# Its lock file


def make_pipe(lock: Path, precious: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("there are no named pipes here")
    os.mkfifo(lock)


NO_LOCK_FILES: dict[str, Callable[[Path, Path], Any]] = {
    "a link": lambda lock, precious: lock.symlink_to(precious),
    "a link to nothing": lambda lock, precious: lock.symlink_to(precious.parent / "nowhere"),
    "a second name of a file": lambda lock, precious: os.link(precious, lock),
    "a pipe": make_pipe,
}


@pytest.mark.parametrize("kind", NO_LOCK_FILES)
async def test_what_is_no_lock_file_is_refused_and_left_as_it_is(tmp_path, path, store, kind):
    """Whoever may make names in this folder has the server write to no file of its own."""
    await check_it_is_refused(store, tmp_path, kind, b"precious")


@pytest.mark.parametrize("content", [b" " * 30, b"\n", b"7" * 30, b"12 and more", b"\0" * 20], ids=repr)
async def test_a_file_that_is_almost_a_lock_file_is_refused_and_left_as_it_is(tmp_path, path, store, content):
    await check_it_is_refused(store, tmp_path, "a second name of a file", content)


async def check_it_is_refused(store: SQLiteStore, folder: Path, kind: str, content: bytes) -> None:
    precious, lock = folder / "precious", folder / "users.db.lock"
    precious.write_bytes(content)
    NO_LOCK_FILES[kind](lock, precious)
    before = sorted(os.listdir(folder))
    with pytest.raises(StoreLayoutError, match=r"users\.db\.lock"):
        await store.open()
    assert sorted(os.listdir(folder)) == before and precious.read_bytes() == content
    lock.unlink()
    async with opened(store):
        assert (await claim(store)).granted


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
async def test_a_link_in_place_of_a_file_of_sqlites_own_is_not_written_to(tmp_path, path, store, suffix):
    async with opened(store):
        await saved(store, 1)
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (tmp_path / f"users.db{suffix}").symlink_to(precious)
    with suppress(StoreUnavailableError):
        async with opened(store):
            await saved(store, 2)
    assert precious.read_bytes() == b"precious"


async def test_whose_it_was_is_replaced_as_a_whole_by_whose_it_is(tmp_path, path, store):
    (tmp_path / "users.db.lock").write_bytes(b"9" * 20)
    async with opened(store):
        with pytest.raises(StoreInUseError) as caught:
            await SQLiteStore(path).open()
        assert caught.value.pid == os.getpid()
    assert int((tmp_path / "users.db.lock").read_bytes()) == os.getpid()


# One file


@pytest.mark.parametrize("link", ["file", "folder", "relative"])
async def test_one_file_under_two_names_is_one_file(tmp_path, path, store, link, monkeypatch):
    if link == "file":
        other = tmp_path / "other.db"
        other.symlink_to(path)
    elif link == "folder":
        (tmp_path / "folder").symlink_to(tmp_path, target_is_directory=True)
        other = tmp_path / "folder" / path.name
    else:
        monkeypatch.chdir(tmp_path)
        other = Path(path.name)
    async with opened(store):
        await saved(store, 1)
        with pytest.raises(StoreInUseError):
            await SQLiteStore(other).open()
    async with opened(SQLiteStore(other)) as by_link:
        assert (await by_link.load(1)) is not None
        with pytest.raises(StoreInUseError):
            await store.open()


async def test_the_file_is_the_same_wherever_the_process_goes(tmp_path, path, monkeypatch, writer):
    monkeypatch.chdir(tmp_path)
    async with opened(SQLiteStore(path.name)) as store:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        await saved(store, 1)
        writer.connection.fail = "COMMIT"
        with pytest.raises(StoreUnavailableError):
            await store.load(1)
        assert (await store.load(1)) is not None, "on a new connection, too"
        assert not list((tmp_path / "elsewhere").iterdir())


async def test_others_may_read_meanwhile(path, store, writer):
    async with opened(store):
        await saved(store, 1, "x", body=b'{"gold":3,"bag":["sword"]}')
        found: list[Any] = []

        def read() -> None:
            with reading(path) as reader:
                query = (
                    "SELECT user_id, json_extract(body, '$.gold'), json_extract(body, '$.bag[0]') FROM cagey_sessions"
                )
                found.append(reader.execute(query + " ORDER BY user_id").fetchall())

        read()
        writer.at["COMMIT"] = read  # in the middle of a transaction, too
        await save(store, record(1, 2, epoch=1))
        del writer.at["COMMIT"]
        assert found == [[(1, 3, "sword"), ("x", 3, "sword")]] * 2


# Ends of a process


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["", "sys.exit(0)", "asyncio.get_running_loop().stop()"])
def test_a_forgotten_store_does_not_hold_up_the_end_of_the_process(path, ends):
    printed = python(
        f"""
        async def main():
            store = SQLiteStore(path)
            await store.open()
            (claim,) = await store.claim_many([1], "a")
            for version in range(1, 30):
                (verdict,) = await store.save_many([Record(1, claim.epoch, "a", version, 0, b"{{}}", 0.0)])
            print(version, verdict.outcome, flush=True)
            asyncio.ensure_future(store.load(1))
            {ends}
        try:
            asyncio.run(main())
        except RuntimeError:
            pass  # a loop that was stopped
        """,
        path,
    )
    assert printed == "29 saved\n"
    with reading(path) as reader:
        assert reader.execute("SELECT user_id, version FROM cagey_sessions").fetchall() == [(1, 29)]


WRITES = """
async def main():
    store = SQLiteStore(path, synchronous="NORMAL")
    await store.open()
    epochs = {claim.user_id: claim.epoch for claim in await store.claim_many(range(8), "a")}
    async def write(user_id):
        version = 0
        while True:
            version += 1
            body = b'"%d"' % version + b" " * 2000
            (verdict,) = await store.save_many([Record(user_id, epochs[user_id], "a", version, 0, body, 0.0)])
            assert verdict.outcome == "saved"
            os.write(1, b"%d %d\\n" % (user_id, version))
    await asyncio.gather(*map(write, range(8)))
asyncio.run(main())
"""


@pytest.mark.slow
@no_sigkill
@pytest.mark.parametrize("after", [20, 200, 900])
def test_what_was_acknowledged_is_there_after_a_kill(path, after):
    acknowledged: dict[int, int] = {}
    with subprocess.Popen(script(WRITES, path), stdout=subprocess.PIPE, text=True) as writing:
        for number, line in enumerate(writing.stdout):
            user_id, version = map(int, line.split())
            acknowledged[user_id] = version
            if number == after:
                writing.send_signal(signal.SIGKILL)
    assert writing.returncode == -signal.SIGKILL
    assert sum(acknowledged.values()) >= after

    async def found() -> dict[int | str, Record]:
        async with opened(SQLiteStore(path)) as store:
            return {each.user_id: each async for each in store.scan()}

    records = asyncio.run(found())
    for user_id, version in acknowledged.items():
        # one more may have been written and not told
        assert version <= records[user_id].version <= version + 1
        assert records[user_id].value() == str(records[user_id].version)
    with closing(connect_really(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
