"""What could not be saved is kept in a file, and saved at the next start where nobody has written since."""

from __future__ import annotations

import asyncio
import copy
import errno
import gc
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

import cagey_sessions
from cagey_sessions import (
    CageySessionsError,
    DrainError,
    OptionError,
    OwnedElsewhereError,
    SessionManager,
    SnapshotError,
    SpillConflictError,
    StoreInUseError,
    StoreUnavailableError,
    UnsavableError,
    UserNotFoundError,
    read_snapshot,
)
from cagey_sessions._core import Digest
from cagey_sessions.savefile import DISK, first_line, last_line
from cagey_sessions.spill import Spill, SpillEntry
from cagey_sessions.stores import CallbackStore, Outcome, SQLiteStore, Verdict
from cagey_sessions.stores.memory import MemoryBacking
from cagey_sessions.testing.store_conformance import opened
from conftest import run
from support import Crash, FaultyDisk, ScriptedStore, let_time_pass, turns

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cagey_sessions.__file__).parents[1])}


class Cluster:
    """Processes, one after the other or at the same time, on one database and each with a spill file."""

    def __init__(self, clock: Any, path: Path) -> None:
        self.clock = clock
        self.path = path
        self.backing = MemoryBacking()
        self.store: Any = None
        self.errors: list[Exception] = []

    def manager(self, **options: Any) -> SessionManager[Any]:
        self.store = options.pop("store", None) or ScriptedStore(self.clock, backing=self.backing)
        options.setdefault("spill", self.path)
        manager: SessionManager[Any] = SessionManager(store=self.store, clock=self.clock, **options)
        manager.on("error", lambda error, session: self.errors.append(error))
        return manager

    async def start(self, **options: Any) -> SessionManager[Any]:
        """A process begins; whoever had users before is dead."""
        self.backing.dead |= {row.owner for row in self.backing.rows.values()}
        manager = self.manager(**options)
        await manager.__aenter__()
        return manager

    async def fail(self, manager: SessionManager[Any]) -> DrainError:
        """The process ends, and the store is down."""
        manager._life.gateway.store.down = True
        with pytest.raises(DrainError) as raised:
            await let_time_pass(self.clock, manager.destroy(deadline="1s"))
        return raised.value

    def stored(self, user_id: int | str) -> Any:
        row = self.backing.rows.get(user_id)
        return None if row is None or row.record is None else row.record.value()

    def spilled(self) -> dict[int | str, bytes]:
        return {entry.user_id: entry.body for entry in read_snapshot(self.path).entries} if self.path.exists() else {}


@pytest.fixture
def cluster(clock, tmp_path):
    return Cluster(clock, tmp_path / "spill")


async def spill_gold(cluster: Cluster, gold: int = 2, **users: int) -> None:
    """Ann has 1 in the store, and 2 in the spill."""
    manager = await cluster.start()
    session = await manager.open("ann", default={"gold": 0})
    session.user_data["gold"] = 1
    await session.persist_now()
    session.user_data["gold"] = gold
    for user_id, each in users.items():
        await manager.open(user_id, default={"gold": each})
    error = await cluster.fail(manager)
    assert all(user.spilled for user in error.report.unsaved)


# Down, and back


async def test_what_was_spilled_is_saved_on_top_of_what_an_engine_has_lost_part_of(cluster):
    """It went down with less than it had acknowledged, and nobody has claimed the user since."""
    manager = await cluster.start()
    session = await manager.open("ann", default={"gold": 0})
    await session.persist_now()
    mark = copy.deepcopy(cluster.backing.rows)
    session.user_data["gold"] = 1
    await session.persist_now()
    session.user_data["gold"] = 2
    await cluster.fail(manager)
    cluster.backing.rows.clear()
    cluster.backing.rows.update(mark)

    manager = await cluster.start()
    assert (manager.spill_report.replayed, manager.spill_report.conflicts) == (("ann",), ())
    assert cluster.stored("ann") == {"gold": 2}
    await let_time_pass(cluster.clock, manager.destroy())


