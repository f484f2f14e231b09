"""A store belongs to one manager at a time, whichever store it is; `shared_stores.py` asks the same of the engines."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from cagey_sessions import SessionManager, StoreContractError, StoreLayoutError, UserNotFoundError
from cagey_sessions.stores import CallbackStore, MemoryStore, SQLiteStore
from support import refuse_a_second_manager


class Own(MemoryStore):
    """As somebody may write one: it does not mind being opened twice."""

    async def open(self) -> None:
        self._is_open = True


def callbacks() -> CallbackStore:
    rows: dict[Any, bytes] = {}
    return CallbackStore(rows.get, lambda records: rows.update((each.user_id, each.body) for each in records))


@pytest.mark.parametrize("kind", ["memory", "callbacks", "sqlite", "own"])
async def test_a_second_manager_is_refused_and_a_later_one_is_not(kind, path):
    makers = {"memory": MemoryStore, "callbacks": callbacks, "sqlite": lambda: SQLiteStore(path), "own": Own}
    await refuse_a_second_manager(makers[kind]())


async def test_a_store_that_the_program_has_opened_itself_is_not_closed_by_a_manager_that_was_refused():
    store = MemoryStore()
    await store.open()
    manager = SessionManager(store=store)
    with pytest.raises(StoreContractError):
        await manager.open("ann", default={})
    await manager.destroy()
    assert await store.load("ann") is None
    await store.close()


async def test_a_manager_that_could_not_open_a_store_leaves_it_to_the_next():
    class Flaky(MemoryStore):
        fails = True

        async def open(self) -> None:
            if self.fails:
                raise StoreLayoutError("not ours")
            await super().open()

    store = Flaky()
    first, second = SessionManager(store=store), SessionManager(store=store)
    with pytest.raises(StoreLayoutError):
        await first.read("ann")
    store.fails = False
    async with second:
        await second.open("ann", default={})
        await first.destroy()
        await second.persist_all_user_data()
        assert await second.read("ann") == {}


async def test_a_manager_that_is_gone_keeps_no_store():
    store = callbacks()
    manager = SessionManager(store=store)
    with pytest.raises(UserNotFoundError):
        await manager.read("ann")
    del manager
    gc.collect()
    async with SessionManager(store=store) as following:
        await following.open("ann", default={})
