"""What the tests share: a clock that is turned by hand, and databases and stores that do what they are told."""

from __future__ import annotations

import asyncio
import errno
import functools
import heapq
import itertools
import json
import os
import re
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis

import cagey_sessions
from cagey_sessions import SessionManager, StoreContractError, StoreUnavailableError
from cagey_sessions.files.format import Files
from cagey_sessions.options import parse_duration
from cagey_sessions.stores import Claim, MemoryStore, Record, Store, Verdict
from cagey_sessions.stores.memory import MemoryBacking, Row

SECOND = 1_000_000_000


class _Timer:
    def __init__(self, when: int, callback: Callable[[], None], context: Context) -> None:
        self.when = when
        self.callback = callback
        self.context = context
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


UNHURRIED = "import logging; logging.getLogger('asyncio').setLevel(logging.ERROR)\n"
"""For scripts under `-X dev`, where asyncio warns of a callback that takes long: that says how busy the machine is."""


def python(script: str, prelude: str = "", *, status: int = 0, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter and expect its exit status."""
    code = UNHURRIED + prelude + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error::RuntimeWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(cagey_sessions.__file__).parents[1])},
    )
    assert done.returncode == status, done.stderr
    return done


POSTGRES = os.environ.get("CAGEY_TEST_POSTGRES", "postgresql://root@127.0.0.1:5432/test")
REDIS = os.environ.get("CAGEY_TEST_REDIS", "redis://127.0.0.1:6379/0")


@functools.cache
def server_answers(url: str) -> bool:
    """Whether a server of an engine is there; where CI is set it has to be."""

    async def look() -> None:
        await (await asyncpg.connect(url, timeout=5)).close()

    try:
        if url.startswith("redis"):
            with redis.Redis.from_url(url, socket_connect_timeout=5) as client:
                client.ping()
        else:
            with ThreadPoolExecutor(1) as thread:  # a loop may run here
                thread.submit(asyncio.run, look()).result()
    except (OSError, asyncpg.PostgresError, redis.RedisError) as error:
        if os.environ.get("CI"):
            raise RuntimeError(f"CI needs the server at {url}") from error
        return False
    return True


async def execute(*statements: str) -> None:
    """On the PostgreSQL of the tests, by a connection of its own."""
    connection = await asyncpg.connect(POSTGRES)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def execute_each(statements: list[str]) -> None:
    """As a migration does, one statement at a time: the protocol for that takes no two in one text."""
    assert isinstance(statements, list)
    connection = await asyncpg.connect(POSTGRES)
    try:
        for statement in statements:
            await connection.fetch(statement)
    finally:
        await connection.close()


@asynccontextmanager
async def new_role(schema: str) -> AsyncIterator[tuple[str, str]]:
    """A user of the server who may do nothing yet, for one schema of a test: the name, and a DSN for it."""
    role = f"role_{schema[-12:]}"
    try:
        await execute(f"CREATE ROLE {role} LOGIN PASSWORD '{role}'")
    except asyncpg.InsufficientPrivilegeError:
        # only a second user can have fewer rights, and whose server this is may not let us make one
        pytest.skip("this user may not make roles")
    try:
        yield role, re.sub("//[^@]*@", f"//{role}:{role}@", POSTGRES)
    finally:
        await execute(f"GRANT {role} TO CURRENT_USER", f"DROP OWNED BY {role}", f"DROP ROLE {role}")


async def until_a_lock_is_waited_for(connection: Any) -> None:
    """Wait until somebody waits for a lock that this connection holds."""
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
    async with asyncio.timeout(10):
        while not await connection.fetchval(waiting):  # noqa: ASYNC110 - the server sets no event
            await asyncio.sleep(0.01)


async def drop_schema(name: str) -> None:
    """Remove a schema of a test. One that has failed may have left a transaction open, which would hold that up."""
    connection = await asyncpg.connect(POSTGRES)
    try:
        await connection.execute(
            """SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_class ON pg_class.oid = relation
                WHERE relnamespace = to_regnamespace($1) AND pid <> pg_backend_pid()""",
            name,
        )
        await connection.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE")
    finally:
        await connection.close()


def needs_server(url: str) -> pytest.MarkDecorator:
    """For tests that are skipped where a server is not there; CAGEY_TEST_POSTGRES and CAGEY_TEST_REDIS say where."""
    return pytest.mark.skipif(not server_answers(url), reason=f"no server at {url}")


def skip_without(url: str) -> None:
    """The same from within a test or a fixture."""
    if not server_answers(url):  # a newcomer may have none; with CI set that is an error, raised there
        pytest.skip(f"no server at {url}")


async def turns(count: int = 25) -> None:
    """Let the loop turn until what can go on without time has gone on."""
    for _ in range(count):
        await asyncio.sleep(0)


async def finishes(*calls: Any, within: int = 400) -> list[asyncio.Future[Any]]:
    """The tasks of these calls, done after a number of turns in which no time passes."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    await turns(within)
    assert [task.done() for task in tasks] == [True] * len(tasks)
    return tasks


def descriptors() -> dict[int, tuple[int, int, int]]:
    """What is open in this process: the file that each descriptor is of, and its kind."""
    found = {}
    for number in range(1024):
        with suppress(OSError):
            status = os.fstat(number)
            found[number] = status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode)
    return found