async def test_what_a_drain_could_not_save_is_saved_at_the_next_start(cluster, clock):
    manager = await cluster.start()
    assert manager.spill_report == cagey_sessions.SpillReport((), (), (), (), True)
    for user_id in ("ann", 1, "1"):
        session = await manager.open(user_id, default={"gold": 0})
        session.user_data["gold"] = 1
    await manager.persist_all_user_data()
    for n, user_id in enumerate(("ann", 1, "1")):
        manager.find_by_user(user_id).user_data["gold"] = 10 + n
    await manager.open("new", default={"gold": 20})
    error = await cluster.fail(manager)
    assert {user.user_id: user.spilled for user in error.report.unsaved} == dict.fromkeys(("ann", 1, "1", "new"), True)
    assert "4 of them are in the spill file" in str(error)
    assert read_snapshot(cluster.path).kind == "spill"
    assert cluster.spilled() == {"ann": b'{"gold":10}', 1: b'{"gold":11}', "1": b'{"gold":12}', "new": b'{"gold":20}'}

    manager = await cluster.start()
    report = manager.spill_report
    assert (set(report.replayed), report.pending, report.conflicts) == ({"ann", 1, "1", "new"}, (), ())
    assert [cluster.stored(user_id)["gold"] for user_id in ("ann", 1, "1", "new")] == [10, 11, 12, 20]
    assert not cluster.path.exists()
    assert not any(row.owner for row in cluster.backing.rows.values()), "each is let go of by the write"
    assert cluster.store.releases == []
    assert cluster.backing.rows["ann"].record.version == 2
    assert len(cluster.store.batches) == 1 and len(cluster.store.claims) == 1
    assert (await manager.open("ann")).user_data == {"gold": 10}
    await manager.destroy()
    assert cluster.errors == [] or all(isinstance(each, StoreUnavailableError) for each in cluster.errors)


async def test_who_is_saved_in_time_is_not_spilled(cluster):
    manager = await cluster.start()
    await manager.open("ann", default={})
    await manager.destroy()
    assert not cluster.path.exists()


async def test_an_end_without_saves_spills_nothing(cluster):
    manager = await cluster.start()
    await manager.open("ann", default={})
    cluster.store.down = True
    await let_time_pass(cluster.clock, manager.destroy(False))
    assert not cluster.path.exists()


async def test_who_cannot_be_encoded_is_not_spilled_and_named(cluster):
    manager = await cluster.start()
    for user_id in ("ann", "bob"):
        await manager.open(user_id, default={})
    manager.find_by_user("bob").user_data["bag"] = {1}
    error = await cluster.fail(manager)
    assert {user.user_id: user.spilled for user in error.report.unsaved} == {"ann": True, "bob": False}
    assert list(cluster.spilled()) == ["ann"]


async def test_live_state_is_copied_before_it_is_spilled(cluster):
    manager = await cluster.start(before_save=lambda session: session.user_data.update(live=7))
    await manager.open("ann", default={})
    await cluster.fail(manager)
    assert cluster.spilled() == {"ann": b'{"live":7}'}


async def test_listeners_that_never_return_do_not_keep_a_user_from_the_spill(cluster):
    manager = await cluster.start()
    session = await manager.open("ann", default={"gold": 1})

    @session.on("before_destroy")
    async def hang():
        await asyncio.Event().wait()

    error = await cluster.fail(manager)
    assert error.report.unsaved[0].spilled
    assert cluster.spilled() == {"ann": b'{"gold":1}'}


async def test_a_save_whose_reply_is_lost_before_the_drain_is_no_conflict(cluster):
    manager = await cluster.start()
    session = await manager.open("ann", default={"gold": 0})
    await session.persist_now()
    session.user_data["gold"] = 1
    cluster.store.script = ["lose"]
    saving = asyncio.create_task(session.persist_now())
    await turns()
    assert cluster.stored("ann") == {"gold": 1}
    cluster.store.down = True
    session.user_data["gold"] = 2
    await cluster.fail(manager)
    with pytest.raises(CageySessionsError):
        await saving
    manager = await cluster.start()
    assert manager.spill_report.replayed == ("ann",)
    assert cluster.stored("ann") == {"gold": 2}
    assert not any(isinstance(error, SpillConflictError) for error in cluster.errors)
    await manager.destroy()


