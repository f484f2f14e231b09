"""A call that would wait for the code it stands in raises `WouldDeadlockError` before it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from cagey_sessions import ListenerError, SessionManager, WouldDeadlockError
from cagey_sessions.events import deadlocks as waits
from support import Db, add_user, changed, end, finishes, let_time_pass, turns


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


async def test_a_listener_cannot_wait_for_the_save_it_is_part_of(clock):
    manager = SessionManager(clock=clock)
    raised = []

    @manager.on("persist_user_data")
    async def save(session):
        for call in (session.persist_now, manager.persist_all_user_data, session.wait_ended):
            try:
                await asyncio.gather(call())
            except WouldDeadlockError as error:
                raised.append(error)

    session = await add_user(manager, 1)
    await session.persist_now()
    assert len(raised) == 3
    await manager.destroy()


@pytest.mark.fault("All slots were held by listeners that waited for saves that needed a slot.")
@pytest.mark.parametrize(("slots", "call"), [(1, "persist_now"), (1, "destroy"), (4, "persist_now")])
async def test_a_listener_that_waits_for_another_save_does_not_starve_it(clock, slots, call):
    manager = SessionManager(max_in_flight=slots, clock=clock)
    stored = []

    @manager.on("persist_user_data")
    async def save(session):
        await asyncio.sleep(0)
        guild = session.get("guild")
        if guild is not None and guild.alive:
            await (guild.persist_now() if call == "persist_now" else guild.destroy(True))
        stored.append(session.user_id)

    members = []
    for number in range(slots):
        member = await add_user(manager, number)
        member.set("guild", await add_user(manager, f"guild {number}"))
        members.append(member)
    await finishes(*(member.persist_now() for member in members))
    assert len(stored) == 2 * slots
    await manager.destroy()


async def test_a_save_of_everybody_notices_a_circle_of_waits(clock):
    manager = SessionManager(clock=clock)
    go = asyncio.Event()
    first, second = await add_user(manager, 1), await add_user(manager, 2)

    @manager.on("persist_user_data")
    async def save(session):
        if session is first:
            await second.destroy()

    @second.on("before_destroy")
    async def everybody():
        await go.wait()
        await manager.persist_all_user_data()

    end, save_first = asyncio.create_task(second.destroy()), asyncio.create_task(first.persist_now())
    await turns()
    go.set()
    await turns(100)
    assert end.done()
    assert save_first.done()
    await asyncio.gather(end, save_first, return_exceptions=True)
    await manager.destroy()


@pytest.mark.parametrize("wait", ["destroy", "wait_ended"])
async def test_a_slot_that_is_lent_is_used_at_once(clock, wait):
    manager = SessionManager(interval="1h", max_in_flight=1, clock=clock)
    stored = []

    @manager.on("persist_user_data")
    async def save(session):
        await go.wait()
        if session is first:
            await (second.destroy(True) if wait == "destroy" else second.wait_ended())
        stored.append(session.user_id)

    go = asyncio.Event()
    first, second = await add_user(manager, 1), await add_user(manager, 2)
    saving = asyncio.create_task(first.persist_now())
    await turns()
    ending = asyncio.create_task(second.destroy(True))
    await turns()
    go.set()
    await finishes(saving, ending)
    assert stored == [2, 1]
    await manager.destroy()


async def test_a_listener_lends_one_slot_however_many_saves_it_waits_for(clock):
    db = Db(clock, delay="10ms")
    manager = SessionManager(max_in_flight=2, clock=clock)
    others = [await add_user(manager, user_id) for user_id in range(50)]
    leader = await add_user(manager, "leader")

    @manager.on("persist_user_data")
    async def save(session):
        if session is leader:
            await asyncio.gather(*(other.persist_now() for other in others))
        else:
            await db.save(session)

    await let_time_pass(clock, leader.persist_now())
    assert len(db.log) == 50
    assert db.most_open == 2
    await manager.destroy()


async def test_frames_and_notes_do_not_pile_up(clock):
    manager = SessionManager(clock=clock)
    failure = ValueError("the same each time")

    @manager.on("persist_user_data")
    def save(session):
        raise failure

    session = await add_user(manager, 1)
    for _ in range(20):
        with pytest.raises(ListenerError):
            await session.persist_now()
    assert len(failure.__notes__) == 1

    depth = []

    async def generation(left):
        next_one = await manager.create()
        depth.append(len(waits._frames.get()))
        if left:
            next_one.on("destroy", lambda: tasks.append(asyncio.create_task(generation(left - 1))))
        await next_one.destroy()

    tasks = [asyncio.create_task(generation(20))]
    await turns(500)
    assert len(tasks) == 21
    assert max(depth) <= 2
    await manager.destroy()


async def test_a_block_that_edits_a_user_cannot_wait_for_itself(clock, store, manager):
    store.put(1, b'{"n":0}')
    session = await manager.create()
    async with manager.edit(1) as data:
        for call in (
            lambda: manager.open(1),
            lambda: manager.open(1, when_active="replace"),
            lambda: session.login(1),
            lambda: manager.erase(1),
            lambda: manager.edit(1).__aenter__(),
        ):
            with pytest.raises(WouldDeadlockError):
                await call()
        data["n"] = 1
    assert store.stored(1) == {"n": 1}
    await end(clock, manager)


@pytest.mark.parametrize("event", ["before_destroy", "destroy"])
@pytest.mark.parametrize("call", ["edit", "erase", "open", "login"])
async def test_a_listener_of_an_end_that_a_login_waits_for_cannot_wait_for_that_login(
    clock, store, manager, event, call
):
    """It hears `WouldDeadlockError` (or is served) instead of hanging for ever with the login and the user."""
    session = await changed(manager)
    outcome: list[Any] = []

    async def listener() -> None:
        try:
            if call == "edit":
                async with manager.edit(1) as data:
                    data["seen"] = True
            elif call == "erase":
                await manager.erase(1)
            elif call == "open":
                await manager.open(1)
            else:
                await (await manager.create()).login(1)
        except Exception as error:
            outcome.append(error)
        else:
            outcome.append("done")

    session.on(event, listener)
    login = asyncio.ensure_future((await manager.create()).login(1, default={"n": 0}))
    await clock.advance("30s")
    hangs = not login.done()
    leaving = asyncio.gather(manager.destroy(deadline="1s"), login, return_exceptions=True)
    await let_time_pass(clock, leaving)
    assert not hangs, "the login hangs, and with it the user"
    assert outcome == ["done"] or isinstance(outcome[0], WouldDeadlockError), outcome


async def test_an_open_of_ones_own_user_in_before_destroy_is_told_at_once(clock, store, manager):
    """`open` shares a task, but knows who called it: no ten seconds, and no talk of the store."""
    session = await changed(manager)
    outcome: list[Any] = []

    async def listener() -> None:
        try:
            outcome.append(await manager.open(1))
        except Exception as error:
            outcome.append(error)

    session.on("before_destroy", listener)
    task = asyncio.ensure_future(session.destroy())
    await clock.advance("15s")
    await asyncio.gather(task, return_exceptions=True)
    assert [type(each) for each in outcome] == [WouldDeadlockError]
    await end(clock, manager)


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