def threads_of_ours() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("cagey-sessions")}


def end_of_threads(others: AbstractSet[threading.Thread] = frozenset()) -> None:
    """Wait for the threads of ours, which a test has left to end by themselves."""
    for thread in threads_of_ours() - others:
        thread.join(20)
        assert not thread.is_alive(), f"left behind: {thread}"


class ManualClock:
    """Time that stands still until `advance` moves it from timer to timer, or `jump` moves it past them all."""

    def __init__(self, start: int = 0) -> None:
        self._now = start
        self._order = itertools.count()
        self._timers: list[tuple[int, int, _Timer]] = []
        self.fired = 0

    def now(self) -> int:
        return self._now

    def call_later(self, delay: int, callback: Callable[[], None], context: Context) -> _Timer:
        timer = _Timer(self._now + delay, callback, context)
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    @property
    def pending(self) -> int:
        return sum(not timer.cancelled for _, _, timer in self._timers)

    async def advance(self, duration: Any) -> None:
        """Let time pass, each timer at its moment, with room for the loop after each."""
        until = self._now + parse_duration(duration, "duration", shortest=0)
        await turns()
        while self._timers and self._timers[0][0] <= until:
            when, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, when)
            if not timer.cancelled:
                self.fired += 1
                timer.context.run(timer.callback)
                await turns()
        self._now = until
        await turns()

    async def jump(self, duration: Any) -> None:
        """A stall: time passes, and only then do the timers run, all of them late."""
        self._now += parse_duration(duration, "duration", shortest=0)
        await self.advance(0)

    async def sleep(self, duration: Any) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not future.done():
                future.set_result(None)

        self.call_later(parse_duration(duration, "duration", shortest=0), wake, Context())
        await future


@dataclass
class Write:
    user_id: int | str
    body: str
    start: int
    end: int | None = None
    error: BaseException | None = None


class Db:
    """A database behind a `persist_user_data` listener: it fixes the bytes first, then takes its time, then stores.

    `script` holds what the next writes do, in order, for all users or by user: a delay (``"50ms"``), an exception to
    raise, ``"hang"`` (until `release` is set), or a callable awaited in place of the delay. Without one a write takes
    `delay`. Two writes of one user at a time fail the test.
    """

    def __init__(self, clock: ManualClock, delay: Any = 0) -> None:
        self.clock = clock
        self.delay = delay
        self.script: list[Any] = []
        self.script_of: dict[int | str, list[Any]] = {}
        self.always: dict[int | str, Any] = {}
        self.stored: dict[int | str, Any] = {}
        self.log: list[Write] = []
        self.release = asyncio.Event()
        self.open = 0
        self.most_open = 0
        self._open_users: set[int | str] = set()

    async def save(self, session: Any) -> None:
        user_id, body = session.user_id, json.dumps(session.user_data)
        assert user_id is not None, "a save without a user"
        assert user_id not in self._open_users, f"two writes of user {user_id!r} in flight"
        write = Write(user_id, body, self.clock.now())
        self.log.append(write)
        self._open_users.add(user_id)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            if self.always.get(user_id) is not None:
                step = self.always[user_id]
            elif self.script_of.get(user_id):
                step = self.script_of[user_id].pop(0)
            else:
                step = self.script.pop(0) if self.script else self.delay
            if isinstance(step, BaseException):
                raise step
            if step == "hang":
                await self.release.wait()
            elif callable(step):
                await step()
            elif step:
                await self.clock.sleep(step)
            self.stored[user_id] = json.loads(body)
        except BaseException as error:
            write.error = error
            raise
        finally:
            write.end = self.clock.now()
            self.open -= 1
            self._open_users.discard(user_id)

    def writes(self, user_id: int | str) -> list[Any]:
        """The bodies of a user's writes, in the order they began."""
        return [json.loads(write.body) for write in self.log if write.user_id == user_id]


