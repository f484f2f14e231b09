"""What must come of a store that is away, that answers late, or that fences nothing off."""

from __future__ import annotations

import asyncio
import contextvars
import gc
from typing import Any

import pytest

from cagey_sessions import DrainError, EndReason, FencedError, SessionManager, StoreUnavailableError, WouldDeadlockError
from support import ScriptedStore, changed, end, let_time_pass, turns

# Down and back


async def test_destroy_while_the_store_is_down_keeps_the_session_hidden_until_it_is_saved(clock, store, manager):
    session = await changed(manager)
    events = []
    session.on("before_destroy", lambda: events.append("before_destroy"))
    session.on("destroy", lambda: events.append("destroy"))
    store.down = True
    before = clock.now()
    with pytest.raises(StoreUnavailableError, match="hidden"):
        await let_time_pass(clock, session.destroy())
    assert 9.9 <= (clock.now() - before) / 1e9 <= 10.2
    assert session.alive
    assert manager.find_by_user(1) is None
    await clock.advance("60s")
    assert events == ["before_destroy"]
    session.user_data["n"] = 2
    store.down = False
    await clock.advance("17s")
    assert session.end_reason == EndReason.DESTROYED
    assert events == ["before_destroy", "destroy"]
    assert store.stored(1) == {"n": 2}
    assert store.owner_of(1) == "", "let go of"
    await end(clock, manager)


async def test_a_parked_session_may_be_let_go_of(clock, store, manager):
    session = await changed(manager)
    store.down = True
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.destroy())
    await let_time_pass(clock, session.destroy(persist=False))
    assert not session.alive
    store.down = False
    await clock.advance("20s")
    assert store.stored(1) == {"n": 0}
    await end(clock, manager)


async def test_a_drain_with_a_dead_store_ends_at_its_deadline_and_names_everybody(clock, store, manager):
    [await changed(manager, number) for number in range(300)]
    store.down = True
    before = clock.now()
    with pytest.raises(DrainError) as raised:
        await let_time_pass(clock, manager.destroy(deadline="5s"))
    assert len(raised.value.report.unsaved) == 300
    assert 5 <= (clock.now() - before) / 1e9 <= 7.5
    assert len(manager) == 0
    assert clock.pending == 0


async def test_a_drain_outlives_a_short_outage(clock, store, manager):
    [await changed(manager, number) for number in range(300)]
    store.down = True
    task = asyncio.ensure_future(manager.destroy())
    await clock.advance("12s")
    assert not task.done()
    store.down = False
    report = await let_time_pass(clock, task)
    assert report.saved == 300
    assert all(store.stored(number) == {"n": 1} for number in range(300))


async def test_who_asks_or_leaves_does_not_wait_behind_those_whose_time_has_come(clock, store, manager):
    """Right after an outage, with everybody due."""
    sessions = [await changed(manager, number) for number in range(2000)]
    store.down = True
    await clock.advance("40s")
    store.down = False
    await clock.advance("1s")
    before = clock.now()
    sessions[7].user_data["n"] = sessions[8].user_data["n"] = 9
    await let_time_pass(clock, sessions[7].persist_now())
    await let_time_pass(clock, sessions[8].destroy())
    assert (clock.now() - before) / 1e9 < 0.2
    assert store.stored(7) == store.stored(8) == {"n": 9}
    await end(clock, manager)


async def test_an_outage_without_an_interval(clock, store):
    manager = SessionManager(store=store, clock=clock, interval="100h")
    session = await changed(manager)
    store.down = True
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.persist_now())
    store.down = False
    await clock.advance("2s")
    assert (await let_time_pass(clock, session.persist_now())).version == 2
    await end(clock, manager)


async def test_an_outage_says_little(clock, store, manager, caplog):
    """Ten minutes of it fill no log: down, back, and what callers were told."""
    [await changed(manager, number) for number in range(500)]
    store.down = True
    await clock.advance("600s")
    store.down = False
    await clock.advance("60s")
    assert len(caplog.records) < 20
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "ScriptedStore is down" in text
    assert "ScriptedStore is back after" in text
    await end(clock, manager)


