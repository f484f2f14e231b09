"""What could not be saved is kept in a file, and saved at the next start where nobody has written since."""

from __future__ import annotations

import asyncio
import copy

import pytest

import cagey_sessions
from cagey_sessions import (
    CageySessionsError,
    DrainError,
    SessionManager,
    SpillConflictError,
    StoreInUseError,
    StoreUnavailableError,
    read_snapshot,
)
from cagey_sessions.stores import SQLiteStore
from cagey_sessions.testing.store_conformance import opened
from support import ScriptedStore, let_time_pass, turns


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


async def test_a_user_who_is_saved_in_time_is_not_spilled(cluster):
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


async def test_a_user_who_cannot_be_encoded_is_not_spilled_and_named(cluster):
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