async def let_time_pass(clock: ManualClock, work: Any, limit: Any = "60s") -> Any:
    """Await something that needs time to go on, moving the clock from timer to timer until it is done."""
    task = asyncio.ensure_future(work)
    until = clock.now() + parse_duration(limit, "limit")
    await turns()
    while not task.done() and clock.now() < until:
        await clock.advance(min(0.05, (until - clock.now()) / SECOND))
    if not task.done():
        await asyncio.wait([task], timeout=20)  # for the disk, which knows another time
    assert task.done(), f"not done after {limit}"
    return await task


@dataclass
class Batch:
    """One call of `save_many`."""

    records: list[Record]
    start: int
    end: int | None = None
    error: BaseException | None = None


class ScriptedStore(MemoryStore):
    """A store that does what it is told, and checks what no saver may do.

    `script` holds what the next calls of `save_many` do, in order: a delay (``"50ms"``), an exception to raise before
    anything is written, ``"hang"`` (until `release_all` is set, then nothing is written), ``"lose"`` (write, then raise
    `StoreUnavailableError`), or a callable that is awaited with the records in place of the delay. Without one a call
    takes `delay`. `verdict_of` replaces the verdicts of users, `poison` makes every call raise that has one of them.

    The calls of `save_many` that `lose` names hang until `let_go` is set, and write nothing. Unlike after ``"hang"``,
    the store takes the same users again meanwhile, as one with a fence does.
    """

    def __init__(self, clock: ManualClock, delay: Any = 0, backing: MemoryBacking | None = None) -> None:
        super().__init__(backing)
        self.clock = clock
        self.delay = delay
        self.script: Any = []
        self.claim_script: list[Any] = []
        self.verdict_of: dict[int | str, Verdict] = {}
        self.poison: set[int | str] = set()
        self.down = False
        self.check = True
        self.batches: list[Batch] = []
        self.claims: list[list[int | str]] = []
        self.releases: list[int | str] = []
        self.release_calls: list[list[tuple[int | str, int]]] = []
        self.open_calls = 0
        self.most_open = 0
        self.release_all = asyncio.Event()
        self.lost: set[int] = set()
        self.count = 0
        self.let_go = asyncio.Event()
        self.aborted: list[Any] = []
        self._sent: dict[int | str, Record] = {}
        self._open_users: set[int | str] = set()

    def abort(self, call: Any) -> None:
        self.aborted.append(call)

    def lose(self, *numbers: int) -> None:
        """Lose the calls of `save_many` of these numbers, counted from 1 and from now."""
        self.count = 0
        self.lost = set(numbers)

    async def _take_a_step(self, step: Any, records: list[Record]) -> None:
        if isinstance(step, BaseException):
            raise step
        if step == "hang":
            await self.release_all.wait()
            raise StoreUnavailableError("let go")
        if callable(step):
            await step(records)
        elif step and step != "lose":
            await self.clock.sleep(step)

    async def claim_many(self, user_ids: Any, owner: str) -> list[Claim]:
        self.claims.append(list(user_ids))
        if self.down:
            raise StoreUnavailableError("down")
        if self.claim_script:
            await self._take_a_step(self.claim_script.pop(0), [])
        return await super().claim_many(user_ids, owner)

    async def release_many(self, claims: Any, owner: str) -> list[bool]:
        self.release_calls.append(list(claims))
        self.releases += [user_id for user_id, _ in claims]
        return await super().release_many(claims, owner)

    async def save_many(self, records: Any) -> list[Verdict]:
        self.count += 1
        if self.count in self.lost:
            await self.let_go.wait()
            raise StoreUnavailableError("let go")
        records = list(records)
        batch = Batch(records, self.clock.now())
        if self.check:
            self.batches.append(batch)
        users = {record.user_id for record in records}
        assert len(users) == len(records), "a user is twice in a batch"
        assert not users & self._open_users, "two saves of a user in flight"
        for record in records if self.check else ():
            last = self._sent.get(record.user_id)
            if last is not None and last.epoch == record.epoch:
                assert record.version >= last.version, "versions reach the store in rising order"
                assert record.version > last.version or record.body == last.body, "a version stands for other bytes"
            self._sent[record.user_id] = record
        self._open_users |= users
        self.open_calls += 1
        self.most_open = max(self.most_open, self.open_calls)
        try:
            if self.down:
                raise StoreUnavailableError("down")
            step = self.script.pop(0) if self.script else self.delay
            await self._take_a_step(step, records)
            if users & self.poison:
                raise ValueError("a row that the engine chokes on")
            verdicts = await super().save_many([record for record in records if record.user_id not in self.verdict_of])
            if step == "lose":
                raise StoreUnavailableError("the reply is lost")
            written = iter(verdicts)
            return [self.verdict_of.get(record.user_id) or next(written) for record in records]
        except BaseException as error:
            batch.error = error
            raise
        finally:
            batch.end = self.clock.now()
            self.open_calls -= 1
            self._open_users -= users

    def put(self, user_id: int | str, body: bytes, *, version: int = 1, schema: int = 0) -> None:
        """Have a user in the store, saved and released by somebody else."""
        row = self.backing.rows.setdefault(user_id, Row())
        row.epoch += 1
        row.record = Record(user_id, row.epoch, "somebody", version, schema, body, 0.0)

    def owner_of(self, user_id: int | str) -> str:
        """Who has a user; empty if nobody."""
        row = self.backing.rows.get(user_id)
        return "" if row is None else row.owner

    def stored(self, user_id: int | str) -> Any:
        """What the store has of a user, as plain values; None if nothing."""
        row = self.backing.rows.get(user_id)
        return None if row is None or row.record is None else row.record.value()

    def versions(self, user_id: int | str) -> list[int]:
        """The versions of a user's saves, in the order they were sent."""
        return [record.version for batch in self.batches for record in batch.records if record.user_id == user_id]


