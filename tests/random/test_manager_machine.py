"""A whole manager under random calls, failures and cancellations, checked after every step.

The numbers are those of the guarantees: I1 one write in flight and rising versions, I2 a change during a save is saved
later, I3 a call that returned means stored, I8 no save without a user, I9 one session a key and a user, I10 a bad
session delays no other, I11 nothing after the end, I29 created = live + ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cagey_sessions import (
    AlreadyIdentifiedError,
    DrainError,
    KeyTakenError,
    ListenerError,
    SessionEndedError,
    SessionManager,
    UnsavedError,
    UserActiveError,
)
from conftest import run
from support import Db, ManualClock, inside, turns

INTERVAL = 10
KEYS = ["a", "b", "c"]
USERS = [1, 2, "1", "2", 3]
HEALTHY = 3
"""A user to whom nothing bad is ever done: whatever happens to the others, it is saved on time."""

number = st.integers(0, 7)
STEPS = st.one_of(
    st.tuples(st.just("create"), st.sampled_from([None, *KEYS]), st.booleans()),
    st.tuples(st.just("set_user"), number, st.sampled_from(USERS)),
    st.tuples(st.just("change"), number),
    st.tuples(st.just("persist_now"), number),
    st.tuples(st.just("destroy"), number, st.booleans()),
    st.tuples(st.just("persist_all")),
    st.tuples(st.just("cancel"), number),
    st.tuples(st.just("turns"), st.integers(0, 5)),
    st.tuples(st.just("advance"), st.sampled_from([0.001, 0.05, 0.7, 3.0, 10.0])),
    st.tuples(st.just("jump"), st.sampled_from([1.0, 35.0])),
    st.tuples(st.just("script"), st.sampled_from(USERS[:-1]), st.sampled_from(["fail", "slow", "hang", "cancelled"])),
    st.tuples(st.just("recover")),
)


class Machine:
    def __init__(self, max_in_flight: int) -> None:
        self.clock = ManualClock(start=77_000_000_000)
        self.db = Db(self.clock, delay="20ms")
        self.manager = SessionManager(interval=INTERVAL, max_in_flight=max_in_flight, clock=self.clock)
        self.manager.on("persist_user_data", self.save)
        for name in ("before_destroy", "destroy"):
            self.manager.on(name, lambda session, name=name: self.seen(name, session))
        self.sessions: list[Any] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.events: dict[Any, list[str]] = {}
        self.dropped: set[Any] = set()
        self.counter = 0
        self.slots = max_in_flight
        self.healthy_since: int | None = None

    async def save(self, session: Any) -> None:
        assert session.alive, "I11: a save after the end"
        await self.db.save(session)

    def seen(self, name: str, session: Any) -> None:
        assert session.alive, "I11: an event after the end"
        self.events.setdefault(session, []).append(name)

    def pick(self, n: int) -> Any:
        return self.sessions[n % len(self.sessions)] if self.sessions else None

    def spawn(self, work: Any) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work))

    async def step(self, name: str, *args: Any) -> None:
        await getattr(self, "do_" + name)(*args)
        self.check()

    async def do_create(self, key: str | None, replace: bool) -> None:
        taken = key is not None and self.manager.find_by_key(key) is not None
        if replace and taken:
            self.spawn(self.replace(key))
            return
        try:
            session = await self.manager.create(key)
        except KeyTakenError:
            assert taken
            return
        assert not taken
        self.sessions.append(session)

    async def replace(self, key: str | None) -> None:
        with contextlib.suppress(ListenerError):
            self.sessions.append(await self.manager.create(key, replace=True))

    async def do_set_user(self, n: int, user_id: int | str) -> None:
        session = self.pick(n)
        if session is None:
            return
        holder = inside(self.manager).table.active_session(user_id)
        data = {"n": self.stored_n(user_id)}
        before = session.user_id
        try:
            await session.set_user(user_id, data)
        except SessionEndedError:
            assert not session.alive or inside(self.manager).table.is_ending(session)
        except AlreadyIdentifiedError:
            assert before is not None
        except UserActiveError as error:
            assert holder is error.session
        else:
            assert before is None
            assert holder is None
            if user_id == HEALTHY:
                self.healthy_since = self.clock.now()

    def stored_n(self, user_id: int | str) -> int:
        return self.db.stored.get(user_id, {"n": 0})["n"]

    async def do_change(self, n: int) -> None:
        session = self.pick(n)
        if session is not None and session.alive and session.user_id is not None:
            self.counter += 1
            session.user_data["n"] = self.counter

    async def do_persist_now(self, n: int) -> None:
        session = self.pick(n)
        if session is None:
            return

        async def call() -> None:
            wanted = session.user_data["n"] if session.alive and session.user_id is not None else None
            try:
                await session.persist_now()
            except (ListenerError, SessionEndedError):
                return
            if wanted is not None:
                assert self.stored_n(session.user_id) >= wanted, "I3: persist_now returned before it was stored"

        self.spawn(call())

    async def do_destroy(self, n: int, persist: bool) -> None:
        session = self.pick(n)
        if session is None:
            return
        data = session.user_data if session.alive and session.user_id is not None else None
        if session.user_id == HEALTHY and self.healthy_since is not None:
            self.healthy_since = None

        async def call() -> None:
            try:
                await session.destroy(persist)
            except ListenerError:
                return
            assert not session.alive
            if persist and data is not None and session.user_id is not None and session not in self.dropped:
                assert self.stored_n(session.user_id) >= data["n"], "I3: destroy returned before it was stored"

        if not persist and session.alive:
            self.dropped.add(session)
        self.spawn(call())

    async def do_persist_all(self) -> None:
        async def call() -> None:
            try:
                await self.manager.persist_all_user_data()
            except UnsavedError as error:
                assert HEALTHY not in error.user_ids

        self.spawn(call())

    async def do_cancel(self, n: int) -> None:
        if self.tasks:
            self.tasks[n % len(self.tasks)].cancel()

    async def do_turns(self, count: int) -> None:
        await turns(count)

    async def do_advance(self, seconds: float) -> None:
        await self.clock.advance(seconds)

    async def do_jump(self, seconds: float) -> None:
        await self.clock.jump(seconds)

    async def do_script(self, user_id: int | str, trouble: str) -> None:
        async def cancelled() -> None:
            raise asyncio.CancelledError

        hanging = sum(step == "hang" for step in self.db.always.values())
        if trouble == "hang" and (hanging == 2 or self.slots == 1):
            trouble = "fail"  # never all slots at once, or nobody could be saved
        self.db.always[user_id] = {"fail": OSError("no"), "slow": "700ms", "hang": "hang", "cancelled": cancelled}[
            trouble
        ]

    async def do_recover(self) -> None:
        self.db.always.clear()
        self.db.release.set()
        self.db.release = asyncio.Event()

    def check(self) -> None:
        statistics = self.manager.statistics()
        live = self.manager.sessions()
        assert statistics.created == statistics.live + statistics.ended, "I29"
        assert statistics.live == len(live) == len(self.manager)
        assert statistics.in_flight >= self.db.open or statistics.ending or statistics.ended
        assert statistics.identified == len({session.user_id for session in live if session.user_id is not None}), "I9"
        inside(self.manager).table._check()
        keys: dict[str, Any] = {}
        for session in self.sessions:
            if session.alive and not inside(self.manager).table.is_ending(session):
                if session.key is not None:
                    assert session.key not in keys, "I9: two live sessions of one key"
                    keys[session.key] = session
                if session.user_id is not None:
                    assert self.manager.find_by_user(session.user_id) is session
            if not session.alive:
                assert session not in live, "I11"
                assert self.events.get(session, ["before_destroy", "destroy"]) == ["before_destroy", "destroy"]
        for key in KEYS:
            found = self.manager.find_by_key(key)
            assert found is keys.get(key) or found not in self.sessions
        latest: dict[int | str, int] = {}
        for write in self.db.log:
            n = int(write.body.removeprefix('{"n": ').removesuffix("}"))
            assert n >= latest.get(write.user_id, 0), "I1: an older state was written after a newer one"
            latest[write.user_id] = n
        if self.healthy_since is not None and self.manager.find_by_user(HEALTHY) is not None:
            begun = [write.start for write in self.db.log if write.user_id == HEALTHY]
            since = self.clock.now() - max([self.healthy_since, *begun])
            assert since <= (INTERVAL + 36) * 1_000_000_000, "I10"

    async def finish(self, persist: bool, busy: int) -> None:
        await self.do_recover()
        await self.clock.advance(2 * INTERVAL + 1)
        assert all(task.done() for task in self.tasks), "a call never returns"
        for user_id in USERS:
            session = self.manager.find_by_user(user_id)
            if session is not None:
                assert self.stored_n(user_id) == session.user_data["n"], "I2: a change was never saved"
        for session in self.manager.sessions():
            if session.user_id is not None and not inside(self.manager).table.is_ending(session):
                self.counter += 1
                session.user_data["n"] = self.counter
        if busy:
            for n in range(len(self.sessions)):
                await self.do_persist_now(n)
            await turns(busy)
            for session in self.manager.sessions():
                if session.user_id is not None and not inside(self.manager).table.is_ending(session):
                    self.counter += 1
                    session.user_data["n"] = self.counter
        last = {s.user_id: s.user_data["n"] for s in self.manager.sessions() if s.user_id is not None}
        end = asyncio.get_running_loop().create_task(self.manager.destroy(persist))
        await self.clock.advance(26)
        try:
            report = await end
        except DrainError:
            raise AssertionError("everything is healthy") from None
        if persist:
            assert {user_id: self.stored_n(user_id) for user_id in last} == last
            assert report.unsaved == ()
        for task in self.tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self.tasks, return_exceptions=True):
            assert outcome is None or isinstance(outcome, asyncio.CancelledError), repr(outcome)
        assert len(self.manager) == 0
        assert self.clock.pending == 0
        writes = len(self.db.log)
        await self.clock.advance(100)
        assert len(self.db.log) == writes, "I11: a save after the end of everything"


def play(steps: list[Any], persist: bool, busy: int, max_in_flight: int, loop_kind: str) -> None:
    async def main() -> None:
        machine = Machine(max_in_flight)
        for step in steps:
            await machine.step(*step)
        await machine.finish(persist, busy)

    run(main(), loop_kind)


EXAMPLES = int(os.environ.get("CAGEY_TEST_EXAMPLES", "250"))
common = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True, database=None)


@settings(common, max_examples=EXAMPLES)
@given(st.lists(STEPS, max_size=60), st.booleans(), st.integers(0, 5), st.sampled_from([1, 3, 50]))
def test_a_manager_under_everything_at_once(steps, persist, busy, max_in_flight):
    play(steps, persist, busy, max_in_flight, "asyncio")


@settings(common, max_examples=EXAMPLES // 4)
@given(st.lists(STEPS, max_size=60), st.booleans(), st.integers(0, 5), st.sampled_from([1, 3, 50]))
def test_a_manager_under_everything_at_once_on_uvloop(steps, persist, busy, max_in_flight):
    play(steps, persist, busy, max_in_flight, "uvloop")
