"""The file of a spill: damaged, foreign, not to be written, or left behind by a crash at any step."""

from __future__ import annotations

import asyncio
import errno
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest

from cagey_sessions import OptionError, SessionManager, SnapshotError, read_snapshot, threads
from cagey_sessions._core import Digest
from cagey_sessions.files.format import DISK, Files, first_line, last_line
from cagey_sessions.files.spill import Spill, SpillEntry
from cagey_sessions.sessions import draining as drain
from cagey_sessions.stores import MemoryStore
from conftest import run
from support import (
    Crash,
    FaultyDisk,
    HeldDisk,
    ScriptedStore,
    end_of_threads,
    inside,
    let_time_pass,
    made_by_another_user,
    needs_links,
    turns,
)
from support.cluster import Cluster, spill_gold

ENTRY = SpillEntry("ann", None, 3, "node", 0, 0, b"{}", 0.0, bytes(16), frozenset())


@pytest.mark.guarantee("I17")
async def test_damaged_lines_are_kept_byte_for_byte_and_reported(cluster):
    await spill_gold(cluster, bob=5)
    lines = cluster.path.read_bytes().splitlines()
    lines[1] = lines[1][:-3] + b"\xff\x00}"
    lines[3:3] = [b"rubbish"]
    cluster.path.write_bytes(b"\n".join(lines))
    manager = await cluster.start()
    report = manager.spill_report
    assert len(report.replayed) == 1 and not report.complete
    assert [(bad.line, bad.user_id, bad.raw) for bad in report.damaged] == [
        (2, report_id(lines[1]), lines[1]),
        (4, None, b"rubbish"),
    ]
    kept = read_snapshot(cluster.path)
    assert [bad.raw for bad in kept.damaged] == [lines[1], b"rubbish"] and kept.entries == ()
    await manager.destroy()
    manager = await cluster.start()
    assert len(manager.spill_report.damaged) == 2
    await manager.open("eve", default={})
    await cluster.fail(manager)
    kept = read_snapshot(cluster.path)
    assert [bad.raw for bad in kept.damaged] == [lines[1], b"rubbish"] and len(kept.entries) == 1


def report_id(line: bytes) -> str:
    return "ann" if b'"ann"' in line else "bob"


@pytest.mark.parametrize(
    "change",
    [
        (b'"known":[[1,', b'"known":[["1",'),
        (b'"known":[[1,', b'"known":[[1.0,'),
        (b'"known":[[1,', b'"known":[[0,'),
        (b'"known":[[1,"', b'"known":[[1," '),
        (b'"known":[[1,"', b'"known":[[1,"+'),
        (b'"epoch":', b'"epoch":9007199254740992,"x":'),
        (b'"epoch":', b'"epoch":1,"epoch":'),
        (b'"version":', b'"version":18446744073709551616,"x":'),
        (b'"body":{', b'"body":{"gold":18446744073709551616,'),
        (b'"body":{', b'"body":{"silver":18446744073709551616,'),
        (b'"body":{', b'"body":{"silver":1e-999,'),
        (b'"known":[[1,', b'"known":[[1,2,'),
        (b'"known":', b'"unknown":'),
        (b'"digest_key":"', b'"digest_key":"zz'),
        (b'"fixed_at":', b'"fixed_at":null,"x":'),
    ],
)
async def test_a_line_with_a_right_checksum_and_a_wrong_field_is_set_aside(cluster, change):
    await spill_gold(cluster)
    lines = cluster.path.read_bytes().splitlines()
    content = lines[1][9:].replace(*change)
    assert content != lines[1][9:]
    lines[1] = b"%08x %b" % (crc32(content), content)
    cluster.path.write_bytes(b"\n".join(lines))
    manager = await cluster.start()
    report = manager.spill_report
    assert (report.replayed, [bad.user_id for bad in report.damaged]) == ((), ["ann"])
    assert read_snapshot(cluster.path).expected == 1
    await manager.destroy()


async def test_a_file_that_was_cut_between_two_lines_is_told(cluster):
    await spill_gold(cluster, bob=5)
    lines = cluster.path.read_bytes().splitlines(keepends=True)
    cluster.path.write_bytes(b"".join(lines[:2]))
    manager = await cluster.start()
    assert not manager.spill_report.complete and len(manager.spill_report.replayed) == 1
    await manager.destroy()


