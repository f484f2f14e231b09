"""Whose user it is: read, edit and erase."""

from __future__ import annotations

import asyncio

import pytest

from cagey_sessions import (
    EncodingError,
    EndReason,
    OwnedElsewhereError,
    SessionManager,
    StoreUnavailableError,
    UsageError,
    UserErasedError,
    UserNotFoundError,
)
from support import ScriptedStore, end, let_time_pass, turns


async def test_read_gives_a_private_copy_of_what_is_live_or_stored(clock, store, manager):
    store.put(2, b'{"gold":9}')
    session = await manager.open(1, default={"n": [0]})
    copy = await manager.read(1)
    copy["n"].append(1)
    assert session.user_data == {"n": [0]}
    session.user_data["n"].append(5)
    assert await manager.read(1) == {"n": [0, 5]}
    assert await manager.read(2) == {"gold": 9}
    assert store.owner_of(2) == ""
    with pytest.raises(UserNotFoundError):
        await manager.read(3)
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
    with pytest.raises(EncodingError):
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


async def test_erase_ends_the_session_unsaved_and_leaves_nothing(clock, store, manager):
    session = await manager.open(1, default={"n": 0})
    await session.persist_now()
    session.user_data["n"] = 9
    heard = []
    session.on("destroy", lambda: heard.append("destroy"))
    manager.on("error", lambda error, session: heard.append(error))
    assert await manager.erase(1) is True
    assert session.end_reason == EndReason.ERASED
    assert heard == ["destroy"]
    assert store.stored(1) is None
    assert await manager.erase(1) is False
    assert await manager.erase("nobody") is False
    with pytest.raises(UserNotFoundError):
        await manager.read(1)
    newer = await manager.open(1, default={"n": 1})
    await newer.persist_now()
    assert store.stored(1) == {"n": 1}
    await end(clock, manager)


async def test_erase_beats_a_save_under_way(clock, store, manager):
    session = await manager.open(1, default={"n": 0})
    await session.persist_now()
    session.user_data["n"] = 9
    store.script = ["1s"]
    saving = asyncio.ensure_future(session.persist_now())
    await turns()
    erasing = asyncio.ensure_future(manager.erase(1))
    await clock.advance("2s")
    assert await erasing is True
    with pytest.raises(UserErasedError):
        await saving
    assert store.stored(1) is None
    assert len(manager) == 0
    await end(clock, manager)


async def test_erase_is_refused_while_another_node_has_the_user(clock, store, manager):
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    there = await other.open(1, default={"n": 1})
    with pytest.raises(OwnedElsewhereError):
        await manager.erase(1)
    assert there.alive
    await end(clock, other)
    assert await manager.erase(1)
    await end(clock, manager)


async def test_1_and_its_text_are_two_users(clock, store, manager):
    number, text = await manager.open(1, default={"is": "int"}), await manager.open("1", default={"is": "str"})
    assert number is not text
    await end(clock, manager)
    assert (store.stored(1), store.stored("1")) == ({"is": "int"}, {"is": "str"})


async def test_async_with_opens_and_closes_the_store(clock, store):
    async with SessionManager(store=store, clock=clock) as manager:
        session = await manager.open(1, default={"n": 0})
        session.user_data["n"] = 5
    assert store.stored(1) == {"n": 5}
    with pytest.raises(StoreUnavailableError, match="not open"):
        await store.load(1)
