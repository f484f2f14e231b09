"""What may go wrong with the file of a `SQLiteStore`: full, gone, foreign, damaged; nothing is made worse by it."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cagey_sessions import StoreLayoutError, StoreUnavailableError
from cagey_sessions.stores import SQLiteStore
from cagey_sessions.stores.sqlite import store as sqlite
from cagey_sessions.testing.conformance.base import INVALID, SAVED
from cagey_sessions.testing.store_conformance import claim, opened, record, save
from support.watched_sqlite import blocking, connect_really, saved


@pytest.fixture
def store(path: Path) -> SQLiteStore:
    return SQLiteStore(path)


def edit(path: Path, *statements: str) -> None:
    with closing(connect_really(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


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


# The log


def log_size(path: Path) -> int:
    return (path.parent / f"{path.name}-wal").stat().st_size


class Log:
    """Saves that make the log grow."""

    def __init__(self, store: SQLiteStore, path: Path, epochs: dict[int | str, int]) -> None:
        self._store = store
        self._path = path
        self._epoch = epochs[1]
        self._version = 1

    async def save(self) -> int:
        """Half a megabyte more; how large the log is then."""
        self._version += 1
        body = b'"%b"' % (b"%d" % (self._version % 10) * 500_000)
        assert await save(self._store, record(1, self._version, epoch=self._epoch, body=body)) == [SAVED]
        return log_size(self._path)

    async def grow(self) -> None:
        for _ in range(40):
            size = await self.save()
        assert size > 2 * sqlite.LARGEST_LOG


@contextmanager
def a_long_read(path: Path) -> Iterator[Callable[[], None]]:
    """Another program that reads what is there now, until the function given is called."""
    with closing(connect_really(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM cagey_sessions").fetchone()
        yield lambda: connection.execute("COMMIT") and None


async def test_the_log_is_short_while_nobody_reads(path):
    async with opened(SQLiteStore(path, synchronous="NORMAL")) as store:
        log = Log(store, path, await saved(store, 1))
        assert max([await log.save() for _ in range(40)]) < sqlite.LARGEST_LOG


async def test_the_log_is_short_again_with_the_next_saves_after_a_long_read(path, monkeypatch):
    monkeypatch.setattr(sqlite, "LOG_PAUSE", 1000)
    async with opened(SQLiteStore(path, synchronous="NORMAL")) as store:
        log = Log(store, path, await saved(store, 1))
        with a_long_read(path) as end_of_read:
            await log.grow()
            end_of_read()
        await log.save()
        assert await log.save() <= sqlite.LARGEST_LOG


async def test_the_log_is_short_again_after_a_long_read_though_nobody_saves(path, writer, monkeypatch):
    monkeypatch.setattr(sqlite, "LOG_PAUSE", 0.01)
    monkeypatch.setattr(sqlite, "LOG_WAIT", 0)
    is_short = threading.Event()

    def look() -> None:
        if log_size(path) <= sqlite.LARGEST_LOG:
            is_short.set()

    async with opened(SQLiteStore(path, synchronous="NORMAL")) as store:
        log = Log(store, path, await saved(store, 1))
        with a_long_read(path) as end_of_read:
            await log.grow()
            end_of_read()
        writer.at["PRAGMA busy_timeout"] = look
        assert await asyncio.to_thread(is_short.wait, 20)
        assert await store.load(1) is not None


async def test_the_log_is_short_again_though_there_is_always_somebody_who_reads(path, writer, monkeypatch):
    """Each reads for a moment only, but begins before the one before has ended; their end is waited for."""
    monkeypatch.setattr(sqlite, "LOG_PAUSE", 0)
    monkeypatch.setattr(sqlite, "LOG_WAIT", 0)
    async with opened(SQLiteStore(path, synchronous="NORMAL")) as store:
        log = Log(store, path, await saved(store, 1))
        with ExitStack() as readers:
            ends = [readers.enter_context(a_long_read(path))]
            for _ in range(40):
                size = await log.save()
                ends.append(readers.enter_context(a_long_read(path)))
                ends.pop(0)()
            assert size > 2 * sqlite.LARGEST_LOG
            waited_for = threading.Event()
            writer.at["PRAGMA wal_checkpoint"] = waited_for.set
            monkeypatch.setattr(sqlite, "LOG_WAIT", 20)
            assert await asyncio.to_thread(waited_for.wait, 20)
            ends.pop(0)()
            await store.load(1)  # the thread is through with it
            assert log_size(path) <= sqlite.LARGEST_LOG


async def test_a_large_log_that_a_killed_process_has_left_is_short_again(tmp_path, path):
    async with opened(SQLiteStore(path, synchronous="NORMAL")) as store:
        log = Log(store, path, await saved(store, 1))
        with a_long_read(path):
            await log.grow()
        for name in ("users.db", "users.db-wal"):
            (tmp_path / f"left-{name}").write_bytes((tmp_path / name).read_bytes())
    for name in ("users.db", "users.db-wal"):
        (tmp_path / f"left-{name}").replace(tmp_path / name)
    async with opened(store):
        assert (await store.load(1)).version == 41
        await store.load(1)  # the thread has looked at the log before
        assert log_size(path) <= sqlite.LARGEST_LOG


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
