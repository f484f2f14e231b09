"""Snapshots: what is in them, what damage does to them, and what a disk may do while one is written."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import stat
import threading
import time
from pathlib import Path
from zlib import crc32

import orjson
import pytest

from cagey_sessions import ManagerClosedError, SessionManager, SnapshotError, read_snapshot, threads
from cagey_sessions.files import format as savefile
from cagey_sessions.files.format import Files, entry_line, first_line, last_line, write_whole
from cagey_sessions.records import SnapshotEntry
from cagey_sessions.sessions.snapshot import take_snapshot
from cagey_sessions.stores import MemoryStore
from support import (
    Crash,
    FaultyDisk,
    HeldDisk,
    ScriptedStore,
    end_of_threads,
    inside,
    made_by_another_user,
    needs_links,
    turns,
)

GOLDEN = Path(__file__).parents[1] / "files" / "golden" / "snapshot-1.txt"

ENTRIES = (
    SnapshotEntry(1, "cookie", 3, "node-1", 12, 2, b'{"gold":10,"name":"\xc3\xa9\\n"}'),
    SnapshotEntry("1", None, 1, "node-1", 0, 0, b'[1.5,null,true,",\\"body\\":"]'),
    SnapshotEntry(-(2**63), ',"body":', 0, "", 0, 0, b"7"),
)


def written(path: Path, entries: tuple[SnapshotEntry, ...] = ENTRIES) -> bytes:
    lines = [
        first_line("snapshot", 1767225600.0, "node-1"),
        *map(entry_line, entries),
        last_line("snapshot", len(entries)),
    ]
    write_whole(str(path), lines)
    return path.read_bytes()


def line(content: bytes) -> bytes:
    return b"%08x %b" % (crc32(content), content)


# What is in one


async def test_everybody_is_in_a_snapshot_with_what_the_store_knows_of_them(tmp_path, clock):
    store = ScriptedStore(clock)
    store.put("ann", b'{"gold":1}', version=4)
    async with SessionManager(store=store, clock=clock, schema=3) as manager:
        session = await manager.create("cookie")
        await session.login("ann")
        for user_id in (1, "1"):
            await manager.open(user_id, default={"gold": 5})
        await manager.create("anonymous")
        session.user_data["gold"] = 2
        report = await manager.snapshot(tmp_path / "all")
        found = read_snapshot(tmp_path / "all")
        assert (report.saved, report.left_out, report.size) == (3, (), (tmp_path / "all").stat().st_size)
        assert found.complete and found.kind == "snapshot" and found.expected == 3
        assert found.owner == store.owner_of("ann") and abs(found.taken_at - time.time()) < 60
        entries = {entry.user_id: entry for entry in found.entries}
        assert set(map(repr, entries)) == {"'ann'", "1", "'1'"}
        ann = entries["ann"]
        assert ann == SnapshotEntry("ann", "cookie", 2, found.owner, 4, 3, b'{"gold":2}')
        assert (entries[1].version, entries[1].epoch) == (0, 1)
        assert store.stored("ann") == {"gold": 1}, "a snapshot is no save"


async def test_a_snapshot_without_a_store(tmp_path, make_manager):
    manager = make_manager()
    session = await manager.create("cookie")
    await session.set_user(7, {"gold": 1})
    await manager.snapshot(str(tmp_path / "all"))
    found = read_snapshot(str(tmp_path / "all"))
    assert found.entries == (SnapshotEntry(7, "cookie", 0, "", 0, 0, b'{"gold":1}'),)
    assert found.owner == ""
    await manager.destroy()


async def test_a_user_who_cannot_be_encoded_is_left_out_and_named(tmp_path):
    async with SessionManager(store=MemoryStore()) as manager:
        for user_id in range(3):
            await manager.open(user_id, default={})
        manager.find_by_user(1).user_data["bag"] = {1, 2}
        report = await manager.snapshot(tmp_path / "all")
        assert (report.saved, report.left_out) == (2, (1,))
        assert read_snapshot(tmp_path / "all").complete
        await manager.erase(1)


async def test_an_encoder_and_before_save_are_used_as_for_a_save(tmp_path):
    def copy(session):
        session.user_data.add("live")

    async with SessionManager(store=MemoryStore(), encode=sorted, decode=set, before_save=copy) as manager:
        await manager.open("ann", default=set)
        await manager.snapshot(tmp_path / "all")
        assert read_snapshot(tmp_path / "all").entries[0].body == b'["live"]'


async def test_users_who_are_saved_while_it_is_written_are_in_it_once(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(savefile, "CHUNK", 1)
    store = ScriptedStore(clock)
    async with SessionManager(store=store, clock=clock) as manager:
        for user_id in range(50):
            await manager.open(user_id, default={"n": 0})
        work = asyncio.create_task(manager.snapshot(tmp_path / "all"))
        while not work.done():
            for session in manager.sessions():
                session.user_data["n"] += 1
            await manager.persist_all_user_data()
        report = await work
        found = read_snapshot(tmp_path / "all")
        assert report.saved == 50
        assert found.complete and sorted(entry.user_id for entry in found.entries) == list(range(50))


async def test_a_user_whose_last_save_fails_is_in_it(tmp_path, clock):
    store = ScriptedStore(clock)
    manager = SessionManager(store=store, clock=clock)
    session = await manager.open("ann", default={"gold": 1})
    store.down = True
    ending = asyncio.create_task(session.destroy())
    await clock.advance("11s")
    with pytest.raises(Exception, match="not acknowledged"):
        await ending
    await manager.snapshot(tmp_path / "all")
    assert [entry.user_id for entry in read_snapshot(tmp_path / "all").entries] == ["ann"]
    store.down = False
    await clock.advance("5s")
    await manager.destroy()


async def test_the_loop_goes_on_while_a_large_snapshot_is_written(tmp_path):
    async with SessionManager(store=MemoryStore()) as manager:
        for user_id in range(2000):
            await manager.open(user_id, default={"text": "x" * 2000})
        gaps, last, done = [], time.perf_counter(), False

        async def tick():
            nonlocal last
            while not done:
                await asyncio.sleep(0)
                now = time.perf_counter()
                gaps.append(now - last)
                last = now

        ticking = asyncio.create_task(tick())
        await manager.snapshot(tmp_path / "all")
        done = True
        await ticking
        assert len(gaps) > 5
        assert sorted(gaps)[int(len(gaps) * 0.9)] < 0.02
        assert (tmp_path / "all").stat().st_size > 4_000_000


async def test_a_snapshot_after_the_end_is_refused_and_leaves_the_file(tmp_path):
    written(tmp_path / "all")
    async with SessionManager(store=MemoryStore()) as manager:
        pass
    with pytest.raises(ManagerClosedError):
        await manager.snapshot(tmp_path / "all")
    assert read_snapshot(tmp_path / "all").entries == ENTRIES


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
async def test_only_the_owner_may_read_it_and_a_link_is_followed(tmp_path):
    (tmp_path / "real").write_bytes(b"")
    (tmp_path / "real").chmod(0o644)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    async with SessionManager() as manager:
        await manager.snapshot(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


# Calls that end early


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def a_snapshot_held_at(step: str, disk: HeldDisk, path: Path, manager: SessionManager) -> asyncio.Task:
    """One whose thread is in the middle of a step."""
    await manager.open("new", default={"text": "x" * 1000})
    work = asyncio.create_task(take_snapshot(inside(manager), path, disk))
    await disk.is_reached(step)
    return work


async def cancel_in_vain(work: asyncio.Task) -> None:
    for _ in range(3):
        work.cancel()
        await turns()
        assert not work.done(), "its thread is still at work"


@pytest.mark.parametrize("step", ["create", "write", "sync", "close"])
async def test_however_often_it_is_cancelled_the_old_file_stays_and_nothing_else(tmp_path, step):
    data = written(tmp_path / "all")
    disk = HeldDisk(step)
    async with SessionManager(store=MemoryStore()) as manager:
        work = await a_snapshot_held_at(step, disk, tmp_path / "all", manager)
        await cancel_in_vain(work)
        disk.let_go(step)
        with pytest.raises(asyncio.CancelledError):
            await work
        assert names(tmp_path) == ["all"]
        assert (tmp_path / "all").read_bytes() == data


@pytest.mark.parametrize("step", ["replace", "sync folder"])
async def test_cancelled_when_the_new_file_takes_its_place_the_new_one_is_there_and_nothing_else(tmp_path, step):
    written(tmp_path / "all")
    disk = HeldDisk(step)
    async with SessionManager(store=MemoryStore()) as manager:
        work = await a_snapshot_held_at(step, disk, tmp_path / "all", manager)
        await cancel_in_vain(work)
        disk.let_go(step)
        with pytest.raises(asyncio.CancelledError):
            await work
        assert names(tmp_path) == ["all"]
        assert [entry.user_id for entry in read_snapshot(tmp_path / "all").entries] == ["new"]


async def test_cancelled_while_it_cleans_up_it_cleans_up_all_the_same(tmp_path):
    disk = HeldDisk("write", "remove")
    async with SessionManager(store=MemoryStore()) as manager:
        work = await a_snapshot_held_at("write", disk, tmp_path / "all", manager)
        work.cancel()
        disk.let_go("write")
        await disk.is_reached("remove")
        await cancel_in_vain(work)
        disk.let_go("remove")
        with pytest.raises(asyncio.CancelledError):
            await work
        assert names(tmp_path) == []


async def test_a_time_limit_of_the_caller_is_told_apart_from_another_cancellation(tmp_path):
    disk = HeldDisk("write")
    async with SessionManager(store=MemoryStore()) as manager:
        await manager.open("new", default={})

        async def within(seconds: float) -> None:
            async with asyncio.timeout(seconds):
                await take_snapshot(inside(manager), tmp_path / "all", disk)

        work = asyncio.create_task(within(60))
        await disk.is_reached("write")
        work.cancel()
        await turns()
        disk.let_go("write")
        with pytest.raises(asyncio.CancelledError):
            await work
        with pytest.raises(TimeoutError):
            await within(0)
        assert names(tmp_path) == []


async def test_a_disk_that_hangs_holds_up_a_cancelled_call_no_longer_than_it_may(tmp_path, monkeypatch):
    """The thread is left alone then, and cleans up itself when the disk answers; until then its descriptor stays open.

    Otherwise somebody else's file or socket would get the number, and the thread would go on with that.
    """
    monkeypatch.setattr(threads, "PATIENCE", 0)
    data = written(tmp_path / "all")
    for step in ("create", "write", "sync", "close"):
        disk = HeldDisk(step)
        async with SessionManager(store=MemoryStore()) as manager:
            work = await a_snapshot_held_at(step, disk, tmp_path / "all", manager)
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
            others = [(tmp_path / "other").open("ab") for _ in range(5)]
            disk.let_go(step)
            end_of_threads()
            assert (tmp_path / "other").read_bytes() == b""
            for other in others:
                other.close()
        (tmp_path / "other").unlink()
        assert names(tmp_path) == ["all"]
        assert (tmp_path / "all").read_bytes() == data


@pytest.mark.parametrize("step", ["create", "write", "sync", "close"])
def test_a_loop_that_is_closed_meanwhile_leaves_the_old_file_and_nothing_else(tmp_path, step, caplog):
    """Nobody is cancelled, and nothing can be waited for."""
    data = written(tmp_path / "all")
    disk = HeldDisk(step)
    manager = SessionManager()

    async def begin() -> asyncio.Task:
        work = asyncio.create_task(take_snapshot(inside(manager), tmp_path / "all", disk))
        await disk.is_reached(step)
        return work

    loop = asyncio.new_event_loop()
    work = loop.run_until_complete(begin())
    loop.close()
    disk.let_go(step)
    end_of_threads()
    del work
    gc.collect()
    assert names(tmp_path) == ["all"]
    assert (tmp_path / "all").read_bytes() == data
    assert [record.getMessage().splitlines()[0] for record in caplog.records] == [
        "Task was destroyed but it is pending!"
    ]


async def test_where_there_are_no_more_threads_it_is_written_without_one(tmp_path, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    async with SessionManager(store=MemoryStore()) as manager:
        await manager.open("ann", default={})
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            await manager.snapshot(tmp_path / "all")
            with pytest.raises(SnapshotError):
                await take_snapshot(inside(manager), tmp_path / "all", FaultyDisk(fail={"sync": errno.EIO}))
    assert read_snapshot(tmp_path / "all").complete and names(tmp_path) == ["all"]


# Names that lead elsewhere


@needs_links
async def test_a_link_that_another_user_has_made_is_not_followed(tmp_path, monkeypatch):
    """Whoever may make names in a folder would have the server replace any file of its own."""
    (tmp_path / "precious").write_bytes(b"precious")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "precious")
    made_by_another_user(link, monkeypatch)
    (tmp_path / "all").symlink_to(link)
    async with SessionManager() as manager:
        for path in (link, tmp_path / "all"):
            with pytest.raises(SnapshotError, match="another user"):
                await manager.snapshot(path)
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert names(tmp_path) == ["all", "link", "precious"]


@needs_links
async def test_the_temporary_file_is_made_by_no_link(tmp_path, monkeypatch):
    (tmp_path / "precious").write_bytes(b"precious")
    for target in ("precious", "nowhere"):
        link = tmp_path / "all.00000000.tmp"
        link.symlink_to(tmp_path / target)
        async with SessionManager() as manager:
            with monkeypatch.context() as patch:
                patch.setattr(os, "urandom", bytes)
                with pytest.raises(SnapshotError, match="could not be written"):
                    await manager.snapshot(tmp_path / "all")
        link.unlink()
        assert names(tmp_path) == ["precious"] and (tmp_path / "precious").read_bytes() == b"precious"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_in_place_of_a_snapshot_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SnapshotError, match="no regular file"):
        read_snapshot(tmp_path / "pipe")


def test_what_is_printed_of_one_shows_no_data_and_no_key(tmp_path):
    data = written(tmp_path / "all")
    (tmp_path / "all").write_bytes(data.replace(b"cookie", b"cookio"))
    found = read_snapshot(tmp_path / "all")
    assert len(found.damaged) == 1
    assert "cooki" not in repr(found) and "gold" not in repr(found)


# Damage


class Held(Files):
    """A disk with one file."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, path: str) -> bytes:
        return self.data


