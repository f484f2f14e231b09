"""`open`: callers share the session of a user, and cancelling one of them takes it from none of the others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cagey_sessions import StoreUnavailableError
from support import end, let_time_pass, turns


async def test_a_caller_that_joins_an_open_keeps_the_session_if_the_first_is_cancelled(clock, store, manager):
    """A session that `open` has returned to a second caller is not ended because the first was cancelled."""
    gate = asyncio.Event()

    @manager.on("identified")
    async def wait(session: Any, *_: Any) -> None:
        await gate.wait()

    first = asyncio.ensure_future(manager.open(1, default={"n": 0}))
    await turns()
    second = asyncio.ensure_future(manager.open(1, default={"n": 0}))
    await turns()
    first.cancel()
    await turns()
    if second.done():
        second.result().user_data["n"] = 5
    gate.set()
    await turns()
    session = await second
    assert session.alive, "ended under the caller who has it"
    session.user_data["n"] = 5
    await end(clock, manager)
    assert store.stored(1) == {"n": 5}


async def test_an_open_cancelled_at_any_turn_leaves_no_session_without_a_caller(clock, store, manager):
    """Cancelled at any turn of the loop: either the caller has the session or it is ended."""
    for count in range(30):
        task = asyncio.ensure_future(manager.open(count, default={"n": 0}))
        await turns(count)
        task.cancel()
        await turns()
        if task.cancelled():
            assert manager.find_by_user(count) is None, f"a session that nobody has (cancelled after {count} turns)"
            assert store.owner_of(count) == "", f"cancelled after {count} turns"
    await end(clock, manager)


@pytest.mark.parametrize("later", range(3))
async def test_an_open_that_begins_as_another_is_cancelled_gives_a_live_session(clock, store, manager, later):
    """At any turn of the loop: never the session that is ended because nobody waits for it any more."""
    for count in range(30):
        first = asyncio.ensure_future(manager.open(count, default={"n": 0}))
        await turns(count)
        first.cancel()
        await turns(later)
        second = asyncio.ensure_future(manager.open(count, default={"n": 0}))
        session = await let_time_pass(clock, second)
        await turns()
        assert session.alive, f"cancelled after {count} turns"
        assert manager.find_by_user(count) is session
    await end(clock, manager)


@pytest.mark.parametrize("when_active", ["replace", "refuse"])
async def test_a_cancelled_open_ends_its_session_if_no_other_caller_waits_for_it(clock, store, manager, when_active):
    """Cancelling `open` ends the session if nobody else waits for it, also while `identified` listeners run."""
    gate = asyncio.Event()

    @manager.on("identified")
    async def wait(session: Any, *_: Any) -> None:
        await gate.wait()

    task = asyncio.ensure_future(manager.open(1, default={"n": 0}, when_active=when_active))
    await turns()
    task.cancel()
    await turns()
    assert task.cancelled()
    assert manager.find_by_user(1) is None
    assert len(manager) == 0
    await end(clock, manager)


@pytest.mark.parametrize("when_active", ["replace", "refuse"])
async def test_a_session_that_another_open_has_returned_outlives_the_open_that_made_it(
    clock, store, manager, when_active
):
    """Cancelled while its `identified` listeners run: by then somebody else has the session, and plays."""
    gate = asyncio.Event()

    @manager.on("identified")
    async def wait(session: Any, *_: Any) -> None:
        await gate.wait()

    first = asyncio.ensure_future(manager.open(1, default={"n": 0}, when_active=when_active))
    await turns()
    session = await manager.open(1)
    session.user_data["n"] = 5
    first.cancel()
    gate.set()
    await turns()
    assert session.alive, "ended under the caller who has it"
    await end(clock, manager)
    assert store.stored(1) == {"n": 5}


async def test_a_session_opened_again_just_before_the_first_open_is_cancelled_stays(clock, store, manager):
    """Whichever turns of the loop those are."""
    for count in range(30):
        first = asyncio.ensure_future(manager.open(count, default={"n": 0}))
        await turns(count)
        second = asyncio.ensure_future(manager.open(count, default={"n": 0}))
        await asyncio.sleep(0)
        first.cancel()
        session = await let_time_pass(clock, second)
        await turns()
        assert session.alive, f"cancelled after {count} turns"
    await end(clock, manager)


async def test_a_default_of_none_is_refused_before_anything_changes(clock, store, manager):
    """I6: no claim is made for it; and no user becomes null, whom nobody could log in any more."""
    session = await manager.create()
    with pytest.raises(ValueError, match=r"None|null"):
        await session.login(1, default=None)
    assert store.claims == []
    await end(clock, manager)


async def test_concurrent_opens_share_one_load_and_get_one_session(clock, store, manager):
    store.put(1, b'{"gold":9}')
    store.claim_script = ["20ms"]
    sessions = await let_time_pass(clock, asyncio.gather(*(manager.open(1) for _ in range(10))))
    assert len(set(sessions)) == 1
    assert store.claims == [[1]]
    assert await manager.open(1) is sessions[0]
    await end(clock, manager)


async def test_open_of_many_users_at_once_claims_them_in_few_calls(clock, store, manager):
    await let_time_pass(clock, asyncio.gather(*(manager.open(number, default={}) for number in range(300))))
    assert len(store.claims) <= 10
    assert sorted(user_id for claim in store.claims for user_id in claim) == list(range(300))
    await end(clock, manager)


async def test_one_bad_load_does_not_fail_the_others_of_its_call(clock, store, manager):
    async def claim(user_ids: Any, owner: str) -> Any:
        if 7 in user_ids:
            raise ValueError("row 7 is strange")
        return await original(user_ids, owner)

    original = store.claim_many
    store.claim_many = claim
    opened = await let_time_pass(
        clock, asyncio.gather(*(manager.open(number, default={}) for number in range(20)), return_exceptions=True)
    )
    assert [isinstance(each, StoreUnavailableError) for each in opened] == [number == 7 for number in range(20)]
    assert manager.statistics().store_up, "one row is not the store"
    await end(clock, manager)


async def test_an_open_whose_callers_are_all_cancelled_leaves_no_session(clock, store, manager):
    store.claim_script = ["20ms", "20ms", "20ms"]
    tasks = [asyncio.ensure_future(manager.open(1, default={})) for _ in range(3)]
    await turns()
    tasks[0].cancel()
    await clock.advance("5ms")
    for task in tasks:
        task.cancel()
    await clock.advance("1s")
    assert len(manager) == 0
    assert store.owner_of(1) == ""
    await end(clock, manager)


async def test_the_remaining_caller_of_a_shared_open_gets_the_session(clock, store, manager):
    store.claim_script = ["20ms"]
    tasks = [asyncio.ensure_future(manager.open(1, default={})) for _ in range(3)]
    await turns()
    tasks[0].cancel()
    await clock.advance("1s")
    assert (await tasks[1]) is (await tasks[2])
    await end(clock, manager)


async def test_open_waits_for_the_last_save_of_a_session_that_is_ending(clock, store, manager):
    session = await manager.open(1, default={"n": 0})
    session.user_data["n"] = 3
    store.script = ["100ms"]
    ending = asyncio.ensure_future(session.destroy())
    await turns()
    newer = await let_time_pass(clock, manager.open(1))
    assert newer is not session
    assert newer.user_data == {"n": 3}
    await ending
    await end(clock, manager)
