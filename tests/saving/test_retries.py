"""What a store may answer to a save, and how the save is repeated."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cagey_sessions import StoreUnavailableError
from cagey_sessions.stores import Outcome, Verdict
from support import SECOND, add_user, changed, end, let_time_pass, turns


@pytest.mark.guarantee("I13")
async def test_a_lost_reply_is_repeated_with_the_same_version(clock, store, manager):
    session = await changed(manager)
    store.script = ["lose", "lose"]
    receipt = await let_time_pass(clock, session.persist_now())
    assert (receipt.version, receipt.changed) == (2, True)
    assert store.versions(1) == [1, 2, 2, 2]
    await end(clock, manager)


async def test_a_change_during_an_unknown_outcome_is_the_next_version(clock, store, manager):
    session = await changed(manager)
    store.script = ["lose"]
    task = asyncio.ensure_future(session.persist_now())
    await turns()
    session.user_data["n"] = 2
    receipt = await let_time_pass(clock, task)
    assert receipt.version == 3
    assert store.stored(1) == {"n": 2}
    await end(clock, manager)


async def test_data_changed_back_after_an_unknown_outcome_is_written_again(clock, store, manager):
    session = await changed(manager)
    store.script = ["lose"]
    task = asyncio.ensure_future(session.persist_now())
    await turns()
    assert store.stored(1) == {"n": 1}
    session.user_data["n"] = 0
    await let_time_pass(clock, task)
    assert store.stored(1) == {"n": 0}
    await end(clock, manager)


@pytest.mark.guarantee("I2")
async def test_a_change_during_a_save_is_saved_later(clock, store, manager):
    """And a receipt is never for bytes that are older than the call."""
    session = await changed(manager)
    store.script = ["50ms"]
    first = asyncio.ensure_future(session.persist_now())
    await clock.advance("10ms")
    session.user_data["n"] = 2
    second = asyncio.ensure_future(session.persist_now())
    receipts = await let_time_pass(clock, asyncio.gather(first, second))
    assert [receipt.version for receipt in receipts] == [2, 3]
    assert store.stored(1) == {"n": 2}
    session.user_data["n"] = 3
    await clock.advance("31s")
    assert store.stored(1) == {"n": 3}
    await end(clock, manager)


async def test_a_row_that_fails_is_tried_again_within_the_interval_and_reported(clock, store, manager):
    """Nothing counts as saved before the store has said so."""
    heard = []
    manager.on("error", lambda error, session: heard.append((type(error), session)))
    session = await changed(manager)
    others = [await changed(manager, number) for number in range(2, 10)]
    store.verdict_of[1] = Verdict(Outcome.FAILED, "locked")
    await clock.advance("35s")
    assert all(store.stored(other.user_id) == {"n": 1} for other in others)
    assert store.stored(1) == {"n": 0}
    assert (StoreUnavailableError, session) in heard
    assert manager.statistics().failed >= 2
    del store.verdict_of[1]
    await clock.advance("16s")
    assert store.stored(1) == {"n": 1}
    await end(clock, manager)


async def test_a_store_that_answers_nonsense_breaks_nothing(clock, store, manager):
    session = await changed(manager)
    original = store.save_many
    for nonsense in ([], None, [Verdict(Outcome.SAVED)] * 2, ["saved"], [("saved", "")], [Verdict("whatever", "")]):

        async def answer(records: Any, nonsense: Any = nonsense) -> Any:
            return nonsense

        store.save_many = answer
        with pytest.raises(StoreUnavailableError, match="within 10 s"):
            await let_time_pass(clock, session.persist_now())
        assert session.alive
    store.save_many = original
    await clock.advance("2s")
    await let_time_pass(clock, session.persist_now())
    assert store.stored(1) == {"n": 1}
    await end(clock, manager)


async def test_retries_back_off_within_the_interval(make_manager, db, clock):
    manager = make_manager(interval="16s")
    await add_user(manager, 1)
    db.always[1] = OSError("down")
    await clock.advance("16s")
    db.log.clear()
    await clock.advance("300s")
    gaps = [(b.start - a.start) / SECOND for a, b in zip(db.log, db.log[1:], strict=False)]
    assert max(gaps) <= 8
    assert len(db.log) <= 90, "no storm"
    assert min(gaps[5:]) >= 3.9
    db.always.clear()
    await clock.advance("8s")
    assert db.stored == {1: {"gold": 1}}
    await manager.destroy()


async def test_a_verdict_that_cannot_be_hashed_is_nonsense_like_any_other(clock, store, manager):
    session = await changed(manager)

    async def answer(records: Any) -> Any:
        return [Verdict([], "") for _ in records]  # type: ignore[arg-type]

    original, store.save_many = store.save_many, answer
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.persist_now())
    store.save_many = original
    await clock.advance("2s")
    await end(clock, manager)


@pytest.mark.parametrize("verdict", [Outcome.FAILED, Outcome.INVALID, Outcome.MISSING, Outcome.FENCED, Outcome.ERASED])
async def test_no_verdict_keeps_a_slot_a_timer_or_a_caller_for_ever(clock, store, manager, verdict):
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
