"""Turns: one call at a time is at work on a user, and the others wait in the order in which they came."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from cagey_sessions import SessionEndedError, SessionManager, StoreUnavailableError, UserErasedError
from support import let_time_pass, turns


async def edit(manager: SessionManager, user_id: object) -> None:
    async with manager.edit(user_id, default={}):
        pass


async def login(manager: SessionManager, user_id: object) -> None:
    # without a session of its own that it would have to make, for a listener of `created` hears of that
    session = manager.find_by_key("spare")
    await session.login(user_id, default={})


CALLS: dict[str, Callable[[SessionManager, Any], Any]] = {
    "open": lambda manager, user_id: manager.open(user_id, default={}),
    "open, replacing": lambda manager, user_id: manager.open(user_id, default={}, when_active="replace"),
    "login": login,
    "edit": edit,
    "erase": lambda manager, user_id: manager.erase(user_id),
}


async def test_a_task_that_an_edit_has_started_waits_for_the_turn(manager, clock):
    async with manager.edit(1, default={"gold": 0}) as data:
        later = asyncio.ensure_future(manager.open(1))
        await turns()
        assert not later.done()
        data["gold"] = 5
    assert (await later).user_data == {"gold": 5}
    await let_time_pass(clock, manager.destroy())


@pytest.mark.parametrize("call", ["open", "login", "edit", "erase"])
async def test_a_call_waits_for_its_turn_as_long_as_for_the_store(call, clock, store):
    manager = SessionManager(store=store, clock=clock, save_timeout="3s")
    await manager.create("spare")
    go = asyncio.Event()

    async def edit_for_ever() -> None:
        async with manager.edit(1, default={}):
            await go.wait()

    editing = asyncio.ensure_future(edit_for_ever())
    await turns()
    waiting = asyncio.ensure_future(CALLS[call](manager, 1))
    await clock.advance("2900ms")
    assert not waiting.done()
    await clock.advance("200ms")
    with pytest.raises(StoreUnavailableError, match="another call is at work on user 1"):
        await waiting
    last = asyncio.ensure_future(CALLS[call](manager, 1))
    await turns()
    go.set()
    await let_time_pass(clock, asyncio.gather(editing, last))
    await let_time_pass(clock, manager.destroy())


async def test_the_turn_goes_to_calls_in_the_order_in_which_they_came_and_past_those_that_are_cancelled(manager, clock):
    order: list[int] = []

    async def edit_as(number: int) -> None:
        async with manager.edit(1, default={}):
            order.append(number)
            await clock.sleep("10ms")

    calls = [asyncio.ensure_future(edit_as(number)) for number in range(5)]
    await turns()
    calls[1].cancel()
    await clock.advance("15ms")
    calls[3].cancel()
    await let_time_pass(clock, asyncio.gather(*calls, return_exceptions=True))
    assert order == [0, 2, 4]
    await let_time_pass(clock, manager.destroy())


async def test_a_login_does_not_wait_for_ever_for_listeners_of_the_older_session(clock, store):
    manager = SessionManager(store=store, clock=clock, save_timeout="3s")
    first = await manager.open(1, default={})
    go = asyncio.Event()
    first.on("before_destroy", go.wait)
    second = await manager.create()
    with pytest.raises(StoreUnavailableError, match="has not ended"):
        await let_time_pass(clock, second.login(1))
    go.set()
    await let_time_pass(clock, second.login(1))
    assert second.user_id == 1 and not first.alive
    await let_time_pass(clock, manager.destroy())


async def test_edits_of_a_user_exclude_each_other_whether_the_user_is_here_or_not(manager, clock):
    async def add() -> None:
        async with manager.edit(1, default={"coins": 0}) as data:
            coins = data["coins"]
            await asyncio.sleep(0)
            data["coins"] = coins + 1

    await let_time_pass(clock, asyncio.gather(*(add() for _ in range(10))))
    assert await manager.read(1) == {"coins": 10}
    session = await manager.open(1)
    await let_time_pass(clock, asyncio.gather(*(add() for _ in range(10))))
    assert session.user_data == {"coins": 20}
    await let_time_pass(clock, manager.destroy())


async def test_a_login_waits_for_an_edit_of_the_session_it_replaces(manager, clock):
    first = await manager.open(1, default={"coins": 0})
    second = await manager.create()
    async with manager.edit(1) as data:
        login = asyncio.ensure_future(second.login(1))
        await turns()
        assert first.alive
        data["coins"] = 7
    await let_time_pass(clock, login)
    assert second.user_data == {"coins": 7}
    await let_time_pass(clock, manager.destroy())


async def test_an_edit_of_a_session_that_ends_meanwhile_says_so(manager, clock):
    session = await manager.open(1, default={"coins": 0})
    with pytest.raises(SessionEndedError):
        async with manager.edit(1) as data:
            data["coins"] = 7
            await session.destroy(persist=False)

    await let_time_pass(clock, manager.destroy())


async def test_an_edit_of_a_session_whose_open_is_cancelled_is_kept_and_then_the_session_ends(manager, clock):
    manager.on("identified", lambda *_: asyncio.Event().wait())
    opening = asyncio.ensure_future(manager.open(1, default={"gold": 0}))
    await turns()
    session = manager.find_by_user(1)
    async with manager.edit(1) as data:
        opening.cancel()
        await turns()
        assert session.alive
        data["gold"] = 105
    await turns()
    assert not session.alive, "nobody has been given it"
    assert await manager.read(1) == {"gold": 105}
    assert manager.statistics().fenced == 0
    await let_time_pass(clock, manager.destroy())


async def test_a_session_that_an_open_joins_while_an_edit_delays_its_end_stays(manager, clock):
    manager.on("identified", lambda *_: asyncio.Event().wait())
    opening = asyncio.ensure_future(manager.open(1, default={"gold": 0}))
    await turns()
    async with manager.edit(1):
        opening.cancel()
        await turns()
        session = await manager.open(1)
    await turns()
    assert session.alive
    await let_time_pass(clock, manager.destroy())


async def test_an_erasure_waits_for_an_edit_and_then_ends_the_session(manager, clock):
    session = await manager.open(1, default={"gold": 0})
    async with manager.edit(1) as data:
        erasing = asyncio.ensure_future(manager.erase(1))
        await turns()
        assert not erasing.done() and session.alive
        data["gold"] = 1
    assert await let_time_pass(clock, erasing)
    assert not session.alive
    with pytest.raises((SessionEndedError, UserErasedError)):
        await session.persist_now()
    await let_time_pass(clock, manager.destroy())