@pytest.mark.parametrize("lands", [False, True])
async def test_the_first_save_of_a_new_user_hangs_and_lands_or_not(cluster, lands):
    manager = await cluster.start()
    store = cluster.store
    session = await manager.open("ann", default={"gold": 1})
    held = asyncio.Event()

    async def hold(records):
        await held.wait()
        if not lands:
            raise StoreUnavailableError("gone")

    store.script = [hold]
    saving = asyncio.create_task(session.persist_now())
    await asyncio.sleep(0.01)
    session.user_data["gold"] = 2
    ending = asyncio.create_task(manager.destroy(deadline="1s"))
    await cluster.clock.advance("1.5s")
    held.set()
    with pytest.raises(DrainError) as raised:
        await let_time_pass(cluster.clock, ending)
    with pytest.raises(CageySessionsError):
        await saving
    assert raised.value.report.unsaved[0].spilled
    assert cluster.stored("ann") == ({"gold": 1} if lands else None)
    manager = await cluster.start()
    assert manager.spill_report.replayed == ("ann",)
    assert cluster.stored("ann") == {"gold": 2}
    await manager.destroy()


async def test_a_body_loaded_in_another_writing_is_known_by_its_digest(cluster):
    ScriptedStore(cluster.clock, backing=cluster.backing).put("ann", b'{ "gold" : 1 }', version=5)
    manager = await cluster.start()
    (await manager.open("ann")).user_data["gold"] = 2
    await cluster.fail(manager)
    manager = await cluster.start()
    assert manager.spill_report.replayed == ("ann",)
    assert cluster.backing.rows["ann"].record.version == 6
    await manager.destroy()


# Conflicts


async def test_somebody_has_taken_over_and_saved(cluster, tmp_path):
    await spill_gold(cluster)
    other = await cluster.start(spill=tmp_path / "other")
    (await other.open("ann")).user_data["gold"] = 77
    await other.destroy()
    before = cluster.path.read_bytes()

    for _ in range(2):
        cluster.errors.clear()
        manager = await cluster.start()
        report = manager.spill_report
        assert (report.replayed, report.pending, report.conflicts) == ((), (), ("ann",))
        assert cluster.stored("ann") == {"gold": 77}
        assert cluster.path.read_bytes() == before, "kept, byte for byte"
        await asyncio.sleep(0)
        (error,) = cluster.errors
        assert isinstance(error, SpillConflictError) and error.user_id == "ann"
        assert "gold" not in str(error) and "2" not in str(error).replace(str(cluster.path), "")
        assert (await manager.open("ann")).user_data == {"gold": 77}
        await manager.destroy()
        assert cluster.store.owner_of("ann") == ""


async def test_somebody_else_has_the_user_and_then_has_saved(cluster, tmp_path):
    await spill_gold(cluster)
    other = await cluster.start(spill=tmp_path / "other")
    session = await other.open("ann")
    manager = cluster.manager()
    await manager.__aenter__()
    assert manager.spill_report.pending == ("ann",)
    with pytest.raises(OwnedElsewhereError):
        await manager.open("ann")
    session.user_data["gold"] = 77
    await session.destroy()
    assert (await manager.open("ann")).user_data == {"gold": 77}
    assert manager.spill_report.conflicts == ("ann",)
    assert cluster.spilled() == {"ann": b'{"gold":2}'}
    await manager.destroy()
    await other.destroy()


async def test_somebody_else_has_had_the_user_and_saved_nothing(cluster, tmp_path):
    await spill_gold(cluster)
    other = await cluster.start(spill=tmp_path / "other")
    await other.open("ann")
    await other.destroy(False)
    manager = await cluster.start()
    assert manager.spill_report.replayed == ("ann",)
    assert cluster.stored("ann") == {"gold": 2}
    await manager.destroy()


@pytest.mark.parametrize("again", [False, True])
async def test_who_was_erased_does_not_come_back(cluster, tmp_path, again):
    await spill_gold(cluster, bob=5)
    other = await cluster.start(spill=tmp_path / "other")
    for user_id in ("ann", "bob"):
        await other.erase(user_id)
        if again:
            await other.open(user_id, default={"gold": 0})
    await other.destroy()
    manager = await cluster.start()
    assert set(manager.spill_report.conflicts) == {"ann", "bob"}
    assert cluster.stored("ann") == ({"gold": 0} if again else None)
    await manager.destroy()