async def end(clock: ManualClock, *managers: Any) -> None:
    for manager in managers:
        assert not (await let_time_pass(clock, manager.destroy())).unsaved
        statistics = manager.statistics()
        assert (statistics.live, statistics.in_flight, statistics.pending) == (0, 0, 0)
    assert clock.pending == 0, "no timer is left"


async def refuse_a_second_manager(store: Store) -> None:
    """While a manager has a store no other gets it, nor closes it; afterwards the next one may."""
    async with SessionManager(store=store) as manager:
        ann = await manager.open("ann", default={"n": 0})
        second = SessionManager(store=store)
        for call in (second.open("bob", default={}), second.read("ann"), second.__aenter__()):
            with pytest.raises(StoreContractError, match="open already; make one for each manager"):
                await call
        await second.destroy()
        ann.user_data["n"] += 1
        assert (await ann.persist_now()).changed, "the end of the second has closed nothing"
    async with SessionManager(store=store) as following:
        assert (await following.open("ann")).user_data == {"n": 1}


async def add_user(manager: Any, user_id: int | str, data: Any = None, key: str | None = None) -> Any:
    session = await manager.create(key)
    await session.set_user(user_id, {"gold": 1} if data is None else data)
    return session


async def add_users(manager: SessionManager, count: int, data: Any = None) -> list[Any]:
    """Users 0 to `count`, logged in 500 at a time."""
    sessions = []
    for start in range(0, count, 500):
        created = [await manager.create() for _ in range(min(500, count - start))]
        await asyncio.gather(
            *(session.login(start + place, default=data or {"n": 0}) for place, session in enumerate(created))
        )
        sessions += created
    return sessions


async def changed(manager: Any, user_id: int | str = 1) -> Any:
    """A session with a change that is not saved."""
    session = await manager.open(user_id, default={"n": 0})
    await session.persist_now()
    session.user_data["n"] = 1
    return session


async def edit(manager: Any, user_id: int = 1) -> None:
    async with manager.edit(user_id, default={"n": 0}) as data:
        data["n"] = 1


def inside(manager: Any) -> Any:
    """What a manager is made of. It may change at any time; so this is the only place of the tests that says where."""
    return manager._server


class Crash(BaseException):
    """The machine has gone down at this point."""


