"""`tracking="marked"`: who is not marked is passed over by the timer, and by nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cagey_sessions import (
    NotIdentifiedError,
    OptionError,
    SessionEndedError,
    SessionManager,
    StoreUnavailableError,
)
from cagey_sessions.stores import Outcome, Verdict
from support import ManualClock, ScriptedStore, end, let_time_pass, turns


class Encodes:
    """An encoder that counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, value: Any) -> Any:
        self.count += 1
        return value


@pytest.fixture
def encode() -> Encodes:
    return Encodes()


@pytest.fixture
def manager(clock: ManualClock, store: ScriptedStore, encode: Encodes) -> Any:
    return SessionManager(store=store, clock=clock, tracking="marked", encode=encode)


async def opened(clock: ManualClock, store: ScriptedStore, manager: Any, user_id: int | str = "ann") -> Any:
    """A user whom the store knows."""
    store.put(user_id, b'{"gold":1}')
    return await manager.open(user_id)


# The setting


@pytest.mark.parametrize("tracking", ["mark", "contents", "", 1, True, ["marked"]])
def test_what_is_not_a_way_of_tracking(store, tracking):
    with pytest.raises(OptionError, match=r"tracking is 'content' or 'marked'"):
        SessionManager(store=store, tracking=tracking)


def test_a_close_name_is_suggested(store):
    with pytest.raises(OptionError, match=r"did you mean 'marked'\?"):
        SessionManager(store=store, tracking="Marks")


@pytest.mark.parametrize("tracking", ["marked", "content"])
def test_it_needs_a_store(tracking):
    with pytest.raises(OptionError, match="tracking needs a store"):
        SessionManager(tracking=tracking)


# The timer


async def test_a_user_who_is_not_marked_is_not_encoded(clock, store, manager, encode):
    seen = []
    manager = SessionManager(store=store, clock=clock, tracking="marked", encode=encode, before_save=seen.append)
    session = await opened(clock, store, manager)
    encode.count = 0
    session.user_data["gold"] = 2
    await clock.advance("10m")
    assert encode.count == 0
    assert seen == []
    assert store.batches == []
    found = manager.statistics()
    assert 20 <= found.saved == found.unchanged <= 21, "passed over once an interval"
    assert found.pending == found.in_flight == found.failed == 0
    assert found.oldest_unsaved <= 30
    assert manager.health().state == "ok"
    await end(clock, manager)
    assert store.stored("ann") == {"gold": 2}, "the end compares"
    assert seen


async def test_a_mark_is_good_for_one_save(clock, store, manager, encode):
    session = await opened(clock, store, manager)
    encode.count = 0
    session.user_data["gold"] = 2
    session.mark_changed()
    session.mark_changed()
    await clock.advance("30s")
    assert store.stored("ann") == {"gold": 2}
    assert encode.count == 1
    session.user_data["gold"] = 3
    await clock.advance("10m")
    assert encode.count == 1
    session.mark_changed()
    await clock.advance("30s")
    assert store.stored("ann") == {"gold": 3}
    assert encode.count == 2
    await end(clock, manager)


async def test_a_mark_without_a_change_costs_the_encoding_and_goes(clock, store, manager, encode):
    session = await opened(clock, store, manager)
    encode.count = 0
    session.mark_changed()
    await clock.advance("5m")
    assert encode.count == 1
    assert store.batches == []
    await end(clock, manager)


async def test_a_new_user_is_saved_without_a_mark(clock, store, manager, encode):
    await manager.open("ann", default={"gold": 0})
    await clock.advance("30s")
    assert store.stored("ann") == {"gold": 0}
    encode.count = 0
    await clock.advance("5m")
    assert encode.count == 0
    await end(clock, manager)


async def test_an_assignment_marks(clock, store, manager):
    session = await opened(clock, store, manager)
    session.user_data = {"gold": 5}
    await clock.advance("30s")
    assert store.stored("ann") == {"gold": 5}
    await end(clock, manager)


async def test_before_save_that_assigns_is_not_called_for_ever(clock, store, encode):
    seen = []

    def copy(session: Any) -> None:
        seen.append(session)
        session.user_data = dict(session.user_data)

    manager = SessionManager(store=store, clock=clock, tracking="marked", before_save=copy)
    session = await opened(clock, store, manager)
    session.mark_changed()
    await clock.advance("10m")
    assert seen == [session]
    await end(clock, manager)


async def test_everybody_is_passed_over_at_their_own_time(clock, store, manager, encode):
    for user_id in range(50):
        store.put(user_id, b"{}")
        await manager.open(user_id)
    encode.count = 0
    await clock.advance("30s")
    assert manager.statistics().unchanged == 50
    (chosen,) = [session for session in manager.sessions() if session.user_id == 25]
    chosen.user_data["x"] = 1
    chosen.mark_changed()
    await clock.advance("30s")
    assert encode.count == 1
    assert [record.user_id for batch in store.batches for record in batch.records] == [25]
    await end(clock, manager)