def test_what_needs_a_store_says_so(tmp_path):
    with pytest.raises(OptionError, match="spill needs a store"):
        SessionManager(spill=tmp_path / "spill")


@pytest.mark.parametrize("path", ["none/spill", ".", 7, b"spill"])
def test_a_path_that_cannot_be_used_is_refused_at_once(tmp_path, monkeypatch, clock, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match="spill"):
        SessionManager(store=ScriptedStore(clock), spill=path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path):
    with pytest.raises(OptionError, match="nothing can be written"):
        Spill(tmp_path / "spill", FaultyDisk(fail={"create": errno.EACCES}))


async def test_a_file_that_is_no_spill_is_refused_before_anybody_is_admitted(cluster):
    manager = cluster.manager()
    cluster.path.write_bytes(b"my diary\n")
    with pytest.raises(SnapshotError, match="is not a snapshot"):
        await manager.__aenter__()
    assert not cluster.store._is_open
    with pytest.raises(SnapshotError):
        await manager.open("ann", default={})
    async with SessionManager() as other:
        await other.snapshot(cluster.path)
    with pytest.raises(SnapshotError, match="is a snapshot, not a spill"):
        await manager.open("ann", default={})
    await manager.destroy()
    assert read_snapshot(cluster.path).kind == "snapshot"


GOLDEN = Path(__file__).parent / "golden" / "spill-1.txt"


KEY = bytes(range(16))


ENTRIES = (
    SpillEntry("ann", None, 3, "node-1", 7, 2, b'{"gold":2}', 1767225600.0, KEY, frozenset({(7, 0x3333), (8, 0x44)})),
    SpillEntry(1, None, 1, "node-1", 0, 0, b"[]", 1767225601.5, KEY, frozenset()),
)


async def test_the_golden_file_of_format_1(cluster):
    known = frozenset({(7, Digest(KEY)(b'{"gold":1}')), (8, 0x44)})
    entries = (replace(ENTRIES[0], known=known), ENTRIES[1])
    lines = [first_line("spill", 1767225602.0, "node-2"), *(entry.line() for entry in entries), last_line("spill", 2)]
    assert b"".join(lines) == GOLDEN.read_bytes(), "what is written has changed: that is a new format"
    cluster.path.write_bytes(GOLDEN.read_bytes())
    store = ScriptedStore(cluster.clock, backing=cluster.backing)
    store.put("ann", b'{"gold":1}', version=7)
    await store.open()
    await store.claim_many([1], "node-1")
    manager = await cluster.start()
    assert set(manager.spill_report.replayed) == {"ann", 1}
    assert cluster.backing.rows["ann"].record[3:6] == (8, 2, b'{"gold":2}')
    await manager.destroy()


@pytest.mark.parametrize("step", ["create", "write", "sync", "close", "replace", "sync folder"])
async def test_after_any_failure_of_the_disk_the_next_attempt_does_it(cluster, step):
    spill = Spill(cluster.path)
    spill.collect(ENTRIES[0])
    spill._files = FaultyDisk(fail={step: errno.EIO})
    with pytest.raises(SnapshotError):
        spill.write()
    spill._files = FaultyDisk()
    spill.collect(ENTRIES[1])
    assert spill.write() == 2
    assert cluster.spilled() == {"ann": b'{"gold":2}', 1: b"[]"}
    assert sorted(path.name for path in cluster.path.parent.iterdir()) == ["spill", "spill.lock"]


async def test_a_full_disk_is_reported_and_everybody_is_named(cluster):
    manager = await cluster.start()
    for user_id in ("ann", "bob"):
        await manager.open(user_id, default={})
    inside(manager).spill._files = FaultyDisk(fail={"write": errno.ENOSPC})
    error = await cluster.fail(manager)
    assert set(error.user_ids) == {"ann", "bob"} and not any(user.spilled for user in error.report.unsaved)
    assert isinstance(error.exceptions[-1], SnapshotError) and "free some space" in str(error.exceptions[-1])
    assert [path.name for path in cluster.path.parent.iterdir()] == ["spill.lock"]
    inside(manager).spill._files = DISK
    manager._spilling._spill_at_exit()  # which tries once more
    assert {entry.user_id for entry in read_snapshot(cluster.path).entries} == {"ann", "bob"}