def check_nothing_is_made_up(found, lost_is_told: bool = True) -> None:
    assert all(entry in ENTRIES for entry in found.entries), "a wrong entry was taken for a right one"
    assert len(set(found.entries)) == len(found.entries)
    if len(found.entries) < len(ENTRIES):
        assert not found.complete
        assert found.damaged or found.expected != len(found.entries)


def test_a_file_cut_at_any_byte(tmp_path):
    data = written(tmp_path / "all")
    header = data.index(b"\n")
    for length in range(len(data)):
        (tmp_path / "cut").write_bytes(data[:length])
        if length < header:
            with pytest.raises(SnapshotError, match="is not a snapshot"):
                read_snapshot(tmp_path / "cut")
            continue
        found = read_snapshot(tmp_path / "cut")
        check_nothing_is_made_up(found)
        assert found.complete == (length == len(data) - 1), "only the end of the last line may be missing"
        assert len(found.entries) == max(0, data[: length + 1].count(b"\n") - 1) or found.complete


@pytest.mark.guarantee("I17")
def test_a_file_with_any_bit_flipped(tmp_path):
    data = written(tmp_path / "all")
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            found = savefile.read("flipped", files=Held(bytes(flipped)))  # the first line or the last one is whole
            check_nothing_is_made_up(found)
            assert not found.complete or place == len(data) - 1
            for damaged in found.damaged:
                assert damaged.raw in bytes(flipped) and damaged.reason


