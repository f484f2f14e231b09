"""One call at a time is at work on a user; whoever waits for the turn waits for as long as callers do, and never for
itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from cagey_sessions import (
    ListenerError,
    SessionEndedError,
    SessionManager,
    StoreUnavailableError,
    UserErasedError,
    WouldDeadlockError,
)
from support import let_time_pass, turns

# Waiting for oneself


def causes(error: BaseException) -> list[BaseException]:
    """What is at the bottom of a group of groups."""
    parts = getattr(error, "exceptions", None)
    return [error] if parts is None else [cause for part in parts for cause in causes(part)]


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


@pytest.mark.parametrize("call", CALLS)
async def test_a_created_listener_that_wants_the_user_being_opened_is_told_at_once(call, manager, clock):
    await manager.create("spare")

    @manager.on("created")
    async def want(session):
        await CALLS[call](manager, "world")

    before = clock.now()
    with pytest.raises(ListenerError) as caught:
        await manager.open("world", default={})
    assert [type(cause) for cause in causes(caught.value)] == [WouldDeadlockError]
    assert clock.now() == before
    manager.off("created", want)
    assert (await manager.open("world", default={})).user_id == "world", "and nobody is left with the turn"
    await let_time_pass(clock, manager.destroy())


async def test_a_created_listener_that_opens_another_user_does_so_once_that_user_is_there(manager, clock):
    """A record that all sessions share: the first one has to be made outside of the listener that wants it."""
    await manager.open("world", default={"players": 0})

    @manager.on("created")
    async def join_world(session):
        session.set("world", await manager.open("world"))

    session = await manager.create()
    assert session.get("world") is manager.find_by_user("world")
    ann = await manager.open("ann", default={})
    assert ann.get("world") is manager.find_by_user("world")
    await let_time_pass(clock, manager.destroy())


async def test_opens_that_wait_for_each_other_end_with_an_error_for_one_of_them(manager, clock):
    both = asyncio.Barrier(2)
    asked = iter([("bob", "ann"), ("ann", "bob")])

    @manager.on("created")
    async def want_the_other(session):
        pair = next(asked, None)
        if pair is not None:
            await both.wait()
            session.set("friend", await manager.open(pair[1], default={}))

    opens = [asyncio.ensure_future(manager.open(user_id, default={})) for user_id in ("bob", "ann")]
    done = await let_time_pass(clock, asyncio.gather(*opens, return_exceptions=True), "1s")
    failed = [each for each in done if isinstance(each, BaseException)]
    assert failed, "they cannot both have been waited for"
    assert {type(cause) for each in failed for cause in causes(each)} == {WouldDeadlockError}
    for user_id in ("ann", "bob"):
        assert (await manager.open(user_id, default={})).user_id == user_id
    await let_time_pass(clock, manager.destroy())


@pytest.mark.parametrize("call", ["open", "login", "edit", "erase"])
@pytest.mark.parametrize("event", ["started", "identified"])
async def test_listeners_that_nothing_of_ours_waits_behind_may_do_all_that(event, call, manager, clock):
    spare = await manager.create("spare")
    session = await manager.create()

    async def act(*_: object) -> None:
        manager.off(event, act)
        await CALLS[call](manager, "ann")

    if event == "identified":
        manager.on(event, act)
        await let_time_pass(clock, session.login("ann", default={}))
    else:
        await session.login("ann", default={})
        manager.on(event, act)
        if call in ("login", "erase"):  # they end the session, and a listener of the end of it would have to return
            await let_time_pass(clock, spare.start())
        else:
            await let_time_pass(clock, session.start())
    assert session.alive is (call in ("open", "edit"))
    await let_time_pass(clock, manager.destroy())


@pytest.mark.parametrize("call", CALLS)
async def test_inside_an_edit_no_call_waits_for_the_end_of_that_edit(call, manager, clock):
    await manager.create("spare")
    async with manager.edit(1, default={}) as data:
        with pytest.raises(WouldDeadlockError):
            await CALLS[call](manager, 1)
        data["gold"] = 5
    assert await manager.read(1) == {"gold": 5}
    await let_time_pass(clock, manager.destroy())


async def test_a_task_that_an_edit_has_started_waits_for_the_turn(manager, clock):
    async with manager.edit(1, default={"gold": 0}) as data:
        later = asyncio.ensure_future(manager.open(1))
        await turns()
        assert not later.done()
        data["gold"] = 5
    assert (await later).user_data == {"gold": 5}
    await let_time_pass(clock, manager.destroy())


@pytest.mark.parametrize("event", ["before_destroy", "destroy"])
async def test_a_listener_of_an_end_that_a_login_waits_for_cannot_open_that_user(event, manager, clock):
    first = await manager.open(1, default={})
    told = []

    @first.on(event)
    async def come_back() -> None:
        try:
            await manager.open(1)
        except WouldDeadlockError as error:
            told.append(error)

    second = await manager.create()
    await let_time_pass(clock, second.login(1, default={}))
    assert told or event == "destroy"
    assert second.user_id == 1
    await let_time_pass(clock, manager.destroy())


# How long a call waits


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


# Edits of users who are here


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