async def a_start_that_is_held(cluster: Cluster, step: str) -> tuple[SessionManager, HeldDisk, asyncio.Task]:
    """The start of a process for which ann was spilled; its thread is in the middle of a step."""
    await spill_gold(cluster)
    cluster.errors.clear()
    cluster.backing.dead |= {row.owner for row in cluster.backing.rows.values()}
    manager = cluster.manager()
    disk = inside(manager).spill._files = HeldDisk(step)
    starting = asyncio.create_task(manager.__aenter__())
    await disk.is_reached(step)
    return manager, disk, starting


async def test_however_often_a_start_is_cancelled_what_was_spilled_is_known_once(cluster):
    manager, disk, starting = await a_start_that_is_held(cluster, "read")
    for _ in range(3):
        starting.cancel()
        await turns()
        assert not starting.done(), "its thread is still at work"
    another = asyncio.create_task(manager.open("ann", default={}))
    await turns()
    disk.let_go("read")
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert (await another).user_data == {"gold": 2}
    assert (manager.spill_report.replayed, manager.spill_report.pending) == (("ann",), ())
    await let_time_pass(cluster.clock, manager.destroy())
    assert cluster.errors == [] and not cluster.path.exists()


async def test_a_start_that_was_cancelled_while_the_disk_hung_tells_nothing_later(cluster, monkeypatch):
    monkeypatch.setattr(threads, "PATIENCE", 0)
    manager, disk, starting = await a_start_that_is_held(cluster, "read")
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    session = await manager.open("ann", default={})
    assert manager.spill_report.replayed == ("ann",)
    session.user_data["gold"] = 3
    await session.persist_now()
    disk.let_go("read")
    end_of_threads()
    await turns()
    assert manager.spill_report.pending == ()
    await session.destroy()
    assert (await manager.open("ann", default={})).user_data == {"gold": 3}
    await let_time_pass(cluster.clock, manager.destroy())
    assert cluster.errors == [] and not cluster.path.exists()


async def test_a_drain_does_not_wait_for_ever_for_a_disk_that_hangs_and_nor_does_its_loop(cluster, monkeypatch):
    monkeypatch.setattr(drain, "SECONDS_TO_SPILL", 0)
    manager = await cluster.start()
    await manager.open("ann", default={"gold": 1})
    disk = inside(manager).spill._files = HeldDisk("sync")
    error = await cluster.fail(manager)
    assert not error.report.unsaved[0].spilled
    assert isinstance(error.exceptions[-1], SnapshotError) and "the disk hangs" in str(error.exceptions[-1])
    await turns()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("cagey-sessions")]
    disk.let_go("sync")
    end_of_threads()
    assert cluster.spilled() == {"ann": b'{"gold":1}'}, "it goes on alone when the disk answers"
    manager._spilling._spill_at_exit()


NO_LOCK_FILES = {
    "a link": lambda lock, precious: lock.symlink_to(precious),
    "a link to nothing": lambda lock, precious: lock.symlink_to(precious.parent / "nowhere"),
    "a file of something else": lambda lock, precious: os.link(precious, lock),
    "a folder": lambda lock, precious: lock.mkdir(),
    "a pipe": lambda lock, precious: os.mkfifo(lock),
}


