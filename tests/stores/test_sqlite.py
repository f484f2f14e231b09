"""`SQLiteStore` against the contract, and what is only its own: the file, its lock, its transactions, its thread."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cagey_sessions import (
    OptionError,
    StoreContractError,
    StoreInUseError,
    StoreLayoutError,
    StoreUnavailableError,
    WrongLoopError,
)
from cagey_sessions.stores import Record, SQLiteStore, sqlite, sqlite_rows
from cagey_sessions.testing.conformance.base import ALREADY, ERASED, FENCED, INVALID, MISSING, SAVED, every_call
from cagey_sessions.testing.store_conformance import (
    StoreConformance,
    StoreMachine,
    claim,
    everything,
    machine_test,
    opened,
    record,
    save,
)
from support import turns

connect_really = sqlite3.connect
no_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
ENDLESS = "(WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n)"


class TestSQLiteStore(StoreConformance):
    @pytest.fixture
    def make(self, tmp_path):
        return lambda: SQLiteStore(tmp_path / "users.db")


class SQLiteMachine(StoreMachine):
    def make(self):
        self.folder = tempfile.TemporaryDirectory()
        return SQLiteStore(Path(self.folder.name) / "users.db", synchronous="NORMAL")

    def teardown(self):
        super().teardown()
        self.folder.cleanup()


TestSQLiteMachine = pytest.mark.slow(machine_test(SQLiteMachine, 40))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "users.db"


@pytest.fixture
def store(path: Path) -> SQLiteStore:
    return SQLiteStore(path)


class Watched(sqlite3.Connection):
    """The writer's connection: what it is told is written down, and what `fail` names fails."""

    fail = ""

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        if self.fail and sql.startswith(self.fail):
            raise sqlite3.OperationalError("database or disk is full")
        return super().execute(sql, *args)


class Writer:
    """The connections that a store has made so far, and the statements they have begun."""

    def __init__(self) -> None:
        self.connections: list[Watched] = []
        self.statements: list[str] = []
        self.at: dict[str, Callable[[], None]] = {}

    @property
    def connection(self) -> Watched:
        return self.connections[-1]

    def connect(self, *args: Any, **options: Any) -> Watched:
        made = connect_really(*args, factory=Watched, **options)
        made.set_trace_callback(self.note)
        self.connections.append(made)
        return made

    def note(self, statement: str) -> None:
        self.statements.append(statement)
        for start, what in self.at.items():
            if statement.startswith(start):
                what()


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Writer:
    watched = Writer()
    monkeypatch.setattr(sqlite3, "connect", watched.connect)
    return watched


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(connect_really(f"file:{path}?mode=ro", uri=True)) as connection:
        yield connection