def test_a_file_with_any_byte_or_line_missing_or_twice(tmp_path):
    data = written(tmp_path / "all")
    for place in range(len(data) - 1):
        (tmp_path / "other").write_bytes(data[:place] + data[place + 1 :])
        found = read_snapshot(tmp_path / "other")
        check_nothing_is_made_up(found)
        assert not found.complete
    lines = data.splitlines(keepends=True)
    for number in range(1, len(lines)):
        (tmp_path / "other").write_bytes(b"".join(lines[:number] + lines[number + 1 :]))
        found = read_snapshot(tmp_path / "other")
        assert not found.complete
        assert found.expected in (None, 3)


def test_of_a_thousand_entries_one_is_cut_short_and_one_has_a_wrong_type(tmp_path):
    entries = tuple(SnapshotEntry(n, None, 1, "node", n, 0, b'{"gold":%d}' % n) for n in range(1000))
    lines = written(tmp_path / "all", entries).splitlines()
    lines[500] = lines[500][:-7]  # user 499
    lines[701] = line(lines[701][9:].replace(b'"version":700', b'"version":"7"'))
    (tmp_path / "all").write_bytes(b"\n".join(lines) + b"\n")
    found = read_snapshot(tmp_path / "all")
    assert found.entries == tuple(entry for entry in entries if entry.user_id not in (499, 700))
    assert [(bad.line, bad.user_id, bad.raw) for bad in found.damaged] == [
        (501, 499, lines[500]),
        (702, 700, lines[701]),
    ]
    assert [bad.reason for bad in found.damaged] == [
        "the checksum is that of other bytes",
        "version is not a whole number from 0 to 2**53 - 1",
    ]
    assert found.expected == 1000 and not found.complete


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"7",
        b"[]",
        b'{"user_id":1}',
        b'{"user_id":1.0,"key":null,"epoch":1,"owner":"","version":1,"schema":0,"body":{}}',
        b'{"user_id":true,"key":null,"epoch":1,"owner":"","version":1,"schema":0,"body":{}}',
        b'{"user_id":"","key":null,"epoch":1,"owner":"","version":1,"schema":0,"body":{}}',
        b'{"user_id":1,"key":7,"epoch":1,"owner":"","version":1,"schema":0,"body":{}}',
        b'{"user_id":1,"key":null,"epoch":-1,"owner":"","version":1,"schema":0,"body":{}}',
        b'{"user_id":1,"key":null,"epoch":1,"owner":null,"version":1,"schema":0,"body":{}}',
        b'{"user_id":1,"key":null,"epoch":1,"owner":"","version":true,"schema":0,"body":{}}',
        b'{"user_id":1,"key":null,"epoch":1,"owner":"","version":1,"body":{}}',
        b'{"user_id":1,"key":null,"epoch":1,"owner":"","version":1,"schema":0,"body":{]}',
        b'{"user_id":1,"key":null,"epoch":1,"owner":"","version":1,"schema":0,"body":}',
        b'{"user_id":1,"key":null,"epoch":1,"owner":"","version":1,"schema":0,"body":{}',
        b'{"end":1,"format":"cagey_sessions","version":1,"kind":"snapshot"}',
    ],
)
def test_a_line_with_a_right_checksum_and_a_wrong_content_is_set_aside(tmp_path, content):
    lines = written(tmp_path / "all").splitlines()
    lines[2:2] = [line(content)]
    (tmp_path / "all").write_bytes(b"\n".join(lines) + b"\n")
    found = read_snapshot(tmp_path / "all")
    assert found.entries == ENTRIES
    assert [(bad.line, bad.raw) for bad in found.damaged] == [(3, line(content))]


