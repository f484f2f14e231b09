"""The failure matrix: what a store may do to a save, and what must come of it."""

from __future__ import annotations

import asyncio
import contextvars
import gc
from typing import Any

import pytest

from cagey_sessions import (
    DrainError,
    EndReason,
    FencedError,
    LostRecordError,
    SessionManager,
    StoreUnavailableError,
    UnsavableError,
    UnsavedError,
    UserErasedError,
    WouldDeadlockError,
)
from cagey_sessions.stores import Outcome, Verdict
from support import ScriptedStore, changed, end, let_time_pass, turns

# Outcomes that are not known


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


async def test_a_change_during_a_save_is_saved_later(clock, store, manager):
    """Case 3, and a receipt is never for bytes that are older than the call."""
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


# Verdicts


async def test_a_row_that_fails_is_tried_again_within_the_interval_and_reported(clock, store, manager):
    """Case 4: nothing moves ahead of success."""
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


async def test_while_somebody_waits_attempts_are_repeated_soon(clock, store, manager):
    session = await changed(manager)
    store.verdict_of[1] = Verdict(Outcome.FAILED, "locked")
    task = asyncio.ensure_future(session.persist_now())
    await clock.advance("3s")
    assert not task.done()
    del store.verdict_of[1]
    await clock.advance("1100ms")
    assert (await task).version == 2
    await end(clock, manager)


async def test_a_record_that_is_gone_is_claimed_and_saved_again_with_an_alarm(clock, store, manager):
    heard = []
    manager.on("error", lambda error, session: heard.append(error))
    sessions = [await changed(manager, number) for number in range(5)]
    for number in range(5):
        del store.backing.rows[number]
    store.script = ["1ms"]
    await let_time_pass(clock, manager.persist_all_user_data())
    assert [store.stored(number) for number in range(5)] == [{"n": 1}] * 5
    await turns()
    assert {type(error) for error in heard} == {LostRecordError}
    assert all(session.alive for session in sessions)
    sessions[0].user_data["n"] = 2
    await sessions[0].persist_now()
    assert store.stored(0) == {"n": 2}
    await end(clock, manager)


async def test_a_record_that_is_gone_and_taken_by_another_node_is_fenced_off(clock, store, manager):
    session = await changed(manager)
    del store.backing.rows[1]
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    theirs = await other.open(1, default={"theirs": True})
    with pytest.raises(FencedError):
        await let_time_pass(clock, session.persist_now())
    await turns()
    assert session.end_reason == EndReason.FENCED
    await let_time_pass(clock, theirs.destroy())
    assert store.stored(1) == {"theirs": True}
    await end(clock, manager, other)


async def test_who_was_taken_over_ends_unsaved_and_says_so(clock, store, manager):
    heard = []
    manager.on("error", lambda error, session: heard.append((error, session)))
    session = await changed(manager)
    events = []
    session.on("before_destroy", lambda: events.append("before_destroy"))
    session.on("destroy", lambda: events.append("destroy"))
    store.bury(manager._life.owner)
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    theirs = await other.open(1)
    assert theirs.user_data == {"n": 0}
    with pytest.raises(FencedError):
        await let_time_pass(clock, session.persist_now())
    await turns()
    assert session.end_reason == EndReason.FENCED
    assert events == ["before_destroy", "destroy"]
    assert [(type(error), about) for error, about in heard] == [(FencedError, session)]
    assert manager.statistics().fenced == 1
    assert store.owner_of(1) == other._life.owner, "not let go of by who no longer has it"
    theirs.user_data["n"] = 5
    await end(clock, other, manager)
    assert store.stored(1) == {"n": 5}


@pytest.mark.parametrize("when", ["destroy", "drain"])
async def test_who_was_taken_over_hears_it_at_the_end_at_the_latest(clock, store, manager, when):
    session = await changed(manager)
    store.bury(manager._life.owner)
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    await other.open(1)
    if when == "destroy":
        with pytest.raises(FencedError):
            await let_time_pass(clock, session.destroy())
    else:
        with pytest.raises(DrainError) as raised:
            await let_time_pass(clock, manager.destroy())
        assert [user.user_id for user in raised.value.report.unsaved] == [1]
    assert session.end_reason == EndReason.FENCED
    assert store.stored(1) == {"n": 0}
    await let_time_pass(clock, other.destroy())
    if when == "destroy":
        await end(clock, manager)


async def test_an_erased_user_is_never_written_again(clock, store, manager):
    session = await changed(manager)
    store.bury(manager._life.owner)
    await ScriptedStore.erase(store, 1)
    with pytest.raises(UserErasedError):
        await let_time_pass(clock, session.persist_now())
    await turns()
    assert session.end_reason == EndReason.ERASED
    assert store.stored(1) is None
    await end(clock, manager)


# Data that cannot be saved