@contextmanager
def blocking(path: Path) -> Iterator[Callable[[], None]]:
    """Another program that is in the middle of writing to the file, until the function given is called."""
    with closing(connect_really(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield lambda: connection.execute("ROLLBACK") and None


def edit(path: Path, *statements: str) -> None:
    with closing(connect_really(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


async def saved(store: SQLiteStore, *users: int | str, body: bytes = b"{}") -> dict[int | str, int]:
    """Claim and save users; their epochs."""
    epochs = {each.user_id: each.epoch for each in await store.claim_many(users, "a")}
    assert set(await save(store, *(record(each, epoch=epochs[each], body=body) for each in users))) == {SAVED}
    return epochs


async def gathered(*calls: Any) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


async def end_of_writers() -> None:
    for thread in threading.enumerate():
        if thread.name == "cagey-sessions sqlite":
            await asyncio.to_thread(thread.join, 10)


PRELUDE = """
import asyncio, os, sys
from cagey_sessions import *
from cagey_sessions.stores import *
path = sys.argv[1]
"""


def script(text: str, path: Path) -> list[str]:
    return [sys.executable, "-X", "dev", "-c", PRELUDE + textwrap.dedent(text), str(path)]


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


# Group commit


async def test_calls_that_wait_share_a_transaction(store, path, writer):
    async with opened(store):
        epochs = await saved(store, *range(101))
        writer.statements.clear()
        with blocking(path) as let_go:
            calls = [asyncio.ensure_future(save(store, record(each, 2, epoch=epochs[each]))) for each in epochs]
            await turns()
            let_go()
            assert await asyncio.gather(*calls) == [[SAVED]] * 101
        # the first may have gone alone, 64 at a time come after it
        assert 1 <= writer.statements.count("COMMIT") <= 3
        assert writer.statements.count("COMMIT") == writer.statements.count("BEGIN IMMEDIATE")


async def test_nobody_is_told_before_the_commit(store, path, writer):
    loop = asyncio.get_running_loop()
    async with opened(store):
        epochs = await saved(store, 1)
        calls: list[asyncio.Future[Any]] = []
        seen: list[Any] = []

        def at_commit() -> None:
            asyncio.run_coroutine_threadsafe(turns(), loop).result(10)
            with reading(path) as reader:
                (version,) = reader.execute("SELECT version FROM cagey_sessions WHERE user_id = 1").fetchone()
            seen.append((version, [call.done() for call in calls]))

        writer.at["COMMIT"] = at_commit
        calls += [
            asyncio.ensure_future(save(store, record(1, 2, epoch=epochs[1]))),
            asyncio.ensure_future(claim(store, 2)),
            asyncio.ensure_future(store.load(1)),
        ]
        await asyncio.gather(*calls)
        del writer.at["COMMIT"]
        assert seen[0] == (1, [False] * 3)
        with reading(path) as reader:
            assert reader.execute("SELECT version FROM cagey_sessions WHERE user_id = 1").fetchone() == (2,)


async def test_a_commit_that_fails_is_nobodys_success(store, path, writer):
    async with opened(store):
        epochs = await saved(store, 1)
        writer.connection.fail = "COMMIT"
        with blocking(path) as let_go:
            calls = [
                asyncio.ensure_future(save(store, record(1, 2, epoch=epochs[1]))),
                asyncio.ensure_future(claim(store, 2)),
                asyncio.ensure_future(store.erase(1, "a")),
            ]
            await turns()
            let_go()
            answers = await gathered(*calls)
        failed = [each for each in answers if isinstance(each, StoreUnavailableError)]
        assert failed and "disk is full" in str(failed[0])
        assert isinstance(answers[0], StoreUnavailableError), "it was in the first transaction"
        # what was not in that transaction came after it, on a connection of its own
        after = await store.load(1)
        assert after is None if answers[2] is True else after == record(epoch=epochs[1])


async def test_a_job_that_fails_in_a_transaction_fails_alone(store, path):
    async with opened(store):
        epochs = await saved(store, 1)
        with blocking(path) as let_go:
            calls = [
                asyncio.ensure_future(save(store, record(1, 2, epoch=epochs[1]))),
                asyncio.ensure_future(store.claim_many([7, 2**63, 8], "a")),  # more than SQLite can bind
                asyncio.ensure_future(claim(store, 2)),
            ]
            await turns()
            let_go()
            first, second, third = await gathered(*calls)
        assert first == [SAVED]
        assert isinstance(second, OverflowError)
        assert third.granted
        assert await save(store, record(7), record(8)) == [MISSING, MISSING], "a call is done as a whole, or not at all"


# Many rows


FATES = {
    # what becomes of a record for a row of version 5: what is sent, the outcome, whether it is written or releases
    "next": ({"version": 6}, SAVED, True, False),
    "last": ({"version": 9, "release": True}, SAVED, True, True),
    "repeated": ({"version": 5}, ALREADY, False, False),
    "last repeated": ({"version": 5, "release": True}, ALREADY, False, True),
    "late": ({"version": 4, "release": True}, ALREADY, False, False),
    "of a claim before": ({"version": 6, "epoch": 0, "release": True}, FENCED, False, False),
    "of another owner": ({"version": 6, "owner": "b", "release": True}, FENCED, False, False),
    "not text": ({"version": 6, "body": b"\xff", "release": True}, INVALID, False, False),
    "not there": ({"version": 6}, MISSING, False, False),
    "erased": ({"version": 6}, ERASED, False, False),
    "next for a name": ({"version": 6, "body": '"é\U0001f409"'.encode()}, SAVED, True, False),
}


@pytest.mark.parametrize("variables", [None, 60])
@pytest.mark.parametrize("number", [1, 2, 199, 200, 201, 3000])
async def test_of_many_rows_each_has_its_own_verdict(path, writer, number, variables):
    fates = dict(zip(range(number), itertools.cycle(FATES), strict=False))
    users = {each: str(each) if fate == "next for a name" else each for each, fate in fates.items()}
    async with opened(SQLiteStore(path, synchronous="NORMAL")) as store:
        if variables:
            writer.connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, variables)
        there = [users[each] for each, fate in fates.items() if fate != "not there"]
        claims = await store.claim_many(there, "a")
        assert [(type(each.user_id), each.user_id, each.record) for each in claims] == [
            (type(each), each, None) for each in there
        ]
        epochs = {each.user_id: each.epoch for each in claims}
        first = [record(each, 5, epoch=epochs[each], body=b'"%d"' % len(str(each))) for each in there]
        assert await save(store, *first) == [SAVED] * len(there)
        gone = {users[each] for each, fate in fates.items() if fate == "erased"}
        assert all(await asyncio.gather(*(store.erase(each, "a") for each in gone)))
        model = {each.user_id: each for each in first if each.user_id not in gone}
        batch, expected = [], []
        for each, fate in fates.items():
            changes, outcome, written, released = FATES[fate]
            made = record(users[each], epoch=epochs.get(users[each], 1), body=b'"%d"' % each)._replace(**changes)
            batch.append(made)
            expected.append(outcome)
            if written:
                model[users[each]] = made._replace(release=False)
            if released:
                model[users[each]] = model[users[each]]._replace(owner="")
        assert await save(store, *batch) == expected
        assert await everything(store) == {(type(each), each): kept for each, kept in model.items()}
        known = {each: kept._replace(epoch=kept.epoch + 1, owner="c") for each, kept in model.items()}
        assert [each.record for each in await store.claim_many(there, "c")] == [known.get(each) for each in there]


# Durability


@pytest.mark.parametrize(("synchronous", "number"), [("FULL", 2), ("NORMAL", 1)])
async def test_synchronous_is_what_was_asked_for_on_every_connection(path, writer, synchronous, number):
    store = SQLiteStore(path, synchronous=synchronous)
    async with opened(store):
        for _ in range(2):
            assert writer.connection.execute("PRAGMA synchronous").fetchone() == (number,)
            assert writer.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            writer.connection.fail = "COMMIT"
            with pytest.raises(StoreUnavailableError):
                await store.load(1)
            await store.load(1)
        assert len(writer.connections) == 3
        assert f"synchronous={synchronous}" in store.loss_class
        assert "journal_mode=wal" in store.loss_class
        assert ("the last transactions when the machine does" in store.loss_class) is (synchronous == "NORMAL")


async def test_full_is_the_default(store):
    async with opened(store):
        assert "synchronous=FULL" in store.loss_class


@pytest.mark.parametrize("synchronous", ["OFF", "full", "", None, 2])
def test_other_kinds_of_synchronous_are_refused(path, synchronous):
    with pytest.raises(OptionError):
        SQLiteStore(path, synchronous=synchronous)


@pytest.mark.parametrize("path", ["", ":memory:", None, 7])
def test_what_is_no_file_is_refused(path):
    with pytest.raises(OptionError):
        SQLiteStore(path)


# One process has the file


async def test_a_second_store_in_this_process_is_refused(path, store):
    async with opened(store):
        await saved(store, 1)
        with pytest.raises(StoreInUseError) as caught:
            await SQLiteStore(path).open()
        assert caught.value.pid == os.getpid()
        assert str(os.getpid()) in str(caught.value)
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

        asyncio.run(refused())
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


async def test_the_file_is_free_after_an_open_that_was_cancelled(path, store):
    opening = asyncio.ensure_future(store.open())
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await end_of_writers()
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
    await end_of_writers()


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


# What may go wrong with the file


async def test_a_full_disk_is_an_error_and_leaves_nothing_partial(path, store, writer):
    async with opened(store):
        epochs = await saved(store, *range(5))
        (pages,) = writer.connection.execute("PRAGMA page_count").fetchone()
        writer.connection.execute(f"PRAGMA max_page_count = {pages + 4}")
        large = b'"' + b"x" * 200_000 + b'"'
        batch = [record(each, 2, epoch=epochs[each], body=large if each == 3 else b"2") for each in range(5)]
        with pytest.raises(StoreUnavailableError, match="full"):
            await save(store, *batch)
        assert [(await store.load(each)).version for each in range(5)] == [1] * 5
        for connection in writer.connections:
            try:
                connection.execute("PRAGMA max_page_count = 1000000")
            except sqlite3.ProgrammingError:
                continue  # closed
        assert await save(store, *batch) == [SAVED] * 5


async def test_a_file_that_is_written_to_by_another_program_is_an_error_after_a_while(path, store, monkeypatch):
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.05)
    async with opened(store):
        epochs = await saved(store, 1)
        with blocking(path) as let_go:
            for call in (save(store, record(1, 2, epoch=epochs[1])), store.load(1), claim(store, 2)):
                with pytest.raises(StoreUnavailableError, match="locked"):
                    await call
            let_go()
        assert await save(store, record(1, 2, epoch=epochs[1])) == [SAVED]


async def test_a_file_that_is_away_is_an_error_until_it_is_back(tmp_path, path, store):
    async with opened(store):
        epochs = await saved(store, 1)
        path.rename(tmp_path / "away.db")
        for _ in range(2):
            for call in (save(store, record(1, 2, epoch=epochs[1])), store.load(1), claim(store, 2)):
                with pytest.raises(StoreUnavailableError):
                    await call
        assert not path.exists(), "no new one was made"
        (tmp_path / "away.db").rename(path)
        assert await store.load(1) == record(1, epoch=epochs[1])
        assert await save(store, record(1, 2, epoch=epochs[1])) == [SAVED]


async def test_a_file_that_was_replaced_is_an_error_and_the_new_one_is_left_alone(tmp_path, path, store):
    async with opened(SQLiteStore(tmp_path / "other.db")) as other:
        await saved(other, "theirs")
    before = (tmp_path / "other.db").read_bytes()
    async with opened(store):
        epochs = await saved(store, 1)
        (tmp_path / "other.db").replace(path)
        for _ in range(2):
            for call in (save(store, record(1, 2, epoch=epochs[1])), store.load(1), claim(store, 2)):
                with pytest.raises(StoreUnavailableError, match="replaced"):
                    await call
    assert path.read_bytes() == before


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: path.write_text("gold;sword\n" * 500),
    "short text": lambda path: path.write_text("gold"),
    "cut off": lambda path: path.write_bytes(b"SQLite format 3\x00" + b"\x10\x00\x02\x02"),
    "foreign tables": lambda path: edit(path, "CREATE TABLE players (id INTEGER)", "INSERT INTO players VALUES (1)"),
    "a table of our name": lambda path: edit(path, "CREATE TABLE cagey_sessions (user_id, body)"),
    "a table of our shape": lambda path: edit(path, sqlite.CREATE[0], sqlite.CREATE[1]),
    "of another program": lambda path: edit(path, "PRAGMA application_id = 1"),
    "numbered by another program": lambda path: edit(path, "PRAGMA user_version = 1"),
    "of a newer version": lambda path: edit(path, *sqlite.CREATE, f"PRAGMA user_version = {sqlite.LAYOUT + 1}"),
    "with a column more": lambda path: edit(path, *sqlite.CREATE, "ALTER TABLE cagey_sessions ADD COLUMN more"),
    "with a column less": lambda path: edit(path, *sqlite.CREATE, "ALTER TABLE cagey_sessions DROP COLUMN saved_at"),
    "with a table less": lambda path: edit(path, *sqlite.CREATE, "DROP TABLE cagey_sessions_epochs"),
    "with no table": lambda path: edit(
        path, *sqlite.CREATE, "DROP TABLE cagey_sessions_epochs", "DROP TABLE cagey_sessions"
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
async def test_what_is_not_ours_is_left_as_it_is(tmp_path, path, store, kind):
    FOREIGN[kind](path)
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(StoreLayoutError, match=r"users\.db"):
            await store.open()
    assert path.read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} <= {path.name, path.name + ".lock"}


async def test_a_newer_version_is_named(path, store):
    FOREIGN["of a newer version"](path)
    with pytest.raises(StoreLayoutError, match=f"layout {sqlite.LAYOUT + 1}"):
        await store.open()


async def test_an_empty_file_is_made_ours(path, store):
    path.touch()
    async with opened(store):
        await saved(store, 1)


async def test_an_index_or_a_table_beside_ours_does_no_harm(path, store):
    async with opened(store):
        await saved(store, 1)
    edit(path, "CREATE INDEX by_time ON cagey_sessions (saved_at)", "CREATE TABLE notes (text)")
    async with opened(store):
        assert (await store.load(1)) is not None


async def test_a_folder_that_is_not_there_is_an_error_that_names_it(tmp_path):
    with pytest.raises(StoreUnavailableError, match="nowhere"):
        await SQLiteStore(tmp_path / "nowhere" / "users.db").open()
    assert not (tmp_path / "nowhere").exists()


async def test_a_folder_in_place_of_the_file_is_an_error(tmp_path):
    with pytest.raises(StoreLayoutError, match="folder"):
        await SQLiteStore(tmp_path).open()


async def test_a_link_that_leads_to_itself_is_an_error(path, store):
    path.symlink_to(path)
    with pytest.raises(StoreUnavailableError):
        await store.open()


# to root the system refuses neither of these, so that there would be no error to look at
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do everything")
@pytest.mark.parametrize("what", ["file", "folder"])
async def test_no_permission_is_an_error(path, store, what):
    async with opened(store):
        await saved(store, 1)
    target, mode = (path, 0o400) if what == "file" else (path.parent, 0o500)
    (path.parent / (path.name + ".lock")).unlink()
    target.chmod(mode)
    try:
        with pytest.raises(StoreUnavailableError, match=r"users\.db"):
            await store.open()
    finally:
        target.chmod(0o700)


DAMAGED = {
    "not UTF-8": ("CAST(x'7b22ff' AS TEXT)", b'{"\xff'),
    "broken JSON": ("'{\"gold\":'", b'{"gold":'),
    "empty": ("''", b""),
    "bytes": ("x'00ff'", b"\x00\xff"),
    "a number": ("7", b"7"),
    "cut by a NUL": ("CAST(x'7b7d007b' AS TEXT)", b"{}\x00{"),
}


@pytest.mark.parametrize("kind", DAMAGED)
async def test_a_damaged_body_comes_back_as_it_is(path, store, kind):
    sql, bytes_ = DAMAGED[kind]
    async with opened(store):
        epochs = await saved(store, 1, 2)
        edit(path, f"UPDATE cagey_sessions SET body = {sql} WHERE user_id = 1")
        damaged = record(1, epoch=epochs[1], body=bytes_)
        assert await store.load(1) == damaged
        assert [each async for each in store.scan()] == [damaged, record(2, epoch=epochs[2])]
        assert (await claim(store)).record == damaged._replace(epoch=epochs[1] + 1)
        assert await save(store, record(1, 2, epoch=epochs[1] + 1)) == [SAVED]
        assert (await store.load(1)).body == b"{}"


@pytest.mark.parametrize("poison", [b'"\xff"', b'"\xed\xa0\x80"', b'"a\x00b"', b"\x00"])
async def test_a_body_that_is_not_text_is_invalid_alone(store, poison):
    async with opened(store):
        epochs = await saved(store, 1, 2, 3)
        batch = [record(each, 2, epoch=epochs[each], body=poison if each == 2 else b"2") for each in (1, 2, 3)]
        verdicts = await store.save_many(batch)
        assert [each.outcome for each in verdicts] == [SAVED, INVALID, SAVED]
        assert verdicts[1].detail
        assert [(await store.load(each)).version for each in (1, 2, 3)] == [2, 1, 2]
        assert await save(store, record(2, 3, epoch=epochs[2])) == [SAVED]


@pytest.mark.parametrize("size", [20_000, 9_995])  # too much for a parameter; only for a row
@pytest.mark.parametrize("place", [0, 1, 2])
async def test_a_body_that_is_too_large_for_sqlite_is_invalid_alone(store, writer, place, size):
    async with opened(store):
        epochs = await saved(store, 0, 1, 2)
        writer.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
        bodies = [b"2"] * 3
        bodies[place] = b'"' + b"x" * (size - 2) + b'"'
        batch = [record(each, 2, epoch=epochs[each], body=bodies[each]) for each in (0, 1, 2)]
        expected = [SAVED] * 3
        expected[place] = INVALID
        verdicts = await store.save_many(batch)
        assert [each.outcome for each in verdicts] == expected
        assert "xxx" not in verdicts[place].detail
        assert [(await store.load(each)).version for each in (0, 1, 2)] == [
            1 if each == place else 2 for each in (0, 1, 2)
        ]


# What is left behind


async def test_a_user_who_was_never_saved_leaves_nothing_behind(path, store):
    async with opened(store):
        epochs = await saved(store, 1)
        for user_id in range(100, 130):
            assert await store.release(user_id, (await claim(store, user_id)).epoch, "a")
        assert await store.release(1, epochs[1], "a")
        with reading(path) as reader:
            assert reader.execute("SELECT user_id FROM cagey_sessions").fetchall() == [(1,)]
        assert await save(store, record(100)) == [MISSING]


async def test_epochs_rise_over_a_new_open(path, store):
    seen = []
    for _ in range(3):
        async with opened(store):
            epoch = (await claim(store)).epoch
            seen.append(epoch)
            assert await store.release(1, epoch, "a")
    async with opened(store):
        epoch = (await claim(store)).epoch
        assert seen == sorted({*seen}) and epoch > seen[-1]
        assert await save(store, record(epoch=seen[0])) == [FENCED]


async def test_the_owner_of_before_is_dead_when_the_file_is_opened_again(path, store):
    async with opened(store):
        epochs = await saved(store, 1)
    async with opened(SQLiteStore(path)) as again:
        taken = await claim(again, 1, "b")
        assert taken.granted
        assert taken.epoch == epochs[1] + 1
        assert await again.erase(1, "c")


# Calls that end early


@pytest.mark.parametrize("reads", [True, False])
async def test_abort_ends_a_statement_that_does_not_end(store, writer, monkeypatch, reads):
    async with opened(store):
        epochs = await saved(store, 1)
        running = threading.Event()
        writer.at["SELECT 1, " if reads else "INSERT"] = running.set
        with monkeypatch.context() as patch:
            if reads:
                patch.setattr(sqlite, "LOAD", f"SELECT 1, ?, {ENDLESS}")
                call = asyncio.ensure_future(store.load(1))
            else:
                patch.setattr(sqlite_rows, "SAVE", f"{sqlite_rows.SAVE} WHERE {ENDLESS} > 0")
                call = asyncio.ensure_future(save(store, record(1, 2, epoch=epochs[1])))
            assert await asyncio.to_thread(running.wait, 10)
            assert not call.done()
            store.abort(call)
            with pytest.raises(StoreUnavailableError, match="interrupted"):
                await call
        assert await store.load(1) == record(1, epoch=epochs[1])
        assert await save(store, record(1, 2, epoch=epochs[1])) == [SAVED]


async def test_abort_when_nothing_runs_does_nothing(store):
    async def nothing() -> None:
        return

    call = asyncio.ensure_future(nothing())
    store.abort(call)
    async with opened(store):
        await saved(store, 1)
        store.abort(call)
        assert (await store.load(1)) is not None
    store.abort(call)
    await call


async def test_a_call_that_is_cancelled_while_it_waits_is_done_or_not_and_harms_nobody(path, store):
    async with opened(store):
        epochs = await saved(store, 1, 2, 3)
        with blocking(path) as let_go:
            calls = [asyncio.ensure_future(save(store, record(each, 2, epoch=epochs[each]))) for each in (1, 2, 3)]
            await turns()
            calls[1].cancel()
            await turns()
            let_go()
            first, second, third = await gathered(*calls)
        assert (first, third) == ([SAVED], [SAVED])
        assert isinstance(second, asyncio.CancelledError)
        assert await save(store, record(2, 2, epoch=epochs[2])) in ([SAVED], [ALREADY])
        assert (await store.load(2)).version == 2


async def test_close_finishes_what_waits(path, store):
    async with opened(store):
        epochs = await saved(store, *range(100))
        with blocking(path) as let_go:
            calls = [asyncio.ensure_future(save(store, record(each, 2, epoch=epochs[each]))) for each in epochs]
            await turns()
            ending = asyncio.ensure_future(store.close())
            await turns()
            assert not ending.done()
            with pytest.raises(StoreUnavailableError):
                await store.load(1)
            await store.close()  # the second has nothing to do
            let_go()
            assert await asyncio.gather(*calls) == [[SAVED]] * 100
            await ending
    async with opened(store):
        assert {each.version async for each in store.scan()} == {2}


async def test_a_close_that_is_cancelled_goes_on(path, store):
    await store.open()
    epochs = await saved(store, 1)
    with blocking(path) as let_go:
        call = asyncio.ensure_future(save(store, record(1, 2, epoch=epochs[1])))
        await turns()
        ending = asyncio.ensure_future(store.close())
        await turns()
        ending.cancel()
        await turns()
        let_go()
        assert await call == [SAVED]
    await end_of_writers()
    async with opened(store):
        assert (await store.load(1)).version == 2


async def test_close_leaves_one_file_and_an_empty_log(tmp_path, path, store):
    async with opened(store):
        await saved(store, 1)
    assert {each.name for each in tmp_path.iterdir()} == {path.name, path.name + ".lock"}


def test_another_loop_is_refused_and_may_close(path):
    store = SQLiteStore(path)

    async def on_another() -> None:
        for call in every_call(store):
            with pytest.raises(WrongLoopError):
                await call
        async with asyncio.timeout(10):
            await store.close()
            await store.open()
            await saved(store, 1)
            await store.close()

    with asyncio.Runner() as one, asyncio.Runner() as other:
        one.run(store.open())
        other.run(on_another())
        one.run(store.open())
    asyncio.run(on_another_after_all(store))


async def on_another_after_all(store: SQLiteStore) -> None:
    """The loop it was opened on is closed."""
    async with asyncio.timeout(10):
        await store.close()
        async with opened(store):
            assert (await store.load(1)) is not None


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
