"""Random histories of two servers on one store that delays, fails, hangs, loses replies and rows.

A register for each user: every change writes a number that is higher than any before. Whatever was acknowledged is what
a later load sees, or something newer; what `destroy` has returned for is in the store.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from typing import Any

import pytest

from cagey_sessions import (
    CageySessionsError,
    FencedError,
    OwnedElsewhereError,
    SessionEndedError,
    SessionManager,
    StoreError,
    UnsavableError,
    UnsavedError,
)
from cagey_sessions.stores import Outcome, Verdict
from conftest import run
from support import ManualClock, ScriptedStore, inside, turns

SEEDS = int(os.environ.get("CAGEY_TEST_HISTORIES", "40"))
USERS = 4
STEPS = 120


class History:
    """Two servers, four users, and what is known of each user."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        random.seed(seed)
        self.clock = ManualClock(10**12)
        first = ScriptedStore(self.clock, "1ms")
        self.stores = [first, ScriptedStore(self.clock, "1ms", first.backing)]
        shared = self.chance.random() < 0.8
        fenced = self.chance.random() < 0.8 or shared
        for store in self.stores:
            store.fenced, store.shared = fenced, shared
        self.managers = [
            SessionManager(
                store=store,
                clock=self.clock,
                interval=self.chance.choice(["1s", "5s", "30s"]),
                save_timeout=self.chance.choice(["2s", "10s"]),
                max_in_flight=self.chance.choice([1, 2, 4]),
            )
            for store in self.stores[: 2 if shared else 1]
        ]
        self.next_number = [0] * USERS
        self.acknowledged = [0] * USERS
        self.tasks: list[asyncio.Task[Any]] = []
        self.log: list[str] = []

    # What the program does

    def change(self, session: Any) -> None:
        try:
            data = session.user_data
        except SessionEndedError:
            return
        if data is None:
            return
        self.next_number[session.user_id] += 1
        data["n"] = self.next_number[session.user_id]
        data["twice"] = 2 * data["n"]

    def see(self, user_id: int, data: Any, how: str) -> None:
        """A load: nothing acknowledged may be missing."""
        assert data["n"] >= self.acknowledged[user_id], f"{how} of user {user_id}: acknowledged data is gone"
        assert data["twice"] == 2 * data["n"]

    async def open(self, manager: Any, user_id: int) -> None:
        session = await manager.open(user_id, default={"n": 0, "twice": 0})
        if session.alive:
            self.see(user_id, session.user_data, "open")

    async def login(self, manager: Any, user_id: int) -> None:
        session = await manager.create()
        try:
            await session.login(user_id, default={"n": 0, "twice": 0})
            if session.alive:
                self.see(user_id, session.user_data, "login")
        finally:
            if session.user_id is None:
                await session.destroy()

    async def persist(self, session: Any) -> None:
        user_id, n = session.user_id, session.user_data["n"]
        receipt = await session.persist_now()
        assert receipt.version > 0
        self.acknowledged[user_id] = max(self.acknowledged[user_id], n)

    async def destroy(self, session: Any) -> None:
        user_id, n = session.user_id, session.user_data["n"]
        was_ending = inside(session._host).table.is_ending(session)
        await session.destroy()
        if not was_ending and session.end_reason == "destroyed":
            self.acknowledged[user_id] = max(self.acknowledged[user_id], n)

    async def drop(self, session: Any) -> None:
        await session.destroy(persist=False)

    async def edit(self, manager: Any, user_id: int) -> None:
        async with manager.edit(user_id, default={"n": 0, "twice": 0}) as data:
            self.see(user_id, data, "edit")
            self.next_number[user_id] += 1
            n = data["n"] = self.next_number[user_id]
            data["twice"] = 2 * n
        self.acknowledged[user_id] = max(self.acknowledged[user_id], n)

    async def read(self, manager: Any, user_id: int) -> None:
        data = await manager.read(user_id)
        assert data["twice"] == 2 * data["n"]

    def begin(self, work: Any, *arguments: Any) -> None:
        async def tolerate() -> None:
            try:
                await work(*arguments)
            except CageySessionsError as error:
                allowed = (
                    StoreError,
                    UnsavableError,
                    UnsavedError,
                    SessionEndedError,
                    FencedError,
                    OwnedElsewhereError,
                )
                if not isinstance(error, (*allowed, LookupError)):
                    raise

        self.tasks.append(asyncio.ensure_future(tolerate()))

    def sessions(self, manager: Any) -> list[Any]:
        return [session for session in manager.sessions() if session.user_id is not None and session.alive]

    # What the world does

    def trouble(self) -> None:
        store = self.chance.choice(self.stores)
        kind = self.chance.randrange(8)
        if kind == 0:
            store.down = not store.down
        elif kind == 1:
            store.script.append(self.chance.choice(["lose", "500ms", "20ms", OSError("gone"), ValueError("odd")]))
        elif kind == 2:
            store.script.append("hang")
        elif kind == 3:
            user_id = self.chance.randrange(USERS)
            outcome = self.chance.choice([Outcome.FAILED, Outcome.INVALID])
            if store.verdict_of.pop(user_id, None) is None:
                store.verdict_of[user_id] = Verdict(outcome, "for now")
        elif kind == 4:
            store.poison ^= {self.chance.randrange(USERS)}
        elif kind == 5:
            store.claim_script.append(self.chance.choice(["lose", "500ms", OSError("gone"), "3s"]))
        elif kind == 6:
            store.release_all.set()
            store.release_all = asyncio.Event()
        else:
            for other in self.stores:
                other.down = False

    async def step(self) -> None:
        manager = self.chance.choice(self.managers)
        user_id = self.chance.randrange(USERS)
        sessions = self.sessions(manager)
        session = self.chance.choice(sessions) if sessions else None
        kind = self.chance.randrange(20)
        if kind < 4:
            self.begin(self.open, manager, user_id)
        elif kind == 4:
            self.begin(self.login, manager, user_id)
        elif kind == 5:
            self.begin(self.edit, manager, user_id)
        elif kind == 6:
            self.begin(self.read, manager, user_id)
        elif kind == 7:
            self.trouble()
        elif kind == 8 and self.tasks:
            if self.chance.random() < 0.3:
                self.chance.choice(self.tasks).cancel()
        elif kind == 9:
            self.begin(manager.persist_all_user_data)
        elif session is not None and kind < 13:
            self.change(session)
        elif session is not None and kind < 16 and not inside(session._host).table.is_ending(session):
            self.begin(self.persist, session)
        elif session is not None and kind == 16:
            self.begin(self.destroy, session)
        elif session is not None and kind == 17:
            self.begin(self.drop, session)
        if self.chance.random() < 0.5:
            await self.clock.advance(self.chance.choice(["1ms", "20ms", "300ms", "2s", "11s"]))
        else:
            await turns(self.chance.randrange(6))
        for task in [task for task in self.tasks if task.done()]:
            self.tasks.remove(task)
            if not task.cancelled():
                task.result()

    async def play(self) -> None:
        for _ in range(STEPS):
            await self.step()
        await self.heal()
        for manager in self.managers:
            for session in self.sessions(manager):
                self.change(session)  # what was refused for good is tried again once it is other data
        await self.clock.advance("61s")
        for task in self.tasks:
            if not task.cancelled():
                task.result()
        for manager in self.managers:
            statistics = manager.statistics()
            assert statistics.in_flight == 0, "a save never came to its end"
        wanted = {}
        for manager in self.managers:
            for session in self.sessions(manager):
                if not inside(session._host).table.is_ending(session):
                    self.change(session)
                    wanted[session.user_id] = session.user_data["n"]
        for manager in self.managers:
            task = asyncio.ensure_future(manager.destroy())
            await self.clock.advance("60s")
            assert task.done(), "the drain has no end"
            report = task.result()
            assert not report.unsaved
        store = self.stores[0]
        for user_id in range(USERS):
            stored = store.stored(user_id)
            if stored is None:
                assert self.acknowledged[user_id] == 0
                continue
            assert stored["n"] >= self.acknowledged[user_id], f"user {user_id}: acknowledged data is gone"
            assert stored["twice"] == 2 * stored["n"]
            if user_id in wanted:
                assert stored["n"] == wanted[user_id], f"user {user_id}: the last save is not the last state"
            assert not store.shared or store.owner_of(user_id) == "", f"user {user_id} is not let go of"
        for manager in self.managers:
            statistics = manager.statistics()
            assert (statistics.live, statistics.in_flight, statistics.pending) == (0, 0, 0)
            assert statistics.created == statistics.ended
        assert self.clock.pending == 0

    async def heal(self) -> None:
        """The world is well again; whatever waits comes to its end."""
        for store in self.stores:
            store.down = False
            store.script = []
            store.claim_script = []
            store.verdict_of.clear()
            store.poison = set()
            store.release_all.set()
        for _ in range(8):
            await self.clock.advance("15s")
            for store in self.stores:
                store.release_all.set()
        assert all(task.done() for task in self.tasks), "somebody waits for ever"


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
def test_whatever_happens_nothing_acknowledged_is_lost():
    for seed in range(SEEDS):
        try:
            run(History(seed).play(), "asyncio" if seed % 2 else "uvloop")
        except BaseException:
            print(f"seed {seed}")
            raise
