"""`SQLiteStore` with `read_only`: beside a running server, and alone."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cagey_sessions import (
    OptionError,
    SessionManager,
    StoreError,
    StoreLayoutError,
    StoreUnavailableError,
)
from cagey_sessions.stores import SQLiteStore
from cagey_sessions.testing.store_conformance import claim, everything, opened, record, release, save


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """One with what means something in a URI."""
    folder = tmp_path / "a ?b#c%20"
    folder.mkdir()
    return folder / "users.db"


def reader(path: Path) -> SQLiteStore:
    return SQLiteStore(path, read_only=True)


async def fill(path: Path) -> None:
    async with opened(SQLiteStore(path)) as store:
        for user_id in (1, "1"):
            granted = await claim(store, user_id)
            await save(store, record(user_id, epoch=granted.epoch, body=b'{"gold":1}'))


async def test_a_reader_reads_beside_the_process_that_has_the_file(path):
    async with opened(SQLiteStore(path)) as server, opened(reader(path)) as store, opened(reader(path)):
        assert await store.load(1) is None
        granted = await claim(server, 1)
        assert await store.holder(1) == ("", 0), "not saved yet"
        for version in (1, 2):
            await save(server, record(1, version, epoch=granted.epoch, body=b"%d" % version))
            found = await store.load(1)
            assert (found.body, found.version, found.owner) == (b"%d" % version, version, "a")
            assert await store.holder(1) == ("a", granted.epoch)
            assert list(await everything(store)) == [(int, 1)]


async def test_a_reader_holds_up_no_save(path, monkeypatch):
    monkeypatch.setattr("cagey_sessions.stores.sqlite.store.BUSY_SECONDS", 0)
    async with opened(SQLiteStore(path)) as server, opened(reader(path)) as store:
        for version in (1, 2):
            granted = await claim(server, version)
            await save(server, record(version, epoch=granted.epoch))
        scan = store.scan()
        await anext(scan)
        await save(server, record(2, 2, epoch=2))
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert (await store.load(1)).version == 1, "nor does somebody who writes hold up the reader"
            other.execute("ROLLBACK")
        await scan.aclose()


async def test_a_reader_keeps_no_server_out(path):
    await fill(path)
    async with opened(reader(path)) as store, opened(SQLiteStore(path)) as server:
        assert (await claim(server, 1)).granted
        assert (await store.load(1)).body == b'{"gold":1}'


async def test_a_reader_leaves_the_folder_as_it_was(path):
    await fill(path)
    (path.parent / "users.db.lock").unlink()
    before = path.read_bytes()
    async with opened(reader(path)) as store:
        assert len(await everything(store)) == 2
    assert [each.name for each in path.parent.iterdir()] == ["users.db"]
    assert path.read_bytes() == before


async def test_a_file_that_is_not_there_is_not_made(path):
    with pytest.raises(StoreUnavailableError, match="No such file"):
        await reader(path).open()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(("content", "said"), [(b"", "is empty"), (b"no database" * 500, "not an SQLite database")])
async def test_a_file_that_has_no_users_is_refused_and_left_as_it_is(path, content, said):
    path.write_bytes(content)
    with pytest.raises(StoreLayoutError, match=said):
        await reader(path).open()
    assert [each.name for each in path.parent.iterdir()] == ["users.db"]
    assert path.read_bytes() == content


@pytest.mark.parametrize("how", ["VACUUM INTO", "backup"])
async def test_a_backup_is_read_as_it_is(tmp_path, path, how):
    copy = tmp_path / "copy.db"
    async with opened(SQLiteStore(path)) as server:
        granted = await claim(server, 1)
        await save(server, record(1, epoch=granted.epoch, body=b"[1]"))
        with closing(sqlite3.connect(path, isolation_level=None)) as source:
            if how == "backup":
                with closing(sqlite3.connect(copy)) as target:
                    source.backup(target)
            else:
                source.execute("VACUUM INTO ?", (str(copy),))
    async with opened(reader(copy)) as store:
        assert (await store.load(1)).body == b"[1]"
    async with opened(SQLiteStore(copy)) as again:
        assert (await claim(again, 1)).record.body == b"[1]"


async def test_what_would_write_is_refused(path):
    await fill(path)
    async with opened(reader(path)) as store:
        for call in (
            store.claim_many([1], "b"),
            store.save_many([record(1, 7)]),
            release(store, 1, 1, "a"),
            store.erase(1),
        ):
            with pytest.raises(StoreError, match="read_only"):
                await call
        assert (await store.load(1)).version == 1


async def test_a_manager_on_a_reader_reads_and_lets_nobody_in(path):
    await fill(path)
    async with SessionManager(store=reader(path)) as manager:
        assert await manager.read(1) == {"gold": 1}
        with pytest.raises(StoreError):
            await manager.open(1)


@pytest.mark.parametrize("read_only", [1, None, "yes"])
def test_read_only_is_yes_or_no(path, read_only):
    with pytest.raises(OptionError):
        SQLiteStore(path, read_only=read_only)