@pytest.mark.guarantee("I30")
def test_a_newer_format_is_refused_by_name(tmp_path):
    data = written(tmp_path / "all")
    lines = data.splitlines()
    for number in (0, -1):
        newer = list(lines)
        newer[number] = line(lines[number][9:].replace(b'"version":1', b'"version":2'))
        if number:
            newer[0] = b"?"
        (tmp_path / "newer").write_bytes(b"\n".join(newer))
        with pytest.raises(SnapshotError, match="has format 2, and this version of cagey-sessions reads up to 1"):
            read_snapshot(tmp_path / "newer")


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"hello\n", b"\0" * 100, b'{"gold":1}', line(b'{"format":"other","version":1}')]
)
def test_a_file_that_is_none(tmp_path, content):
    (tmp_path / "all").write_bytes(content)
    with pytest.raises(SnapshotError, match="is not a snapshot"):
        read_snapshot(tmp_path / "all")


def test_a_file_that_is_not_there_or_is_a_folder(tmp_path):
    with pytest.raises(SnapshotError, match="there is no file"):
        read_snapshot(tmp_path / "none")
    with pytest.raises(SnapshotError, match="could not be read"):
        read_snapshot(tmp_path)


@pytest.mark.guarantee("I30")
def test_the_golden_file_of_format_1(tmp_path):
    assert written(tmp_path / "all") == GOLDEN.read_bytes(), "what is written has changed: that is a new format"
    found = read_snapshot(GOLDEN)
    assert found.entries == ENTRIES
    assert (found.kind, found.taken_at, found.owner, found.complete) == ("snapshot", 1767225600.0, "node-1", True)
    assert orjson.loads(found.entries[0].body) == {"gold": 10, "name": "é\n"}


