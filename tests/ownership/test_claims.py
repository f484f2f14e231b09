"""Claims: a claim that was cancelled, given up or granted late leaves no user owned by a process without a session."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

import pytest

from cagey_sessions import EndReason, StoreError, StoreUnavailableError
from cagey_sessions.ownership.claims import CLAIM_CALLS
from cagey_sessions.stores import Outcome, Verdict
from support import ScriptedStore, changed, edit, end, inside, let_time_pass, turns


@pytest.mark.parametrize("epoch", [-1, "1", None])
async def test_a_claim_with_a_wrong_epoch_is_refused(clock, store, manager, epoch):
    session = await manager.create()
    original = store.claim_many

    async def claim_many(user_ids: Any, owner: str) -> Any:
        return [claim._replace(epoch=epoch) for claim in await original(user_ids, owner)]

    store.claim_many = claim_many
    with pytest.raises(Exception):  # noqa: B017
        await let_time_pass(clock, session.login(1, default={"n": 0}))
    assert session.user_id is None, "identified, though the login has failed"
    store.claim_many = original
    await end(clock, manager)


async def test_a_claim_that_is_granted_too_late_is_released(clock, store, manager):
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


async def test_a_login_cancelled_at_any_turn_lets_go_of_its_claim(clock, store, manager):
    """Cancelled logins identify nobody, and leave no claim behind."""
    for count in range(30):
        session = await manager.create()
        task = asyncio.ensure_future(session.login(count, default={"n": 0}))
        await turns(count)
        task.cancel()
        await turns()
        if task.cancelled():
            assert session.user_id is None
            assert store.owner_of(count) == "", f"still claimed (cancelled after {count} turns)"
    await end(clock, manager)


async def test_an_edit_cancelled_at_any_turn_lets_go_of_its_claim(clock, store, manager):
    for count in range(40):
        task = asyncio.ensure_future(edit(manager, count))
        await turns(count)
        task.cancel()
        await turns()
        await asyncio.gather(task, return_exceptions=True)
        assert store.owner_of(count) == "", f"still claimed (cancelled after {count} turns)"
    await end(clock, manager)


async def test_a_claim_made_again_that_comes_late_is_released(clock, store, manager):
    """The reclaim of a fenced or missing row is given up, the session is let go of, and then the claim is granted."""
    session = await changed(manager)
    gate = asyncio.Event()

    async def hang(_: Any) -> None:
        await gate.wait()

    del store.backing.rows[1]
    store.claim_script = [hang]
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.persist_now())
    await let_time_pass(clock, session.destroy(persist=False))
    assert session.end_reason == EndReason.DESTROYED
    gate.set()
    await turns()
    await clock.advance("1s")
    assert store.owner_of(1) == "", "owned for as long as this node lives, and nobody has the user"
    await end(clock, manager)


async def test_a_login_that_comes_as_all_claims_under_way_are_answered_does_not_wait_for_another(clock, store, manager):
    gate = asyncio.Event()

    async def hang(_: Any) -> None:
        await gate.wait()

    async def visit(*users: int) -> None:
        for user in users:
            await (await manager.create()).login(user, default={})

    await manager.__aenter__()
    store.claim_script = [hang] * CLAIM_CALLS
    visits = []
    for user in range(CLAIM_CALLS):
        visits.append(asyncio.ensure_future(visit(user, user + 100) if not user else visit(user)))
        await turns()
    assert len(store.claims) == CLAIM_CALLS
    gate.set()
    await turns()
    assert all(task.done() for task in visits)
    await asyncio.gather(*visits)
    await end(clock, manager)


async def test_a_claim_whose_task_is_cancelled_by_somebody_is_made_again(clock, store, manager):
    gate = asyncio.Event()

    async def hang(_: Any) -> None:
        await gate.wait()

    await manager.__aenter__()
    store.claim_script = [hang]
    opening = asyncio.ensure_future(manager.open(1, default={}))
    await turns()
    for task in asyncio.all_tasks():
        if task.get_name() == "cagey-sessions claims":
            task.cancel()
    session = await let_time_pass(clock, opening)
    assert session.user_id == 1, "its caller was not cancelled, and the claim is made again"
    gate.set()
    await let_time_pass(clock, clock.sleep("1s"))
    assert session.alive and (await session.persist_now()).version, "whichever of the two claims came last"
    await session.destroy()
    await let_time_pass(clock, clock.sleep("1s"))
    assert 1 in store.backing.rows and store.owner_of(1) == ""
    await end(clock, manager)


async def test_a_late_answer_for_a_session_that_is_gone_touches_nothing_of_the_next_one(clock, store, manager):
    """The next session of the same user keeps its claim: no other node gets in while it is live."""
    session = await changed(manager)
    store.verdict_of[1] = Verdict(Outcome.FAILED, "for now")
    task = asyncio.ensure_future(session.persist_now())
    await clock.advance("9s")
    store.delay = "3s"
    store.verdict_of.clear()
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, task)
    assert store.open_calls == 1, "the last attempt is still under way"
    await session.destroy(persist=False)
    newer = await manager.open(1)
    await clock.advance("5s")
    assert newer.alive
    assert store.owner_of(1) == inside(manager).owner
    assert store.backing.rows[1].epoch == inside(manager).table.epoch(newer)
    store.delay = 0
    await end(clock, manager)


@pytest.mark.fault(
    "a supervisor cancelled all tasks but its own and went on: a user stayed with a process without a session"
)
async def test_who_looks_after_a_claim_is_begun_again_when_somebody_cancels_it(clock, store, manager):
    store.claim_script = ["15s"]
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, manager.open(1, default={"n": 0}))
    for task in asyncio.all_tasks():
        if task.get_name() == "cagey-sessions doubtful claims":
            task.cancel()
    await turns()
    assert "cagey-sessions doubtful claims" not in {task.get_name() for task in asyncio.all_tasks()}
    await clock.advance("2s")
    assert "cagey-sessions doubtful claims" in {task.get_name() for task in asyncio.all_tasks()}
    await clock.advance("20s")
    assert store.owner_of(1) == ""
    await end(clock, manager)


async def test_a_claim_that_nobody_wants_is_released_although_somebody_cancels_that(clock, store, manager):
    await manager.create()  # binds the loop
    await store.open()
    (claim,) = await store.claim_many([1], inside(manager).owner)
    inside(manager).claims.disown(claim)
    (stray,) = [task for task in asyncio.all_tasks() if task.get_name() == "cagey-sessions stray claim"]
    stray.cancel()
    await turns()
    assert store.owner_of(1) == inside(manager).owner
    await clock.advance("2s")
    assert store.owner_of(1) == ""
    await end(clock, manager)


@pytest.mark.fault("an erasure that was cancelled came late, and erased what had been saved after it")
async def test_a_user_is_not_loaded_before_an_erasure_that_was_given_up_has_returned(clock, store, manager):
    store.put(1, b'{"n":1}')
    erase, returns = store.erase, asyncio.Event()

    async def slow(*args: Any) -> bool:
        await returns.wait()
        return await erase(*args)

    store.erase = slow
    erasing = asyncio.ensure_future(manager.erase(1))
    await turns()
    erasing.cancel()
    await asyncio.gather(erasing, return_exceptions=True)
    opening = asyncio.ensure_future(manager.open(1, default={"n": 0}))
    await clock.advance("1s")
    assert not opening.done()
    returns.set()
    session = await let_time_pass(clock, opening)
    assert session.user_data == {"n": 0}, "the user is new"
    await let_time_pass(clock, session.persist_now())
    await end(clock, manager)
    assert store.stored(1) == {"n": 0}


@pytest.mark.fault("ids that the engine cannot hold were asked about once a second for ever, as many as anybody sent")
async def test_a_user_whom_the_store_never_answers_about_is_not_asked_about_for_ever(clock, store, manager):
    store.claim_script = ["15s"]
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, manager.open(1, default={"n": 0}))
    asked = []

    async def holder(user_id: Any) -> Any:
        asked.append(user_id)
        raise StoreError("this engine has no such users")

    store.holder = holder
    for _ in range(80):
        await clock.advance("10s")
    assert 0 < len(asked) < 10
    del store.holder
    await end(clock, manager)
