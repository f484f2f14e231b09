"""The failure matrix: what a store may answer to a save, and what must come of it."""

from __future__ import annotations

import asyncio
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
    store.bury(manager._server.owner)
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
    assert store.owner_of(1) == other._server.owner, "not let go of by who no longer has it"
    theirs.user_data["n"] = 5
    await end(clock, other, manager)
    assert store.stored(1) == {"n": 5}


@pytest.mark.parametrize("when", ["destroy", "drain"])
async def test_who_was_taken_over_hears_it_at_the_end_at_the_latest(clock, store, manager, when):
    session = await changed(manager)
    store.bury(manager._server.owner)
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
    store.bury(manager._server.owner)
    await ScriptedStore.erase(store, 1)
    with pytest.raises(UserErasedError):
        await let_time_pass(clock, session.persist_now())
    await turns()
    assert session.end_reason == EndReason.ERASED
    assert store.stored(1) is None
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