async def test_a_store_that_is_down_is_no_business_of_the_unmarked(clock, store, manager):
    session = await opened(clock, store, manager)
    await opened(clock, store, manager, "bob")
    store.down = True
    session.user_data["gold"] = 2
    session.mark_changed()
    await clock.advance("3m")
    assert manager.statistics().pending + manager.statistics().in_flight <= 1
    store.down = False
    await clock.advance("1m")
    assert store.stored("ann") == {"gold": 2}
    assert {record.user_id for batch in store.batches for record in batch.records} == {"ann"}
    await end(clock, manager)


# Marks and saves


async def test_a_mark_set_while_a_save_is_under_way_stays(clock, store, manager):
    session = await opened(clock, store, manager)
    store.delay = "50ms"
    session.user_data["gold"] = 2
    session.mark_changed()
    while not store.batches:
        await clock.advance("10ms")
    assert manager.statistics().in_flight == 1
    session.user_data["gold"] = 3
    session.mark_changed()
    await clock.advance("100ms")
    assert store.stored("ann") == {"gold": 2}
    await clock.advance("30s")
    assert store.stored("ann") == {"gold": 3}
    await clock.advance("5m")
    assert len(store.batches) == 2
    await end(clock, manager)


async def test_an_assignment_while_a_save_is_under_way_stays(clock, store, manager):
    session = await opened(clock, store, manager)
    store.delay = "50ms"
    saving = asyncio.ensure_future(session.persist_now())
    session.user_data["gold"] = 2
    while not store.batches:
        await clock.advance("10ms")
    session.user_data = {"gold": 3}
    await clock.advance("100ms")
    assert (await saving).changed
    await clock.advance("30s")
    assert store.stored("ann") == {"gold": 3}
    await end(clock, manager)


@pytest.mark.parametrize("step", [StoreUnavailableError("no"), ValueError("no"), "lose"])
async def test_a_save_that_failed_or_is_unknown_leaves_the_mark(clock, store, manager, step):
    session = await opened(clock, store, manager)
    store.script = [step]
    session.user_data["gold"] = 2
    session.mark_changed()
    await clock.advance("2m")
    assert len(store.batches) == 2
    assert store.stored("ann") == {"gold": 2}
    assert store.versions("ann") == [2, 2]
    await clock.advance("5m")
    assert len(store.batches) == 2, "the second has taken the mark"
    await end(clock, manager)


async def test_a_save_that_hangs_leaves_the_mark(clock, store, manager):
    session = await opened(clock, store, manager)
    store.check = False
    store.script = ["hang"]
    session.user_data["gold"] = 2
    session.mark_changed()
    await clock.advance("50s")
    store.release_all.set()
    await clock.advance("2m")
    assert store.stored("ann") == {"gold": 2}
    await end(clock, manager)


async def test_a_refused_save_leaves_the_mark(clock, store, manager, encode):
    session = await opened(clock, store, manager)
    store.verdict_of["ann"] = Verdict(Outcome.INVALID, "too silly")
    session.user_data["gold"] = 2
    session.mark_changed()
    await clock.advance("1m")
    assert manager.statistics().unsavable == 1
    encode.count = 0
    await clock.advance("2m")
    assert encode.count >= 3, "looked at once an interval"
    del store.verdict_of["ann"]
    session.user_data["gold"] = 3  # mended, and not marked
    await clock.advance("1m")
    assert store.stored("ann") == {"gold": 3}
    assert manager.statistics().unsavable == 0
    await end(clock, manager)


async def test_data_that_cannot_be_encoded_leaves_the_mark(clock, store, manager):
    session = await opened(clock, store, manager)
    session.user_data["gold"] = {1}
    session.mark_changed()
    await clock.advance("2m")
    assert manager.statistics().unsavable == 1
    session.user_data["gold"] = 3
    await clock.advance("1m")
    assert store.stored("ann") == {"gold": 3}
    await end(clock, manager)


async def test_a_failed_save_of_an_unmarked_user_marks(clock, store, manager):
    """It was asked for, and the data may be other than what is stored."""
    session = await opened(clock, store, manager)
    session.user_data["gold"] = 2
    store.down = True
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.persist_now())
    store.down = False
    await clock.advance("1m")
    assert store.stored("ann") == {"gold": 2}
    await end(clock, manager)


# What always compares


async def test_persist_now_compares_and_takes_the_mark(clock, store, manager, encode):
    session = await opened(clock, store, manager)
    session.user_data["gold"] = 2
    assert (await session.persist_now()).changed
    session.user_data["gold"] = 3
    session.mark_changed()
    assert (await session.persist_now()).changed
    assert not (await session.persist_now()).changed
    encode.count = 0
    await clock.advance("5m")
    assert encode.count == 0
    await end(clock, manager)


async def test_the_end_of_a_session_compares(clock, store, manager):
    session = await opened(clock, store, manager)
    session.user_data["gold"] = 2
    await session.destroy()
    assert store.stored("ann") == {"gold": 2}
    await end(clock, manager)