class FaultyDisk(Files):
    """A disk on which one step goes wrong.

    Steps are counted from 0; the names of those begun are in `steps`. `fail` maps a step, or the name of a step, to the
    number of an error. `crash` is a step and ``"before"``, ``"during"`` or ``"after"`` it; from then on nothing is done
    any more, and what was written to a file and never synced is half lost.
    """

    def __init__(self, *, fail: dict[int | str, int] | None = None, crash: tuple[int, str] | None = None) -> None:
        self.fail = fail or {}
        self.crash = crash
        self.crashed = False
        self.steps: list[str] = []
        self._unsynced: dict[int, str] = {}
        self._open: set[int] = set()

    def _step(self, name: str, work: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        if self.crashed:
            raise Crash
        number = len(self.steps)
        self.steps.append(name)
        code = self.fail.get(number) or self.fail.get(name)
        if code:
            if code == errno.ENOSPC:
                half()
            raise OSError(code, os.strerror(code))
        moment = self.crash[1] if self.crash is not None and self.crash[0] == number else ""
        if moment == "during":
            half()
        result = work() if moment in ("", "after") else None
        if moment:
            self.crashed = True
            for path in self._unsynced.values():
                os.truncate(path, os.path.getsize(path) // 2)
            for file in self._open:
                Files.close(self, file)
            raise Crash
        return result

    def create(self, path: str) -> int:
        def create() -> int:
            file = Files.create(self, path)
            self._unsynced[file] = path
            self._open.add(file)
            return file

        file: int = self._step("create", create)
        return file

    def write(self, file: int, data: bytes) -> None:
        self._step(
            "write", lambda: Files.write(self, file, data), lambda: Files.write(self, file, data[: len(data) // 2])
        )

    def sync(self, file: int) -> None:
        self._step("sync", lambda: (Files.sync(self, file), self._unsynced.pop(file)))

    def close(self, file: int) -> None:
        def close() -> None:
            self._unsynced.pop(file, None)
            self._open.discard(file)
            Files.close(self, file)

        try:
            self._step("close", close)
        except OSError:
            close()  # as systems do: it is gone all the same
            raise

    def replace(self, source: str, target: str) -> None:
        self._step("replace", lambda: Files.replace(self, source, target))

    def sync_folder(self, path: str) -> None:
        self._step("sync folder", lambda: Files.sync_folder(self, path))

    def remove(self, path: str) -> None:
        self._step("remove", lambda: Files.remove(self, path))

    def read(self, path: str) -> bytes:
        data: bytes = self._step("read", lambda: Files.read(self, path))
        return data


class HeldDisk(Files):
    """A disk that does not go on at some steps, each the first time, until it is let."""

    def __init__(self, *steps: str) -> None:
        self._reached = {step: threading.Event() for step in steps}
        self._go = {step: threading.Event() for step in steps}

    async def is_reached(self, step: str) -> None:
        """Wait until a step has begun."""
        assert await asyncio.to_thread(self._reached[step].wait, 20)

    def let_go(self, step: str) -> None:
        self._go[step].set()

    def _hold(self, step: str) -> None:
        if step in self._reached and not self._reached[step].is_set():
            self._reached[step].set()
            assert self._go[step].wait(60)

    def create(self, path: str) -> int:
        file = super().create(path)
        self._hold("create")
        return file

    def write(self, file: int, data: bytes) -> None:
        super().write(file, data[:1])
        self._hold("write")
        super().write(file, data[1:])

    def sync(self, file: int) -> None:
        self._hold("sync")
        super().sync(file)

    def close(self, file: int) -> None:
        self._hold("close")
        super().close(file)

    def replace(self, source: str, target: str) -> None:
        self._hold("replace")
        super().replace(source, target)

    def sync_folder(self, path: str) -> None:
        self._hold("sync folder")
        super().sync_folder(path)

    def remove(self, path: str) -> None:
        self._hold("remove")
        super().remove(path)

    def read(self, path: str) -> bytes:
        data = super().read(path)
        self._hold("read")
        return data


needs_links = pytest.mark.skipif(sys.platform == "win32", reason="whoever may make links there may do everything")


def made_by_another_user(link: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a symbolic link look as if somebody else had made it; only root can give one away."""
    if os.geteuid() == 0:
        os.lchown(link, 4711, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