async def test_a_version_of_the_same_number_by_somebody_else_is_a_conflict(cluster):
    await spill_gold(cluster)
    row = cluster.backing.rows["ann"]
    row.record = row.record._replace(body=b'{"gold":99}')
    manager = await cluster.start()
    assert manager.spill_report.conflicts == ("ann",)
    assert cluster.stored("ann") == {"gold": 99}
    await manager.destroy()


async def test_a_conflict_is_over_when_the_spilled_data_has_been_put_back(cluster, tmp_path):
    await spill_gold(cluster)
    other = await cluster.start(spill=tmp_path / "other")
    (await other.open("ann")).user_data["gold"] = 77
    await other.destroy()
    manager = await cluster.start()
    assert manager.spill_report.conflicts == ("ann",)
    async with manager.edit("ann") as data:
        data["gold"] = 2
    await manager.destroy()
    manager = await cluster.start()
    assert (manager.spill_report.replayed, manager.spill_report.conflicts) == (("ann",), ())
    assert not cluster.path.exists()
    await manager.destroy()


async def test_erasing_a_user_removes_the_spill_too(cluster, tmp_path):
    await spill_gold(cluster, bob=5)
    other = await cluster.start(spill=tmp_path / "other")
    (await other.open("ann")).user_data["gold"] = 77
    await other.destroy()
    manager = await cluster.start()
    assert manager.spill_report.conflicts == ("ann",)
    await manager.erase("ann")
    assert not cluster.path.exists()
    assert manager.spill_report.conflicts == ()
    await manager.destroy()


# Pending


async def test_who_is_not_ours_yet_is_pending_and_sees_the_spill_when_they_log_in(cluster):
    await spill_gold(cluster)
    manager = cluster.manager()  # the dead owner's lease is not over
    await manager.__aenter__()
    assert manager.spill_report.pending == ("ann",)
    with pytest.raises(OwnedElsewhereError):
        await manager.open("ann")
    cluster.store.bury(cluster.store.owner_of("ann"))
    session = await manager.create()
    await session.login("ann")
    assert session.user_data == {"gold": 2}
    assert cluster.stored("ann") == {"gold": 2}, "it is saved before anybody sees it"
    assert (manager.spill_report.replayed, manager.spill_report.pending) == (("ann",), ())
    assert not cluster.path.exists()
    session.user_data["gold"] = 3
    await manager.destroy()
    assert cluster.stored("ann") == {"gold": 3}
    assert cluster.backing.rows["ann"].record.version == 3


async def test_a_store_that_fails_the_replay_leaves_them_pending(cluster):
    await spill_gold(cluster, bob=5)
    store = ScriptedStore(cluster.clock, backing=cluster.backing)
    store.script = [StoreUnavailableError("no")]
    manager = await cluster.start(store=store)
    assert set(manager.spill_report.pending) == {"ann", "bob"}
    assert cluster.spilled() == {"ann": b'{"gold":2}', "bob": b'{"gold":5}'}
    await cluster.clock.advance("2s")
    async with manager.edit("ann") as data:
        assert data == {"gold": 2}
        data["gold"] += 1
    assert cluster.stored("ann") == {"gold": 3}
    assert cluster.spilled() == {"bob": b'{"gold":5}'}
    await manager.destroy()
    manager = await cluster.start()  # what is left is saved by the next one
    assert manager.spill_report.replayed == ("bob",)
    assert cluster.stored("bob") == {"gold": 5}
    await manager.destroy()


async def test_a_login_whose_spill_the_store_does_not_take_fails_and_leaves_it(cluster):
    await spill_gold(cluster)
    manager = cluster.manager()
    await manager.__aenter__()
    cluster.store.bury(cluster.store.owner_of("ann"))
    cluster.store.script = ["lose"]
    with pytest.raises(StoreUnavailableError):
        await manager.open("ann")
    assert cluster.spilled() == {"ann": b'{"gold":2}'}
    await cluster.clock.advance("2s")
    assert (await manager.open("ann")).user_data == {"gold": 2}, "it was written after all"
    assert cluster.spilled() == {}
    assert cluster.backing.rows["ann"].record.version == 2
    await manager.destroy()


