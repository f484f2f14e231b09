"""Ways in which saving to a store once lost or withheld something, or made somebody wait for ever."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from cagey_sessions import (
    DrainError,
    EndReason,
    SessionEndedError,
    SessionManager,
    StoreUnavailableError,
    UnsavableError,
)
from cagey_sessions.stores import Outcome, Verdict
from cagey_sessions.stores.memory import Row
from support import ManualClock, ScriptedStore, changed, end, let_time_pass, turns

# A call that hangs, and who is not in it


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
    manager._server.table.ask(first)
    manager._server.table.ask(second)
    manager._server.autosave.employ()
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


# A store without a fence


class UnfencedStore(ScriptedStore):
    """Writes whatever comes, whenever it comes."""

    fenced = shared = False

    def _save(self, record: Any) -> Outcome:
        row = self.backing.rows.setdefault(record.user_id, Row(record.epoch))
        row.record, row.erased = record, False
        return Outcome.SAVED


async def hanging_without_a_fence(clock: ManualClock) -> Any:
    """A manager, and a session whose save has been given up on and will be written later all the same."""
    store = UnfencedStore(clock)
    manager = SessionManager(store=store, clock=clock)
    session = await changed(manager)

    async def write_late(_: Any) -> None:
        await store.release_all.wait()

    store.script = [write_late]
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.persist_now())
    assert store.open_calls == 1
    return store, manager, session


async def test_a_user_whose_unfenced_call_hangs_is_not_written_again_before_it_returns(clock):
    """Whatever ends the session meanwhile: what the call writes late must not replace what a later session saved."""
    store, manager, session = await hanging_without_a_fence(clock)

    async def end_and_begin_again() -> None:
        await session.destroy(persist=False)
        newer = await manager.open(1, default={"n": 0})
        newer.user_data["n"] = 50
        await newer.persist_now()

    task = asyncio.ensure_future(end_and_begin_again())
    await clock.advance("1s")
    assert len(store.batches) == 2, "two saves of a user in flight"
    store.release_all.set()
    await let_time_pass(clock, task)
    assert store.stored(1) == {"n": 50}
    await end(clock, manager)


async def test_an_erasure_is_not_undone_by_an_unfenced_call_that_hangs(clock):
    """`erase` returns when nothing can bring the data back, or raises."""
    store, manager, _ = await hanging_without_a_fence(clock)
    task = asyncio.ensure_future(manager.erase(1))
    await clock.advance("1s")
    store.release_all.set()
    assert await let_time_pass(clock, task)
    await clock.advance("1s")
    assert store.stored(1) is None
    await end(clock, manager)


# Down and back


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


async def test_two_rows_the_engine_chokes_on_are_no_outage(clock, store, manager, caplog):
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


@pytest.mark.parametrize("during", ["between attempts", "in an attempt"])
async def test_who_asks_late_has_patience_of_their_own(clock, store, manager, during):
    """Somebody else has been waiting for nine seconds; that is no reason to be told of ten."""
    session = await changed(manager)
    store.verdict_of[1] = Verdict(Outcome.FAILED, "for now")
    if during == "in an attempt":
        store.delay = "900ms"
    early = asyncio.ensure_future(session.persist_now())
    await clock.advance("9.6s")
    late = asyncio.ensure_future(session.persist_now())
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, early)
    await clock.advance("1s")
    store.verdict_of.clear()
    assert (await let_time_pass(clock, late)).version == 2
    await end(clock, manager)


async def test_a_drain_does_not_wait_for_data_that_is_refused_at_a_second_attempt(clock, store, manager):
    """What can be known to be hopeless is not waited for until the deadline."""
    await changed(manager)
    store.down = True
    store.verdict_of[1] = Verdict(Outcome.INVALID, "never")
    task = asyncio.ensure_future(manager.destroy(deadline="60s"))
    await clock.advance("12s")
    store.down = False
    before = clock.now()
    with pytest.raises(DrainError) as raised:
        await let_time_pass(clock, task)
    assert isinstance(raised.value.report.unsaved[0].error, UnsavableError)
    assert (clock.now() - before) / 1e9 < 5
    assert clock.pending == 0


# Our tasks, stopped by others


async def test_a_worker_that_somebody_cancels_leaves_its_call_alone_and_waits_for_it(clock, store, manager):
    """The call goes on; until it has returned nothing else is written of its users."""
    session = await changed(manager)
    store.script = ["5s"]
    task = asyncio.ensure_future(session.persist_now())
    await turns()
    session.user_data["n"] = 2
    for other in asyncio.all_tasks():
        if other.get_name() == "cagey-sessions autosave":
            other.cancel()
    await clock.advance("3s")
    again = asyncio.ensure_future(session.persist_now())
    await clock.advance("1s")
    assert store.open_calls == 1
    assert len(store.batches) == 2, "two saves of a user in flight"
    await let_time_pass(clock, asyncio.gather(task, again))
    assert store.stored(1) == {"n": 2}
    await end(clock, manager)


def test_a_loop_that_ends_in_the_middle_of_a_save_is_quiet_also_with_a_listener_of_errors(capfd, clock):
    """A listener that takes its time is not begun when the loop is about to close."""
    store = ScriptedStore(clock)

    async def main() -> None:
        manager = SessionManager(store=store, clock=clock)

        async def tell(error: Exception, session: Any) -> None:
            await asyncio.sleep(0.01)

        manager.on("error", tell)
        session = await changed(manager)
        store.script = ["hang"]
        manager._server.table.ask(session)
        manager._server.autosave.employ()
        await turns()
        assert store.open_calls == 1

    asyncio.run(main())
    gc.collect()
    _, err = capfd.readouterr()
    assert "never" not in err
    assert "destroyed but it is pending" not in err


# For ever, at last, and at each attempt


@pytest.mark.parametrize("verdict", [Outcome.FAILED, Outcome.INVALID, Outcome.MISSING, Outcome.FENCED, Outcome.ERASED])
async def test_no_verdict_for_ever_keeps_a_slot_a_timer_or_a_caller(clock, store, manager, verdict):
    """Whatever the store says of one user: whoever waits is answered, a drain ends, others are saved."""
    session, healthy = await changed(manager, 1), await changed(manager, 2)
    store.verdict_of[1] = Verdict(verdict, "always")
    task = asyncio.ensure_future(session.persist_now())
    await clock.advance("11s")
    assert task.done()
    assert task.exception() is not None
    ending = asyncio.ensure_future(session.destroy())
    await clock.advance("25s")
    assert ending.done()
    ending.exception()
    healthy.user_data["n"] = 5
    await let_time_pass(clock, healthy.persist_now(), "100ms")
    assert manager.statistics().in_flight == 0
    drain = asyncio.ensure_future(manager.destroy())
    await clock.advance("30s")
    assert drain.done()
    drain.exception()
    assert store.stored(2) == {"n": 5}
    assert store.stored(1) == {"n": 0}
    statistics = manager.statistics()
    assert (statistics.live, statistics.in_flight, statistics.pending) == (0, 0, 0)
    assert clock.pending == 0


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


async def test_a_release_refused_by_an_old_epoch_leaves_no_claim_behind(clock, store, manager):
    """A claim for a row that is gone comes late; the session ends without a save: the user is free."""
    session = await changed(manager)
    del store.backing.rows[1]

    async def late(_: Any) -> None:
        await store.release_all.wait()

    store.claim_script = [late]
    task = asyncio.ensure_future(session.persist_now())
    await clock.advance("10.5s")
    assert isinstance(task.exception(), StoreUnavailableError)
    store.down = True
    await let_time_pass(clock, session.destroy(persist=False))
    store.release_all.set()
    store.down = False
    await clock.advance("5s")
    assert store.owner_of(1) == ""
    await end(clock, manager)


async def test_an_end_in_a_hanging_store_is_told_within_the_save_timeout(clock, store, manager):
    """A periodic save hangs when `destroy` is called: not first ten seconds for that, and then ten for its own."""
    session = await changed(manager)
    store.script = ["hang", "hang", "hang"]
    manager._server.table.ask(session)
    manager._server.autosave.employ()
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


async def test_an_end_behind_an_unfenced_call_that_nobody_waited_for_is_told_within_the_save_timeout(clock):
    """A periodic save hangs for minutes already: `destroy` waits for its own patience, not for that call."""
    store = UnfencedStore(clock)
    manager = SessionManager(store=store, clock=clock)
    session = await changed(manager)
    store.script = ["hang"]
    manager._server.table.ask(session)
    manager._server.autosave.employ()
    await clock.advance("60s")
    assert store.open_calls == 1
    before = clock.now()
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.destroy())
    assert (clock.now() - before) / 1e9 < 11
    store.release_all.set()
    await clock.advance("2s")
    assert store.stored(1) == {"n": 1}
    await end(clock, manager)


async def test_who_waits_for_a_save_of_a_session_that_ends_without_it_hears_of_that(clock, store, manager):
    """Not, at the end of their own patience, that a session which is gone stays due."""
    session = await changed(manager)
    store.down = True
    early = asyncio.ensure_future(session.persist_now())
    await clock.advance("1s")
    ending = asyncio.ensure_future(session.destroy(persist=False))
    await clock.advance("5s")
    late = asyncio.ensure_future(session.persist_now())
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, early)
    await let_time_pass(clock, ending, "5s")
    with pytest.raises(SessionEndedError):
        await late
    store.down = False
    await end(clock, manager)


async def test_who_waits_for_the_next_attempt_hears_of_an_end_at_once(clock, store, manager):
    """Between two attempts a session has no save under way, and may end here and now."""
    store.shared = False
    session = await changed(manager)
    store.verdict_of[1] = Verdict(Outcome.FAILED, "for now")
    task = asyncio.ensure_future(session.persist_now())
    await turns()
    assert manager._server.table.state(session) in ("idle", "due")
    await session.destroy(persist=False)
    with pytest.raises(SessionEndedError):
        await task
    await end(clock, manager)


async def test_what_is_saved_by_before_save_changes_at_each_attempt_and_ends_well(clock, store):
    """Live state that never stands still, replies lost at every other save, and a release."""
    count = 0

    def before_save(session: Any) -> None:
        nonlocal count
        count += 1
        session.user_data["n"] = count

    manager = SessionManager(store=store, clock=clock, before_save=before_save)
    session = await manager.open(1, default={"n": 0})
    for _ in range(5):
        store.script = ["lose"]
        await let_time_pass(clock, session.persist_now())
    store.script = ["lose"]
    await let_time_pass(clock, session.destroy())
    assert session.end_reason == EndReason.DESTROYED
    assert store.stored(1)["n"] >= count - 1
    await end(clock, manager)
