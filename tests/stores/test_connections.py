"""Who has which connection to an engine: one call on each, none used after one that did not end, nobody forgotten."""

from __future__ import annotations

import asyncio

import pytest

from cagey_sessions import StoreUnavailableError
from cagey_sessions.stores.connections import Connections


class Wire:
    def __init__(self) -> None:
        self.is_cut = self.is_finished = False
        self.users = 0


class Engine:
    """Makes connections, and knows them all."""

    def __init__(self, most: int = 2, timeout: float = 30) -> None:
        self.made: list[Wire] = []
        self.fails = False
        self.connections = Connections(
            "TestStore",
            most=most,
            timeout=timeout,
            connect=self.connect,
            is_live=lambda wire: not wire.is_cut,
            cut=self.cut,
            finish=self.finish,
        )

    async def connect(self) -> Wire:
        await asyncio.sleep(0)
        if self.fails:
            raise OSError("refused")
        self.made.append(Wire())
        return self.made[-1]

    @staticmethod
    def cut(wire: Wire) -> None:
        wire.is_cut = True

    @staticmethod
    async def finish(wire: Wire) -> None:
        wire.is_finished = wire.is_cut = True


async def hold(wire: Wire, gate: asyncio.Event) -> Wire:
    wire.users += 1
    assert wire.users == 1, "two calls on one connection"
    await gate.wait()
    wire.users -= 1
    return wire


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_connection_has_one_call_at_a_time_and_is_used_again():
    engine, gate = Engine(), asyncio.Event()
    calls = [asyncio.ensure_future(engine.connections.run(lambda wire: hold(wire, gate))) for _ in range(9)]
    await settled()
    assert [wire.users for wire in engine.made] == [1, 1]
    gate.set()
    used = await asyncio.gather(*calls)
    assert {id(wire) for wire in used} == {id(wire) for wire in engine.made}
    assert len(engine.made) == 2
    await engine.connections.close()


async def test_a_cancelled_call_leaves_a_connection_that_nobody_uses_again():
    engine, gate = Engine(most=1), asyncio.Event()
    call = asyncio.ensure_future(engine.connections.run(lambda wire: hold(wire, gate)))
    await settled()
    call.cancel()
    await asyncio.wait([call])
    assert engine.made[0].is_cut
    gate.set()
    assert await engine.connections.run(lambda wire: hold(wire, gate)) is engine.made[1]
    await engine.connections.close()


async def test_places_survive_any_number_of_cancelled_and_failed_calls():
    engine, gate = Engine(most=2), asyncio.Event()
    for turns in range(40):
        calls = [asyncio.ensure_future(engine.connections.run(lambda wire: hold(wire, gate))) for _ in range(5)]
        engine.fails = turns % 3 == 0
        for _ in range(turns % 7):
            await asyncio.sleep(0)
        for call in calls[turns % 2 :: 2]:
            call.cancel()
        gate.set()
        await asyncio.gather(*calls, return_exceptions=True)
        gate.clear()
        for wire in engine.made:
            wire.users = 0
    engine.fails = False
    calls = [asyncio.ensure_future(engine.connections.run(lambda wire: hold(wire, gate))) for _ in range(2)]
    await settled()
    assert sum(wire.users for wire in engine.made) == 2, "both places are there"
    gate.set()
    await asyncio.gather(*calls)
    await engine.connections.close()


async def test_a_call_that_waits_for_a_place_can_be_given_up():
    engine, gate = Engine(most=1), asyncio.Event()
    first = asyncio.ensure_future(engine.connections.run(lambda wire: hold(wire, gate)))
    await settled()
    second = asyncio.ensure_future(engine.connections.run(lambda wire: hold(wire, gate)))
    await settled()
    engine.connections.abort(second)
    with pytest.raises(StoreUnavailableError, match="given up"):
        await second
    gate.set()
    await first
    assert not engine.made[0].is_cut
    await engine.connections.close()


async def test_who_waits_too_long_for_a_place_is_told():
    engine, gate = Engine(most=1, timeout=0.01), asyncio.Event()
    first = asyncio.ensure_future(engine.connections.run(lambda wire: hold(wire, gate)))
    await settled()
    with pytest.raises(StoreUnavailableError, match="free in time"):
        await engine.connections.run(lambda wire: hold(wire, gate))
    gate.set()
    await first
    await engine.connections.close()


async def test_closing_lets_calls_come_to_their_end_and_lets_nobody_else_begin():
    engine, gate = Engine(most=1), asyncio.Event()
    first = asyncio.ensure_future(engine.connections.run(lambda wire: hold(wire, gate)))
    await settled()
    waiting = asyncio.ensure_future(engine.connections.run(lambda wire: hold(wire, gate)))
    await settled()
    closing = asyncio.ensure_future(engine.connections.close())
    with pytest.raises(StoreUnavailableError):
        await waiting
    with pytest.raises(StoreUnavailableError):
        await engine.connections.run(lambda wire: hold(wire, gate))
    assert not closing.done()
    gate.set()
    await asyncio.gather(first, closing)
    assert engine.made[0].is_finished


async def test_closing_does_not_wait_for_ever():
    engine, gate = Engine(most=1, timeout=0.01), asyncio.Event()
    first = asyncio.ensure_future(engine.connections.run(lambda wire: hold(wire, gate)))
    await settled()
    await engine.connections.close()
    assert engine.made[0].is_cut
    gate.set()
    await first


async def test_a_place_is_not_lost_with_a_call_that_is_cancelled_while_its_connection_is_given_back():
    engine, gate = Engine(most=1), asyncio.Event()
    giving = asyncio.Event()

    class OfPool(Connections[Wire]):
        async def _give(self, connection: Wire) -> None:
            giving.set()
            await gate.wait()

    connections = OfPool(
        "TestStore",
        most=1,
        timeout=30,
        connect=engine.connect,
        is_live=lambda wire: True,
        cut=engine.cut,
        finish=engine.finish,
    )

    async def work(wire: Wire) -> str:
        return "done"

    call = asyncio.ensure_future(connections.run(work))
    await giving.wait()
    call.cancel()
    await asyncio.wait([call])
    gate.set()
    async with asyncio.timeout(5):
        assert await connections.run(work) == "done"
        await connections.close()
