"""Users without a session of the caller's: `read` and `erase`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cagey_sessions import (
    DrainError,
    EndReason,
    OwnedElsewhereError,
    SessionManager,
    StoreUnavailableError,
    UserErasedError,
    UserNotFoundError,
    WouldDeadlockError,
)
from cagey_sessions.stores import CallbackStore
from support import ScriptedStore, changed, end, let_time_pass, turns


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


async def _leave_in_vain(clock, manager, session):
    """Have a session wait, hidden, for a last save that is not acknowledged."""
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.destroy())
    assert manager.find_by_user(session.user_id) is None
    assert session.alive


async def test_read_of_a_session_that_waits_for_a_lost_reply_gives_what_somebody_else_has_saved_since(clock, store):
    """The last save came through, and let go of the user; only its reply was lost."""
    here = SessionManager(store=store, clock=clock)
    session = await here.open("ann", default={"n": 0})
    session.user_data["n"] = 1
    store.script = ["lose", *[StoreUnavailableError("cut")] * 10_000]
    await _leave_in_vain(clock, here, session)
    assert store.owner_of("ann") == ""
    assert await let_time_pass(clock, here.read("ann")) == {"n": 1}
    there = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    other = await let_time_pass(clock, there.open("ann"))
    other.user_data["n"] = 2
    await let_time_pass(clock, other.persist_now())
    assert session.user_data == {"n": 1}
    assert await let_time_pass(clock, here.read("ann")) == {"n": 2}
    await let_time_pass(clock, other.destroy())
    assert await let_time_pass(clock, here.read("ann")) == {"n": 2}, "also when nobody has the user any more"
    store.script = []
    await clock.advance("20s")
    assert session.end_reason == EndReason.FENCED
    await end(clock, there, here)


@pytest.mark.parametrize("saved_before", [False, True])
async def test_read_of_a_session_whose_last_save_is_not_written_gives_its_data(clock, store, manager, saved_before):
    session = await manager.open("ann", default={"n": 0})
    if saved_before:
        await session.persist_now()
    session.user_data["n"] = 1
    store.script = [StoreUnavailableError("cut")] * 10_000
    await _leave_in_vain(clock, manager, session)
    assert store.stored("ann") == ({"n": 0} if saved_before else None)
    found = await let_time_pass(clock, manager.read("ann"))
    assert found == {"n": 1}
    found["n"] = 7
    assert session.user_data == {"n": 1}, "a private copy"
    store.script = []
    await end(clock, manager)


async def test_read_of_a_session_that_ends_meanwhile_gives_what_it_has_saved(clock, store, manager):
    session = await manager.open("ann", default={"n": 0})
    session.user_data["n"] = 1
    store.script = ["5s"]
    ending = asyncio.create_task(session.destroy())
    await clock.advance("1s")
    asked, holder, gate = asyncio.Event(), store.holder, asyncio.Event()

    async def slowly(user_id):
        answer = await holder(user_id)
        asked.set()
        await gate.wait()
        return answer

    store.holder = slowly
    reading = asyncio.create_task(manager.read("ann"))
    await asked.wait()
    await clock.advance("5s")
    assert ending.done() and not session.alive
    gate.set()
    assert await let_time_pass(clock, reading) == {"n": 1}
    await end(clock, manager)


async def test_read_in_one_process_alone_gives_the_data_of_a_session_that_waits(clock):
    """Nobody else can have saved it since, so the program is not asked."""
    loads = []

    def save_many(records):
        raise OSError("cut")

    manager = SessionManager(store=CallbackStore(loads.append, save_many), clock=clock)
    session = await manager.open("ann", default={"n": 0})
    session.user_data["n"] = 1
    await _leave_in_vain(clock, manager, session)
    loads.clear()
    assert await manager.read("ann") == {"n": 1}
    assert loads == []
    with pytest.raises(DrainError):
        await let_time_pass(clock, manager.destroy(deadline="1s"))


async def test_read_of_a_session_that_is_ended_by_an_erasure_finds_no_user(clock, store, manager):
    session = await manager.open("ann", default={"n": 0})
    await session.persist_now()
    found = []

    @session.on("before_destroy")
    async def read():
        with pytest.raises(UserNotFoundError):
            await manager.read("ann")
        found.append("nobody")

    assert await let_time_pass(clock, manager.erase("ann"))
    assert found == ["nobody"]
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


async def test_an_edit_does_not_end_a_session_that_logs_in_meanwhile(clock, store, manager):
    """`edit` is the live data, or load-change-save; it sends nobody home."""
    store.put(1, b'{"n":0}')
    gate = asyncio.Event()

    async def wait(_: Any) -> None:
        await gate.wait()

    store.claim_script = [wait]
    session = await manager.create()
    login = asyncio.ensure_future(session.login(1))
    await turns()

    async def edit() -> None:
        async with manager.edit(1) as data:
            data["n"] += 1

    editing = asyncio.ensure_future(edit())
    await turns()
    gate.set()
    await let_time_pass(clock, login)
    await let_time_pass(clock, editing)
    assert session.alive
    assert session.user_data == {"n": 1}
    await end(clock, manager)
    assert store.stored(1) == {"n": 1}


async def test_an_edit_makes_no_user_of_nothing(clock, store, manager):
    with pytest.raises((ValueError, UserNotFoundError)):
        async with manager.edit(1, default=lambda: None):
            pass
    assert store.stored(1) is None
    assert store.backing.rows.get(1) is None or store.backing.rows[1].record is None
    await end(clock, manager)


async def test_an_erase_that_cannot_wait_changes_nothing(clock, store, manager):
    """A listener of an end that erases the very user: erased without an error, or an error and not erased."""
    session = await changed(manager)
    outcome: list[Any] = []

    async def listener() -> None:
        try:
            outcome.append(await manager.erase(1))
        except WouldDeadlockError as error:
            outcome.append(error)

    session.on("before_destroy", listener)
    await asyncio.gather(let_time_pass(clock, session.destroy()), return_exceptions=True)
    assert (store.stored(1) is None) == (outcome == [True]), (outcome, store.stored(1))
    await end(clock, manager)


@pytest.mark.fault("the last attempt of a call had a time-out of its own, so the call took twice as long as it may")
@pytest.mark.parametrize("call", ["read", "erase", "open"])
async def test_an_attempt_has_no_longer_than_what_is_left_for_the_call(clock, call):
    attempts, returns = [], asyncio.Event()

    class Silent(ScriptedStore):
        async def load(self, user_id: Any) -> Any:
            attempts.append(user_id)
            if len(attempts) == 1:
                await self.clock.sleep("8s")
                raise StoreUnavailableError("not now")
            await returns.wait()
            raise StoreUnavailableError("too late")

        async def erase(self, user_id: Any, owner: str = "") -> Any:
            return await self.load(user_id)

        async def claim_many(self, user_ids: Any, owner: str) -> Any:
            return await self.load(user_ids)

    store = Silent(clock)
    manager = SessionManager(store=store, clock=clock)  # a call may take 10 seconds
    store.clock = clock
    began = clock.now()
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, getattr(manager, call)(1))
    assert len(attempts) == 2
    assert clock.now() - began < 11_000_000_000
    returns.set()
    await turns()
    await let_time_pass(clock, manager.destroy())