async def test_unsavable_data_is_told_once_and_costs_nobody_else_anything(clock, store, manager):
    """Cases 12 and 66."""
    heard = []
    manager.on("unsavable", lambda session, error: heard.append((session, error.path)))
    sessions = [await changed(manager, number) for number in range(20)]
    bad = sessions[3]
    bad.user_data["when"] = {1, 2}
    with pytest.raises(UnsavedError) as raised:
        await let_time_pass(clock, manager.persist_all_user_data())
    assert raised.value.user_ids == (3,)
    assert [type(error) for error in raised.value.exceptions] == [UnsavableError]
    await clock.advance("100s")
    assert heard == [(bad, 'user_data["when"]')]
    assert all(store.stored(number) == {"n": 1} for number in range(20) if number != 3)
    assert store.stored(3) == {"n": 0}, "the last good record is untouched"
    assert manager.statistics().unsavable == 1
    assert manager.health().state == "degraded"
    bad.user_data["when"] = [1, 2]
    await clock.advance("31s")
    assert store.stored(3) == {"n": 1, "when": [1, 2]}
    assert manager.statistics().unsavable == 0
    assert manager.health().state == "ok"
    bad.user_data["when"] = {3}
    await clock.advance("31s")
    assert len(heard) == 2, "the next fault is told again"
    del bad.user_data["when"]
    await end(clock, manager)


async def test_destroy_with_unsavable_data_leaves_the_session_as_it_was(clock, store, manager):
    session = await manager.create("key")
    await session.login(1, default={"n": 0})
    session.user_data["x"] = 1j
    events = []
    session.on("before_destroy", lambda: events.append("before_destroy"))
    with pytest.raises(UnsavableError) as raised:
        await session.destroy()
    assert raised.value.path == 'user_data["x"]'
    assert manager.find_by_key("key") is session
    assert events == []
    del session.user_data["x"]
    await session.destroy()
    assert store.stored(1) == {"n": 0}
    await end(clock, manager)


async def test_data_that_becomes_unsavable_in_before_destroy_keeps_the_session_until_it_is_mended(
    clock, store, manager
):
    session = await changed(manager)
    session.once("before_destroy", lambda: session.user_data.update(x={1}))
    with pytest.raises(UnsavableError):
        await let_time_pass(clock, session.destroy())
    assert session.alive
    session.user_data["x"] = 1
    await let_time_pass(clock, session.destroy())
    assert store.stored(1) == {"n": 1, "x": 1}
    await end(clock, manager)


async def test_a_drain_names_whose_data_cannot_be_saved_and_does_not_wait_for_it(clock, store, manager):
    sessions = [await changed(manager, number) for number in range(5)]
    sessions[2].user_data["x"] = b"bytes"
    with pytest.raises(DrainError) as raised:
        await let_time_pass(clock, manager.destroy())
    report = raised.value.report
    assert [(user.user_id, type(user.error)) for user in report.unsaved] == [(2, UnsavableError)]
    assert report.saved == 4
    assert report.seconds < 1


async def test_what_the_store_refuses_for_good_is_not_sent_again_until_it_changes(clock, store, manager):
    heard = []
    manager.on("unsavable", lambda session, error: heard.append(error))
    session = await changed(manager)
    store.verdict_of[1] = Verdict(Outcome.INVALID, "U+0000 in a text")
    with pytest.raises(UnsavableError, match="U\\+0000"):
        await let_time_pass(clock, session.persist_now())
    sent = len(store.versions(1))
    await clock.advance("100s")
    assert len(store.versions(1)) == sent
    assert len(heard) == 1
    with pytest.raises(UnsavableError):
        await session.destroy()
    assert session.alive
    store.verdict_of.clear()
    session.user_data["n"] = 2
    await clock.advance("31s")
    assert store.stored(1) == {"n": 2}
    await end(clock, manager)


async def test_before_save_that_fails_is_no_loss(clock, store):
    wrong = [ZeroDivisionError()]

    def before_save(session: Any) -> None:
        if wrong:
            raise wrong[0]
        session.user_data["copied"] = True

    manager = SessionManager(store=store, clock=clock, before_save=before_save)
    session = await manager.open(1, default={"n": 0})
    with pytest.raises(UnsavableError, match="before_save raised ZeroDivisionError"):
        await session.persist_now()
    wrong.clear()
    await clock.advance("31s")
    assert store.stored(1) == {"n": 0, "copied": True}
    await end(clock, manager)


async def test_data_above_the_limit_is_unsavable(clock, store):
    manager = SessionManager(store=store, clock=clock, max_bytes=1000)
    session = await manager.open(1, default={"n": 0})
    session.user_data["text"] = "x" * 1000
    with pytest.raises(UnsavableError, match="1,000 bytes"):
        await session.persist_now()
    del session.user_data["text"]
    await end(clock, manager)


# Batches that fail


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
