"""`edit`: the data of a live session is changed, or a user is loaded, changed, saved and released."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cagey_sessions import (
    FencedError,
    StoreUnavailableError,
    UnsavableError,
    UsageError,
    UserNotFoundError,
)
from cagey_sessions.stores import MemoryStore, Outcome, Verdict
from support import end, inside, let_time_pass, turns


async def test_an_edit_is_not_fenced_by_our_own_late_claim(clock, store, manager):
    """Nobody else has the user: the row is claimed again and written."""
    gate = asyncio.Event()

    async def hang(_: Any) -> None:
        await gate.wait()

    store.put(1, b'{"n":0}')
    store.claim_script = [hang]
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, manager.open(1))

    async def edit() -> None:
        async with manager.edit(1) as data:
            gate.set()  # the claim that was given up is granted now
            await turns()
            data["n"] = 1

    await let_time_pass(clock, edit())
    assert store.stored(1) == {"n": 1}
    await end(clock, manager)


async def test_an_edit_that_was_written_is_saved_whatever_claim_of_ours_comes_after_it(clock, store, manager):
    """The reply to the write is lost, and before the repeat a claim is granted that we had given up."""

    async def claim_late(_: Any) -> None:
        await MemoryStore.claim_many(store, [1], inside(manager).owner)

    store.put(1, b'{"n":0}')
    store.script = ["lose", claim_late]

    async def edit() -> None:
        async with manager.edit(1) as data:
            data["n"] = 1

    await let_time_pass(clock, edit())
    assert store.stored(1) == {"n": 1}
    await clock.advance("1s")
    assert store.owner_of(1) == ""
    await end(clock, manager)


async def test_an_edit_does_not_overwrite_what_another_owner_has_saved_meanwhile(clock, store, manager):
    """Not even once they have let go of the user, so that the claim made again is granted."""
    store.put(1, b'{"n":0}')
    other = MemoryStore(store.backing)
    await other.open()

    async def edit() -> None:
        async with manager.edit(1) as data:
            store.bury(inside(manager).owner)
            (claim,) = await other.claim_many([1], "b")
            await other.save_many([claim.record._replace(version=2, body=b'{"n":7}', release=True)])
            data["n"] = 1

    with pytest.raises(FencedError):
        await let_time_pass(clock, edit())
    assert store.stored(1) == {"n": 7}
    await clock.advance("1s")
    assert store.owner_of(1) == ""
    await end(clock, manager)


async def test_an_edit_that_is_refused_after_a_claim_made_again_lets_go_of_that(clock, store, manager):
    async def claim_late(_: Any) -> None:
        await MemoryStore.claim_many(store, [1], inside(manager).owner)

    async def refuse(_: Any) -> None:
        store.verdict_of[1] = Verdict(Outcome.INVALID, "too odd")

    async def edit() -> None:
        async with manager.edit(1) as data:
            data["n"] = 1

    store.put(1, b'{"n":0}')
    store.script = [claim_late, refuse]
    with pytest.raises(UnsavableError, match="too odd"):
        await let_time_pass(clock, edit())
    await clock.advance("1s")
    assert store.owner_of(1) == ""
    await end(clock, manager)


@pytest.mark.parametrize("goes_on", ["has them", "has saved them"])
async def test_an_edit_that_may_be_written_does_not_say_that_it_is_not(clock, store, manager, goes_on):
    """The reply to the write is lost, and before the repeat somebody else takes the user over."""
    store.put(1, b'{"n":0}')
    other = MemoryStore(store.backing)
    await other.open()

    async def take_over(_: Any) -> None:
        (claim,) = await other.claim_many([1], "b")
        assert claim.record is not None
        if goes_on == "has saved them":
            await other.save_many([claim.record._replace(version=3, body=b'{"n":8}', release=True)])

    store.script = ["lose", take_over]

    async def edit() -> None:
        async with manager.edit(1) as data:
            data["n"] = 1

    with pytest.raises(FencedError, match="whether this edit was written before that is not known"):
        await let_time_pass(clock, edit())
    await end(clock, manager)


async def test_an_edit_that_cannot_be_written_says_so(clock, store, manager):
    """Somebody else takes the user over before anything is sent, and has them."""
    store.put(1, b'{"n":0}')
    other = MemoryStore(store.backing)
    await other.open()

    async def edit() -> None:
        async with manager.edit(1) as data:
            store.bury(inside(manager).owner)
            await other.claim_many([1], "b")
            data["n"] = 1

    with pytest.raises(FencedError, match="nothing was written"):
        await let_time_pass(clock, edit())
    await end(clock, manager)


async def test_edit_changes_what_is_live_and_saves_it(clock, store, manager):
    session = await manager.open(1, default={"n": 0})
    async with manager.edit(1) as data:
        assert data is session.user_data
        data["n"] = 4
    assert store.stored(1) == {"n": 4}
    assert session.alive
    await end(clock, manager)


async def test_edit_loads_changes_saves_and_lets_go(clock, store, manager):
    store.put(1, b'{"n":0}', version=8)
    events = []
    manager.on("created", lambda session: events.append("created"))
    async with manager.edit(1) as data:
        data["n"] = 4
        assert store.owner_of(1)
    assert store.stored(1) == {"n": 4}
    assert store.backing.rows[1].record.version == 9
    assert store.owner_of(1) == ""
    async with manager.edit(1):
        pass
    assert len(store.batches) == 1, "nothing had changed"
    await turns()
    assert store.owner_of(1) == ""
    with pytest.raises(UserNotFoundError):
        async with manager.edit(2):
            raise AssertionError("there is nothing to edit")
    async with manager.edit(2, default={"new": True}):
        pass
    assert store.stored(2) == {"new": True}
    assert events == []
    await end(clock, manager)


async def test_an_edit_that_raises_writes_nothing(clock, store, manager):
    store.put(1, b'{"n":0}')
    with pytest.raises(ZeroDivisionError):
        async with manager.edit(1) as data:
            data["n"] = 4
            raise ZeroDivisionError
    await turns()
    assert store.stored(1) == {"n": 0}
    assert store.owner_of(1) == ""
    with pytest.raises(UnsavableError):
        async with manager.edit(1) as data:
            data["n"] = object()
    await turns()
    assert store.stored(1) == {"n": 0}
    assert store.owner_of(1) == ""
    await end(clock, manager)


async def test_an_edit_of_data_that_is_the_users_no_more_says_so(clock, store, manager):
    store.put(1, b'{"gold":1}')
    session = await manager.open(1)
    with pytest.raises(UsageError, match="user_data was assigned"):
        async with manager.edit(1) as data:
            session.user_data = {"gold": 5}
            data["gold"] += 100
    async with manager.edit(1) as data:
        session.user_data = data | {"gold": data["gold"] + 1}  # nothing is lost: the block has changed what there is
    assert store.stored(1) == {"gold": 6}
    await end(clock, manager)


async def test_a_login_waits_for_an_edit(clock, store, manager):
    store.put(1, b'{"n":0}')
    session = await manager.create()
    async with manager.edit(1) as data:
        task = asyncio.ensure_future(session.login(1))
        await turns()
        assert not task.done()
        data["n"] = 4
    await task
    assert session.user_data == {"n": 4}
    await end(clock, manager)


async def test_an_edit_repeats_a_save_whose_reply_is_lost(clock, store, manager):
    store.put(1, b'{"n":0}')
    store.script = ["lose"]

    async def edit() -> None:
        async with manager.edit(1) as data:
            data["n"] = 4

    await let_time_pass(clock, edit())
    assert store.stored(1) == {"n": 4}
    assert [len(batch.records) for batch in store.batches] == [1, 1]
    assert store.versions(1) == [2, 2]
    await end(clock, manager)


async def test_a_drain_waits_for_an_edit_as_long_as_its_deadline_is(clock, store, manager):
    store.put(1, b'{"n":0}')

    async def edit_slowly() -> None:
        async with manager.edit(1) as data:
            await clock.sleep("5s")
            data["n"] = 1

    editing = asyncio.ensure_future(edit_slowly())
    await turns(20)
    await let_time_pass(clock, manager.destroy())
    await editing
    assert store.stored(1) == {"n": 1}
    assert store.owner_of(1) == ""