async def test_a_new_user_whose_replay_fails_and_who_logs_in_then(cluster):
    manager = await cluster.start()
    await manager.open("bob", default={"gold": 5})
    await cluster.fail(manager)
    store = ScriptedStore(cluster.clock, backing=cluster.backing)
    store.script = [StoreUnavailableError("no")] * 2
    manager = await cluster.start(store=store)
    await cluster.clock.advance("2s")
    with pytest.raises(StoreUnavailableError):
        await manager.open("bob", default={"gold": 0})
    await cluster.clock.advance("2s")
    assert (await manager.open("bob", default={"gold": 0})).user_data == {"gold": 5}
    await manager.destroy()


@pytest.mark.parametrize("users", ["ann", "ann and bob"])
async def test_a_crash_between_the_claim_and_the_write(cluster, users):
    await spill_gold(cluster, **({"bob": 5} if "bob" in users else {}))
    store = ScriptedStore(cluster.clock, backing=cluster.backing)
    await store.open()
    cluster.backing.dead |= {row.owner for row in cluster.backing.rows.values()}
    await store.claim_many(["ann", "bob"] if "bob" in users else ["ann"], "who has crashed")
    manager = await cluster.start()
    assert manager.spill_report.replayed == ("ann",)
    # of a user never saved nothing tells a claim that came to nothing from an erasure: a human is asked
    assert manager.spill_report.conflicts == (("bob",) if "bob" in users else ())
    await manager.destroy()


async def test_all_threads_of_the_loop_may_be_taken(cluster):
    held = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        asyncio.get_running_loop().set_default_executor(pool)
        work = asyncio.ensure_future(asyncio.to_thread(held.wait))
        await spill_gold(cluster)
        assert cluster.spilled() == {"ann": b'{"gold":2}'}
        held.set()
        await work


async def test_what_is_remembered_of_the_store_is_what_the_core_remembers(cluster):
    ScriptedStore(cluster.clock, backing=cluster.backing).put("ann", b'{ "gold" : 1 }', version=5)
    manager = await cluster.start()
    table, saver = manager._life.table, manager._life.store_saver
    ann, new = await manager.open("ann"), await manager.open("new", default={"gold": 0})

    def check(session, versions):
        known = saver.known_stored(session)
        assert sorted(version for version, _ in known) == versions
        if table.versions(session)[1]:
            assert sum(table.is_stored(session, *each) for each in known) == 1

    check(ann, [5])
    check(new, [])
    for step in range(3):
        ann.user_data["gold"] += step % 2
        await manager.persist_all_user_data()
        check(ann, [5 if step == 0 else 6])
        check(new, [1])
    cluster.store.script = ["lose"]
    new.user_data["gold"] = 9
    saving = asyncio.create_task(new.persist_now())
    await turns()
    check(new, [1, 2])
    await cluster.clock.advance("2s")
    await saving
    check(new, [2])
    await manager.destroy()
    assert not saver._settlement.unknown


async def test_a_row_that_fails_the_batch_keeps_nobody_else_back(cluster):
    await spill_gold(cluster, bob=5, eve=6)
    store = ScriptedStore(cluster.clock, backing=cluster.backing)
    store.poison = {"bob"}
    manager = await cluster.start(store=store)
    assert set(manager.spill_report.replayed) == {"ann", "eve"}
    assert manager.spill_report.pending == ("bob",)
    assert list(cluster.spilled()) == ["bob"]
    store.poison = set()
    await manager.destroy()


async def test_what_the_store_refuses_for_good_is_set_aside_and_bars_no_login(cluster):
    await spill_gold(cluster)
    store = ScriptedStore(cluster.clock, backing=cluster.backing)
    store.verdict_of["ann"] = Verdict(Outcome.INVALID, "too odd")
    manager = await cluster.start(store=store)
    assert manager.spill_report.conflicts == ("ann",)
    assert cluster.spilled() == {"ann": b'{"gold":2}'}
    await asyncio.sleep(0)
    assert isinstance(cluster.errors[-1], UnsavableError) and "too odd" in str(cluster.errors[-1])
    store.verdict_of.clear()
    assert (await manager.open("ann")).user_data == {"gold": 1}
    await manager.destroy()