# Releases


async def test_another_node_may_claim_as_soon_as_destroy_has_returned(clock, store, manager):
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    session = await changed(manager)
    await let_time_pass(clock, session.destroy())
    theirs = await other.open(1)
    assert theirs.user_data == {"n": 1}
    await let_time_pass(clock, theirs.destroy(persist=False))
    ours = await manager.open(1)
    assert len(store.batches) == 2, "the last save and the release are one write"
    await let_time_pass(clock, ours.destroy())
    assert store.owner_of(1) == ""
    await end(clock, manager, other)


async def test_a_change_after_the_release_is_saved_under_a_new_claim(clock, store, manager):
    session = await changed(manager)
    store.script = ["50ms"]
    task = asyncio.ensure_future(session.destroy())
    await clock.advance("10ms")
    session.user_data["n"] = 2
    await let_time_pass(clock, task)
    assert store.stored(1) == {"n": 2}
    assert store.owner_of(1) == ""
    await end(clock, manager)


async def test_a_change_after_the_release_never_overwrites_the_next_owner(clock, store, manager):
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    session = await changed(manager)
    gate = asyncio.Event()
    original = store.save_many

    async def save_then_wait(records: Any) -> Any:
        verdicts = await original(records)
        store.save_many = original
        await gate.wait()
        return verdicts

    store.save_many = save_then_wait
    task = asyncio.ensure_future(session.destroy())
    await turns()
    assert store.owner_of(1) == ""
    theirs = await other.open(1)
    theirs.user_data["n"] = 50
    session.user_data["n"] = 2
    gate.set()
    with pytest.raises(FencedError):
        await let_time_pass(clock, task)
    assert session.end_reason == EndReason.FENCED
    await end(clock, other, manager)
    assert store.stored(1) == {"n": 50}


# Shutdown, cancellation


async def test_cancelling_callers_cancels_no_call_of_the_store(clock, store, manager):
    """Case 79: a thousand callers who lose patience; the saves go on."""
    session = await changed(manager)
    store.delay = "10ms"
    for number in range(50):
        session.user_data["n"] = number
        task = asyncio.ensure_future(session.persist_now())
        await turns(number % 7)
        task.cancel()
        await clock.advance("3ms")
        gc.collect()
    await clock.advance("1s")
    assert all(batch.error is None for batch in store.batches)
    assert store.stored(1) == {"n": 49}
    await end(clock, manager)


def test_a_loop_that_ends_in_the_middle_of_a_save_is_quiet(capfd, clock):
    store = ScriptedStore(clock)

    async def main() -> None:
        manager = SessionManager(store=store, clock=clock)
        session = await changed(manager)
        store.script = ["hang"]
        task = asyncio.ensure_future(session.persist_now())
        await turns()
        assert store.open_calls == 1
        assert not task.done()

    asyncio.run(main())
    gc.collect()
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "never" not in err


# Stores that fence nothing off


@pytest.fixture
def unfenced(store: ScriptedStore) -> ScriptedStore:
    store.fenced = store.shared = False
    return store


async def late_write(store: ScriptedStore, records: Any) -> None:
    """Wait, and then write over whatever is there: what a database without a fence does."""
    await store.release_all.wait()
    for record in records:
        row = store.backing.rows[record.user_id]
        row.record = record


