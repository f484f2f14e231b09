"""What a review of the spill has found: each of these once lost somebody's data."""

from __future__ import annotations

import asyncio
import errno
import os
from contextlib import suppress
from dataclasses import replace

import pytest

from cagey_sessions import DrainError, OptionError, SessionManager, SnapshotError, StoreContractError, read_snapshot
from cagey_sessions.files.format import Files
from cagey_sessions.files.spill import Spill, SpillEntry
from cagey_sessions.stores import CallbackStore, MemoryStore, Outcome, Verdict
from cagey_sessions.stores.memory import Row
from support import ScriptedStore, let_time_pass, turns

ENTRY = SpillEntry("ann", None, 3, "node", 0, 0, b"{}", 0.0, bytes(16), frozenset())


class Program:
    """A program around a dict, whose saves fail until `takes` is set."""

    def __init__(self, path) -> None:
        self.path = path
        self.stored: dict = {}
        self.takes = False

    def load(self, user_id):
        return self.stored.get(user_id)

    def save_many(self, records):
        if self.takes:
            self.stored.update({record.user_id: record.value() for record in records})
        return [self.takes] * len(records)

    async def start(self, **options) -> SessionManager:
        store = CallbackStore(self.load, self.save_many)
        manager = SessionManager(store=store, spill=self.path, save_timeout="200ms", **options)
        await manager.__aenter__()
        return manager

    def has_file(self):
        return os.path.exists(self.path)

    async def end(self, manager) -> None:
        with pytest.raises(DrainError):
            await manager.destroy(deadline="50ms")


@pytest.fixture
def program(tmp_path):
    return Program(tmp_path / "players.spill")


async def test_a_replay_that_fails_leaves_a_new_user_in_the_file(program):
    first = await program.start()
    await first.open("ann", default={"gold": 7})
    await program.end(first)
    second = await program.start()
    assert second.spill_report.pending == ("ann",)
    await second.destroy()
    assert program.has_file()
    program.takes = True
    third = await program.start()
    assert third.spill_report.replayed == ("ann",)
    assert program.stored == {"ann": {"gold": 7}}
    await third.destroy()


async def test_a_snapshot_never_takes_the_place_of_the_spill(tmp_path):
    manager = SessionManager(store=MemoryStore(), spill=tmp_path / "spill")
    async with manager:
        os.symlink(tmp_path / "spill", tmp_path / "link")
        for name in ("spill", "link"):
            with pytest.raises(OptionError, match="spill"):
                await manager.snapshot(tmp_path / name)
        await manager.snapshot(tmp_path / "snapshot")


async def test_spilled_data_of_an_older_schema_is_converted(program):
    program.stored = {"ann": {"gold": 1}}
    first = await program.start(schema=1)
    (await first.open("ann")).user_data["gold"] = 7
    await program.end(first)
    program.takes = True

    def decode(value, schema):
        return {"coins": value["gold"]} if schema < 2 else value

    second = await program.start(schema=2, decode=decode)
    assert program.stored == {"ann": {"coins": 7}}
    await second.destroy()


async def test_spilled_data_of_a_newer_schema_is_kept(program):
    program.stored = {"ann": {"gold": 1}}
    first = await program.start(schema=2)
    (await first.open("ann")).user_data["gold"] = 7
    await program.end(first)
    program.takes = True
    second = await program.start(schema=1)
    assert second.spill_report.conflicts == ("ann",)
    assert program.stored == {"ann": {"gold": 1}}
    await second.destroy()
    assert program.has_file()