async def test_many_users_in_batches(cluster):
    manager = await cluster.start()
    for user_id in range(600):
        await manager.open(user_id, default={"n": user_id})
    await cluster.fail(manager)
    assert len(cluster.spilled()) == 600
    manager = await cluster.start()
    assert len(manager.spill_report.replayed) == 600
    assert all(cluster.stored(user_id) == {"n": user_id} for user_id in range(600))
    assert len(cluster.store.batches) < 10 and len(cluster.store.claims) < 20
    await manager.destroy()


async def test_a_manager_without_async_with_replays_at_the_first_call_that_needs_the_store(cluster):
    await spill_gold(cluster, bob=5)
    cluster.backing.dead |= {row.owner for row in cluster.backing.rows.values()}
    manager = cluster.manager()
    assert manager.spill_report is None
    assert (await manager.open("ann")).user_data == {"gold": 2}
    await cluster.clock.advance("1s")
    await manager._replay.enter()
    assert not cluster.path.exists()
    assert set(manager.spill_report.replayed) == {"ann", "bob"}
    with pytest.raises(UserNotFoundError):
        await manager.open("nobody")
    await manager.destroy()


# Twice


async def test_two_drains_that_fail_share_the_file(cluster):
    await spill_gold(cluster)
    manager = cluster.manager()  # ann is pending: her owner is not dead yet
    await manager.__aenter__()
    await manager.open("bob", default={"gold": 5})
    await cluster.fail(manager)
    assert cluster.spilled() == {"ann": b'{"gold":2}', "bob": b'{"gold":5}'}
    manager = await cluster.start()
    assert set(manager.spill_report.replayed) == {"ann", "bob"}
    assert (cluster.stored("ann"), cluster.stored("bob")) == ({"gold": 2}, {"gold": 5})
    await manager.destroy()


async def test_the_same_user_spilled_twice(cluster):
    await spill_gold(cluster)
    manager = await cluster.start()
    session = await manager.open("ann")
    session.user_data["gold"] = 3
    await cluster.fail(manager)
    assert cluster.spilled() == {"ann": b'{"gold":3}'}
    manager = await cluster.start()
    assert cluster.stored("ann") == {"gold": 3}
    await manager.destroy()


async def test_a_conflict_and_a_later_spill_of_the_same_user(cluster, tmp_path):
    await spill_gold(cluster)
    other = await cluster.start(spill=tmp_path / "other")
    (await other.open("ann")).user_data["gold"] = 77
    await other.destroy()
    manager = await cluster.start()
    (await manager.open("ann")).user_data["gold"] = 78
    await cluster.fail(manager)
    assert [entry.body for entry in read_snapshot(cluster.path).entries] == [b'{"gold":2}', b'{"gold":78}']
    manager = await cluster.start()
    assert (manager.spill_report.replayed, manager.spill_report.conflicts) == (("ann",), ("ann",))
    assert cluster.stored("ann") == {"gold": 78}
    assert cluster.spilled() == {"ann": b'{"gold":2}'}
    await manager.destroy()


