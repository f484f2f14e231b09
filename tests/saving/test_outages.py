"""A store that is down: it is probed, nothing is lost, and everybody is saved once it is back."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from cagey_sessions import DrainError, EndReason, SessionManager, StoreUnavailableError
from cagey_sessions.stores import Outcome, Verdict
from support import SECOND, ScriptedStore, add_users, changed, end, inside, let_time_pass, turns

OUTAGE_USERS = 3000


@pytest.mark.guarantee("I3")
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


async def test_a_session_whose_end_waits_for_the_store_may_be_ended_unsaved(clock, store, manager):
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


async def test_requests_and_ends_do_not_wait_behind_periodic_saves(clock, store, manager):
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


async def test_a_probe_that_passes_its_deadline_is_followed_by_others(clock, store, manager):
    """Store hangs: the program goes on. A probe that has passed its deadline does not keep all others out."""
    session = await changed(manager)
    await clock.advance("1ms")
    store.lose(1, 2)  # two calls are lost in a network; from then on the store is well
    await asyncio.gather(let_time_pass(clock, session.persist_now()), return_exceptions=True)
    await clock.advance("60s")
    await asyncio.gather(let_time_pass(clock, session.persist_now()), return_exceptions=True)
    assert manager.statistics().store_up
    assert store.stored(1) == {"n": 1}
    store.let_go.set()
    await end(clock, manager)


async def test_a_release_that_never_returns_does_not_keep_the_store_down(clock, store, manager):
    """A release nobody waits for has a deadline too, and is not the only call allowed while the store is down."""
    session = await changed(manager)
    hold = asyncio.Event()
    original = store.release_many

    async def release(*args: Any) -> list[bool]:
        await hold.wait()
        return await original(*args)

    store.release_many = release
    store.script = [StoreUnavailableError("blip")]
    await clock.advance("1ms")
    task = asyncio.ensure_future(session.persist_now())
    await turns()
    assert not manager.statistics().store_up
    inside(manager).claims.release_later(9, 1)  # as after a cancelled login
    await clock.advance("5s")
    assert (await task).changed, "saves come before releases"
    assert store.stored(1) == {"n": 1}
    hold.set()
    await end(clock, manager)


async def test_an_outage_told_by_an_error_of_the_driver_is_probed_as_seldom(clock, store, manager):
    """I32: drivers raise errors of their own; while the store is down one probe at a time, now and then."""
    [await changed(manager, number) for number in range(300)]

    async def refuse(records: Any) -> None:
        raise RuntimeError("connection refused, says the driver")

    class Always(list):
        def __bool__(self) -> bool:
            return True

        def pop(self, *_: Any) -> Any:
            return refuse

    store.script = Always()
    await clock.advance("30s")
    store.batches.clear()
    await clock.advance("30s")
    sent = len(store.batches)
    store.script = []
    await clock.advance("60s")
    await end(clock, manager)
    assert sent <= 75, f"{sent} calls in 30 s of an outage"


async def test_two_poison_rows_are_not_an_outage(clock, store, manager):
    """I10: rows the engine chokes on, retried together, do not make the store count as down for everybody."""
    sessions = [await changed(manager, number) for number in range(20)]
    store.poison = {3, 4}
    store.delay = "5ms"
    await clock.advance("31s")
    said = []
    inside(manager).link._say = lambda level, message, *args: said.append(message % args)
    for _ in range(5):
        for session in sessions:
            session.user_data["n"] += 1
        tasks = [asyncio.ensure_future(sessions[n].persist_now()) for n in (3, 4)]
        await clock.advance("12s")
        await asyncio.gather(*tasks, return_exceptions=True)
    store.poison = set()
    await end(clock, manager)
    assert said == []


async def test_after_an_outage_a_waiting_caller_is_retried_before_periodic_saves(clock, store, manager):
    """A caller's retry does not queue behind everybody who is due after an outage."""
    sessions = [await changed(manager, number) for number in range(3000)]
    store.down = True
    await clock.advance("40s")
    store.down = False
    await clock.advance("1500ms")
    last = sessions[list(inside(manager).table.oldest_first())[-1].user_id]
    last.user_data["n"] = 9
    store.verdict_of[last.user_id] = Verdict(Outcome.FAILED, "locked for a moment")
    task = asyncio.ensure_future(last.persist_now())
    await clock.advance("100ms")
    assert not task.done()
    store.verdict_of.clear()
    await clock.advance("1200ms")
    assert task.done(), "its retry waits in the periodic lane"
    await task
    await end(clock, manager)


async def test_a_parked_session_is_saved_soon_after_the_store_is_back(clock, store):
    """Also with a long interval: the user cannot log in again before."""
    manager = SessionManager(store=store, clock=clock, interval="1h")
    session = await changed(manager)
    store.down = True
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.destroy())
    await clock.advance("60s")
    store.down = False
    await clock.advance("60s")
    assert session.end_reason == EndReason.DESTROYED
    await end(clock, manager)


async def test_while_the_store_is_down_reads_are_probes_like_other_calls(clock, store, manager):
    """I7, I32: a hundred callers of `read` are not a hundred calls under way to a store that is down."""
    await changed(manager)
    store.down = True
    await clock.advance("40s")
    assert not manager.statistics().store_up
    open_calls = most = 0

    async def load(_: Any) -> Any:
        nonlocal open_calls, most
        open_calls += 1
        most = max(most, open_calls)
        try:
            await clock.sleep("500ms")
            raise StoreUnavailableError("down")
        finally:
            open_calls -= 1

    original, store.load = store.load, load
    tasks = [asyncio.ensure_future(manager.read(100 + number)) for number in range(100)]
    await clock.advance("15s")
    await asyncio.gather(*tasks, return_exceptions=True)
    store.load, store.down = original, False
    await clock.advance("20s")
    await end(clock, manager)
    assert most <= 8


