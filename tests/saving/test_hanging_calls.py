"""A call of the store that hangs costs the users in it their save, and nobody else anything."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cagey_sessions import SessionManager, StoreUnavailableError
from cagey_sessions.stores import Outcome, Verdict
from support import ManualClock, ScriptedStore, add_users, changed, end, inside, let_time_pass, turns


async def one_that_failed(clock: ManualClock, store: ScriptedStore, manager: Any) -> tuple[Any, Any]:
    """Two users with a change; the last save of the first has failed, that of the other has not."""
    bad, good = await changed(manager, 1), await changed(manager, 2)
    store.verdict_of[1] = Verdict(Outcome.FAILED, "locked")
    await clock.advance("31s")
    store.verdict_of.clear()
    good.user_data["n"] = bad.user_data["n"] = 2
    return bad, good


async def test_a_save_that_is_not_in_a_hanging_call_does_not_wait_for_its_end(clock, store, manager):
    """A session whose last save failed shares a worker with one whose call hangs: it is saved, or at least told."""
    first, second = await changed(manager, 1), await changed(manager, 2)
    store.verdict_of[1] = Verdict(Outcome.FAILED, "for now")
    await clock.advance("31s")
    store.verdict_of.clear()
    second.user_data["n"] = 2
    hung = asyncio.Event()
    original = store.save_many

    async def save_many(records: Any) -> Any:
        if any(record.user_id == 2 for record in records) and not hung.is_set():
            hung.set()
            await store.release_all.wait()
            raise StoreUnavailableError("let go")
        return await original(records)

    store.save_many = save_many
    inside(manager).table.ask(first)
    inside(manager).table.ask(second)
    inside(manager).autosave.employ()
    await turns()
    assert hung.is_set()
    await clock.advance("1s")  # for a patience that does not end at the very moment at which the call is given up
    try:
        await let_time_pass(clock, first.destroy(), "45s")
        assert store.stored(1) == {"n": 1}
    finally:
        store.release_all.set()
        await turns()
    await end(clock, manager)


async def test_an_end_in_a_hanging_store_is_told_within_the_save_timeout(clock, store, manager):
    """A periodic save hangs when `destroy` is called: not first ten seconds for that, and then ten for its own."""
    session = await changed(manager)
    store.script = ["hang", "hang", "hang"]
    inside(manager).table.ask(session)
    inside(manager).autosave.employ()
    await clock.advance("1ms")
    assert store.open_calls == 1
    before = clock.now()
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.destroy())
    assert (clock.now() - before) / 1e9 < 11
    store.release_all.set()
    store.script = []
    await clock.advance("2s")
    await end(clock, manager)


async def test_a_call_that_hangs_does_not_hold_rows_it_has_not_got(clock, store, manager):
    """Fenced: who failed before shares no call with who did not, and does not wait for a call that hangs either."""
    bad, good = await one_that_failed(clock, store, manager)
    store.batches.clear()
    store.lose(1)
    tasks = [asyncio.ensure_future(session.persist_now()) for session in (bad, good)]
    await clock.advance("60s")
    await asyncio.gather(*tasks, return_exceptions=True)
    assert store.stored(2) == {"n": 2}, "the one whose call hung was tried again"
    assert store.stored(1) == {"n": 2}, "never sent: it waits for a call that is not its own"
    store.let_go.set()
    await end(clock, manager)


async def test_half_of_a_batch_does_not_wait_for_the_other_half_that_hangs(clock, store, manager):
    sessions = [await changed(manager, number) for number in range(10)]
    store.script = [ValueError("whole batch")]
    store.lose(2)
    tasks = [asyncio.ensure_future(session.persist_now()) for session in sessions]
    await clock.advance("60s")
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [store.stored(number)["n"] for number in range(10)] == [1] * 10
    store.let_go.set()
    await end(clock, manager)


async def test_destroy_does_not_hang_with_a_call_of_others(clock, store, manager):
    """`destroy` raises after `save_timeout` at the latest, also for a row whose batch waits for another call."""
    bad, good = await one_that_failed(clock, store, manager)
    store.lose(1)
    for session in (bad, good):
        inside(manager).autosave._table.ask(session)  # nobody waits
    inside(manager).autosave.employ()
    await turns()
    assert store.count == 1
    task = asyncio.ensure_future(bad.destroy())
    await clock.advance("60s")
    assert task.done(), "destroy hangs"
    await asyncio.gather(task, return_exceptions=True)
    store.let_go.set()
    await end(clock, manager)


async def test_destroy_raises_after_the_save_timeout_also_when_a_save_hangs(clock, store, manager):
    """Not after what is left of the one under way, and then `save_timeout` once more."""
    session = await changed(manager)
    store.lose(1)
    inside(manager).autosave._table.ask(session)
    inside(manager).autosave.employ()
    await turns()
    store.down = True
    task = asyncio.ensure_future(session.destroy())
    await clock.advance("11s")
    done = task.done()
    await asyncio.gather(let_time_pass(clock, task), return_exceptions=True)
    store.down = False
    store.let_go.set()
    await end(clock, manager)
    assert done


@pytest.mark.parametrize("fenced", [True, False])
async def test_a_call_that_hangs_is_unknown_at_its_deadline(clock, store, manager, fenced):
    """And what it writes later changes nothing: because of the version, or because its end is waited for."""
    store.fenced = fenced
    session = await changed(manager)
    store.script = ["hang"]
    before = clock.now()
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.persist_now())
    assert 9.9 <= (clock.now() - before) / 1e9 <= 10.2
    assert len(store.aborted) == 1
    assert session.alive
    session.user_data["n"] = 7
    if not fenced:
        with pytest.raises(StoreUnavailableError):
            await let_time_pass(clock, session.persist_now())
        assert store.open_calls == 1, "its users wait for the end of the call"
    store.release_all.set()
    await turns()
    await let_time_pass(clock, session.persist_now())
    assert store.stored(1) == {"n": 7}
    await end(clock, manager)


@pytest.mark.parametrize("fenced", [True, False], ids=["fenced", "unfenced"])
async def test_a_hanging_call_costs_its_own_batch_and_is_reported_user_by_user(clock, fenced):
    """The first of many batches hangs: its users are unknown, everybody else is saved meanwhile."""
    store = ScriptedStore(clock, "20ms")
    store.fenced = fenced
    manager = SessionManager(store=store, clock=clock, interval=None)
    sessions = await add_users(manager, 1000)
    for session in sessions:
        session.user_data["n"] = 1
    store.script = ["hang"]
    waiting = [asyncio.ensure_future(session.persist_now()) for session in sessions]
    await clock.advance("9900ms")
    hanging = {record.user_id for record in store.batches[0].records}
    assert 0 < len(hanging) <= 200
    for session, task in zip(sessions, waiting, strict=True):
        assert task.done() == (session.user_id not in hanging)
    await clock.advance("300ms")
    for session, task in zip(sessions, waiting, strict=True):
        if session.user_id in hanging:
            with pytest.raises(StoreUnavailableError):
                await task
            assert store.stored(session.user_id) is None
        else:
            receipt = await task
            assert receipt.changed
            assert store.stored(session.user_id) == {"n": 1}
    assert len(store.aborted) == 1
    assert manager.statistics().store_up, "others got through"
    store.release_all.set()
    await turns()
    await let_time_pass(clock, manager.destroy())
    assert all(store.stored(session_id) == {"n": 1} for session_id in range(1000))