@pytest.mark.parametrize("how", ["edit", "destroy", "out of patience"])
async def test_a_late_write_never_lands_on_a_later_session(clock, unfenced, manager, how):
    """Nothing fences it off, so nobody reads the user before it has returned."""
    store = unfenced
    session = await changed(manager)
    if how == "edit":
        await session.destroy()
    step = [lambda records: late_write(store, records)]

    async def write_and_leave() -> None:
        if how == "edit":
            async with manager.edit(1) as data:
                data["n"] = 2
        elif how == "destroy":
            task = asyncio.ensure_future(session.persist_now())
            await turns()
            await session.destroy(persist=False)
            await task
        else:
            store.script = ["9s", *step]
            task = asyncio.ensure_future(session.persist_now())
            await clock.advance("1s")
            session.user_data["n"] = 3
            later = asyncio.ensure_future(session.persist_now())
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.gather(later, return_exceptions=True)
            await session.destroy(persist=False)
            await later

    store.script = list(step)
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, write_and_leave())
    login = asyncio.ensure_future(manager.open(1))
    await clock.advance("5s")
    assert not login.done()
    store.release_all.set()
    newer = await let_time_pass(clock, login)
    newer.user_data["n"] = 100
    await let_time_pass(clock, newer.persist_now())
    await clock.advance("60s")
    assert store.stored(1) == {"n": 100}
    await end(clock, manager)


async def test_erase_comes_after_a_write_under_way(clock, unfenced, manager):
    store = unfenced
    session = await changed(manager)
    store.script = [lambda records: late_write(store, records)]
    saving = asyncio.ensure_future(session.persist_now())
    await turns()
    erasing = asyncio.ensure_future(manager.erase(1))
    await clock.advance("2s")
    assert not erasing.done()
    store.release_all.set()
    assert await let_time_pass(clock, erasing) is True
    await asyncio.gather(saving, return_exceptions=True)
    await clock.advance("40s")
    assert store.stored(1) is None
    await end(clock, manager)


async def test_a_block_that_edits_a_user_cannot_wait_for_itself(clock, store, manager):
    store.put(1, b'{"n":0}')
    session = await manager.create()
    async with manager.edit(1) as data:
        for call in (
            lambda: manager.open(1),
            lambda: manager.open(1, when_active="replace"),
            lambda: session.login(1),
            lambda: manager.erase(1),
            lambda: manager.edit(1).__aenter__(),
        ):
            with pytest.raises(WouldDeadlockError):
                await call()
        data["n"] = 1
    assert store.stored(1) == {"n": 1}
    await end(clock, manager)


async def test_a_claim_that_is_granted_too_late_is_let_go_of(clock, store, manager):
    store.claim_script = ["15s"]
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, manager.open(1, default={"n": 0}))
    assert store.owner_of(1) == ""
    await clock.advance("10s")
    assert store.owner_of(1) == ""
    assert set(store.releases) == {1}
    await end(clock, manager)


async def test_a_claim_of_ours_that_comes_late_does_not_fence_us_off(clock, store, manager):
    """Its reply had been given up on; meanwhile the user has logged in by a later claim."""
    original = ScriptedStore.claim_many
    gate = asyncio.Event()

    async def claim_late(user_ids: Any, owner: str) -> Any:
        store.claim_many = lambda user_ids, owner: original(store, user_ids, owner)
        await gate.wait()
        return await original(store, user_ids, owner)

    store.claim_many = claim_late
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, manager.open(1, default={"n": 0}))
    session = await let_time_pass(clock, manager.open(1, default={"n": 0}))
    await session.persist_now()
    session.user_data["n"] = 1
    gate.set()
    await turns()
    assert (await let_time_pass(clock, session.persist_now())).version == 2
    assert session.alive
    assert store.owner_of(1)
    await end(clock, manager)
    assert store.stored(1) == {"n": 1}


async def test_an_answer_and_a_cancellation_in_one_turn_leave_no_claim(clock, store, manager):
    for turn in range(12):
        store.claim_script = ["10ms"]
        task = asyncio.ensure_future(manager.open(f"user {turn}", default={}, when_active="refuse"))
        await clock.advance("9ms")
        clock.call_later(1_000_000, task.cancel, contextvars.Context())
        await turns(turn)
        await clock.advance("1s")
        assert (store.owner_of(f"user {turn}") == "") or manager.find_by_user(f"user {turn}") is not None
    await end(clock, manager)
