"""`debug=True`: what holds the loop is named, listeners and `before_save`, and what waits is not."""

from __future__ import annotations

import asyncio
import functools
import time
from typing import Any

import pytest

from cagey_sessions import SessionManager
from support import ManualClock, ScriptedStore, end, turns


@pytest.fixture
def make(clock: ManualClock, store: ScriptedStore) -> Any:
    return functools.partial(SessionManager, store=store, clock=clock, debug=True)


async def test_a_listener_that_holds_the_loop_is_named(clock, store, make, said):
    manager = make()

    def slow(*_: object) -> None:
        time.sleep(0.15)

    class Slow:
        async def method(self, *_: object) -> None:
            await asyncio.sleep(0)
            time.sleep(0.15)  # noqa: ASYNC251 - the mistake
            await asyncio.sleep(0)

    manager.on("started", slow)
    manager.on("identified", functools.partial(Slow().method, 1))
    sessions = [await manager.create() for _ in range(2)]
    for number, session in enumerate(sessions):
        session.on("before_destroy", slow)
        await session.start()
        await session.login(number, default={})
        await session.destroy()
    for text, name in zip(
        said(), ["slow (event 'started')", "Slow.method (event 'identified')", "slow (event 'before_"], strict=True
    ):
        assert name in text
        assert "held the event loop for 1" in text
    await end(clock, manager)


async def test_before_save_that_holds_the_loop_is_named(clock, store, make, said):
    def dawdle(session: Any) -> None:
        time.sleep(0.15)

    manager = make(before_save=dawdle)
    ann = await manager.open("ann", default={})
    await ann.persist_now()
    await ann.persist_now()
    (text,) = said()
    assert "dawdle (before_save) held the event loop" in text
    await end(clock, manager)


async def test_a_listener_that_waits_does_not_hold_the_loop(clock, store, make, said):
    manager = make()
    heard: list[object] = []

    @manager.on("started")
    async def wait(session: Any) -> None:
        for _ in range(4):
            await asyncio.sleep(0.05)
        heard.append(await asyncio.to_thread(lambda: "done"))

    @manager.on("started")
    def hand_back_a_task(session: Any) -> asyncio.Task[None]:
        return asyncio.ensure_future(asyncio.sleep(0.15, heard.append(1)))

    await (await manager.create()).start()
    assert heard == ["done", 1]
    assert said() == []
    await end(clock, manager)


async def test_timed_listeners_raise_and_are_cancelled_like_others(clock, store, make, said):
    manager = make()
    seen: list[object] = []

    @manager.on("started")
    async def hang(session: Any) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as error:
            seen.append(type(error))
            await asyncio.sleep(0)
            seen.append("tidied")
            raise

    session = await manager.create()
    starting = asyncio.ensure_future(session.start())
    await turns()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert seen == [asyncio.CancelledError, "tidied"]
    manager.off("started", hang)

    class Odd:
        """Something to await whose iterator is no generator."""

        def __await__(self) -> Any:
            return iter([None, None])

    @manager.on("started")
    async def timeout(session: Any) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        raise KeyError

    manager.on("started", lambda session: Odd())
    with pytest.raises(ExceptionGroup) as caught:
        await session.start()
    assert [type(error) for error in caught.value.exceptions] == [KeyError]
    await end(clock, manager)
