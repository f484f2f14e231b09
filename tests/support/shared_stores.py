"""What every store does that several servers share. What lives here: tests of leases and of whole managers, each run on
every such engine. What must not: SQL, keys, or anything that only one engine does.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cagey_sessions import OwnedElsewhereError, SessionManager
from cagey_sessions.testing.conformance.base import FENCED, SAVED
from cagey_sessions.testing.store_conformance import StoreConformance, claim, opened, record, save
from support import refuse_a_second_manager


class SharedStoreConformance(StoreConformance):
    """The contract, and what is promised beyond it; `make` takes the settings of the store."""

    async def expire(self) -> None:
        """All leases have run out, as after an outage; nobody is in doubt by that."""
        raise NotImplementedError

    async def lose_leases(self) -> None:
        """The engine has no lease of anybody."""
        raise NotImplementedError

    async def alive_until(self) -> Any:
        """When the only lease runs out."""
        raise NotImplementedError

    async def seconds_left(self) -> float:
        """Until the lease of "a" runs out, or the doubt about it ends, by the clock of the engine."""
        raise NotImplementedError

    async def renewal(self) -> None:
        """Wait until the only lease is renewed."""
        first = await self.alive_until()
        async with asyncio.timeout(20):
            while await self.alive_until() <= first:  # noqa: ASYNC110 - the engine sets no event
                await asyncio.sleep(0.05)

    async def test_an_owner_who_does_not_renew_an_expired_lease_loses_users_to_whoever_asks(self, make):
        async with opened(make(), make()) as (here, there):
            epoch = (await claim(here, 1, "a")).epoch
            assert not (await claim(there, 1, "b")).granted
            await self.expire()
            assert not (await claim(there, 1, "b")).granted, "it is put in doubt, no more"
            assert not (await claim(there, 1, "b")).granted
            await self.expire()
            assert (await claim(there, 1, "b")).granted
            assert await save(here, record(epoch=epoch)) == [FENCED]
            with pytest.raises(OwnedElsewhereError):
                await here.erase(1, "a")

    async def test_the_doubt_begins_with_the_first_ask_that_finds_the_lease_run_out(self, make):
        """So the users of a dead server are free a third of a lease after that, and no sooner for an earlier ask."""
        async with opened(make(lease=600), make(lease=600)) as (here, there):
            await claim(here, 1, "a")
            assert 500 < await self.seconds_left() <= 600, "after the last renewal"
            for _ in range(3):
                assert not (await claim(there, 1, "b")).granted
            assert 500 < await self.seconds_left() <= 600, "whoever asks before it has run out begins nothing"
            await self.expire()
            assert not (await claim(there, 1, "b")).granted
            assert 150 < await self.seconds_left() <= 200, "a third, from the first ask after that"
            assert not (await claim(there, 1, "b")).granted
            assert await self.seconds_left() <= 200, "a later ask does not make it longer"
            await self.expire()
            assert (await claim(there, 1, "b")).granted

    async def test_after_an_outage_whoever_comes_back_first_takes_nobodys_users(self, make):
        async with opened(make(), make()) as (here, there):
            epoch = (await claim(here, 1, "a")).epoch
            await claim(there, 2, "b")
            await self.expire()
            assert not (await claim(there, 1, "b")).granted
            await here._leases.renew("a")
            await self.expire()
            assert not (await claim(there, 1, "b")).granted, "it has renewed since it was put in doubt"
            assert await save(here, record(epoch=epoch)) == [SAVED]

    async def test_an_owner_without_a_lease_is_put_in_doubt_before_it_counts_as_dead(self, make):
        """Its lease may be lost, or not be there yet."""
        async with opened(make(), make()) as (here, there):
            await claim(here, 1, "a")
            await self.lose_leases()
            assert not (await claim(there, 1, "b")).granted
            assert not (await claim(there, 1, "b")).granted
            await self.expire()
            assert (await claim(there, 1, "b")).granted

    async def test_a_store_that_is_closed_leaves_its_users_to_others(self, make):
        async with opened(make()) as there:
            async with opened(make()) as here:
                await claim(here, 1, "a")
            assert (await claim(there, 1, "b")).granted

    async def test_a_lease_is_renewed_while_the_store_is_open(self, make):
        async with opened(make(timeout=1, lease=1)) as store:
            await claim(store, 1, "a")
            await self.renewal()

    def test_a_store_may_be_opened_again_on_another_loop(self, make):
        store = make()

        async def claim_at_once() -> None:
            async with opened(store):
                answers = await asyncio.gather(*(claim(store, user) for user in range(8)))
                assert all(each.granted for each in answers)

        asyncio.run(claim_at_once())
        asyncio.run(claim_at_once())

    async def test_a_manager_keeps_its_users_there(self, make):
        async with SessionManager(store=make()) as manager:
            session = await manager.open("alice", default={"gold": 0})
            session.user_data["gold"] += 10
            assert (await session.persist_now()).changed
            async with SessionManager(store=make()) as other:
                with pytest.raises(OwnedElsewhereError):
                    await other.open("alice")
                await session.destroy()
                assert (await other.open("alice")).user_data == {"gold": 10}

    async def test_a_store_belongs_to_one_manager(self, make):
        await refuse_a_second_manager(make())