async def test_the_end_of_the_manager_compares_and_tries_again(clock, store, manager):
    session = await opened(clock, store, manager)
    session.user_data["gold"] = 2
    store.script = [StoreUnavailableError("no"), "lose"]
    await end(clock, manager)
    assert store.stored("ann") == {"gold": 2}


async def test_persist_all_compares(clock, store, manager):
    sessions = [await opened(clock, store, manager, user_id) for user_id in range(5)]
    for session in sessions:
        session.user_data["gold"] = 2
    await manager.persist_all_user_data()
    assert [store.stored(user_id)["gold"] for user_id in range(5)] == [2] * 5
    await end(clock, manager)


async def test_persist_all_covers_users_who_fall_due_meanwhile(clock, store, encode):
    """A user passed over is not to count as saved by a call that promises to look at everybody."""
    manager = SessionManager(store=store, clock=clock, tracking="marked", interval="1s")
    sessions = [await opened(clock, store, manager, user_id) for user_id in range(1500)]
    for session in sessions:
        session.user_data["gold"] = 2
    store.delay = "700ms"
    await let_time_pass(clock, manager.persist_all_user_data())
    assert {store.stored(user_id)["gold"] for user_id in range(1500)} == {2}
    store.delay = 0
    await end(clock, manager)


async def test_edit_marks_what_it_leaves_behind(clock, store, manager):
    session = await opened(clock, store, manager)
    with pytest.raises(ZeroDivisionError):
        async with manager.edit("ann") as data:
            data["gold"] = 2
            raise ZeroDivisionError
    await clock.advance("30s")
    assert store.stored("ann") == {"gold": 2}
    async with manager.edit("ann") as data:
        data["gold"] = 3
    assert store.stored("ann") == {"gold": 3}
    async with manager.edit("bob", default={"gold": 0}) as data:
        data["gold"] = 4
    assert store.stored("bob") == {"gold": 4}
    with pytest.raises(SessionEndedError):
        async with manager.edit("ann") as data:
            await session.destroy()
    await end(clock, manager)


async def test_edit_marks_what_is_changed_after_a_save_within_the_block(clock, store, manager):
    await opened(clock, store, manager)
    with pytest.raises(ZeroDivisionError):
        async with manager.edit("ann") as data:
            await clock.advance("30s")  # the mark of the beginning goes with this save
            data["gold"] = 2
            raise ZeroDivisionError
    await clock.advance("30s")
    assert store.stored("ann") == {"gold": 2}
    await end(clock, manager)


async def test_edit_marks_what_is_changed_in_a_long_block(clock, store, manager):
    await opened(clock, store, manager)
    async with manager.edit("ann") as data:
        data["gold"] = 2
        await clock.advance("30s")
        assert store.stored("ann") == {"gold": 2}
    await end(clock, manager)


# When it can be called


@pytest.mark.parametrize("tracking", ["marked", "content"])
async def test_before_and_after_the_user(clock, store, tracking):
    manager = SessionManager(store=store, clock=clock, tracking=tracking)
    session = await manager.create()
    with pytest.raises(NotIdentifiedError):
        session.mark_changed()
    await session.login("ann", default={"gold": 0})
    session.mark_changed()
    late: list[Any] = []

    @session.on("destroy")
    def mark_too_late() -> None:
        with pytest.raises(SessionEndedError, match="its last save is done"):
            session.mark_changed()
        late.append(1)

    @session.on("before_destroy")
    def mark_in_time() -> None:
        session.user_data["gold"] = 9
        session.mark_changed()

    await session.destroy()
    assert late == [1]
    assert store.stored("ann") == {"gold": 9}
    with pytest.raises(SessionEndedError):
        session.mark_changed()
    anonymous = await manager.create()
    await anonymous.destroy()
    with pytest.raises(SessionEndedError):
        anonymous.mark_changed()
    await end(clock, manager)


async def test_under_content_a_mark_changes_nothing(clock, store, encode):
    manager = SessionManager(store=store, clock=clock, encode=encode)
    session = await opened(clock, store, manager)
    session.mark_changed()
    session.user_data["gold"] = 2
    await clock.advance("30s")
    assert store.stored("ann") == {"gold": 2}
    session.user_data["gold"] = 3
    await clock.advance("30s")
    assert store.stored("ann") == {"gold": 3}
    await end(clock, manager)


async def test_without_a_store_a_mark_changes_nothing(clock, db, make_manager):
    manager = make_manager()
    session = await manager.create()
    await session.set_user("ann", {"gold": 1})
    session.mark_changed()
    await clock.advance("1m")
    assert len(db.log) >= 2, "a listener is asked once an interval"
    await manager.destroy(True)


async def test_the_last_save_may_change_the_data(clock, store, manager):
    session = await opened(clock, store, manager)
    store.delay = "50ms"
    ending = asyncio.ensure_future(session.destroy())
    await turns()
    session.user_data["gold"] = 7
    session.mark_changed()
    await let_time_pass(clock, ending)
    assert store.stored("ann") == {"gold": 7}
    await end(clock, manager)