async def test_who_is_erased_while_the_drain_gives_up_is_in_no_file(clock, tmp_path):
    store = ScriptedStore(clock)
    manager = SessionManager(store=store, spill=tmp_path / "spill", clock=clock)
    await manager.__aenter__()
    for user_id in ("ann", "bob"):
        await manager.open(user_id, default={})
    bob = manager.find_by_user("bob")
    bob.on("destroy", asyncio.Event().wait)  # holds the drain up once the deadline has passed
    store.down = True
    drain = asyncio.ensure_future(manager.destroy(deadline="1s"))
    await clock.advance("1.1s")
    store.down = False
    erased = asyncio.ensure_future(manager.erase("ann"))
    with pytest.raises(DrainError):
        await let_time_pass(clock, drain)
    await erased
    assert [entry.user_id for entry in read_snapshot(tmp_path / "spill").entries] == ["bob"]


async def test_who_is_erased_just_after_the_drain_has_spilled_them_is_taken_out_of_the_file(clock, tmp_path):
    """The erasure was under way before, and its answer comes while the drain waits for such calls."""
    answered = asyncio.Event()

    class Slow(ScriptedStore):
        async def erase(self, user_id, owner=""):
            await answered.wait()
            return await super().erase(user_id, owner)

    store = Slow(clock)
    manager = SessionManager(store=store, spill=tmp_path / "spill", clock=clock)
    await manager.__aenter__()
    for user_id in ("ann", "bob"):
        await manager.open(user_id, default={})
    store.down = True
    drain = asyncio.ensure_future(manager.destroy(deadline="1s"))
    erased = asyncio.ensure_future(manager.erase("ann"))
    await clock.advance("1.1s")
    while not (tmp_path / "spill").exists():
        await asyncio.sleep(0.01)
        await clock.advance("1ms")
    answered.set()
    with pytest.raises(DrainError):
        await let_time_pass(clock, drain)
    await erased
    assert [entry.user_id for entry in read_snapshot(tmp_path / "spill").entries] == ["bob"]


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


async def test_a_row_that_is_not_taken_now_keeps_nobody_else_from_the_replay(clock, tmp_path, monkeypatch):
    monkeypatch.setattr("cagey_sessions.sessions.spilling.REPLAYED_AT_A_TIME", 2)
    users = ["ann", "bob", "cid", "dan", "eve"]
    store = ScriptedStore(clock)
    manager = SessionManager(store=store, spill=tmp_path / "spill", clock=clock)
    await manager.__aenter__()
    for user_id in users:
        await manager.open(user_id, default={})
    store.down = True
    with pytest.raises(DrainError):
        await let_time_pass(clock, manager.destroy(deadline="1s"))
    store.backing.dead |= {row.owner for row in store.backing.rows.values()}
    store = ScriptedStore(clock, backing=store.backing)
    first = read_snapshot(tmp_path / "spill").entries[0].user_id
    store.verdict_of[first] = Verdict(Outcome.FAILED, "locked")
    manager = SessionManager(store=store, spill=tmp_path / "spill", clock=clock)
    await manager.__aenter__()
    assert manager.spill_report.pending == (first,)
    assert set(manager.spill_report.replayed) == {*users} - {first}
    store.verdict_of.clear()
    await let_time_pass(clock, manager.destroy())


@pytest.mark.parametrize("answer", [None, [], ["saved"], [Verdict("odd")], [Verdict([])]], ids=repr)
async def test_a_replay_that_is_answered_with_nonsense_leaves_them_pending(clock, tmp_path, answer):
    spill = Spill(tmp_path / "spill")
    spill.collect(ENTRY)
    spill.write()
    store = ScriptedStore(clock)
    store.backing.rows["ann"] = Row(ENTRY.epoch)
    save_many = store.save_many

    async def answer_nonsense(records):
        return answer

    store.save_many = answer_nonsense
    errors = []
    manager = SessionManager(store=store, spill=tmp_path / "spill", clock=clock)
    manager.on("error", lambda error, session: errors.append(error))
    await manager.__aenter__()
    await turns()
    assert (manager.spill_report.pending, errors) == (("ann",), [])
    with pytest.raises(StoreContractError):
        await manager.open("ann", default={"new": True})
    await clock.advance("1s")
    assert store.owner_of("ann") == ""
    store.save_many = save_many
    await manager.destroy()