# The file


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
    if change[1] == b'"known":[["1",':
        assert report.replayed == ("ann",)  # a number all the same
    else:
        assert [bad.user_id for bad in report.damaged] == ["ann"]
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
    manager._life.spill._files = FaultyDisk(fail={"write": errno.ENOSPC})
    error = await cluster.fail(manager)
    assert set(error.user_ids) == {"ann", "bob"} and not any(user.spilled for user in error.report.unsaved)
    assert isinstance(error.exceptions[-1], SnapshotError) and "free some space" in str(error.exceptions[-1])
    assert [path.name for path in cluster.path.parent.iterdir()] == ["spill.lock"]
    manager._life.spill._files = DISK
    manager._life.spill_at_exit()  # which tries once more
    assert {entry.user_id for entry in read_snapshot(cluster.path).entries} == {"ann", "bob"}


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
        manager._life.spill = spill
        cluster.backing.dead |= {row.owner for row in cluster.backing.rows.values()}
        try:
            await manager.__aenter__()
        except Crash:
            number += 1
        else:
            done = True
        manager._life.spill = None
        await manager.destroy()

        manager = await cluster.start()
        assert manager.spill_report.conflicts == ()
        assert (cluster.stored("ann"), cluster.stored("bob")) == ({"gold": 2}, {"gold": 5})
        assert not cluster.path.exists()
        await manager.destroy()
    assert number >= 3


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_crash_at_any_step_of_a_write_leaves_what_was_there_or_what_is_to_be(cluster, moment, clock):
    run(spill_gold(cluster))
    before = cluster.path.read_bytes()
    run(spill_two(cluster))
    after = cluster.spilled()
    for number in range(20):
        cluster.path.write_bytes(before)
        spill = Spill(cluster.path)
        spill.open()
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


# Other stores


async def test_sqlite(tmp_path, clock):
    class Flaky(SQLiteStore):
        down = False

        async def save_many(self, records):
            if self.down:
                raise StoreUnavailableError("down")
            return await super().save_many(records)

    async def start():
        store = Flaky(tmp_path / "players.db")
        manager = SessionManager(store=store, spill=tmp_path / "spill", clock=clock)
        await manager.__aenter__()
        return manager, store

    manager, store = await start()
    for user_id in ("ann", 1):
        await manager.open(user_id, default={"gold": 0})
    await manager.find_by_user("ann").persist_now()
    for session in manager.sessions():
        session.user_data["gold"] = 5
    store.down = True
    ending = asyncio.ensure_future(manager.destroy(deadline="1s"))
    while not ending.done():
        await clock.advance("100ms")
        await asyncio.sleep(0.001)
    with pytest.raises(DrainError):
        await ending
    async with asyncio.timeout(30):  # its thread closes the file in real time
        while True:
            try:
                async with opened(Flaky(tmp_path / "players.db")):
                    break
            except StoreInUseError:
                await asyncio.sleep(0.01)
    for _ in range(2):
        manager, store = await start()
        assert await manager.read("ann") == {"gold": 5} and await manager.read(1) == {"gold": 5}
        assert manager.spill_report.conflicts == ()
        assert not (tmp_path / "spill").exists()
        await manager.destroy()


@pytest.mark.parametrize("changed", [False, True])
async def test_functions_of_the_program(cluster, changed):
    rows: dict[Any, bytes] = {}
    down = False

    async def save_many(records):
        if down:
            raise OSError
        rows.update((record.user_id, record.body) for record in records)

    async def load(user_id):
        body = rows.get(user_id)
        return None if body is None else body.decode()

    async def start():
        manager = SessionManager(
            store=CallbackStore(load, save_many), spill=cluster.path, clock=cluster.clock, schema=3
        )
        await manager.__aenter__()
        return manager

    manager = await start()
    session = await manager.open("ann", default={"gold": 0})
    await session.persist_now()
    session.user_data["gold"] = 1
    await session.persist_now()
    session.user_data["gold"] = 2
    await manager.open("new", default={"gold": 3})
    down = True
    with pytest.raises(DrainError):
        await let_time_pass(cluster.clock, manager.destroy(deadline="1s"))
    down = False
    if changed:
        rows["ann"] = b'{"gold":77}'
    kept = cluster.path.read_bytes()
    for _ in range(2):
        manager = await start()
        assert set(manager.spill_report.replayed) == ({"new"} if changed else {"ann", "new"})
        assert rows == {"ann": b'{"gold":77}' if changed else b'{"gold":2}', "new": b'{"gold":3}'}
        await manager.destroy()
        cluster.path.write_bytes(kept)  # a crash between the write and the file: it is done already


# The end of the process


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
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error::RuntimeWarning", "-c", PRELUDE + textwrap.dedent(script)],
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
    life = weakref.ref(manager._life)
    await manager.open("ann", default={})
    await manager.destroy()
    del manager
    cluster.store = None
    cluster.clock._timers.clear()  # cancelled ones, which a loop's own clock would have let go of
    await turns()
    gc.collect()
    assert life() is None
