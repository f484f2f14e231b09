"""Each awaited call against a store that never answers: it raises within the time that the page of guarantees gives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from cagey_sessions import DrainError, SessionManager, StoreUnavailableError, UnsavedError
from cagey_sessions.stores import MemoryStore
from support import SECOND, let_time_pass

TIMEOUT = 3
"""What `save_timeout` is here, in seconds."""


class Silent(MemoryStore):
    """Answers until it is told not to; from then on each call hangs until it is aborted."""

    silent = False

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()

    def abort(self, call: asyncio.Task[Any]) -> None:
        call.cancel()


def silenced(name: str) -> Callable[..., Any]:
    real = getattr(MemoryStore, name)

    async def method(self: Silent, *args: Any) -> Any:
        if self.silent:
            await self.go.wait()
        return await real(self, *args)

    return method


for name in ("open", "claim_many", "save_many", "load", "erase", "release_many"):
    setattr(Silent, name, silenced(name))


async def enter(manager: SessionManager) -> None:
    await manager.__aenter__()


async def login(manager: SessionManager) -> None:
    await (await manager.create()).login("bob", default={})


async def replace(manager: SessionManager) -> None:
    await (await manager.create()).login("ann")


async def edit(manager: SessionManager) -> None:
    async with manager.edit("bob", default={}):
        pass


async def edit_live(manager: SessionManager) -> None:
    async with manager.edit("ann") as data:
        data["gold"] = 3


async def leave_block(manager: SessionManager) -> None:
    async with manager.find_by_user("ann"):
        pass


# the call, what it raises, and for how many seconds it may wait
CALLS: dict[str, tuple[Callable[[SessionManager], Any], type[Exception], float]] = {
    "login": (login, StoreUnavailableError, TIMEOUT),
    "login that replaces": (replace, StoreUnavailableError, TIMEOUT),
    "open": (lambda manager: manager.open("bob", default={}), StoreUnavailableError, TIMEOUT),
    "read": (lambda manager: manager.read("bob"), StoreUnavailableError, TIMEOUT),
    "edit": (edit, StoreUnavailableError, TIMEOUT),
    "edit of a user who is here": (edit_live, StoreUnavailableError, TIMEOUT),
    "erase": (lambda manager: manager.erase("bob"), StoreUnavailableError, TIMEOUT),
    "create that replaces": (lambda manager: manager.create("k", replace=True), StoreUnavailableError, TIMEOUT),
    "persist_now": (lambda manager: manager.find_by_user("ann").persist_now(), StoreUnavailableError, TIMEOUT),
    "persist_all_user_data": (lambda manager: manager.persist_all_user_data(), UnsavedError, 2 * TIMEOUT),
    "session.destroy": (lambda manager: manager.find_by_user("ann").destroy(), StoreUnavailableError, TIMEOUT),
    "leaving a session's block": (leave_block, StoreUnavailableError, TIMEOUT),
    "manager.destroy": (lambda manager: manager.destroy(deadline="5s"), DrainError, 5 + 1 + 3),
}


@pytest.mark.parametrize("call", CALLS)
async def test_a_call_waits_for_a_silent_store_as_long_as_the_page_says(call, clock):
    act, raises, longest = CALLS[call]
    store = Silent()
    manager = SessionManager(store=store, clock=clock, save_timeout=TIMEOUT)
    ann = await manager.create("k")
    await ann.login("ann", default={"gold": 0})
    await ann.persist_now()
    store.silent = True
    ann.user_data["gold"] = 1
    began = clock.now()
    with pytest.raises(raises):
        await let_time_pass(clock, act(manager))
    assert clock.now() - began <= (longest + 0.1) * SECOND, "and a grid of 50 ms, by which callers are told"
    store.silent = False
    store.go.set()  # what is under way beyond the end comes to its own
    if call != "manager.destroy":
        await let_time_pass(clock, clock.sleep("2s"))
        await let_time_pass(clock, manager.destroy())


async def test_a_store_that_does_not_open_in_time_is_tried_again_by_the_next_call(clock):
    store = Silent()
    store.silent = True
    manager = SessionManager(store=store, clock=clock, save_timeout=TIMEOUT)
    began = clock.now()
    with pytest.raises(StoreUnavailableError, match="could not be opened within 3 s"):
        await let_time_pass(clock, enter(manager))
    assert clock.now() - began <= (TIMEOUT + 0.1) * SECOND
    store.silent = False
    for task in asyncio.all_tasks():
        if task.get_name() == "cagey-sessions store call":
            task.cancel()
    assert (await let_time_pass(clock, manager.open("bob", default={}))).user_id == "bob"
    await let_time_pass(clock, manager.destroy())
