"""`MemoryStore` against the contract, and what is only its own."""

from __future__ import annotations

import pytest

from cagey_sessions import StoreContractError
from cagey_sessions.stores import MemoryStore
from cagey_sessions.stores.memory import MemoryBacking
from cagey_sessions.testing.conformance.base import SAVED
from cagey_sessions.testing.store_conformance import (
    StoreConformance,
    StoreMachine,
    claim,
    machine_test,
    opened,
    record,
    save,
)


class TestMemoryStore(StoreConformance):
    @pytest.fixture
    def make(self):
        backing = MemoryBacking()
        return lambda: MemoryStore(backing)

    async def bury(self, store, owner):
        store.bury(owner)

    async def damage(self, store, user_id):
        row = store.backing.rows[user_id]
        row.record = row.record._replace(version="x")


class MemoryMachine(StoreMachine):
    def make(self):
        return MemoryStore()

    def bury(self, owner):
        self.store.bury(owner)


TestMemoryMachine = pytest.mark.slow(machine_test(MemoryMachine, 150))


async def test_stores_without_a_common_backing_have_nothing_in_common():
    async with opened(MemoryStore(), MemoryStore()) as (one, other):
        assert await save(one, record(epoch=(await claim(one)).epoch)) == [SAVED]
        assert await other.load(1) is None
        assert (await claim(other, 1, "b")).granted


async def test_a_store_that_is_open_is_not_opened_again():
    async with opened(MemoryStore()) as store:
        with pytest.raises(StoreContractError):
            await store.open()
        assert (await claim(store)).granted, "the one that has it goes on"


async def test_a_buried_owner_is_dead_on_every_node_and_those_who_took_over_are_alive():
    backing = MemoryBacking()
    async with opened(MemoryStore(backing), MemoryStore(backing)) as (one, other):
        await claim(one, 1, "a")
        one.bury("a")
        assert (await claim(other, 1, "b")).granted
        assert (await claim(one, 1, "a")).owner == "b"
