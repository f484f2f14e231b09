"""An engine that comes back with less than it had acknowledged: a failover to a replica that lagged, a crash without a
journal, a backup that was restored. What is in memory is newer, and is written again.
"""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest

from cagey_sessions import EndReason, SessionManager
from support import ManualClock, ScriptedStore, end, turns


class Engine(ScriptedStore):
    """A store whose engine can be thrown back to how it was at a mark."""

    incarnation = "1"

    @property
    def writes(self) -> int:
        return sum(len(batch.records) for batch in self.batches)

    def mark(self) -> Any:
        return copy.deepcopy(self.backing)

    def throw_back(self, mark: Any, *, is_noticed: bool = True) -> None:
        self.backing.rows.clear()
        self.backing.rows.update(copy.deepcopy(mark.rows))
        if is_noticed:
            self.incarnation += "+"


@pytest.fixture
def store(clock: ManualClock) -> Engine:
    return Engine(clock)


async def opened(manager: Any, *users: int) -> list[Any]:
    sessions = [await manager.open(user, default={"n": 0}) for user in users]
    for session in sessions:
        await session.persist_now()
    return sessions


async def save(session: Any, n: int) -> None:
    session.user_data["n"] = n
    await session.persist_now()


async def returned(manager: Any, store: Engine) -> tuple[Any, Any]:
    """Somebody who was here before and has changed since, and how the engine was in between."""
    (first,) = await opened(manager, 1)
    await first.destroy()
    mark = store.mark()
    (session,) = await opened(manager, 1)
    await save(session, 5)
    return session, mark


@pytest.mark.parametrize("options", [{}, {"tracking": "marked"}, {"before_save": id}], ids=str)
async def test_after_a_restart_everybody_is_written_again_within_an_interval(clock, store, options):
    manager = SessionManager(store=store, clock=clock, **options)
    sessions = await opened(manager, *range(1, 9))
    mark = store.mark()
    for session in sessions:
        session.user_data["n"] = 7
        session.mark_changed()
        await session.persist_now()
    store.throw_back(mark)
    await opened(manager, 99)  # any call shows who answers now
    assert store.stored(1) == {"n": 0}
    await clock.advance("31s")
    assert [store.stored(user) for user in range(1, 9)] == [{"n": 7}] * 8
    writes = store.writes
    await clock.advance("5m")
    assert store.writes == writes, "once is enough"
    await end(clock, manager)


async def test_a_claim_that_was_lost_is_made_again_and_what_is_in_memory_wins(clock, store, manager):
    session, mark = await returned(manager, store)
    store.throw_back(mark)
    await opened(manager, 2)
    await clock.advance("31s")
    assert session.end_reason is None
    assert store.stored(1) == {"n": 5}
    await save(session, 6)
    assert store.stored(1) == {"n": 6}
    await end(clock, manager)


async def test_a_user_whose_row_is_from_before_the_first_save_is_written_again(clock, store, manager):
    first = await manager.open(1, default={"n": 0})
    mark = store.mark()
    await first.destroy()
    (session,) = await opened(manager, 1)
    await save(session, 5)
    store.throw_back(mark)
    await opened(manager, 2)
    await clock.advance("31s")
    assert store.stored(1) == {"n": 5}
    await end(clock, manager)


async def test_an_unnoticed_rollback_is_healed_by_the_next_change(clock, store, manager):
    session, mark = await returned(manager, store)
    store.throw_back(mark, is_noticed=False)
    await save(session, 6)
    assert store.stored(1) == {"n": 6}
    await end(clock, manager)


