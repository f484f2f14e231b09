"""A listener of an end can see why it is one, to tell the client: `end_reason` is set before the first of them runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cagey_sessions import DrainError, EndReason, FencedError, ListenerError, SessionManager, UnsavableError
from support import ScriptedStore, inside, let_time_pass


async def destroy(manager: SessionManager, store: Any) -> None:
    await manager.find_by_user("ann").destroy()


async def leave_block(manager: SessionManager, store: Any) -> None:
    async with manager.find_by_user("ann"):
        pass


async def replace(manager: SessionManager, store: Any) -> None:
    await (await manager.create()).login("ann")


async def drain(manager: SessionManager, store: Any) -> None:
    await manager.destroy()


async def drain_without_success(manager: SessionManager, store: Any) -> None:
    manager.find_by_user("ann").user_data["a set"] = {1}
    with pytest.raises(DrainError):
        await manager.destroy(deadline="1s")


async def erase(manager: SessionManager, store: Any) -> None:
    await manager.erase("ann")


async def take_over(manager: SessionManager, store: Any) -> None:
    store.bury(inside(manager).owner)
    async with SessionManager(store=ScriptedStore(store.clock, backing=store.backing), clock=store.clock) as other:
        theirs = await other.open("ann")
        theirs.user_data["gold"] = 9
        await theirs.destroy()
    session = manager.find_by_user("ann")
    session.user_data["gold"] = 5
    with pytest.raises(FencedError):
        await session.persist_now()


# how the session ends, what its listeners see, and what it has ended with
ENDS: dict[str, tuple[Callable[[SessionManager, Any], Any], list[EndReason], EndReason]] = {
    "destroy": (destroy, [EndReason.DESTROYED] * 2, EndReason.DESTROYED),
    "the end of its block": (leave_block, [EndReason.DESTROYED] * 2, EndReason.DESTROYED),
    "a later login": (replace, [EndReason.REPLACED] * 2, EndReason.REPLACED),
    "the end of the manager": (drain, [EndReason.DRAINED] * 2, EndReason.DRAINED),
    "the end of the manager, unsaved": (
        drain_without_success,
        [EndReason.DRAINED, EndReason.UNSAVED],
        EndReason.UNSAVED,
    ),
    "an erasure": (erase, [EndReason.ERASED] * 2, EndReason.ERASED),
    "a takeover": (take_over, [EndReason.FENCED] * 2, EndReason.FENCED),
}


@pytest.mark.parametrize("how", ENDS)
async def test_listeners_of_an_end_see_why_it_is_one(how, clock, store, manager):
    end, expected, last = ENDS[how]
    session = await manager.open("ann", default={"gold": 0})
    await let_time_pass(clock, session.persist_now())
    seen: list[tuple[str, str | None, bool]] = []
    for event in ("before_destroy", "destroy"):
        session.on(event, lambda event=event: seen.append((event, session.end_reason, session.alive)))
    assert session.end_reason is None
    await let_time_pass(clock, end(manager, store))
    await let_time_pass(clock, clock.sleep("1s"))
    assert seen == [("before_destroy", expected[0], True), ("destroy", expected[1], True)]
    assert (session.end_reason, session.alive) == (last, False)
    assert await session.wait_ended() is last
    if not inside(manager).closed:
        await let_time_pass(clock, manager.destroy())


async def test_listeners_of_the_end_of_a_session_whose_creation_failed_see_that(manager, clock):
    seen = []
    manager.on("created", lambda session: 1 / 0)
    manager.on("destroy", lambda session: seen.append(session.end_reason))
    with pytest.raises(ListenerError):
        await manager.create()
    assert seen == [EndReason.CREATE_FAILED]
    await let_time_pass(clock, manager.destroy())


async def test_an_end_that_is_refused_leaves_no_reason(manager, clock):
    session = await manager.open("ann", default={})
    session.user_data["a set"] = {1}
    with pytest.raises(UnsavableError):
        await session.destroy()
    assert session.alive and session.end_reason is None
    await let_time_pass(clock, session.destroy(persist=False))
    await let_time_pass(clock, manager.destroy())
