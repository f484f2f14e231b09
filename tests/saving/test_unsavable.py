"""Data that cannot be saved: it is reported once, kept in memory, and holds up nobody else."""

from __future__ import annotations

from typing import Any

import pytest

from cagey_sessions import DrainError, SessionManager, UnsavableError, UnsavedError
from cagey_sessions.stores import Outcome, Verdict
from support import changed, end, let_time_pass


async def test_unsavable_data_is_reported_once_and_holds_up_no_other_user(clock, store, manager):
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
