"""A spill of users whom somebody else has, or has saved, or whom the store does not take yet."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cagey_sessions import (
    DrainError,
    OwnedElsewhereError,
    SessionManager,
    SpillConflictError,
    StoreContractError,
    StoreUnavailableError,
    UnsavableError,
    UserNotFoundError,
    read_snapshot,
)
from cagey_sessions.files.spill import Spill, SpillEntry
from cagey_sessions.stores import Outcome, Verdict
from cagey_sessions.stores.memory import Row
from support import ScriptedStore, inside, let_time_pass, turns
from support.cluster import spill_gold

ENTRY = SpillEntry("ann", None, 3, "node", 0, 0, b"{}", 0.0, bytes(16), frozenset())


@pytest.mark.guarantee("I31")
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
async def test_an_erased_user_does_not_come_back_from_the_spill(cluster, tmp_path, again):
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


async def test_a_user_of_another_process_stays_pending_and_sees_the_spill_at_login(cluster):
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


async def test_a_new_user_whose_replay_fails_sees_the_spill_at_login(cluster):
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
    table, saver = inside(manager).table, inside(manager).store_saver
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
    assert not saver._results.unknown


async def test_a_row_that_fails_its_batch_holds_up_no_other_replay(cluster):
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
    await inside(manager).link.open()
    manager._spilling.begin()
    await manager._spilling.wait()
    assert not cluster.path.exists()
    assert set(manager.spill_report.replayed) == {"ann", "bob"}
    with pytest.raises(UserNotFoundError):
        await manager.open("nobody")
    await manager.destroy()


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


async def test_a_row_that_is_not_taken_now_holds_up_no_other_replay(clock, tmp_path, monkeypatch):
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
