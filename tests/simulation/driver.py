"""One run, step by step. What lives here: what the program and the world do in a run, and what is known of each user.
What must not: the checks (`laws.py`), the choice of what happens (`plan.py`).

Each user is a register: every change writes a number higher than any before, on whatever server. What was acknowledged
is what everybody sees from then on, or something newer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Coroutine
from typing import Any

from cagey_sessions import (
    AlreadyIdentifiedError,
    DrainDeadlineError,
    DrainError,
    FencedError,
    KeyTakenError,
    ListenerError,
    ManagerClosedError,
    OwnedElsewhereError,
    SessionEndedError,
    SessionManager,
    StoreError,
    UnsavableError,
    UnsavedError,
    UserNotFoundError,
    WrongLoopError,
)
from cagey_sessions.testing.store import Faults, SimulatedDatabase
from cagey_sessions.testing.universe import Universe
from cagey_sessions.testing.world import Server
from support import inside

from .laws import Laws
from .plan import Plan

__all__ = ["Run", "play"]

MILLISECOND = 1_000_000
SECOND = 1_000_000_000
LATEST = 25
"""After how many seconds nothing that was sent can still arrive."""
LONGEST_RETRY = 16
NEW = {"n": 0, "twice": 0}
EXPECTED = (
    AlreadyIdentifiedError,
    DrainDeadlineError,
    DrainError,
    FencedError,
    KeyTakenError,
    ManagerClosedError,
    OwnedElsewhereError,
    SessionEndedError,
    StoreError,
    UnsavableError,
    UnsavedError,
    UserNotFoundError,
)
"""What a call may raise in a world where anything may go wrong."""


class Run:
    """The servers, the database, and what has been promised of each user."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.settings = plan.settings
        self.universe = Universe(f"universe {plan.seed}", shuffle=self.settings["shuffle"], tick=self.settings["tick"])
        self.database = SimulatedDatabase(self.universe, fenced=self.settings["fenced"])
        self.users: list[int | str] = [n if n % 2 else str(n // 2) for n in range(self.settings["users"])]
        self.servers: list[Server | None] = [None] * self.settings["servers"]
        self.graves: list[Server] = []
        self.calls: list[tuple[Server, asyncio.Task[Any]]] = []
        self.numbers = dict.fromkeys(self.users, 0)
        self.promised = dict.fromkeys(self.users, 0)
        """The highest number that was acknowledged since the row was last erased or lost."""
        self.trace: list[str] = []
        self.laws = Laws(self)

    # Servers

    def make_manager(self, store: Any, clock: Any) -> SessionManager[Any]:
        settings = self.settings
        manager: SessionManager[Any] = SessionManager(
            store=store,
            clock=clock,
            interval=settings["interval"],
            save_timeout=settings["save_timeout"],
            max_in_flight=settings["max_in_flight"],
            tracking=settings["tracking"],
        )
        manager.on("destroy", self.laws.see_end)
        if settings["listeners"] == "change":
            manager.on("before_destroy", self.change)
        elif settings["listeners"] == "slow":

            async def think(session: Any) -> None:
                await asyncio.sleep(0.05)
                self.change(session)

            manager.on("before_destroy", think)
        elif settings["listeners"] == "raise":

            def fail(session: Any) -> None:
                raise ValueError("a listener fails")

            manager.on("before_destroy", fail)
            manager.on("error", fail)
        return manager

    def start_server(self, place: int) -> None:
        server = Server(self.database, self.make_manager)
        server.store.faults = dataclasses.replace(self.database.faults)
        self.servers[place] = server
        self.laws.watch(server)
        self.begin(server, server.manager.__aenter__)

    def owners(self) -> set[str]:
        """The names of the servers there are."""
        return {inside(server.manager).owner for server in self.servers if server is not None}

    def faults(self) -> list[Faults]:
        return [self.database.faults, *(server.store.faults for server in self.servers if server is not None)]

    # What the program does

    def change(self, session: Any) -> None:
        """Change a user's data in one step."""
        if session.user_id is None or not session.alive:
            return
        self.numbers[session.user_id] += 1
        session.user_data["n"] = self.numbers[session.user_id]
        session.user_data["twice"] = 2 * session.user_data["n"]
        if self.settings["tracking"] == "marked":
            session.mark_changed()

    def promise(self, server: Server, user_id: int | str, n: int, since: float) -> None:
        """The program was told that number `n`, or a later one, is saved."""
        if not self.laws.has_vanished(server, user_id, since):
            self.laws.see_promise(user_id, n)
            self.promised[user_id] = max(self.promised[user_id], n)

    def see(self, server: Server, user_id: int | str, data: Any, since: float, promised: int) -> None:
        """The program was handed a user's data, and `promised` was acknowledged when it asked for it."""
        assert data["twice"] == 2 * data["n"], "I15: a torn state was loaded"
        if not self.laws.has_vanished(server, user_id, since):
            assert data["n"] >= promised, "I3: a load does not see what was acknowledged"

    async def open(self, server: Server, user_id: int | str) -> None:
        since, promised = self.universe.seconds, self.promised[user_id]
        session = await server.manager.open(user_id, default=dict(NEW))
        if session.alive:
            self.see(server, user_id, session.user_data, since, promised)

    async def login(self, server: Server, user_id: int | str) -> None:
        since, promised = self.universe.seconds, self.promised[user_id]
        session = await server.manager.create()
        try:
            await session.login(user_id, default=dict(NEW))
            if session.alive:
                self.see(server, user_id, session.user_data, since, promised)
        finally:
            if session.user_id is None:
                await session.destroy()

    async def create(self, server: Server, key: str, replace: bool) -> None:
        await server.manager.create(key, replace=replace)

    async def persist(self, server: Server, session: Any) -> None:
        since, user_id, n = self.universe.seconds, session.user_id, session.user_data["n"]
        receipt = await session.persist_now()
        assert receipt.version > 0
        self.promise(server, user_id, n, since)

    async def persist_all(self, server: Server) -> None:
        since = self.universe.seconds
        there = [(session, session.user_id, session.user_data["n"]) for session in self.sessions(server)]
        await server.manager.persist_all_user_data()
        for session, user_id, n in there:
            if server.manager.find_by_user(user_id) is session:
                self.promise(server, user_id, n, since)

    async def destroy(self, server: Server, session: Any) -> None:
        since, user_id, n = self.universe.seconds, session.user_id, session.user_data["n"]
        was_ending = inside(session._host).table.is_ending(session)
        try:
            await session.destroy()
        except ListenerError:
            assert self.settings["listeners"] == "raise"
        assert not session.alive, "I11: destroy has returned"
        if not was_ending and session.end_reason == "destroyed":
            self.promise(server, user_id, n, since)

    async def drop(self, server: Server, session: Any) -> None:
        try:
            await session.destroy(persist=False)
        except ListenerError:
            assert self.settings["listeners"] == "raise"

    async def edit(self, server: Server, user_id: int | str) -> None:
        since, promised = self.universe.seconds, self.promised[user_id]
        async with server.manager.edit(user_id, default=dict(NEW)) as data:
            self.see(server, user_id, data, since, promised)
            self.numbers[user_id] += 1
            n = data["n"] = self.numbers[user_id]
            data["twice"] = 2 * n
        self.promise(server, user_id, n, since)

    async def read(self, server: Server, user_id: int | str) -> None:
        since, promised = self.universe.seconds, self.promised[user_id]
        self.see(server, user_id, await server.manager.read(user_id), since, promised)

    async def drain(self, server: Server, seconds: int) -> None:
        since = self.universe.seconds
        there = [(session, session.user_id, session.user_data["n"]) for session in self.sessions(server)]
        unsaved: set[int | str] = set()
        try:
            await server.manager.destroy(deadline=seconds)
        except DrainError as error:
            unsaved = set(error.user_ids)
        for session, user_id, n in there:
            if session.end_reason != "drained":
                continue  # it had been ended otherwise by then
            if user_id not in unsaved and server not in self.laws.has_dropped.get(user_id, ()):
                self.promise(server, user_id, n, since)

    def begin(self, server: Server, work: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> None:
        """Have something done on a server; what may go wrong in such a world is put up with."""

        async def call() -> None:
            began = self.universe.seconds
            try:
                await work(*arguments)
            except EXPECTED as error:
                if server.is_alive:
                    self.trace.append(f"{work.__name__}: {type(error).__name__}")
            except ListenerError:
                assert self.settings["listeners"] == "raise"
            finally:
                if server.is_alive and work in (self.persist, self.destroy):
                    self.laws.see_patience(work.__name__, self.universe.seconds - began)

        self.calls.append((server, server.loop.start(call())))

    def sessions(self, server: Server) -> list[Any]:
        """The users of a server who are not ending."""
        table = inside(server.manager).table
        return [
            session
            for session in server.manager.sessions()
            if session.user_id is not None and session.alive and not table.is_ending(session)
        ]

    # Steps

    def step(self, name: str, a: int, b: int) -> None:
        place = a % len(self.servers)
        server = self.servers[place]
        if name == "start":
            if server is None:
                self.start_server(place)
            return
        if server is None:
            return
        user_id = self.users[b % len(self.users)]
        there = self.sessions(server)
        session = there[b % len(there)] if there else None
        if name in ("open", "login", "edit", "read"):
            self.begin(server, getattr(self, name), server, user_id)
        elif name == "create":
            self.begin(server, self.create, server, f"key {b % 3}", bool(b % 2))
        elif name == "persist_all":
            self.begin(server, self.persist_all, server)
        elif name == "erase":
            self.begin(server, server.manager.erase, user_id)
        elif name == "drain":
            self.begin(server, self.drain, server, [0, 1, 25][b % 3])
        elif name == "crash":
            self.kill(place)
        elif name == "bury":
            self.database.backing.dead ^= {server.store.owner}
        elif name == "cancel":
            mine = [task for owner, task in self.calls if owner is server and not task.done()]
            if mine:
                mine[b % len(mine)].cancel()
        elif name == "foreign":
            self.call_from_another_loop(server, user_id)
        elif name == "dead_handle":
            self.laws.use_dead_handles(server)
        elif name in ("rates", "outage", "invalid", "lose", "slow", "calm"):
            getattr(self, name)(server, user_id, b)
        elif session is not None:
            if name == "change":
                self.change(session)
            elif name == "drop":
                self.laws.has_dropped.setdefault(session.user_id, []).append(server)
                self.begin(server, self.drop, server, session)
            else:
                self.begin(server, getattr(self, name), server, session)

    def kill(self, place: int) -> None:
        server = self.servers[place]
        assert server is not None
        self.servers[place] = None
        server.kill()
        self.graves.append(server)
        self.calls = [(owner, task) for owner, task in self.calls if owner is not server]

    def call_from_another_loop(self, server: Server, user_id: int | str) -> None:
        if inside(server.manager).loop.running is None:
            return  # nobody has used it yet
        other = Server(self.database, self.make_manager)
        before = self.laws.counts(server)

        async def use() -> None:
            for call in (server.manager.open(user_id), server.manager.create(), server.manager.destroy()):
                try:
                    await call
                except WrongLoopError:
                    continue
                raise AssertionError("I28: a call from another loop was let in")

        task = other.loop.start(use())
        while not task.done():
            other.loop.turn()
        task.result()
        assert self.laws.counts(server) == before, "I28"
        self.universe.remove_loop(other.loop)
        other.bury()

    # What the world does

    def rates(self, server: Server, user_id: int | str, b: int) -> None:
        faults = server.store.faults
        name = ["failing", "losing_replies", "hanging", "late", "partial", "refusing"][b % 6]
        setattr(faults, name, [0.1, 0.5][b % 2] if name != "hanging" else 0.1)

    def outage(self, server: Server, user_id: int | str, b: int) -> None:
        down = ["refusing", "silent"][b % 2]
        one = [server.store.faults] if b % 3 else self.faults()
        for faults in one:
            faults.down = down

        def back() -> None:
            for faults in one:
                faults.down = ""

        self.universe.call_later([200, 3_000, 40_000, 300_000][b % 4] * MILLISECOND, back)

    def invalid(self, server: Server, user_id: int | str, b: int) -> None:
        for faults in self.faults():
            faults.invalid ^= {user_id}

    def lose(self, server: Server, user_id: int | str, b: int) -> None:
        self.database.lose([user_id])

    def slow(self, server: Server, user_id: int | str, b: int) -> None:
        longest = [5, 50, 1_500, 4_000][b % 4] * MILLISECOND
        server.store.faults.latency = (MILLISECOND, longest)

    def calm(self, server: Server, user_id: int | str, b: int) -> None:
        for faults in self.faults() if b % 2 else [server.store.faults]:
            for field in dataclasses.fields(Faults):
                setattr(faults, field.name, getattr(Faults(), field.name))

    # A run

    def pause(self, kind: str, much: int) -> None:
        if kind == "turns":
            for _ in range(much):
                self.universe.step(self.universe.now + MILLISECOND)
                self.laws.check()
        else:
            until = self.universe.now + much * MILLISECOND
            while self.universe.step(until):
                if self.universe.steps % 16 == 0:
                    self.laws.check()
            self.universe.now = max(self.universe.now, until)

    def collect(self) -> None:
        """What calls have come to."""
        for server, task in self.calls:
            if task.done() and not task.cancelled():
                task.result()
            assert not server.unobserved, f"unobserved: {server.unobserved}"
        self.calls = [(server, task) for server, task in self.calls if not task.done()]
        for place, server in enumerate(self.servers):
            if server is not None and inside(server.manager).closed:
                self.laws.check_closed(server)
                self.kill(place)

    def play(self) -> None:
        for place in range(len(self.servers)):
            self.start_server(place)
        for number, (name, a, b, kind, much) in enumerate(self.plan.steps):
            self.trace.append(f"{number} {self.universe.now} {name} {a} {b}")
            self.step(name, a, b)
            self.pause(kind, much)
            self.laws.check()
            self.collect()
        self.finish()

    def finish(self) -> None:
        """The world is well again; whatever waits comes to its end, and everybody is saved and let go of."""
        for faults in self.faults():
            for field in dataclasses.fields(Faults):
                setattr(faults, field.name, getattr(Faults(), field.name))
        self.database.backing.dead -= {server.store.owner for server in self.servers if server is not None}
        self.pause("wait", (LATEST + 2 * self.settings["save_timeout"]) * 1000)
        self.collect()
        assert not self.calls, f"I7: a call never returns: {[task for _, task in self.calls]}"
        for server in self.servers:
            for session in self.sessions(server) if server is not None else ():
                self.change(session)  # what was refused for good is tried again once it is other data
        self.pause("wait", (self.settings["interval"] + LONGEST_RETRY) * 1000)
        self.laws.check_saved()
        wanted: dict[int | str, int] = {}
        owners = {server.store.owner for server in self.servers if server is not None and server.store.owner}
        for server in self.servers:
            if server is None:
                continue
            for session in self.sessions(server):
                self.change(session)
                wanted[session.user_id] = max(wanted.get(session.user_id, 0), session.user_data["n"])
            self.begin(server, server.manager.destroy)
        self.pause("wait", 40_000)
        self.collect()
        assert not self.calls, "I22: the drain has no end"
        self.laws.judge(wanted, owners)

    def close(self) -> None:
        for place, server in enumerate(self.servers):
            if server is not None:
                self.kill(place)
        for server in self.graves:
            server.bury()


def play(plan: Plan) -> Run:
    """Play a plan to its end. Raises whatever law was broken."""
    random.seed(plan.seed)
    run = Run(plan)
    try:
        run.play()
    finally:
        run.close()
    return run
