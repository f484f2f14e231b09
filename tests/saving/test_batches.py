"""Which users are saved together, how large a batch is, and how one bad row in it is found."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cagey_sessions import SessionManager, StoreUnavailableError
from cagey_sessions.stores import Outcome, Verdict
from support import ScriptedStore, add_users, changed, end, let_time_pass


async def test_urgent_calls_of_one_turn_share_a_batch(clock):
    store = ScriptedStore(clock, "5ms")
    manager = SessionManager(store=store, clock=clock)
    sessions = await add_users(manager, 150)
    for session in sessions:
        session.user_data["n"] = 1
    store.batches.clear()
    await let_time_pass(clock, asyncio.gather(*(session.persist_now() for session in sessions)))
    assert [len(batch.records) for batch in store.batches] == [150]
    await let_time_pass(clock, manager.destroy())


@pytest.mark.guarantee("I7")
async def test_batches_are_bounded_by_rows_and_by_bytes(clock):
    store = ScriptedStore(clock, "5ms")
    manager = SessionManager(store=store, clock=clock, interval=None)
    sessions = await add_users(manager, 1000)
    for session in sessions:
        session.user_data["n"] = 1
    store.batches.clear()
    await let_time_pass(clock, manager.persist_all_user_data())
    assert sum(len(batch.records) for batch in store.batches) == 1000
    assert max(len(batch.records) for batch in store.batches) == 200
    store.batches.clear()
    for session in sessions[:12]:
        session.user_data["text"] = "x" * 200_000
    await let_time_pass(clock, manager.persist_all_user_data())
    assert sum(len(batch.records) for batch in store.batches) == 12
    assert max(sum(len(record.body) for record in batch.records) for batch in store.batches) <= 1024 * 1024 + 200_100
    assert store.most_open <= 4
    await let_time_pass(clock, manager.destroy())


@pytest.mark.guarantee("I15")
async def test_what_is_saved_is_the_data_of_one_moment(clock):
    """Gold goes between two bags in every step of the loop, while saves that are slow are under way all the time."""
    store = ScriptedStore(clock, "7ms")
    manager = SessionManager(store=store, clock=clock, interval="1s")
    session = await manager.open("ann", default={"bag": list(range(50)), "bank": list(range(50))})
    for _ in range(300):
        session.user_data["bank"].append(session.user_data["bag"].pop(0))
        save = asyncio.ensure_future(session.persist_now())
        await clock.advance("3ms")
        session.user_data["bag"].append(session.user_data["bank"].pop(0))
        await clock.advance("3ms")
        save.cancel()
    saved = [record.value() for batch in store.batches for record in batch.records]
    assert len(saved) > 100
    assert len({len(data["bag"]) for data in saved}) == 2, "of both moments"
    assert all(sorted(data["bag"] + data["bank"]) == sorted([*range(50)] * 2) for data in saved)
    await let_time_pass(clock, manager.destroy())


async def test_a_store_that_takes_one_row_at_a_time_gets_them_so(clock, store, manager):
    """It raises for every batch of more: everybody is saved at once, and the store counts as up."""
    sessions = [await changed(manager, number) for number in range(40)]
    original = store.save_many

    async def save_one(records: Any) -> Any:
        if len(records) > 1:
            raise ValueError("one at a time")
        return await original(records)

    store.save_many = save_one
    await let_time_pass(clock, manager.persist_all_user_data(), "1s")
    assert all(store.stored(number) == {"n": 1} for number in range(40))
    assert manager.statistics().store_up
    assert len(sessions) == 40
    await end(clock, manager)


async def test_two_users_saved_at_once_are_two_saves(clock, store, manager):
    """In one statement, mostly, and yet one of them may be stored without the other."""
    ann, bob = await changed(manager, "ann"), await changed(manager, "bob")
    await let_time_pass(clock, manager.persist_all_user_data())
    store.batches.clear()
    ann.user_data["sword"], bob.user_data["gold"] = 1, 50
    store.verdict_of["bob"] = Verdict(Outcome.FAILED, "the row is locked")
    both = asyncio.gather(ann.persist_now(), bob.persist_now(), return_exceptions=True)
    receipt, refused = await let_time_pass(clock, both)
    assert len(store.batches[0].records) == 2, "they shared a call of the store"
    assert receipt.changed and isinstance(refused, StoreUnavailableError)
    assert "sword" in store.stored("ann") and "gold" not in store.stored("bob"), "what a crash would leave now"
    store.verdict_of.clear()
    await end(clock, manager)


@pytest.mark.guarantee("I10")
@pytest.mark.parametrize("poison", [{3}, {0, 199}, {77, 78}, set(range(0, 200, 20))], ids=str)
async def test_poison_rows_are_found_and_everybody_else_is_saved_at_once(clock, store, manager, poison):
    sessions = [await changed(manager, number) for number in range(200)]
    store.poison = set(poison)
    store.batches.clear()
    tasks = {session.user_id: asyncio.ensure_future(session.persist_now()) for session in sessions}
    await clock.advance("5s")
    for user_id, task in tasks.items():
        assert task.done() == (user_id not in poison), user_id
        assert (store.stored(user_id) == {"n": 1}) == (user_id not in poison)
    store.poison = set()
    await clock.advance("6s")
    for task in tasks.values():
        assert (await task).changed
    await end(clock, manager)


async def test_a_poison_row_does_not_slow_down_later_saves_of_others(clock, store, manager):
    """I10: its retries share no batch with rows that did not fail."""
    sessions = [await changed(manager, number) for number in range(100)]
    store.poison = {5}
    await clock.advance("31s")
    for number in range(4):
        for session in sessions:
            session.user_data["n"] = 10 + number
        store.batches.clear()
        await clock.advance("30100ms")
        for session in sessions:
            assert (store.stored(session.user_id)["n"] == 10 + number) == (session.user_id != 5)
        failed = [batch for batch in store.batches if batch.error is not None]
        assert failed
        assert all([record.user_id for record in batch.records] == [5] for batch in failed)
    store.poison = set()
    await end(clock, manager)
