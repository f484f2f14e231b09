"""The queue of users who are let go of: when it gives up on one of them, and that it ends with the manager."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cagey_sessions import SessionManager, StoreUnavailableError
from cagey_sessions.claims import MOST_ATTEMPTS, RELEASE_CALLS
from cagey_sessions.stores import Claim
from support import ScriptedStore, let_time_pass, turns


class Watched(ScriptedStore):
    """A store that counts its calls, holds releases and claims back at gates, and fails the releases of some users."""

    calls = 0
    gate: asyncio.Event | None = None
    failing: frozenset[int | str] = frozenset()
    error: Exception = ValueError("a trigger of the table")

    async def _pass(self) -> None:
        self.calls += 1
        if self.gate is not None:
            await self.gate.wait()

    async def claim_many(self, user_ids: Any, owner: str) -> list[Claim]:
        await self._pass()
        return await super().claim_many(user_ids, owner)

    async def save_many(self, records: Any) -> Any:
        self.calls += 1
        return await super().save_many(records)

    async def release(self, user_id: int | str, epoch: int, owner: str) -> bool:
        await self._pass()
        if user_id in self.failing:
            self.releases.append(user_id)
            raise self.error
        return await super().release(user_id, epoch, owner)

    async def holder(self, user_id: int | str) -> tuple[str, int]:
        self.calls += 1
        return await super().holder(user_id)

    def _require_open(self) -> None:
        """It answers to whoever asks, even when it is closed."""


@pytest.fixture
def store(clock):
    return Watched(clock)


async def assert_all_is_quiet(clock: Any, store: Watched) -> None:
    """The manager has been destroyed: whatever comes late, no call is made any more, and nobody waits to make one."""
    calls = store.calls
    await turns()
    left = {task.get_name() for task in asyncio.all_tasks()} & {
        "cagey-sessions release",
        "cagey-sessions doubtful claims",
    }
    assert not left
    if store.gate is not None:
        store.gate.set()
    await clock.advance("2m")
    assert store.calls == calls
    assert clock.pending == 0


async def leave(clock: Any, manager: SessionManager[Any], *user_ids: int | str) -> None:
    """Users come and go, and nothing of them is saved."""
    for user_id in user_ids:
        session = await manager.open(user_id, default={})
        await let_time_pass(clock, session.destroy(persist=False))


# Giving up


async def test_a_release_that_goes_on_failing_is_given_up_and_said(clock, store, manager, caplog):
    """Not at once, and not for ever; whoever else is in the queue is let go of."""
    store.failing = frozenset({"ann"})
    await leave(clock, manager, "ann", "bob", "cid")
    assert store.owner_of("bob") == store.owner_of("cid") == ""
    await clock.advance("1m")
    assert store.releases.count("ann") == 1 + MOST_ATTEMPTS, "one by the session itself, and those of the queue"
    (said,) = [record for record in caplog.records if "stays with this process until it ends" in record.message]
    assert said.levelname == "ERROR" and "'ann'" in said.message and "ValueError, raised in" in said.message
    assert "a trigger of the table" not in said.message, "nobody knows what else the text of another's error quotes"
    assert store.owner_of("ann") == manager._life.owner
    await leave(clock, manager, "dan")
    await clock.advance("1m")
    assert store.owner_of("dan") == ""
    assert store.releases.count("ann") == 1 + MOST_ATTEMPTS
    await let_time_pass(clock, manager.destroy())
    await assert_all_is_quiet(clock, store)


async def test_a_queue_full_of_those_who_fail_keeps_nobody_else_back(clock, store, manager):
    """More of them than calls at a time, and the others behind them."""
    sessions = [await manager.open(number, default={}) for number in range(20)]
    store.failing = frozenset(range(1, 20, 2))
    store.down = True
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, manager.open("ann", default={}))
    for session in sessions:
        await let_time_pass(clock, session.destroy(persist=False))
    assert store.releases == [], "they wait for the store"
    store.down = False
    await clock.advance("2s")
    assert not any(store.owner_of(number) for number in range(0, 20, 2))
    await clock.advance("1m")
    assert all(store.releases.count(number) == MOST_ATTEMPTS for number in store.failing)
    await let_time_pass(clock, manager.destroy())
    await assert_all_is_quiet(clock, store)


async def test_an_outage_is_no_reason_to_give_up(clock, store, manager, caplog):
    store.failing, store.error = frozenset({"ann"}), StoreUnavailableError("down")
    await leave(clock, manager, "ann")
    await clock.advance("2m")
    assert store.releases.count("ann") > MOST_ATTEMPTS
    store.failing = frozenset()
    await clock.advance("2s")
    assert store.owner_of("ann") == ""
    assert not [record for record in caplog.records if "stays with this process" in record.message]
    await let_time_pass(clock, manager.destroy())


# The end


@pytest.mark.parametrize("turn", range(12))
async def test_who_comes_into_the_queue_as_it_runs_empty_is_let_go_of(clock, store, manager, turn):
    """At any turn of the loop: those at work may all be about to end."""
    await manager.__aenter__()
    owner = manager._life.owner
    users = range(RELEASE_CALLS + 1)
    epochs = {claim.user_id: claim.epoch for claim in await store.claim_many(users, owner)}
    store.gate = asyncio.Event()
    for user in users[1:]:
        manager._life.claims.let_go(user, epochs[user])
    await turns()

    async def come_later() -> None:
        await turns(turn)
        manager._life.claims.let_go(0, epochs[0])

    late = asyncio.ensure_future(come_later())
    store.gate.set()
    await turns()
    await late
    await clock.advance("2s")
    assert [store.owner_of(user) for user in users] == [""] * len(users)
    await let_time_pass(clock, manager.destroy())


async def test_the_queue_ends_with_the_manager(clock, store, manager):
    """Releases that fail are repeated until then, and not once more."""
    store.failing = frozenset(range(9))
    await leave(clock, manager, *range(9))
    await let_time_pass(clock, manager.destroy())
    await assert_all_is_quiet(clock, store)


async def test_a_release_that_is_answered_after_the_end_makes_no_call(clock, store, manager):
    """The row has another epoch by then, and whose it is would be the next question."""
    session = await manager.open("ann", default={})
    await store.claim_many(["ann"], store.owner_of("ann"))  # a claim of ours that came late
    store.gate = asyncio.Event()
    ending = asyncio.create_task(session.destroy(persist=False))
    await turns()
    await let_time_pass(clock, manager.destroy(deadline="1s"))
    await assert_all_is_quiet(clock, store)
    await asyncio.gather(ending, return_exceptions=True)


async def test_a_release_that_is_answered_while_the_store_closes_makes_no_call(clock, store, manager):
    await leave(clock, manager, "bob")
    session = await manager.open("ann", default={})
    await store.claim_many(["ann"], store.owner_of("ann"))
    store.down = True
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, manager.open("bob", default={}))
    await let_time_pass(clock, session.destroy(persist=False))
    store.down, store.gate = False, asyncio.Event()
    await clock.advance("1s")
    calls = store.calls
    assert store.open_calls == 0 and store.releases == ["bob"], "the one of ann is held back"

    async def close() -> None:
        store.gate.set()
        await clock.sleep("100ms")

    store.close = close
    await let_time_pass(clock, manager.destroy())
    assert store.releases == ["bob", "ann"]
    assert store.calls == calls
    await assert_all_is_quiet(clock, store)


async def test_nobody_is_looked_after_when_the_manager_has_ended(clock, store, manager):
    """Claims had no answer; one of them comes after the end."""
    store.gate = asyncio.Event()
    opening = [asyncio.create_task(manager.open(each, default={})) for each in ("ann", "bob")]
    await clock.advance("11s")
    answers = await asyncio.gather(*opening, return_exceptions=True)
    assert all(isinstance(answer, StoreUnavailableError) for answer in answers)
    await let_time_pass(clock, manager.destroy())
    await assert_all_is_quiet(clock, store)


async def test_a_claim_that_fails_after_the_end_is_not_repeated_for_each_user(clock, store, manager):
    async def fail(user_ids: Any, owner: str) -> list[Claim]:
        store.calls += 1
        await gate.wait()
        raise ValueError("one of them is the cause")

    gate = asyncio.Event()
    store.claim_many = fail
    opening = [asyncio.create_task(manager.open(each, default={})) for each in ("ann", "bob")]
    await turns()
    await let_time_pass(clock, manager.destroy(deadline="1s"))
    calls = store.calls
    gate.set()
    await clock.advance("20s")
    assert store.calls == calls
    answers = await asyncio.gather(*opening, return_exceptions=True)
    assert all(isinstance(answer, Exception) for answer in answers)
