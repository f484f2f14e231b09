"""Leases: renewed in time, and not given any more once the store closes."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from cagey_sessions import StoreUnavailableError
from cagey_sessions.stores import RedisStore, leases

needs_redis_server = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server here")


@needs_redis_server
async def test_a_lease_that_is_asked_for_while_the_store_closes_is_not_given(servers, monkeypatch):
    server = servers("closing")
    store = RedisStore(f"unix://{server.socket}", prefix="cagey:")
    gate, made = asyncio.Event(), []
    await store.open()
    connect = store._connect

    async def connect_late():
        await gate.wait()
        made.append(await connect())
        return made[-1]

    monkeypatch.setattr(store, "_connect", connect_late)
    claiming = asyncio.ensure_future(store.claim_many([1], "late"))
    await asyncio.sleep(0)
    await store.close()
    gate.set()
    with pytest.raises(StoreUnavailableError):
        await claiming
    assert [connection.is_connected for connection in made] == [False], "its connection is closed"
    assert not server.client.exists("cagey:node:late")


async def test_a_lease_is_renewed_well_before_a_doubt_that_begins_just_after_a_renewal_ends(monkeypatch):
    sleeps, slept = [], asyncio.Event()

    async def sleep(seconds):
        sleeps.append(seconds)
        slept.set()
        await asyncio.get_running_loop().create_future()

    async def send(owner):
        pass

    lease = leases.Leases("TestStore", 15, send)
    monkeypatch.setattr(leases.asyncio, "sleep", sleep)
    await lease.hold("a")
    await slept.wait()
    monkeypatch.undo()
    await lease.end()
    assert sleeps[0] < 15 / 3 - 1, "a doubt lasts for a third"


async def test_a_lease_goes_on_being_renewed_after_somebody_has_cancelled_every_task():
    renewed = asyncio.Event()

    async def send(owner):
        renewed.set()

    lease = leases.Leases("TestStore", 0.2, send)
    await lease.hold("a")
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        if task.get_name() == "cagey-sessions lease":
            task.cancel()
            await asyncio.wait([task])
    async with asyncio.timeout(5):
        while not any(task.get_name() == "cagey-sessions lease" for task in asyncio.all_tasks()):
            await lease.hold("a")  # claims go on, and one of them finds the lease old
            await asyncio.sleep(0)
    renewed.clear()
    await asyncio.wait_for(renewed.wait(), 5)
    await lease.end()