async def test_a_probe_that_never_returns_does_not_keep_the_store_down(clock, store):
    """Two calls hang for ever, beyond `abort`; the store is well again, and two of four slots are free."""
    manager = SessionManager(store=store, clock=clock, interval="1h")  # so that no other save comes in between
    first, second, third = [await changed(manager, number) for number in (1, 2, 3)]
    await clock.advance("1ms")
    store.script = ["hang", "hang"]
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, first.persist_now())
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, second.persist_now())
    await clock.advance("30s")
    assert not store.script
    try:
        await let_time_pass(clock, third.persist_now())
        assert store.stored(3) == {"n": 1}
    finally:
        store.release_all.set()
        await turns()
    await end(clock, manager)


async def test_two_rows_that_fail_by_themselves_each_time_are_no_outage(clock, store, manager, caplog):
    """They fail by themselves each time; the store stays up for everybody else."""
    healthy = await changed(manager, 0)
    [await changed(manager, number) for number in (1, 2)]
    store.poison = {1, 2}
    await clock.advance("1ms")
    tasks = [asyncio.ensure_future(manager.find_by_user(number).persist_now()) for number in (1, 2)]
    for _ in range(120):
        await clock.advance("100ms")
        assert manager.statistics().store_up
    assert all(isinstance(task.exception(), StoreUnavailableError) for task in tasks)
    healthy.user_data["n"] = 5
    await healthy.persist_now()
    store.poison = set()
    await end(clock, manager)


async def test_an_outage_told_row_by_row_is_noticed_where_saves_come_one_at_a_time(clock, store, manager):
    """Users are due at different times, and the driver has an error of its own for a lost connection."""
    sessions = [await manager.open(number, default={"n": 0}) for number in range(30)]
    await clock.advance("31s")
    for session in sessions:
        session.user_data["n"] = 1
    broken = True

    async def save_many(records: Any) -> Any:
        if broken:
            raise RuntimeError("connection refused, says the driver")
        return await works(records)

    works, store.save_many = store.save_many, save_many
    await clock.advance("30s")
    assert not manager.statistics().store_up
    broken = False
    await clock.advance("31s")
    assert manager.statistics().store_up
    assert all(store.stored(number) == {"n": 1} for number in range(30))
    await end(clock, manager)


async def test_rows_that_are_refused_one_at_a_time_are_no_outage_while_others_are_saved(clock, store, manager):
    sessions = [await manager.open(number, default={"n": 0}) for number in range(40)]
    await clock.advance("31s")
    store.poison = set(range(0, 40, 2))
    for session in sessions:
        session.user_data["n"] = 1
    for _ in range(60):
        await clock.advance("1s")
        assert manager.statistics().store_up
    assert all(store.stored(number) == {"n": number % 2} for number in range(40))
    store.poison.clear()
    await clock.advance("60s")
    assert all(store.stored(number) == {"n": 1} for number in range(40))
    await end(clock, manager)


@pytest.mark.guarantee("I32")
async def test_after_an_outage_everybody_is_saved_within_an_interval_and_never_in_a_herd(clock):
    """40 s without a store, interval 30 s: memory grows by marks; then at most 1.5 x users / interval in any second."""
    interval = 30
    store = ScriptedStore(clock, "5ms")
    manager = SessionManager(store=store, interval=interval, clock=clock)
    sessions = await add_users(manager, OUTAGE_USERS, {"n": 0, "text": "x" * 1000})

    def change() -> None:
        for session in sessions:
            session.user_data["n"] += 1

    change()
    await clock.advance(interval + 1)
    assert all(store.stored(user_id) is not None for user_id in range(OUTAGE_USERS))
    store.down = True
    await clock.advance("1s")
    change()
    await clock.advance("5s")
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(34):
            change()
            await clock.advance("1s")
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / OUTAGE_USERS < 300, "what waits is a mark, not a body"
    assert not manager.statistics().store_up
    assert manager.health().state == "down"
    attempts = [batch for batch in store.batches if batch.start > clock.now() - 10 * SECOND]
    assert 8 <= len(attempts) <= 25, "it is tried about once a second"
    assert all(len(batch.records) == 1 for batch in attempts)
    assert all(session.alive for session in sessions)

    store.down = False
    back = clock.now()
    store.batches.clear()
    wanted = [dict(session.user_data) for session in sessions]
    await clock.advance("1s")
    assert manager.statistics().store_up
    for _ in range(interval - 1):
        await clock.advance("1s")
    saved = {record.user_id for batch in store.batches for record in batch.records}
    assert saved == set(range(OUTAGE_USERS)), "everybody within one interval"
    assert [store.stored(user_id) for user_id in range(OUTAGE_USERS)] == wanted
    for _ in range(3 * interval):
        change()
        await clock.advance("1s")
        assert manager.statistics().oldest_unsaved <= interval + 0.02
    per_second: Counter[int] = Counter()
    for batch in store.batches:
        per_second[(batch.start - back) // SECOND] += len(batch.records)
    assert max(per_second.values()) <= 1.5 * OUTAGE_USERS / interval
    await let_time_pass(clock, manager.destroy())