@needs_links
@pytest.mark.parametrize("kind", NO_LOCK_FILES)
async def test_what_is_no_lock_file_is_refused_at_once_and_left_as_it_is(cluster, kind, tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    lock = tmp_path / "spill.lock"
    NO_LOCK_FILES[kind](lock, precious)
    if kind != "a folder":
        with pytest.raises(OptionError, match=r"spill\.lock"):
            cluster.manager()
        lock.unlink()
    else:
        lock.rmdir()
    manager = await cluster.start()
    await manager.open("ann", default={})
    NO_LOCK_FILES[kind](lock, precious)
    error = await cluster.fail(manager)
    assert error.report.unsaved[0].spilled, "it is better written without a lock than not at all"
    assert precious.read_bytes() == b"precious" and not (tmp_path / "nowhere").exists()


@needs_links
async def test_a_link_that_another_user_has_made_is_refused_at_once(tmp_path, clock, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "spill")
    made_by_another_user(tmp_path / "link", monkeypatch)
    with pytest.raises(OptionError, match="another user"):
        SessionManager(store=ScriptedStore(clock), spill=tmp_path / "link")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
async def test_a_pipe_in_place_of_the_spill_is_refused_at_once(cluster):
    os.mkfifo(cluster.path)
    manager = cluster.manager()
    with pytest.raises(SnapshotError, match="no regular file"):
        await manager.open("ann", default={})
    await manager.destroy()


@pytest.mark.crashes
@pytest.mark.parametrize("moment", ["before", "during", "after"])
async def test_a_crash_at_any_step_of_a_replay_loses_nothing_and_makes_no_conflict(cluster, moment):
    done = False
    number = 0
    while not done:
        cluster.path.unlink(missing_ok=True)
        cluster.backing.rows.clear()
        await spill_gold(cluster, bob=5)
        (cluster.path.parent / "keep").write_bytes(cluster.path.read_bytes())
        disk = FaultyDisk(crash=(number, moment))
        spill = Spill(cluster.path)
        spill._files = disk
        manager = cluster.manager()
        inside(manager).spill = spill
        cluster.backing.dead |= {row.owner for row in cluster.backing.rows.values()}
        try:
            await manager.__aenter__()
        except Crash:
            number += 1
        else:
            done = True
        inside(manager).spill = None
        await manager.destroy()

        manager = await cluster.start()
        assert manager.spill_report.conflicts == ()
        assert (cluster.stored("ann"), cluster.stored("bob")) == ({"gold": 2}, {"gold": 5})
        assert not cluster.path.exists()
        await manager.destroy()
    assert number >= 3


@pytest.mark.crashes
@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_crash_at_any_step_of_a_write_leaves_what_was_there_or_what_is_to_be(cluster, moment, clock):
    run(spill_gold(cluster))
    before = cluster.path.read_bytes()
    run(spill_two(cluster))
    after = cluster.spilled()
    for number in range(20):
        cluster.path.write_bytes(before)
        spill = Spill(cluster.path)
        spill.open(spill.read())
        entry = spill.pending["ann"][0]
        spill.collect(replace(entry, user_id="bob"))
        spill._files = FaultyDisk(crash=(number, moment))
        try:
            spill.write()
        except Crash:
            assert set(cluster.spilled()) in ({"ann"}, {"ann", "bob"})
            assert read_snapshot(cluster.path).complete
            continue
        break
    assert number == 7 and set(after) == {"ann", "bob"}


async def spill_two(cluster: Cluster) -> None:
    manager = cluster.manager()
    await manager.__aenter__()
    await manager.open("bob", default={"gold": 5})
    await cluster.fail(manager)


async def test_a_snapshot_never_takes_the_place_of_the_spill(tmp_path):
    manager = SessionManager(store=MemoryStore(), spill=tmp_path / "spill")
    async with manager:
        os.symlink(tmp_path / "spill", tmp_path / "link")
        for name in ("spill", "link"):
            with pytest.raises(OptionError, match="spill"):
                await manager.snapshot(tmp_path / name)
        await manager.snapshot(tmp_path / "snapshot")


def test_two_processes_that_write_at_the_same_time_both_keep_their_users(tmp_path, monkeypatch):
    one, other = Spill(tmp_path / "spill"), Spill(tmp_path / "spill")
    one.collect(ENTRY)
    other.collect(replace(ENTRY, user_id="bob"))

    class Disk(Files):
        def replace(self, source, target):
            """The other comes between what `one` has read and what it writes."""
            monkeypatch.setattr("cagey_sessions.files.spill.LONGEST_WRITE", 0)
            with suppress(SnapshotError):
                other.write()
            super().replace(source, target)

    one._files = Disk()
    one.write()
    if other.is_stale:  # it was refused, and tries again
        other.write()
    assert {entry.user_id for entry in read_snapshot(tmp_path / "spill").entries} == {"ann", "bob"}


def test_a_disk_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(file):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("cagey_sessions.stores.file_lock._lock", refuse)
    spill = Spill(tmp_path / "spill")
    spill.collect(ENTRY)
    spill.write()
    assert read_snapshot(tmp_path / "spill").complete