async def test_a_body_as_deep_as_can_be_saved(tmp_path):
    deep = data = []
    async with SessionManager(store=MemoryStore()) as manager:
        await manager.open(1, default=data)
        live = manager.find_by_user(1).user_data
        for _ in range(2000):
            child = []
            live.append(child)
            try:
                inside(manager).encoding.dump(manager.find_by_user(1).user_data)
            except Exception:
                live.clear()
                break
            live = child
        report = await manager.snapshot(tmp_path / "all")
        assert report.saved == 1 and read_snapshot(tmp_path / "all").complete
        assert deep == []


# The disk


async def a_snapshot(path: Path, disk: FaultyDisk) -> None:
    async with SessionManager() as manager:
        for user_id in ("new", "newer"):
            session = await manager.create()
            await session.set_user(user_id, {})
        try:
            await take_snapshot(inside(manager), path, disk)
        finally:
            await manager.destroy(False)


async def steps_of(path: Path) -> list[str]:
    disk = FaultyDisk()
    await a_snapshot(path, disk)
    return disk.steps


async def test_the_steps_of_a_snapshot(tmp_path):
    assert await steps_of(tmp_path / "all") == [
        "create",
        "write",
        "sync",
        "close",
        "replace",
        "sync folder",
    ]


@pytest.mark.guarantee("I18")
@pytest.mark.crashes
@pytest.mark.parametrize("moment", ["before", "during", "after"])
@pytest.mark.parametrize("chunk", [1, 2**20])
async def test_a_crash_at_any_step_leaves_the_whole_old_file_or_the_whole_new_one(tmp_path, monkeypatch, moment, chunk):
    monkeypatch.setattr(savefile, "CHUNK", chunk)
    steps = await steps_of(tmp_path / "count")
    assert len(steps) == (6 if chunk > 1 else 8)
    seen = set()
    for number in range(len(steps)):
        written(tmp_path / "all")
        with pytest.raises(Crash):
            await a_snapshot(tmp_path / "all", FaultyDisk(crash=(number, moment)))
        found = read_snapshot(tmp_path / "all")
        assert found.complete
        users = tuple(entry.user_id for entry in found.entries)
        assert users in ((1, "1", -(2**63)), ("new", "newer"))
        seen.add(users)
    assert len(seen) == 2


@pytest.mark.guarantee("I18")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("step", ["create", "write", "sync", "close", "replace"])
async def test_a_disk_that_refuses_is_reported_and_the_old_file_stays(tmp_path, step, code):
    data = written(tmp_path / "all")
    with pytest.raises(SnapshotError, match="could not be written") as caught:
        await a_snapshot(tmp_path / "all", FaultyDisk(fail={step: code}))
    assert os.strerror(code) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert (tmp_path / "all").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["all"]


async def test_a_folder_that_cannot_be_synced_is_reported_though_the_file_is_there(tmp_path):
    written(tmp_path / "all")
    with pytest.raises(SnapshotError):
        await a_snapshot(tmp_path / "all", FaultyDisk(fail={"sync folder": errno.EIO}))
    assert len(read_snapshot(tmp_path / "all").entries) == 2


async def test_a_folder_that_is_not_there(tmp_path):
    async with SessionManager() as manager:
        with pytest.raises(SnapshotError, match="make its folder first"):
            await manager.snapshot(tmp_path / "none" / "all")
        with pytest.raises(SnapshotError):
            await manager.snapshot(tmp_path)
