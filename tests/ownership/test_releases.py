"""The queue of users who are let go of: when it gives up on one of them, and that it ends with the manager."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from cagey_sessions import EndReason, FencedError, SessionManager, StoreUnavailableError, UserNotFoundError
from cagey_sessions.ownership.releases import MOST_ATTEMPTS, RELEASE_CALLS, RELEASES_IN_A_CALL
from cagey_sessions.stores import Claim
from support import ScriptedStore, changed, end, inside, let_time_pass, turns


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

    async def release_many(self, claims: Any, owner: str) -> list[bool]:
        await self._pass()
        if self.failing & {user_id for user_id, _ in claims}:
            self.release_calls.append(list(claims))
            raise self.error
        return await super().release_many(claims, owner)

    def attempts(self, user_id: int | str) -> int:
        """How often it was tried to let go of a user alone."""
        return sum([each for each, _ in claims] == [user_id] for claims in self.release_calls)

    async def holder(self, user_id: int | str) -> tuple[str, int]:
        self.calls += 1
        return await super().holder(user_id)

    def _require_open(self) -> None:
        """It answers to whoever asks, even when it is closed."""


class Gates:
    """Has claims and releases of a store take 10 ms each: half of that on the way there, and half on the way back."""

    def __init__(self, clock: Any, store: Watched) -> None:
        self.claims = 0

        def slowly(method: Any) -> Any:
            async def call(what: Any, owner: str) -> Any:
                await clock.sleep("5ms")
                answers = await method(what, owner)
                self.claims += len(answers) if method.__name__ == "claim_many" else 0
                await clock.sleep("5ms")
                return answers

            return call

        store.claim_many, store.release_many = slowly(store.claim_many), slowly(store.release_many)


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


async def test_a_release_that_goes_on_failing_is_given_up_and_said(clock, store, manager, caplog):
    """Not at once, and not for ever; whoever else is in the queue is let go of."""
    store.failing = frozenset({"ann"})
    await leave(clock, manager, "ann", "bob", "cid")
    assert store.owner_of("bob") == store.owner_of("cid") == ""
    await clock.advance("1m")
    assert store.attempts("ann") == MOST_ATTEMPTS
    (said,) = [record for record in caplog.records if "stays with this process until it ends" in record.message]
    assert said.levelname == "ERROR" and "'ann'" in said.message and "ValueError, raised in" in said.message
    assert "a trigger of the table" not in said.message, "nobody knows what else the text of another's error quotes"
    assert store.owner_of("ann") == inside(manager).owner
    await leave(clock, manager, "dan")
    await clock.advance("1m")
    assert store.owner_of("dan") == ""
    assert store.attempts("ann") == MOST_ATTEMPTS
    await let_time_pass(clock, manager.destroy())
    await assert_all_is_quiet(clock, store)


async def test_a_queue_full_of_failing_releases_delays_no_other(clock, store, manager):
    """More of them than calls at a time, and the others behind them."""
    sessions = [await manager.open(number, default={}) for number in range(20)]
    store.failing = frozenset(range(1, 20, 2))
    store.down = True
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, manager.open("ann", default={}))
    for session in sessions:
        await let_time_pass(clock, session.destroy(persist=False))
    assert store.release_calls == [], "they wait for the store"
    store.down = False
    await clock.advance("2s")
    assert not any(store.owner_of(number) for number in range(0, 20, 2))
    await clock.advance("1m")
    assert all(store.attempts(number) == MOST_ATTEMPTS for number in store.failing)
    await let_time_pass(clock, manager.destroy())
    await assert_all_is_quiet(clock, store)


async def test_an_outage_is_no_reason_to_give_up(clock, store, manager, caplog):
    store.failing, store.error = frozenset({"ann"}), StoreUnavailableError("down")
    await leave(clock, manager, "ann")
    await clock.advance("2m")
    assert store.attempts("ann") > MOST_ATTEMPTS
    store.failing = frozenset()
    await clock.advance("2s")
    assert store.owner_of("ann") == ""
    assert not [record for record in caplog.records if "stays with this process" in record.message]
    await let_time_pass(clock, manager.destroy())


async def test_one_row_that_cannot_be_released_does_not_hold_up_its_batch(clock, store, manager):
    sessions = [await manager.open(number, default={}) for number in range(300)]
    store.failing = frozenset({77})
    ends = asyncio.gather(*(session.destroy(persist=False) for session in sessions))
    await turns(100)
    assert ends.done()
    assert [number for number in range(300) if store.owner_of(number)] == [77]
    assert len(store.release_calls) < 30, "it is looked for in halves"
    store.failing = frozenset()
    await clock.advance("2s")
    assert not store.owner_of(77)
    await let_time_pass(clock, manager.destroy())


@pytest.mark.parametrize("answer", [None, [True]])
async def test_a_store_that_does_not_answer_for_each_user_is_said(clock, store, manager, caplog, answer):
    async def answer_wrongly(claims: Any, owner: str) -> Any:
        return answer

    await manager.open("ann", default={})
    await manager.open("bob", default={})
    store.release_many = answer_wrongly
    for user_id in ("ann", "bob"):
        inside(manager).claims.release_later(user_id, 99)  # later than their sessions know
    await clock.advance("1m")
    said = [record.message for record in caplog.records if "did not answer for each user" in record.message]
    assert len(said) == (2 if answer is None else 0), "alone each of them has an answer"
    del store.release_many
    await let_time_pass(clock, manager.destroy())


async def test_users_who_leave_together_are_released_in_batches(clock, store, manager):
    users = 5 * RELEASES_IN_A_CALL
    sessions = await asyncio.gather(*(manager.open(number, default={}) for number in range(users)))
    store.gate = asyncio.Event()
    ends = asyncio.gather(*(session.destroy(persist=False) for session in sessions))
    await turns()
    assert len(store.releases) == 0 and all(session.alive for session in sessions)
    store.gate.set()
    await turns(100)
    assert ends.done()
    assert not any(store.owner_of(number) for number in range(users))
    assert sorted(store.releases) == list(range(users)), "each once"
    assert len(store.release_calls) <= 5 + RELEASE_CALLS
    assert max(map(len, store.release_calls)) == RELEASES_IN_A_CALL
    await let_time_pass(clock, manager.destroy())


async def test_only_the_newest_claim_of_a_user_is_released(clock, store, manager):
    await manager.__aenter__()
    owner = inside(manager).owner
    epochs = [(await store.claim_many(["ann"], owner))[0].epoch for _ in range(5)]
    for epoch in (epochs[1], epochs[4], epochs[0], epochs[3]):
        inside(manager).claims.release_later("ann", epoch)
    await turns()
    assert store.release_calls == [[("ann", epochs[4])]]
    assert store.owner_of("ann") == ""
    await let_time_pass(clock, manager.destroy())


async def test_a_user_with_a_session_by_a_later_claim_is_not_released_and_the_store_is_not_asked(clock, store, manager):
    session = await manager.open("ann", default={})
    calls = store.calls
    for epoch in range(inside(manager).table.epoch(session) + 1):
        inside(manager).claims.release_later("ann", epoch)
        await turns()
    assert store.calls == calls
    assert (await session.persist_now()).changed
    await let_time_pass(clock, manager.destroy())


async def test_after_a_storm_of_cancelled_logins_everybody_is_free_within_seconds(clock, store, manager):
    """4,400 of 400 users in a second, on a store whose answers take a while; some users are claimed a dozen times."""
    chance = random.Random(23)
    users = 400
    gates = Gates(clock, store)
    opening: list[asyncio.Task[Any]] = []
    for step in range(1000):
        wanted = [chance.randrange(users) for _ in range(4 + (step % 5 < 2))]
        opening += [asyncio.ensure_future(manager.open(user, default={})) for user in wanted]
        for task in chance.sample(opening, len(opening) // 3):
            task.cancel()
        opening = [task for task in opening if not task.done()]
        await clock.advance("1ms")
    for task in opening:
        task.cancel()
    await asyncio.gather(*opening, return_exceptions=True)
    await clock.advance("3s")
    assert gates.claims > 3 * users
    assert [user for user in range(users) if store.owner_of(user) and manager.find_by_user(user) is None] == []
    assert all(session.alive for session in map(manager.find_by_user, range(users)) if session is not None)
    await let_time_pass(clock, manager.destroy())


@pytest.mark.parametrize("turn", range(12))
async def test_a_user_queued_as_the_queue_runs_empty_is_released(clock, store, manager, turn):
    """At any turn of the loop: those at work may all be about to end."""
    await manager.__aenter__()
    owner = inside(manager).owner
    users = range(RELEASE_CALLS + 1)
    epochs = {claim.user_id: claim.epoch for claim in await store.claim_many(users, owner)}
    store.gate = asyncio.Event()
    for user in users[1:]:
        inside(manager).claims.release_later(user, epochs[user])
    await turns()

    async def come_later() -> None:
        await turns(turn)
        inside(manager).claims.release_later(0, epochs[0])

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


async def test_no_release_is_begun_after_the_manager_has_ended(clock, store, manager):
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


async def test_a_claim_that_no_session_holds_is_released_when_the_store_is_back(clock, store, manager):
    """Else no other node gets that user for as long as this one lives."""
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    session = await changed(manager)
    await session.persist_now()
    original = store.release_many

    async def release(*_: Any) -> list[bool]:
        raise StoreUnavailableError("a blip")

    store.release_many = release
    await let_time_pass(clock, session.destroy(persist=False))
    store.release_many = original
    await clock.advance("60s")
    assert store.owner_of(1) == ""
    await end(clock, manager, other)


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


@pytest.mark.parametrize("when", ["before its first step", "while it waits for the store"])
async def test_a_release_whose_task_is_cancelled_by_somebody_is_made_all_the_same(clock, store, manager, when):
    """Else the other servers would wait for this user until this process is dead."""
    gate = asyncio.Event()
    release = store.release_many

    async def hang(*args: Any) -> list[bool]:
        await gate.wait()
        raise StoreUnavailableError("the connection is closed")

    store.release_many = hang
    opening = asyncio.ensure_future(manager.open(1))
    tasks: list[asyncio.Task[Any]] = []
    for _ in range(1000):
        tasks = [task for task in asyncio.all_tasks() if task.get_name() == "cagey-sessions release"]
        if tasks:
            break
        await asyncio.sleep(0)
    if when == "while it waits for the store":
        await turns()
    tasks[0].cancel()
    with pytest.raises(UserNotFoundError):
        await opening
    await turns()
    gate.set()
    store.release_many = release
    await let_time_pass(clock, clock.sleep("3s"))
    assert 1 in store.backing.rows and store.owner_of(1) == ""
    await end(clock, manager)


async def test_a_user_claimed_again_for_a_last_save_is_released_without_that_save(clock, store, manager):
    """Released with the last save, claimed again for a change, not saved: `destroy(persist=False)` releases again."""
    session = await changed(manager)
    store.script = ["50ms"]
    task = asyncio.ensure_future(session.destroy())
    await clock.advance("10ms")
    session.user_data["n"] = 2
    original = store.claim_many

    async def claim_and_fall(user_ids: Any, owner: str) -> Any:
        claims = await original(user_ids, owner)
        store.down = True
        return claims

    store.claim_many = claim_and_fall
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, task)
    store.claim_many = original
    store.down = False
    assert store.owner_of(1) == inside(manager).owner
    await let_time_pass(clock, session.destroy(persist=False))
    await clock.advance("1s")
    assert store.owner_of(1) == ""
    await end(clock, manager)


async def test_a_release_that_fails_is_repeated(clock, store, manager):
    """A moment's outage at the end of a session does not lock a user out of all other nodes for good."""
    session = await changed(manager)

    async def fail(*_: Any) -> list[bool]:
        raise StoreUnavailableError("down")

    store.release_many = fail
    await let_time_pass(clock, session.destroy(persist=False))
    del store.release_many
    await clock.advance("60s")
    assert store.owner_of(1) == ""
    await end(clock, manager)