async def test_a_user_taken_over_after_the_rollback_is_fenced(clock, store, manager):
    """Two histories follow the same point by then, and both were acknowledged; ours is the one that ends."""
    session, mark = await returned(manager, store)
    store.throw_back(mark)
    other_store = Engine(clock, backing=store.backing)
    other = SessionManager(store=other_store, clock=clock)
    theirs = await other.open(1)
    await save(theirs, 100)
    await opened(manager, 2)
    await clock.advance("31s")
    assert session.end_reason == EndReason.FENCED
    assert store.stored(1) == {"n": 100}
    await theirs.destroy()
    assert store.stored(1) == {"n": 100}
    await end(clock, manager, other)


async def test_an_engine_that_only_says_who_it_is_later_is_no_new_one(clock, store):
    store.incarnation = ""
    manager = SessionManager(store=store, clock=clock)
    await opened(manager, 1)
    store.incarnation = "1"
    writes = store.writes
    await opened(manager, 2)
    await clock.advance("61s")
    assert store.writes == writes + 1
    await end(clock, manager)


async def test_a_user_whose_release_was_lost_is_not_kept_from_others(clock, store, manager):
    """The engine has them as owned by a server that has let go of them, and lives."""
    (session,) = await opened(manager, 1)
    mark = store.mark()
    await session.destroy()
    store.throw_back(mark)
    await opened(manager, 2)
    await clock.advance("31s")
    other = SessionManager(store=Engine(clock, backing=store.backing), clock=clock)
    (theirs,) = await opened(other, 1)
    assert theirs.user_data == {"n": 0}
    await end(clock, manager, other)


async def test_a_user_who_moved_just_before_the_loss_stays_where_they_are(clock, store, manager):
    there = Engine(clock, backing=store.backing)
    other = SessionManager(store=there, clock=clock)
    (session,) = await opened(manager, 1)
    mark = store.mark()
    await session.destroy()
    (theirs,) = await opened(other, 1)
    await save(theirs, 5)
    store.throw_back(mark)
    there.incarnation += "+"
    theirs.user_data["n"] = 6
    await opened(other, 3)
    await clock.advance("31s")  # the other one has found out first
    await opened(manager, 2)
    await clock.advance("61s")
    assert theirs.end_reason is None
    assert store.stored(1) == {"n": 6}
    await end(clock, manager, other)


async def test_a_release_that_fails_after_the_loss_is_given_up_in_the_end(clock, store, manager):
    there = Engine(clock, backing=store.backing)
    other = SessionManager(store=there, clock=clock)
    (session,) = await opened(manager, 1)
    mark = store.mark()
    await session.destroy()
    (theirs,) = await opened(other, 1)
    store.throw_back(mark)  # and the first one never hears of it
    await opened(other, 3)
    theirs.user_data["n"] = 6
    await clock.advance("10m")
    assert theirs.end_reason == EndReason.FENCED
    await end(clock, manager, other)


async def test_no_timer_is_left_of_a_walk_that_the_end_of_the_manager_has_cut_short(clock, store, manager):
    for _ in range(5000):
        await manager.create()
    (session,) = await opened(manager, 1)
    store.incarnation += "+"
    await save(session, 1)
    await end(clock, manager)


@pytest.mark.parametrize("tracking", ["compared", "marked"])
async def test_a_user_being_loaded_at_the_loss_is_written_again_too(clock, store, tracking):
    options = {"tracking": "marked"} if tracking == "marked" else {}
    manager = SessionManager(store=store, clock=clock, **options)
    (session,) = await opened(manager, 1)
    mark = store.mark()
    session.user_data["n"] = 5
    session.mark_changed()
    await session.persist_now()
    await session.destroy()
    waiting = [asyncio.Event()]

    @manager.on("created")
    async def created(session):
        if waiting:
            await waiting.pop().wait()

    gate = waiting[0]
    opening = asyncio.ensure_future(manager.open(1))
    await turns()
    assert not waiting and not opening.done(), "it is claimed, and no session has it"
    store.throw_back(mark)
    await opened(manager, 2)
    gate.set()
    session = await opening
    await clock.advance("31s")
    assert store.stored(1) == session.user_data == {"n": 5}
    await end(clock, manager)
